"""What a profile says of numbers: the one place that asks codecs for what they have learned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.codec import Context
from kvzip.codecs.channel.profile import stated, tables_of
from kvzip.codecs.predictive.codec import measure, native_model
from kvzip.dtypes import Bits, DType
from kvzip.entropy.before_rope import keys_before_rope
from kvzip.entropy.tables import channel_counts
from kvzip.errors import ProfileError
from kvzip.layout import Origin
from kvzip.profile import Profile
from kvzip.snapshot import Layer, Snapshot

ESCAPED_BITS = 16
"""What `channel` stores a value in that a table does not have."""


def code_lengths(snapshot: Snapshot, profile: Profile) -> list[tuple[float, float]]:
    """Ideal bits of each layer's keys and values, all numbers together, for the tokens that every
    layer holds. Raises ProfileError when the profile is of another model.
    """
    found = [[0.0, 0.0] for _ in snapshot.layers]
    # Of fp32 the lower half is stored as it is.
    raw = 16 if dtypes.get(snapshot.dtype).bits == 32 else 0
    try:
        for i, part, _, bits, count in measure(native_model(profile), profile.tensors, snapshot):
            found[i][part] = bits + raw * count
    except (ValueError, IndexError) as error:
        raise ProfileError(f"the profile is of another model: {error}") from None
    return [(k, v) for k, v in found]


def has_tables(profile: Profile) -> bool:
    """Whether it is tables of `channel` that the profile was learned for."""
    return profile.codec == "channel" and stated(profile) is not None


def table_lengths(
    layer: Layer, number: int, origin: Origin, profile: Profile
) -> dict[str, NDArray[np.float64]]:
    """Ideal bits of each channel, all its numbers together, [heads, dim], with a profile's tables:
    of the layer's parts for which it has some. Keys take those of keys before RoPE where these take
    less. Raises ProfileError when the profile is of another model."""
    found = {}
    for name, part in layer.layout.parts.items():
        block, form = layer.block(name), part.form
        heads, dim = block.shape[1], block.shape[3]
        if not block.size:
            continue
        known = Context(
            form, number, name, layer.layout.first, origin, None, profile, layer.layout.rope
        )
        tables = tables_of(known, heads, dim)
        if tables is None:
            continue
        found[name] = _by_channel(block, tables, form)
        keys = keys_before_rope(block, known) if name == "k" else None
        before = None if keys is None else tables_of(known, heads, dim, before_rope=True)
        if keys is not None and before is not None:
            other = _by_channel(keys, before, form)
            if other.sum() < found[name].sum():
                found[name] = other
    return found


def table_frequencies(tables: Any, form: DType) -> list[NDArray[np.int64]]:
    """How often, of 1,024, each value of a shape occurs by tables of `channel`; the last is the
    escape. From what its slots say (codecs/channel/kernels.hpp)."""
    values, found = 2 << form.exponent_bits, []
    for entries in np.asarray(tables.entries()).astype(np.int64):
        table = np.zeros(values + 1, np.int64)
        there = entries[(entries & 0x7FF) > 0]
        escape = (there >> 11) & 1 > 0
        table[np.where(escape, values, (there >> 12) & 0x1FF)] = there & 0x7FF
        found.append(table)
    return found


def _by_channel(block: Bits, tables: Any, form: DType) -> NDArray[np.float64]:
    """The bits of numbers, [batch, heads, tokens, dim], with a profile's tables, [heads, dim]: no
    channel of theirs is constant, and every shape has an escape."""
    costs = []
    for table in table_frequencies(tables, form):
        bits = np.log2(table.sum()) - np.log2(np.maximum(table, 1))
        costs.append(np.where(table[:-1] > 0, bits[:-1], bits[-1] + ESCAPED_BITS))
    counts = channel_counts(block, form.name)
    heads, dim, values = counts.shape
    shape, base = np.asarray(tables.channels()).astype(np.int64).T
    relative = (np.arange(values) - base[:, None]) % values
    cost = np.array(costs)[shape[:, None], relative].reshape(heads, dim, values)
    return np.asarray((counts * cost).sum(axis=-1) + counts.sum(axis=-1) * form.mantissa_bits)
