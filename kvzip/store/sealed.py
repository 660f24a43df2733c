"""A store's objects, sealed: their bytes and their names.

Each object is a sealed file (:mod:`kvzip.container.sealed`) that is good at its own place only. Its
name is encrypted, part by part, by AES-SIV: the same name becomes the same text, so that it can be
asked for and listed, and says nothing of the hashes in it, which would tell a guessed prompt from
others. ``store.json`` keeps its name, so that a wrong key is an error and not an empty store. What
stays in sight is how many objects there are, how long and when written, and which of them begin
alike. Empty objects, which are only their names, stay empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from kvzip.container import Reader
from kvzip.container.sealed import (
    CHUNK,
    HEADER,
    TAG,
    AnyKey,
    Key,
    Sealed,
    Sealing,
    as_key,
    cryptography_told,
    derived,
    seal,
    sealed_size,
)
from kvzip.container.source import Memory, in_pieces
from kvzip.errors import CorruptError, FormatError, SealError
from kvzip.files import scratch_file
from kvzip.profile import Profile
from kvzip.store.folder import SMALL, Meta, write_all

if TYPE_CHECKING:
    from kvzip.store.bucket import Bucket
    from kvzip.store.folder import Folder

_PLAIN = "store.json"
_PIECE = 1 << 20


class SealedObjects:
    """Objects of a folder or bucket, sealed with one key."""

    def __init__(self, inner: Bucket | Folder, key: AnyKey):
        self._inner, self._key = inner, as_key(key)
        self.url, self.folder = inner.url, inner.folder
        self.writable, self.listable = inner.writable, inner.listable
        self._names = _Names(self._key)

    def get(self, path: str, most: int = SMALL) -> bytes | None:
        """An object's bytes, or None when there is none; none at all of one that has more than
        `most`, or is damaged, as a power cut may leave it. Raises SealError for the settings of a
        store of another key."""
        data = self._inner.get(self._names.hidden(path), sealed_size(most))
        if not data:
            return data
        try:
            found = Sealed(Memory(data), self._key, path)
            return bytes(found.read(0, found.size))
        except SealError as error:
            if path != _PLAIN:
                return b""
            raise SealError(f"{self.url}: {error}") from None
        except FormatError:
            if path != _PLAIN or not data.startswith(b"{"):
                return b""
            raise SealError(
                f"{self.url} is no sealed store, and a key is given: leave the key out, or take "
                "another store"
            ) from None
        except CorruptError:
            return b""

    def put(
        self, path: str, data: bytes | IO[bytes], create: bool = True, durable: bool = False
    ) -> bool:
        """As of :class:`kvzip.store.folder.Folder`; only sealed bytes leave memory."""
        hidden = self._names.hidden(path)
        if isinstance(data, bytes):
            sealed = seal(data, self._key, path) if data else data
            return self._inner.put(hidden, sealed, create, durable)
        with scratch_file() as file:
            sealing = Sealing(self._key, path)
            file.write(sealing.header)
            data.seek(0)
            while piece := data.read(_PIECE):
                file.writelines(sealing.chunks(piece))
            file.writelines(sealing.end())
            file.flush()
            return self._inner.put(hidden, file, create, durable)

    def copy(self, path: str, sink: IO[bytes], progress: Callable[[int], None] | None) -> None:
        """Write an object's bytes to a file. Raises FileNotFoundError when there is none, and
        CorruptError."""
        source = self._source(path)
        try:
            write_all(in_pieces(source), sink, progress)
        finally:
            source.close()

    def head(self, path: str) -> Meta | None:
        """What is known of an object, or None when there is none."""
        found = self._inner.head(self._names.hidden(path))
        return None if found is None else _meta(found, path)

    def under(self, prefix: str) -> Iterator[Meta]:
        """Objects under a prefix; those of another key, or of none, are left out."""
        for found in self._inner.under(self._names.hidden(prefix) if prefix else ""):
            path = self._names.shown(found.path)
            if path is not None:
                yield _meta(found, path)

    def folders(self) -> list[str]:
        """First parts of all objects' paths."""
        return [name for found in self._inner.folders() if (name := self._names.shown(found))]

    def delete(self, path: str) -> None:
        """Delete an object, if there is one."""
        self._inner.delete(self._names.hidden(path))

    def open(self, path: str, profile: Profile | None = None, threads: int = 0) -> Reader:
        """A .kvz object, to be read in ranges. Raises FileNotFoundError when there is none."""
        return Reader(self._source(path), profile, threads)

    def sweep(self) -> None:
        """Remove what killed writers left unfinished."""
        self._inner.sweep()

    def _source(self, path: str) -> Sealed:
        source: Any = self._inner.source(self._names.hidden(path))
        try:
            return Sealed(source, self._key, path)
        except BaseException:
            with suppress(AttributeError):
                source.close()
            raise


class _Names:
    """Paths as they are, and as they stand in the store."""

    def __init__(self, key: Key):
        with cryptography_told():
            from cryptography.hazmat.primitives.ciphers.aead import AESSIV

        self._cipher = AESSIV(derived(key, b"", b"kvzip names of a sealed store", 64))

    def hidden(self, path: str) -> str:
        return "/".join(
            part if part == _PLAIN else self._cipher.encrypt(part.encode(), None).hex()
            for part in path.split("/")
        )

    def shown(self, path: str) -> str | None:
        """The path that was hidden so; None for one that was not, or with another key."""
        from cryptography.exceptions import InvalidTag

        try:
            return "/".join(
                part if part == _PLAIN else self._cipher.decrypt(bytes.fromhex(part), None).decode()
                for part in path.split("/")
            )
        except (InvalidTag, ValueError):
            return None


def _meta(found: Meta, path: str) -> Meta:
    """What is known of an object as it was before it was sealed."""
    body = max(found.size - HEADER, 0)
    return found._replace(path=path, size=max(body - TAG * -(-body // (CHUNK + TAG)), 0))
