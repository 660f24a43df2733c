"""How small documents become as pages of several sizes, with a profile's tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from kvzip.errors import CorruptError
from kvzip.options import integer
from kvzip.pages import decode_page, encode_page
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot


class PageSize(msgspec.Struct, frozen=True):
    """Pages of so many tokens, each compared with its numbers once decoded again."""

    tokens: int
    layers: int
    """In a page."""
    pages: int
    raw_bytes: int
    encoded_bytes: int
    numbers: int

    @property
    def ratio(self) -> float:
        return self.raw_bytes / self.encoded_bytes

    @property
    def bits_per_value(self) -> float:
        return 8 * self.encoded_bytes / self.numbers


def measure(
    snapshots: Sequence[Path],
    profile: Profile,
    tokens: Sequence[int],
    progress: Callable[[str, int, int], None],
) -> list[PageSize]:
    """Encode every whole page of the documents at each size, first a layer a page, then all layers.

    Raises CorruptError when a page does not give back its numbers."""
    sizes = [integer("--tokens", n, 1) for n in tokens]
    found = {(n, one): [0] * 5 for n in sizes for one in (True, False)}
    for done, path in enumerate(snapshots):
        snapshot = Snapshot.load(path)
        for (n, one), sums in found.items():
            for i, add in enumerate(_of(snapshot, profile, n, one)):
                sums[i] += add
        progress("documents", done + 1, len(snapshots))
    return [
        PageSize(n, layers // pages, pages, raw, encoded, numbers)
        for (n, _), (layers, pages, raw, encoded, numbers) in found.items()
        if pages
    ]


def _of(snapshot: Snapshot, profile: Profile, tokens: int, one: bool) -> tuple[int, ...]:
    """Sums over the pages of a document: layers, pages, raw bytes, encoded bytes, numbers."""
    count = len(snapshot.layers)
    held = min((layer.layout.stored for layer in snapshot.layers), default=0)
    layers = pages = raw = encoded = numbers = 0
    step = 1 if one else max(count, 1)
    for first in range(0, count, step):
        inside = snapshot.layers[first : first + step]
        for start in range(0, held - tokens + 1, tokens):
            given = [
                (layer.k[..., start : start + tokens, :], layer.v[..., start : start + tokens, :])
                for layer in inside
            ]
            page = encode_page(given, profile, first=first)
            for pair, back in zip(given, decode_page(page, profile), strict=True):
                if any((a != b).any() for a, b in zip(pair, back, strict=True)):
                    raise CorruptError("a page decodes to other numbers")
            pages, layers, encoded = pages + 1, layers + len(inside), encoded + len(page)
            raw += sum(part.nbytes for pair in given for part in pair)
            numbers += sum(part.size for pair in given for part in pair)
    return layers, pages, raw, encoded, numbers
