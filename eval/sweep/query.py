"""Questions in SQL to the rows of a sweep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvzip.errors import KVZipError, UsageError, extra_told
from kvzip.eval.sweep.rows import RowFolder, schema


def query(path: str | os.PathLike[str], sql: str) -> list[dict[str, Any]]:
    """What DuckDB answers to `sql`, where the table `sweep` holds the rows of a sweep's folder or
    of a Parquet file; a list of rows.

    Raises UsageError for a query that DuckDB does not take, KVZipError when there are no rows.
    """
    with extra_told("queries need more", "eval"):
        import duckdb
        import pyarrow as pa
        import pyarrow.parquet as parquet
    given = Path(path)
    if given.is_dir():
        if not (given / "rows").is_dir():
            raise KVZipError(f"{path} is not the folder of a sweep")
        folder = RowFolder(given)
        sweep = pa.Table.from_pylist(folder.read(), schema(folder.form))
    elif given.is_file():
        try:
            sweep = parquet.read_table(given.absolute())
        except pa.ArrowInvalid as error:
            raise KVZipError(f"{path} is not a Parquet file: {error}") from None
    else:
        raise KVZipError(f"there is no sweep at {path}")
    if not len(sweep):
        raise KVZipError(f"{path} has no rows yet")
    with duckdb.connect() as connection:
        connection.register("sweep", sweep)
        try:
            found = connection.execute(sql)
            if found is None:
                raise UsageError("the query is empty")
            names = [column[0] for column in found.description or []]
            return [dict(zip(names, map(_plain, row), strict=True)) for row in found.fetchall()]
        except duckdb.Error as error:
            raise UsageError(f"SQL: {error}; the table sweep has: {sweep.column_names}") from None


def _plain(value: Any) -> Any:
    """A value of SQL as JSON can have it."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value)
    return value if isinstance(value, (bool, int, float, list, dict, type(None))) else str(value)
