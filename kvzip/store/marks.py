"""A document's marks, the small files by which it is found, and what they were after a power cut.

A power cut can leave them empty, short or full of zeros. Each can be told from a whole one, and is
found again from what else the store has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kvzip.store.bucket import Objects
from kvzip.workers import Workers

_HASH = re.compile(rb"[0-9a-f]{64}")
_END = b"end"
"""The last line of a chain, by which it is whole."""
_LONGEST = 64 << 20
"""Bytes of a chain that are read: of a million blocks. What is longer is lost."""


def chain_file(chain: Sequence[str]) -> bytes:
    """A hash chain as it is stored."""
    return b"\n".join([*(h.encode() for h in chain), _END])


def name_in(mark: bytes | None) -> str:
    """The document that a mark ``last/H`` names, or the profile that ``profile`` does; "" if that
    is lost."""
    return mark.decode() if mark is not None and _HASH.fullmatch(mark) else ""


def stored_chain(objects: Objects, space: str, name: str) -> list[str] | None:
    """A document's hash chain; None if that is lost."""
    *hashes, last = (objects.get(f"{space}/chain/{name}", _LONGEST) or b"").split(b"\n")
    if last != _END or not all(map(_HASH.fullmatch, hashes)):
        return None
    return [h.decode() for h in hashes]


def chain_of(objects: Objects, space: str, name: str) -> list[str]:
    """A document's hash chain; if that is lost, the marks that there are of it, in any order."""
    found = stored_chain(objects, space, name)
    if found is None:
        paths = (meta.path.split("/") for meta in objects.under(f"{space}/with"))
        found = [mark for *_, mark, other in paths if other == name]
    return found


def mark(objects: Objects, pool: Workers, key: str, chain: Sequence[str]) -> None:
    """Write the marks of a document with that hash chain."""
    space, name = key.split("/")
    pool.each(lambda h: objects.put(f"{space}/with/{h}/{name}", b""), chain)
    pool.each(lambda h: objects.put(f"{space}/last/{h}", name.encode(), create=False), chain)


def repoint(objects: Objects, path: str, folder: str, without: str = "") -> None:
    """Let an object that is a name hold that of an object in a folder, but for the one `without`;
    or be gone if there is none."""
    for _ in range(8):
        found = next(_names_in(objects, folder, without), None)
        if found is None:
            objects.delete(path)
            # Written meanwhile? Then its own pointer may be what was deleted.
            found = next(_names_in(objects, folder, without), None)
            if found is None:
                return
        objects.put(path, found.encode(), create=False)
        # Removed meanwhile? Who did that may have seen another name here, and left it.
        if objects.head(f"{folder}/{found}") is not None:
            return


def others_with(objects: Objects, space: str, mark: str, name: str) -> Iterator[str]:
    """The names of other documents than `name` with that mark; none where nothing is listed."""
    return _names_in(objects, f"{space}/with/{mark}", name) if objects.listable else iter(())


def _names_in(objects: Objects, folder: str, without: str) -> Iterator[str]:
    names = (meta.path.rpartition("/")[2] for meta in objects.under(folder))
    return (name for name in names if name != without)
