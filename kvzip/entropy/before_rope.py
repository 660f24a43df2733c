"""Tables of keys before RoPE, of layers whose keys `channel` stores so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from kvzip.codec import Context
from kvzip.codecs.channel.rotation import unturned
from kvzip.dtypes import Bits
from kvzip.entropy.tables import LEVELS, Frequencies, Key
from kvzip.layout import Origin
from kvzip.snapshot import Layer


class BeforeRope:
    """Frequencies of the keys before RoPE, in those layers that have them in every document. A pair
    without, of which there are next to none, counts as it is cached."""

    def __init__(self) -> None:
        self._frequencies = Frequencies()
        self._cached: set[Key] = set()

    def add(self, layers: Sequence[Layer], origin: Origin) -> None:
        """Count the keys of one document."""
        for i, layer in enumerate(layers):
            part = layer.layout.parts.get("k")
            if part is None or (i, "k") in self._cached:
                continue
            known = Context(part.form, i, "k", layer.layout.first, origin, rope=layer.layout.rope)
            keys = keys_before_rope(layer.block("k"), known)
            if keys is None:
                self._cached.add((i, "k"))
            else:
                self._frequencies.count((i, "k"), part.form, keys)

    def code_lengths(self, learned: BeforeRope | None = None) -> dict[Key, NDArray[Any]]:
        """Mean bits of each channel's keys [heads, dim], by layer, with a table for each channel of
        these frequencies or of `learned` ones, where both have them."""
        known = self if learned is None else learned
        keys = self._whole() & known._whole()
        source = None if learned is None else known._frequencies.of(keys)
        return self._frequencies.of(keys).code_lengths(source)[LEVELS[-1]]

    def _whole(self) -> set[Key]:
        return {*self._frequencies.forms} - self._cached


def keys_before_rope(block: Bits, context: Context) -> Bits | None:
    """Keys before RoPE, [batch, heads, tokens, dim]; None where `channel` stores them as cached."""
    found = unturned(block, context)
    return None if found is None else found.array
