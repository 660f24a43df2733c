"""The rows of a sweep on disk, as Parquet files.

Each file is written whole under its own name, so that a sweep that was killed goes on where it
stopped, and no row is lost or there twice.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.results.provenance import machine, versions
from kvzip.eval.results.sweep import FORMS, Row, SweepRow
from kvzip.files import replacing, sweep

_log = logging.getLogger("kvzip.eval")

MERGE_ABOVE = 256
"""Files of one row that a sweep leaves; more are put together when it ends."""


def head_of(point: Any) -> dict[str, Any]:
    """What the row of every kind of point begins with: the point, and where it is measured."""
    here = machine()
    return {
        **msgspec.to_builtins(point),
        "id": point.id,
        "cpu": here.cpu,
        "cores": here.cores,
        "memory_gib": here.memory_gib,
        "process": f"{os.uname().nodename}:{os.getpid()}",
        "versions": json.dumps(versions()),
    }


class RowFolder:
    """The folder of a sweep: rows as Parquet files under rows/, caches under snapshots/.

    `form`: the kind of its rows; default: that of those which are there.
    """

    def __init__(self, folder: str | os.PathLike[str], form: type[SweepRow] | None = None):
        self.folder = Path(folder)
        self.rows = self.folder / "rows"
        self.rows.mkdir(parents=True, exist_ok=True)
        self.form = form or _form_of(self.rows)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder. Raises KVZipError when another process does."""
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise KVZipError(f"{self.folder}: another sweep is writing there") from None
            sweep(self.rows)
            yield

    def add(self, row: SweepRow) -> None:
        """Write one row, whole or not at all, under its id."""
        self._write([msgspec.to_builtins(row)], self.rows / f"{row.id}.parquet")

    def read(self) -> list[dict[str, Any]]:
        """All rows, each id once, by date. A file that is damaged is named in a warning and passed
        over."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.rows.glob("*.parquet")):
            try:
                rows = _rows_of(path, self.form)
            except DamagedError as error:
                _log.warning("%s is damaged and passed over: %s", path, error)
                continue
            found |= {row["id"]: row for row in rows}
        return sorted(found.values(), key=lambda row: (row["date"], row["id"]))

    def set_aside(self) -> list[str]:
        """Rename the files that are damaged, so that their points are measured anew; their new
        paths."""
        moved = []
        for path in sorted(self.rows.glob("*.parquet")):
            try:
                _rows_of(path, self.form)
            except DamagedError:
                moved.append(str(path.rename(path.with_suffix(".damaged"))))
        return moved

    def drop(self, ids: Iterable[str]) -> None:
        """Forget rows, so that their points are measured again."""
        away = set(ids)
        kept = [row for row in self.read() if row["id"] not in away]
        self._replace(kept)

    def merge(self) -> None:
        """Put many small files together. A kill in the midst leaves rows in two files, which
        :meth:`read` counts once and the next merge removes."""
        if sum(1 for _ in self.rows.glob("*.parquet")) > MERGE_ABOVE:
            self._replace(self.read())

    def _replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        old = list(self.rows.glob("*.parquet"))
        merged = self.rows / "merged.parquet"
        if rows:
            self._write(rows, merged)
        for path in old:
            if path != merged or not rows:
                path.unlink()

    def _write(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        packed = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(list(rows), schema(self.form)), packed)
        with replacing(path, private=False) as file:
            file.write(packed.getvalue())


class DamagedError(Exception):
    """A file holds no rows that make sense."""


def _form_of(rows: Path) -> type[SweepRow]:
    """The kind of the rows that are there; a codec's where there are none that say so."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    for path in sorted(rows.glob("*.parquet")):
        try:
            about = parquet.read_schema(path.absolute()).metadata or {}
        except (pa.ArrowException, OSError):
            continue
        if form := FORMS.get(about.get(b"kind", b"").decode(errors="replace")):
            return form
    return Row


def _rows_of(path: Path, form: type[SweepRow]) -> list[dict[str, Any]]:
    """The rows of a file. Raises DamagedError, and KVZipError when they are of another kind or a
    later kvzip wrote them."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        about = parquet.read_schema(path.absolute()).metadata or {}
        if (kind := about.get(b"kind", b"sweep").decode(errors="replace")) != form.kind:
            raise KVZipError(
                f"{path} holds rows of kind {kind!r}, and not of a {form.kind}: use another folder"
            )
        if (version := about.get(b"version", b"1").decode()) != str(form.version):
            raise KVZipError(
                f"{path} holds rows of version {version}, and this kvzip knows version "
                f"{form.version}: go on with the kvzip that wrote them, or in another folder"
            )
        rows: list[dict[str, Any]] = parquet.read_table(
            path.absolute(), schema=schema(form)
        ).to_pylist()
        for row in rows:
            msgspec.convert(row, form)
    except FileNotFoundError:
        return []  # put together with others meanwhile
    except (pa.ArrowException, msgspec.ValidationError, OSError, ValueError) as error:
        raise DamagedError(str(error).partition("\n")[0]) from error
    return rows


def schema(form: type[SweepRow]) -> Any:
    """The columns of a row, as Arrow knows them."""
    import pyarrow as pa

    kinds = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
    fields = []
    for field in msgspec.inspect.type_info(form).fields:  # type: ignore[attr-defined]
        options = getattr(field.type, "types", (field.type,))
        [kind] = {_python_type(t) for t in options} - {type(None)}
        fields.append(pa.field(field.name, kinds[kind]))
    return pa.schema(fields, metadata={"kind": form.kind, "version": str(form.version)})


def _python_type(found: Any) -> type:
    known = {"IntType": int, "FloatType": float, "StrType": str, "LiteralType": str}
    known["BoolType"] = bool
    return known.get(type(found).__name__, type(None))
