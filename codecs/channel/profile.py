"""Tables of `channel` in a profile: learned from documents, and found again by layer and part.

spec.md, "In a profile", says how they lie there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from kvzip import dtypes
from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.dtypes import Bits, DType
from kvzip.errors import ProfileError, UnsupportedError
from kvzip.layout import PartLayout
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.statistics.documents import Item, Progress, check_channels, load

MOST_CHANNELS = 65_535
"""The most channels, heads x dim, that a part with tables has."""
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


def fit(snapshots: Sequence[Item], progress: Progress | None = None) -> Profile:
    """Tables for every layer's keys and values, which code those of the documents best that there
    are, and can code any others. See :meth:`kvzip.Profile.fit`."""
    if not snapshots:
        raise ProfileError("a profile needs at least one snapshot to learn from")
    first = load(snapshots[0])
    check_channels(first)
    form, shapes = dtypes.get(first.dtype), _shapes(first)
    divided = fields(form)
    if not shapes:
        raise UnsupportedError(
            f"codec 'channel' learns nothing of this snapshot: no part has tokens, is {form.name} "
            f"and has at most {MOST_CHANNELS:,} channels"
        )
    counts = {
        key: _native.ChannelCounts(*shape, *divided)
        for key, shape in shapes.items()
        if math.prod(shape)
    }
    tokens = 0
    for done, item in enumerate(snapshots):
        snapshot = load(item)
        if _shapes(snapshot) != shapes or snapshot.dtype != first.dtype:
            raise ProfileError("the snapshots are of different models or dtypes")
        for (i, part), counted in counts.items():
            array = snapshot.layers[i].layout.parts[part].as_block(snapshot.layers[i].part(part))
            if array.size:
                counted.add(rows(array))
        tokens += snapshot.tokens
        if progress is not None:
            progress("documents", done + 1, len(snapshots))
    tensors = {}
    for (i, part), counted in counts.items():
        try:
            tensors[_name(i, part)] = np.frombuffer(counted.tables(), np.uint8)
        except ValueError:
            raise ProfileError(f"the snapshots hold no tokens of layer {i}") from None
    origin = first.origin
    return Profile(
        tensors,
        {
            "codec": "channel",
            "model": origin.model,
            "revision": origin.revision,
            "architecture": origin.architecture,
            "tokens": tokens,
            "documents": len(snapshots),
            "channel": {
                "dtype": form.name,
                "layers": [
                    {part: shape for (j, part), shape in shapes.items() if j == i}
                    for i in range(len(first.layers))
                ],
            },
        },
    )


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


def tables_of(context: Context, heads: int, dim: int) -> _native.ChannelTables | None:
    """The profile's tables for the context's layer and part; None where there is no profile, or one
    without tables for them. Raises ProfileError when they are another model's, or make no sense."""
    profile = context.profile
    found = stated(profile)
    if found is None:
        return None
    layer, part, form = context.layer, context.part, context.dtype
    made = profile.made.setdefault("channel", {})
    key = layer, part, heads, dim, form.name
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
        made[key] = _read(profile, layer, part, heads, dim, form)
    tables: _native.ChannelTables = made[key]
    return tables


def rows(block: Bits) -> Bits:
    """The block itself where each token's numbers lie side by side, else a copy that does."""
    side_by_side = block.strides[3] == block.itemsize or block.shape[3] == 1
    return block if side_by_side else np.ascontiguousarray(block)


def _read(
    profile: Profile, layer: int, part: str, heads: int, dim: int, form: DType
) -> _native.ChannelTables:
    """The tables as the profile's tensors hold them. Raises ProfileError."""
    # Blocks come to them now and then: what is made of them stays.
    how = (heads, dim, *fields(form), True)
    try:
        tables = _native.ChannelTables(profile.tensors[_name(layer, part)].tobytes(), *how)
        tables.channels()  # they are read now
    except (KeyError, ValueError) as error:
        raise ProfileError(
            f"the profile's tables of layer {layer} {part} make no sense: {error}"
        ) from None
    return tables


def _name(layer: int, part: str) -> str:
    """The name of the tensor that holds the tables."""
    return f"channel.{layer}.{part}"


def _shapes(snapshot: Snapshot) -> dict[tuple[int, str], tuple[int, int]]:
    """Heads and dim of all parts that have tokens and the snapshot's format, and that the codec
    takes."""
    return {
        (i, name): (part.size("h"), part.size("d"))
        for i, name, part in snapshot.layout.parts()
        if part.tokens is not None and part.dtype == snapshot.dtype and takes(part)
    }
