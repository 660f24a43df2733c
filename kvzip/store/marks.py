"""A document's marks, the small files by which it is found, and what they were after a power cut.

Some documents are of use to prompts that share much of them only: sliding layers lack what came
before, states are good at one length. Thousands of them may begin with the same instructions. So
their first marks say that they are of none there, and nobody opens them for those.

A power cut can leave them empty, short or full of zeros. Each can be told from a whole one, and is
found again from what else the store has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kvzip.store.bucket import Objects
from kvzip.workers import Workers

_HASH = re.compile(rb"[0-9a-f]{64}")
_USELESS = b"-"
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
    name = (mark or b"").removesuffix(_USELESS)
    return name.decode() if _HASH.fullmatch(name) else ""


def is_useful(mark: bytes | None) -> bool:
    """Whether some document may be of use to a prompt that has the mark ``last/H`` as its last; so
    it is if the mark is lost."""
    return mark is None or not mark.endswith(_USELESS)


def first_useful(chain: Sequence[str], block_tokens: int, least: int | None) -> int:
    """The first mark, from 0 on, at which a document may be of use, which it is to a prompt that
    shares at least `least` tokens with it: a prompt that has a mark as its last may share all but
    one of the next block, too. The length of the chain if there is none."""
    if least is None:
        return len(chain)
    return min(max(0, least // block_tokens - 1), len(chain) - 1)


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


def mark(objects: Objects, pool: Workers, key: str, chain: Sequence[str], first: int = 0) -> None:
    """Write the marks of a document with that hash chain, which may be of use from mark `first` on.
    Where it is not, a pointer to one that may be stays."""
    space, name = key.split("/")
    own, useful = name.encode(), frozenset(chain[first:])

    def note(h: str) -> None:
        objects.put(f"{space}/with/{h}/{name}", b"" if h in useful else _USELESS, create=False)

    def point(h: str) -> None:
        if h in useful:
            objects.put(f"{space}/last/{h}", own, create=False)
        else:
            objects.put(f"{space}/last/{h}", own + _USELESS)

    pool.each(note, chain)
    pool.each(point, chain)


def repoint(objects: Objects, path: str, folder: str, without: str = "") -> None:
    """Let an object that is a name hold that of an object in a folder, of one of use if there is
    one, but for the one `without`; or be gone if there is none."""
    for _ in range(8):
        found = _best_in(objects, folder, without)
        if found is None:
            objects.delete(path)
            # Written meanwhile? Then its own pointer may be what was deleted.
            found = _best_in(objects, folder, without)
            if found is None:
                return
        objects.put(path, found, create=False)
        if not is_useful(found) and is_useful(_best_in(objects, folder, without)):
            continue  # written meanwhile, and its own pointer may be what was written over
        # Removed meanwhile? Who did that may have seen another name here, and left it.
        if objects.head(f"{folder}/{name_in(found)}") is not None:
            return


def others_with(objects: Objects, space: str, mark: str, name: str) -> Iterator[str]:
    """The names of other documents than `name` with that mark which may be of use there; none where
    nothing is listed."""
    if objects.listable:
        for other, useful in _names_in(objects, f"{space}/with/{mark}", name):
            if useful:
                yield other


def _best_in(objects: Objects, folder: str, without: str) -> bytes | None:
    """What points to a document with a mark, to one of use there if any is."""
    found = None
    for name, useful in _names_in(objects, folder, without):
        if useful:
            return name.encode()
        found = found or name.encode() + _USELESS
    return found


def _names_in(objects: Objects, folder: str, without: str) -> Iterator[tuple[str, bool]]:
    """The names of the objects of a folder, and whether each may be of use."""
    for meta in objects.under(folder):
        name = meta.path.rpartition("/")[2]
        if name != without:
            yield name, not meta.size
