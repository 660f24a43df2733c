"""Sealed files: any bytes, a .kvz file first of all, encrypted so that ranges of them can be read.

A sealed file is a header of 128 bytes and chunks of 64 KiB, each encrypted and authenticated by
AES-256-GCM. Each file has a key of its own, which HKDF-SHA256 makes of the caller's and 32 random
bytes in the header. Under it the nonce of a chunk is its number, with a mark on the last: so no
nonce is used twice, and no chunk can be left out, cut off, moved, or put into another file.
docs/format.md has the bytes, and what is protected against whom.

This needs the package `cryptography` (``pip install 'kvzip[encryption]'``).
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from kvzip import checksum
from kvzip.container.source import Closable, Source
from kvzip.errors import CorruptError, FormatError, SealError, UsageError, extra_told
from kvzip.options import text
from kvzip.version import check_format, newer
from kvzip.workers import Lock

MAGIC = b"\x89KVS\r\n\x1a\n"
VERSION = 1
HEADER = 128
CHUNK = 1 << 16
TAG = 16
# Magic, version, zeros, random bytes, what proves the key, the key's name; then the checksum.
_FIELDS = struct.Struct("<8sH6s32s32s40s")
_CHECKSUM = struct.Struct("<Q")
_KEY_BYTES, _NAME_BYTES = 32, 40
_KEPT = 32
"""Chunks that are kept after a read used them in part: the next read often needs their rest."""
_AT_ONCE = 64
"""Chunks that are asked for at once, 4 MiB."""


@dataclass(frozen=True)
class Key:
    """A key of 32 bytes, and its name, which sealed files tell everybody. Raises UsageError."""

    secret: bytes = field(repr=False)
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.secret, (bytes, bytearray)) or len(self.secret) != _KEY_BYTES:
            raise UsageError("a key is 32 random bytes: os.urandom(32), kept where secrets are")
        if len(text("a key's name", self.name).encode()) > _NAME_BYTES or "\0" in self.name:
            raise UsageError(f"a key's name has at most {_NAME_BYTES} bytes")
        object.__setattr__(self, "secret", bytes(self.secret))


AnyKey = bytes | Key | Mapping[str, bytes | Key] | Callable[[str], bytes | Key | None]
"""A key, or what has keys by their names: a mapping, or a function. Under the name "" it has the
one to seal with."""


def is_sealed(first: Any) -> bool:
    """Whether bytes begin like a sealed file."""
    return bytes(first[: len(MAGIC)]) == MAGIC


def as_key(given: Any) -> Key:
    """The key to seal with. Raises UsageError, or SealError where there is none."""
    if isinstance(given, Mapping) or callable(given):
        given = _look_up(given, "")
        if given is None:
            raise SealError("there is no key to seal with: it is looked for under the name ''")
    return given if isinstance(given, Key) else Key(given)


def check_key(given: Any) -> Any:
    """`given`, if it is a key or has keys, or is None. Raises UsageError."""
    if given is None or isinstance(given, (Key, Mapping)) or callable(given):
        return given
    return Key(given)


def _look_up(keys: Any, name: str) -> Any:
    try:
        return keys[name] if isinstance(keys, Mapping) else keys(name)
    except KeyError:
        return None


def sealed_size(size: int) -> int:
    """How many bytes a sealed file of so many has."""
    return HEADER + size + TAG * max(-(-size // CHUNK), 1)


def derived(key: Key, salt: bytes, about: bytes, length: int) -> bytes:
    """Bytes that follow from a key, and of which nobody without it knows anything."""
    with cryptography_told():
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    made: bytes = HKDF(SHA256(), length, salt, about).derive(key.secret)
    return made


def cryptography_told() -> AbstractContextManager[None]:
    """What needs the package that may be missing."""
    return extra_told("sealed files need more", "encryption")


def _cipher(key: Key, start: bytes, place: str) -> tuple[Any, bytes]:
    """What encrypts a file's chunks, and what its header says to prove the key. `start`: the
    header's first fields; `place`: where the file belongs."""
    with cryptography_told():
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    version, salt, name = start[:16], start[16:48], start[48:]
    about = b"kvzip sealed file\0" + version + name + place.encode()
    made = derived(key, salt, about, 64)
    return AESGCM(made[:32]), made[32:]


def _nonce(chunk: int, last: bool) -> bytes:
    return struct.pack(">IQ", last, chunk)


# --- sealing -------------------------------------------------------------------------------


def seal(data: Any, key: AnyKey, place: str = "") -> bytes:
    """A buffer of bytes as a sealed file. `place`: where it belongs, if it is to be good nowhere
    else; who opens it must name the same."""
    parts: list[bytes] = []
    view = memoryview(data).cast("B")
    sealing = Sealing(key, place)
    for begin in range(0, len(view), CHUNK):
        parts += sealing.chunks(view[begin : begin + CHUNK])
    return b"".join([sealing.header, *parts, *sealing.end()])


