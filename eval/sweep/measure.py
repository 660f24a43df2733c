"""One measurement of a sweep: a codec on a cache, which is captured when nobody has it yet."""

from __future__ import annotations

import fcntl
import hashlib
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvzip.codec import get_codec
from kvzip.errors import DiskFullError, KVZipError, disk_full_told
from kvzip.eval.results.provenance import now
from kvzip.eval.results.sweep import Row
from kvzip.eval.speed import bench
from kvzip.eval.sweep import synthetic
from kvzip.eval.sweep.points import Point
from kvzip.eval.sweep.rows import head_of
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot


def measure(point: Point, folder: str) -> Row:
    """Measure one point. Caches are kept in `folder`/snapshots, made by whoever comes first.

    Whatever goes wrong with the codec or the cache becomes a row that says "failed" and why, and
    has no figures. A full disk is no fault of theirs, and raises DiskFullError.
    """
    began = time.perf_counter()
    head = head_of(point)
    figures: dict[str, Any]
    try:
        # Before the capture, which takes long.
        codec = get_codec(point.codec)
        profile = Profile.load(point.profile) if point.profile else None
        with disk_full_told(folder):
            path = _snapshot(point, Path(folder) / "snapshots")
        snapshot = _load(str(path))
        result, _ = bench.measure(snapshot, codec, profile, threads=point.threads, repeat=1)
        if not result.exact:
            raise KVZipError("it did not give back what it was given")
        figures = {"status": "ok", "raw_bytes": snapshot.raw_bytes}
        for name in ("encoded_bytes", "ratio", "bits_per_value", "encode_seconds"):
            figures[name] = getattr(result, name)
        for name in ("decode_seconds", "encode_gbps", "decode_gbps"):
            figures[name] = getattr(result, name)
    except DiskFullError:
        raise
    except Exception as error:  # a codec is anybody's code
        figures = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return Row(**head, **figures, date=now(), seconds=time.perf_counter() - began)


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
    if synthetic.names(point.model):
        return synthetic.make(point.model, point.dtype, point.tokens, point.document)
    from kvzip import capture

    capture.check_cast(point.dtype)
    source = capture.Text.read([point.text])
    loaded = _model(point.model, capture.computed_in(point.dtype))
    numbers = slice(point.document, point.document + 1)
    [cut] = capture.cut_documents(loaded.tokenizer, source, point.tokens, numbers)
    return capture.prefill(loaded, cut.token_ids, dtype=point.dtype, text=cut.name)


@lru_cache(maxsize=1)
def _model(ref: str, dtype: str) -> Any:
    from kvzip.models import load_model

    return load_model(ref, dtype)
