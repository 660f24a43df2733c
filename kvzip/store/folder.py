"""Objects as files in a folder: what a store on a disk is made of.

Objects appear whole or not at all (:mod:`kvzip.files`), need no hard links, and nothing here has
threads or connections that a fork would break. Links that somebody has put among them are read
through, but nothing is written, listed or deleted where they lead: that may be anywhere.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple

from kvzip import files
from kvzip.container import Reader, Source
from kvzip.container.source import open_source
from kvzip.errors import StoreError, UsageError
from kvzip.options import integer
from kvzip.profile import Profile

SMALL = 1 << 20
"""Bytes of an object that is read as a whole, unless who reads it knows that it may have more."""

_LATEST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


class Meta(NamedTuple):
    """What is known of an object without reading it."""

    path: str
    size: int
    version: str | None
    """What changes when the object does (ETag)."""
    modified: datetime


@contextmanager
def _as_store_errors(what: str) -> Iterator[None]:
    """Errors of the system as StoreError; FileNotFoundError stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else error.strerror or str(error)
        raise StoreError(f"{what}: {why}") from error


def write_all(
    chunks: Iterable[bytes | memoryview], sink: IO[bytes], progress: Callable[[int], None] | None
) -> None:
    """Write the chunks to a file; `progress` is called with the bytes of each."""
    for chunk in chunks:
        sink.write(chunk)
        if progress is not None:
            progress(len(chunk))


def _is_folder(entry: os.DirEntry[str], links: bool) -> bool:
    with suppress(OSError):  # a link that leads to itself, say, is neither folder nor file
        return entry.is_dir(follow_symlinks=links)
    return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return entry.is_file()
    return False