class Sealing:
    """Bytes on their way into one sealed file, one after the other."""

    def __init__(self, key: AnyKey, place: str = ""):
        known = as_key(key)
        start = _FIELDS.pack(MAGIC, VERSION, b"", os.urandom(32), b"", known.name.encode())
        self._cipher, proof = _cipher(known, start[:48] + start[80:], place)
        start = start[:48] + proof + start[80:]
        self.header = start + _CHECKSUM.pack(checksum.of_bytes(start))
        self._held = bytearray()
        self._count = 0

    def chunks(self, data: Any) -> Iterator[bytes]:
        """Take on more bytes; the chunks that are full by them and not the last."""
        self._held += data
        while len(self._held) > CHUNK:
            yield self.chunk(self._count, self._held[:CHUNK], last=False)
            self._count += 1
            del self._held[:CHUNK]

    def end(self) -> Iterator[bytes]:
        """The last chunk."""
        yield self.chunk(self._count, self._held, last=True)

    def chunk(self, number: int, data: Any, last: bool) -> bytes:
        """One chunk, which nobody encrypts twice."""
        made: bytes = self._cipher.encrypt(_nonce(number, last), bytes(data), None)
        return made


class SealingSink:
    """A `kvzip.container.writer.Sink` that seals what is written to it into a file.

    What the first `seek` leaves out comes last, and is held back with its chunks; of the rest no
    more than two chunks are held. Call :meth:`close` at the end; the file's own is not called.
    """

    def __init__(self, file: Any, key: AnyKey, place: str = ""):
        self._file, self._sealing = file, Sealing(key, place)
        self._base = file.tell()
        file.write(self._sealing.header)
        self._held: dict[int, bytearray] = {}
        self._at = self._size = self._begun = 0

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, /) -> int:
        if not self._size:
            self._begun = position // CHUNK + 1 if position else 0
        self._at = position
        return position

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        written = len(view)
        while len(view):
            number, begin = divmod(self._at, CHUNK)
            part = view[: CHUNK - begin]
            self._held.setdefault(number, bytearray(CHUNK))[begin : begin + len(part)] = part
            self._at, view = self._at + len(part), view[len(part) :]
            self._size = max(self._size, self._at)
            for full in [n for n in self._held if self._begun <= n < number]:
                self._put(full, last=False)
        return written

    def close(self) -> int:
        """Write what is held back; the length of the sealed file."""
        last = max(self._size - 1, 0) // CHUNK
        self._held.setdefault(last, bytearray())
        for number in sorted(self._held):
            self._put(number, last=number == last)
        length = sealed_size(self._size)
        self._file.seek(self._base + length)
        return length

    def _put(self, number: int, last: bool) -> None:
        data = self._held.pop(number)
        size = self._size - number * CHUNK if last else CHUNK
        self._file.seek(self._base + HEADER + number * (CHUNK + TAG))
        self._file.write(self._sealing.chunk(number, memoryview(data)[:size], last))


# --- reading -------------------------------------------------------------------------------


