"""Tables of `channel` in a profile, found by layer and part. `fit.py` learns them.

spec.md, "In a profile", says how they lie there.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from kvzip import dtypes
from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.channel.blocks import UNTURNED
from kvzip.dtypes import Bits, DType
from kvzip.errors import ProfileError, UnsupportedError
from kvzip.layout import PartLayout
from kvzip.profile import Profile

MOST_CHANNELS = 65_535
"""The most channels, heads x dim, that a part with tables has."""
BEFORE_ROPE = bytes([UNTURNED])
"""The tables of a part whose keys are coded by the profile's tables of keys before RoPE."""
# Tokens on which a profile's tables are tried, and what they may take more there than the part's
# own tables are thought to: 3 % is seen where they fit, since few tokens tell too little of a
# channel. And what a stream takes besides its numbers, in bits.
SAMPLE, MORE, _STREAM = 128, 0.05, 850
_FIELDS = {
    form.name: (form.exponent_bits, form.mantissa_bits)
    for form in map(dtypes.get, dtypes.NAMES)
    if form.is_float and form.bits <= 32
}


def takes(part: PartLayout) -> bool:
    """Whether there can be tables for a part."""
    _, heads, _, dim = part.block_shape
    return part.dtype in _FIELDS and heads * dim <= MOST_CHANNELS


def fields(form: DType) -> tuple[int, int]:
    """Bits of exponent and of mantissa in the numbers of a format that the codec takes. Raises
    UnsupportedError for others: it takes floats of up to 32 bits."""
    found = _FIELDS.get(form.name)
    if found is None:
        raise UnsupportedError(f"codec 'channel' takes no {form.name}")
    return found


class Stated(msgspec.Struct, frozen=True):
    """What a profile says of the numbers that its tables are for."""

    dtype: str
    layers: tuple[dict[str, tuple[int, int]], ...]
    """Heads and dim of each layer's parts that there are tables for, by the parts' names."""


def stated(profile: Profile | None) -> Stated | None:
    """None where there is no profile, or one without tables. Raises ProfileError."""
    if profile is None or "channel" not in profile.description:
        return None
    found: Stated | None = profile.made.get("channel.stated")
    if found is None:
        try:
            found = msgspec.convert(profile.description["channel"], Stated)
            dtypes.get(found.dtype)
        except (msgspec.ValidationError, UnsupportedError) as error:
            raise ProfileError(
                f"what the profile says of its tables makes no sense: {error}"
            ) from None
        profile.made["channel.stated"] = found
    return found


def tables_of(
    context: Context, heads: int, dim: int, before_rope: bool = False
) -> _native.ChannelTables | None:
    """The profile's tables for the context's layer and part, or for its keys before RoPE; None
    where there is no profile, or one without tables for them. Raises ProfileError when they are
    another model's, or make no sense."""
    profile = context.profile
    found = stated(profile)
    if found is None:
        return None
    layer, part, form = context.layer, context.part, context.dtype
    made = profile.made.setdefault("channel", {})
    key = layer, part, heads, dim, form.name, before_rope
    if key not in made:
        parts = found.layers[layer] if layer < len(found.layers) else None
        if parts is not None and part not in parts:
            return None  # it is a state, say, or of another format than the rest
        if found.dtype != form.name:
            raise ProfileError(f"the profile's tables are for {found.dtype}, not {form.name}")
        if parts is None or parts[part] != (heads, dim):
            raise ProfileError(
                f"the profile is of another model: it has no layer {layer} whose {part} has "
                f"{heads} heads of {dim}"
            )
        name = tensor_name(layer, part, before_rope)
        if name not in profile.tensors and (before_rope or not heads * dim):
            return None  # nothing was learned of them
        made[key] = _read(profile, name, heads, dim, form)
    tables: _native.ChannelTables = made[key]
    return tables


def rows(block: Bits) -> Bits:
    """The block itself where each token's numbers lie side by side, else a copy that does."""
    side_by_side = block.strides[3] == block.itemsize or block.shape[3] == 1
    return block if side_by_side else np.ascontiguousarray(block)


def own_bits(numbers: Bits, form: DType) -> float:
    """What numbers, [batch, heads, tokens, dim], take by tables of their own, about."""
    bits: float = _native.channel_bits(numbers, *fields(form))
    return bits


def chosen_of_profile(cached: Bits, before: Bits | None, context: Context) -> bytes | None:
    """What the file has in place of tables where the profile's code a part: of its tables for the
    part, or of those for keys before RoPE, the ones that take less. None where tables of the part's
    own are thought to take clearly less than either.

    `cached`, `before`: the first `SAMPLE` tokens of the part, and of its keys before RoPE, if that
    is how they would be coded.
    """
    heads, dim = cached.shape[1], cached.shape[3]
    sample = cached if before is None else before
    choices = [(b"", tables_of(context, heads, dim), cached)]
    if before is not None:
        choices.append((BEFORE_ROPE, tables_of(context, heads, dim, before_rope=True), before))
    bits = {
        stored: _bits(known, numbers) for stored, known, numbers in choices if known is not None
    }
    if not bits:
        return None
    least = min(bits, key=bits.__getitem__)
    return least if bits[least] <= (1 + MORE) * own_bits(sample, context.dtype) else None


def _bits(tables: _native.ChannelTables, sample: Bits) -> float:
    """What the numbers take with these tables, without what their streams begin with."""
    coded: bytes | None = tables.encode(sample)
    if coded is None:
        return math.inf
    batch, _, tokens, _ = sample.shape
    return 8 * len(coded) - _STREAM * len(tables.streams(coded, batch, tokens))


def _read(profile: Profile, name: str, heads: int, dim: int, form: DType) -> _native.ChannelTables:
    """The tables as the profile's tensors hold them. Raises ProfileError."""
    # Blocks come to them now and then: what is made of them stays.
    how = (heads, dim, *fields(form), True)
    try:
        tables = _native.ChannelTables(profile.tensors[name].tobytes(), *how)
        tables.channels()  # they are read now
    except (KeyError, ValueError) as error:
        raise ProfileError(f"the profile's tables {name} make no sense: {error}") from None
    return tables


def tensor_name(layer: int, part: str, before_rope: bool = False) -> str:
    """The name of the tensor that holds the tables of a part, or those of its keys before RoPE."""
    return f"channel.{layer}.{part}" + (".before_rope" if before_rope else "")