class Folder:
    """Objects below a folder, which is made when the first is written.

    `mode`: the permissions of objects; by default they are for their owner, and for the group as
    far as the folder itself is. Folders below have the folder's own. `make`: without, a folder that
    is not there is a UsageError.
    """

    writable = listable = True

    def __init__(self, folder: Path, url: str, *, make: bool = False, mode: int | None = None):
        with files.naming(str(folder)):
            self.folder, self.url = folder.absolute(), url
        self._mode = None if mode is None else integer("mode", mode, 0, 0o777)
        if not self.folder.is_dir() and (not make or self.folder.exists()):
            if self.folder.exists():
                raise UsageError(f"{self.folder} is not a folder")
            raise UsageError(f"there is no folder {self.folder}")

    def _at(self, path: str) -> Path:
        """Where an object lies. Raises StoreError for a path that leads out of the folder."""
        found = self.folder / path
        if not found.is_relative_to(self.folder) or ".." in found.parts[len(self.folder.parts) :]:
            raise StoreError(f"{path!r} leads out of {self.url}")
        return found

    def _own(self, folder: Path) -> Path:
        """A folder below, in which something is to be written, listed or deleted. Raises StoreError
        where it, or one above it, is a link."""
        for each in (folder, *folder.parents):
            if each == self.folder:
                break
            if each.is_symlink():
                raise StoreError(
                    f"{each} is a link, and so no part of {self.url}: nothing is written, listed "
                    "or deleted where it leads. Put a folder in its place"
                )
        return folder

    def _file(self, path: str) -> Path:
        """Where an object lies that is to be read. Raises FileNotFoundError when there is none, and
        StoreError for what is no file: a pipe would be waited for."""
        found = self._at(path)
        if not stat.S_ISREG(found.stat().st_mode):
            raise StoreError(f"cannot read {path} in {self.url}: it is no file")
        return found

    def get(self, path: str, most: int = SMALL) -> bytes | None:
        """An object's bytes, or None when there is none; none at all of one that has more than
        `most`."""
        with _as_store_errors(f"cannot read {path} in {self.url}"):
            try:
                with self._file(path).open("rb") as file:
                    # Not `read(most)`, which takes so much memory first: ten times as slow.
                    return b"" if os.fstat(file.fileno()).st_size > most else file.read()
            except FileNotFoundError:
                return None

    def copy(self, path: str, sink: IO[bytes], progress: Callable[[int], None] | None) -> None:
        """Write an object's bytes to a file. Raises FileNotFoundError when there is none."""
        write_all(self._chunks(path), sink, progress)

    def _chunks(self, path: str) -> Iterator[bytes]:
        with (
            _as_store_errors(f"cannot read {path} in {self.url}"),
            self._file(path).open("rb") as file,
        ):
            while chunk := file.read(1 << 20):
                yield chunk

    def head(self, path: str) -> Meta | None:
        """What is known of an object, or None when there is none."""
        with _as_store_errors(f"cannot read {path} in {self.url}"):
            try:
                return _meta(path, self._at(path).stat())
            except FileNotFoundError:
                return None

    def put(
        self, path: str, data: bytes | IO[bytes], create: bool = True, durable: bool = False
    ) -> bool:
        """Write an object, all of a file or these bytes, whole or not at all; False when `create`
        and there is one already. `durable`: it outlives a power cut that comes after."""
        target = self._at(path)
        with _as_store_errors(f"cannot write {path} in {self.url}"):
            for _ in range(100):
                try:
                    self._make(self._own(target.parent))
                    self._write(target, data, create, durable)
                    return True
                except FileExistsError:
                    return False
                except FileNotFoundError:  # its folder, or one above, was deleted meanwhile
                    continue
        raise StoreError(f"cannot write {path} in {self.url}: its folder is deleted as it is made")

    def _write(self, target: Path, data: bytes | IO[bytes], create: bool, durable: bool) -> None:
        with files.replacing(
            target,
            mode=self._object_mode(),
            create=create,
            durable=durable,
            scratch=self.folder,
            itself=True,
        ) as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                data.seek(0)
                shutil.copyfileobj(data, file, 1 << 20)

    def _object_mode(self) -> int:
        if self._mode is not None:
            return self._mode
        return 0o600 | (stat.S_IMODE(self.folder.stat().st_mode) & 0o060)

    def _make(self, folder: Path) -> None:
        """Make a folder and those above it, with the store's own permissions."""
        if folder.is_dir():
            return
        if folder == self.folder:
            folder.mkdir(parents=True, exist_ok=True)
            return
        self._make(folder.parent)
        try:
            folder.mkdir()
        except FileExistsError:
            return
        with suppress(OSError):
            folder.chmod(stat.S_IMODE(self.folder.stat().st_mode) & 0o2777)

    def under(self, prefix: str) -> Iterator[Meta]:
        """Objects under a prefix; a part of a name is no prefix."""
        with _as_store_errors(f"cannot list {prefix} in {self.url}"):
            yield from self._walk(prefix)

    def _walk(self, prefix: str) -> Iterator[Meta]:
        self._own(self._at(prefix))
        left = [prefix]
        while left:
            prefix = left.pop()
            try:
                within = os.scandir(self._at(prefix))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in sorted(within, key=lambda entry: entry.name):
                path = f"{prefix}/{entry.name}" if prefix else entry.name
                if _is_folder(entry, links=False):
                    left.append(path)
                elif not files.is_hidden(entry.name) and _is_file(entry):
                    with suppress(FileNotFoundError):
                        yield _meta(path, entry.stat())

    def folders(self) -> list[str]:
        """First parts of all objects' paths."""
        with _as_store_errors(f"cannot list {self.url}"):
            try:
                # A link to one is told when it is listed, and not left out in silence.
                entries = os.scandir(self.folder)
                return sorted(entry.name for entry in entries if _is_folder(entry, links=True))
            except FileNotFoundError:
                return []

    def delete(self, path: str) -> None:
        """Delete an object, if there is one, and the folder that held it alone."""
        target = self._at(path)
        with _as_store_errors(f"cannot delete {path} in {self.url}"), suppress(FileNotFoundError):
            self._own(target.parent)
            target.unlink()
        if target.parent != self.folder:
            with suppress(OSError):
                target.parent.rmdir()

    def open(self, path: str, profile: Profile | None = None, threads: int = 0) -> Reader:
        """A .kvz object, to be read in ranges. Raises FileNotFoundError when there is none."""
        return Reader(self.source(path), profile, threads)

    def source(self, path: str) -> Source:
        """An object's bytes, to be read in ranges. Raises FileNotFoundError when there is none."""
        with _as_store_errors(f"cannot read {path} in {self.url}"):
            return open_source(self._file(path))

    def sweep(self) -> None:
        """Remove what killed writers left unfinished."""
        files.sweep(self.folder)


def _meta(path: str, found: os.stat_result) -> Meta:
    version = f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"
    seconds = min(max(found.st_mtime, 0.0), _LATEST)  # file systems know years that Python doesn't
    return Meta(path, found.st_size, version, datetime.fromtimestamp(seconds, UTC))