class Sealed(Closable):
    """The bytes in a sealed file, as a `Source`: chunks are read and decrypted as they are asked
    for, and each is authentic or an error.

    Raises SealError without the right key (or for another `place`), FormatError for another
    version, CorruptError for what is damaged. Threads may read it at once.
    """

    def __init__(self, source: Source, key: AnyKey | None, place: str = ""):
        self._source = source
        self.name = getattr(source, "name", None)
        """What errors call it, if anything."""
        self._cipher = cipher_of(bytes(source.read(0, min(HEADER, source.size))), key, place)
        body = source.size - HEADER
        self._chunks = -(-body // (CHUNK + TAG))
        self.size = body - TAG * self._chunks
        # Only of an empty file the last chunk is empty; one would not be read, and show no cut.
        least = CHUNK * (self._chunks - 1) + (self._chunks > 1)
        if self._chunks < 1 or self.size < least:
            raise CorruptError("the sealed file is cut short")
        self._kept: dict[int, bytes] = {}
        self._announced: set[int] = set()
        self._lock = Lock()
        if not self.size:  # of an empty file nothing is read, by which a cut would show
            self._chunk(0, keep=False)
        if hasattr(source, "announce"):
            self.announce = self._announce

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes from `offset` on. Raises CorruptError."""
        if not length:
            return memoryview(b"")
        first, last = offset // CHUNK, (offset + length - 1) // CHUNK
        out, at = bytearray(length), 0
        for some in range(first, last + 1, _AT_ONCE):
            chunks = range(some, min(some + _AT_ONCE, last + 1))
            stored = self._stored(chunks)
            for chunk in chunks:
                data = self._chunk(chunk, chunk in (first, last), stored.get(chunk))
                begin = max(offset - chunk * CHUNK, 0)
                part = memoryview(data)[begin : begin + length - at]
                out[at : at + len(part)] = part
                at += len(part)
        return memoryview(out).toreadonly()

    def cancel(self) -> None:
        """End waiting for what the file below fetches, if it does."""
        end = getattr(self._source, "cancel", None)
        if end is not None:
            end()

    def close(self) -> None:
        """Close the file below, if it can be closed."""
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def _stored(self, chunks: Sequence[int]) -> dict[int, memoryview]:
        """Some chunks as they are stored, in one read: a source may take a while for each. But
        those that were announced come one by one."""
        with self._lock:
            missing = [c for c in chunks if c not in self._kept and c not in self._announced]
        if len(missing) < 2:
            return {}
        (begin, _), (at, length) = self._place(missing[0]), self._place(missing[-1])
        data = self._source.read(begin, at + length - begin)
        places = ((chunk, self._place(chunk)) for chunk in missing)
        return {chunk: data[at - begin :][:length] for chunk, (at, length) in places}

    def _chunk(self, chunk: int, keep: bool, stored: memoryview | None = None) -> bytes:
        """A chunk's content; `stored`: as it is in the file, where that was read already."""
        with self._lock:
            found = self._kept.get(chunk)
            self._announced.discard(chunk)
        if found is not None:
            return found
        begin, length = self._place(chunk)
        data = self._source.read(begin, length) if stored is None else stored
        with cryptography_told():
            from cryptography.exceptions import InvalidTag
        try:
            made: bytes = self._cipher.decrypt(
                _nonce(chunk, chunk == self._chunks - 1), bytes(data), None
            )
        except InvalidTag:
            raise CorruptError(
                "the sealed file is damaged, or was changed by somebody without the key, in "
                f"bytes {begin} to {begin + length}; or it is cut short"
            ) from None
        if keep:
            with self._lock:
                self._kept[chunk] = made
                while len(self._kept) > _KEPT:
                    del self._kept[next(iter(self._kept))]
        return made

    def _place(self, chunk: int) -> tuple[int, int]:
        """Where a chunk begins in the file, and how many bytes it has there."""
        begin = HEADER + chunk * (CHUNK + TAG)
        return begin, min(CHUNK + TAG, self._source.size - begin)

    def _announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Tell the source which chunks will be read for these ranges, in ascending order."""
        chunks: dict[int, None] = {}
        for offset, length in ranges:
            if length:
                last = (offset + length - 1) // CHUNK
                chunks.update(dict.fromkeys(range(offset // CHUNK, last + 1)))
        with self._lock:
            self._announced = set(chunks)
        self._source.announce([self._place(chunk) for chunk in chunks])  # type: ignore[attr-defined]


def cipher_of(start: bytes, key: AnyKey | None, place: str = "") -> Any:
    """What decrypts the chunks of the sealed file that begins so. Raises as :class:`Sealed`."""
    proof, name = _read_header(start)
    known = _find(key, name)
    cipher, expected = _cipher(known, start[:48] + start[80:120], place)
    if not hmac.compare_digest(proof, expected):
        raise SealError(
            "the key is not the one that this file was sealed with"
            + (f", which is called {name!r}" if name else "")
            + (", or the file was put in the place of another" if place else "")
        )
    return cipher


def _read_header(start: bytes) -> tuple[bytes, str]:
    """What proves the key, and the key's name. Raises FormatError, CorruptError."""
    if not is_sealed(start):
        raise FormatError("this is no sealed file")
    if len(start) < HEADER:
        raise CorruptError("the sealed file is cut short")
    if _CHECKSUM.unpack_from(start, _FIELDS.size)[0] != checksum.of_bytes(start[: _FIELDS.size]):
        raise CorruptError("the header of the sealed file is damaged")
    _, version, zeros, _, proof, name = _FIELDS.unpack_from(start)
    check_format("the sealed file", version, VERSION, "seal its content anew")
    if any(zeros):
        raise FormatError(newer("the sealed file has fields that are set"))
    try:
        return proof, name.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        raise CorruptError("the header of the sealed file makes no sense") from None


def _find(key: AnyKey | None, name: str) -> Key:
    """The key of that name. Raises SealError."""
    called = f" (its key is called {name!r})" if name else ""
    if key is None:
        raise SealError(f"the file is sealed: give its key{called} (key=, --key-file)")
    if isinstance(key, Key):
        if key.name not in ("", name):
            raise SealError(f"the file is sealed with another key than {key.name!r}{called}")
        return Key(key.secret, name)
    if not isinstance(key, Mapping) and not callable(key):
        return Key(key, name)
    found = _look_up(key, name)
    if found is None:
        raise SealError(f"there is no key of the name that the file says{called}")
    return Key(found.secret if isinstance(found, Key) else found, name)


def unsealed(source: Source, key: AnyKey | None, first: memoryview) -> Source:
    """The bytes of a file that may be sealed, of which these are the first. Raises SealError for a
    sealed one without its key, and for one that is not sealed where a key is given: it may have
    been put in its place."""
    if is_sealed(first):
        return Sealed(source, key)
    if key is not None:
        raise SealError("the file is not sealed, and a key is given: open it without")
    return source
