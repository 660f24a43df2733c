"""SHA-256 of files, kept in the user's cache folder until a file changes.

A digest is kept for a path (links resolved), size, times of change and inode. It is not kept while
the file is so new that it could change once more within the resolution of its times.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import platformdirs

from kvzip.errors import CorruptError, FormatError, KVZipError, told_as
from kvzip.files import replacing
from kvzip.parsing import from_json

THREADS = min(8, os.cpu_count() or 1)
"""hashlib lets other threads run while it works."""
_CHUNK = 4 << 20
_SETTLED = 2.0
"""Seconds after which another change of a file shows in its times, on any file system."""


class Stamp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What changes when a file does."""

    path: str
    size: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        real = path.resolve()
        found = real.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, and can be read once
            raise KVZipError(f"{path} is no regular file, as weights must be")
        return cls(str(real), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    @property
    def settled(self) -> bool:
        return time.time() - max(self.modified_ns, self.changed_ns) / 1e9 > _SETTLED


class Kept(msgspec.Struct, forbid_unknown_fields=True):
    """Digests of one file."""

    stamp: Stamp
    whole: str = ""
    """The digest of all its bytes."""
    tensors: dict[str, str] = {}
    """Those of its tensors, by name and by the dtype that they were brought to."""


_seen: dict[Stamp, str] = {}
"""Digests of files that this process has asked for."""


def load(path: Path) -> Kept:
    """What is kept of a file, or nothing if it has changed."""
    stamp = Stamp.of(path)
    with suppress(OSError, CorruptError, FormatError):
        kept = from_json(_place(stamp).read_bytes(), Kept)
        if kept.stamp == stamp:
            return kept
    return Kept(stamp)


def keep(kept: Kept) -> None:
    """Keep the digests, if the file is still the one that was read; a folder that cannot be written
    costs reading it again."""
    place = _place(kept.stamp)
    with suppress(OSError):
        if not kept.stamp.settled or Stamp.of(Path(kept.stamp.path)) != kept.stamp:
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as file:
            file.write(msgspec.json.encode(kept))


def sha256_of_files(paths: Sequence[Path]) -> list[str]:
    """Hexadecimal SHA-256 of each file, several read at once. Raises KVZipError for a file that
    cannot be read, or that changes meanwhile."""
    with told_as(KVZipError, "cannot read the weights"):
        known = [_seen.get(Stamp.of(path)) for path in paths]
    with ThreadPoolExecutor(THREADS, "kvzip-hash") as pool:  # which begins no thread for nothing
        unknown = pool.map(_sha256, (p for p, k in zip(paths, known, strict=True) if k is None))
        return [next(unknown) if each is None else each for each in known]


def _sha256(path: Path) -> str:
    try:
        kept = load(path)
        if not kept.whole:
            digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
            if Stamp.of(path) != kept.stamp:
                raise KVZipError(f"{path} changed while it was read")
            kept.whole = digest.hexdigest()
            keep(kept)
    except OSError as error:
        raise KVZipError(f"cannot read the weights: {error}") from None
    if kept.stamp.settled:
        _seen[kept.stamp] = kept.whole
    return kept.whole


def _place(stamp: Stamp) -> Path:
    name = hashlib.sha256(stamp.path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(platformdirs.user_cache_dir("kvzip"), "digests", f"{name}.json")
