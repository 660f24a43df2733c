"""What `channel` learns from documents: tables for a profile.

spec.md, "In a profile", says how they lie there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kvzip import dtypes
from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.channel.profile import MOST_CHANNELS, fields, rows, takes, tensor_name
from kvzip.codecs.channel.rotation import unturned
from kvzip.dtypes import DType
from kvzip.errors import ProfileError, UnsupportedError
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.statistics.documents import Item, Progress, check_channels, difference, load

Shapes = dict[tuple[int, str], tuple[int, int]]
"""Heads and dim of parts, by their layer's number and their name."""


def fit(snapshots: Sequence[Item], progress: Progress | None = None) -> Profile:
    """Tables for every layer's keys and values, which code those of the documents best that there
    are, and can code any others; and tables of the keys before RoPE of layers where they are to be
    had and take less. See :meth:`kvzip.Profile.fit`."""
    if not snapshots:
        raise ProfileError("a profile needs at least one snapshot to learn from")
    first = load(snapshots[0])
    check_channels(first)
    form, shapes = dtypes.get(first.dtype), _shapes(first)
    fields(form)  # raises for a format that the codec does not take
    if not shapes:
        raise UnsupportedError(
            f"codec 'channel' learns nothing of this snapshot: no part has tokens, is {form.name} "
            f"and has at most {MOST_CHANNELS:,} channels"
        )
    counts, tokens = _counted(snapshots, first, form, shapes, progress)
    tensors = {}
    for (i, part, before_rope), counted in counts.items():
        try:
            tensors[tensor_name(i, part, before_rope)] = np.frombuffer(counted.tables(), np.uint8)
        except ValueError:
            raise ProfileError(f"the snapshots hold no tokens of layer {i}") from None
    origin = first.origin
    layers: list[dict[str, tuple[int, int]]] = [{} for _ in first.layers]
    for (i, part), shape in shapes.items():
        layers[i][part] = shape
    return Profile(
        tensors,
        {
            "codec": "channel",
            "model": origin.model,
            "revision": origin.revision,
            "architecture": origin.architecture,
            "tokens": tokens,
            "documents": len(snapshots),
            "channel": {"dtype": form.name, "layers": layers},
        },
    )


def _counted(
    snapshots: Sequence[Item],
    first: Snapshot,
    form: DType,
    shapes: Shapes,
    progress: Progress | None,
) -> tuple[dict[tuple[int, str, bool], _native.ChannelCounts], int]:
    """How often the documents' values occur in each channel of a layer's part; with True, of its
    keys before RoPE. And how many tokens the documents have. Raises ProfileError when one is not of
    the model of the `first`."""

    def new(shape: tuple[int, int]) -> _native.ChannelCounts:
        return _native.ChannelCounts(*shape, *fields(form))

    counts = {(*key, False): new(shape) for key, shape in shapes.items() if math.prod(shape)}
    parts = list(counts)
    tokens = 0
    for done, item in enumerate(snapshots):
        snapshot = load(item)
        if found := difference(snapshot, first):
            raise ProfileError(found)
        for i, part, _ in parts:
            array = rows(snapshot.layers[i].block(part))
            if not array.size:
                continue
            counts[i, part, False].add(array)
            keys = unturned(array, _context(snapshot, form, i, part))
            if keys is not None:
                before = i, part, True
                if before not in counts:
                    counts[before] = new(shapes[i, part])
                counts[before].add(keys.array)
        tokens += snapshot.tokens
        if progress is not None:
            progress("documents", done + 1, len(snapshots))
    return counts, tokens


def _context(snapshot: Snapshot, form: DType, layer: int, part: str) -> Context:
    """The context of all that a layer holds of a part."""
    held = snapshot.layout.layers[layer]
    first = held.span(part)[0]
    return Context(form, layer, part, first, snapshot.origin, rope=held.rope)


def _shapes(snapshot: Snapshot) -> Shapes:
    """Heads and dim of all parts that have tokens and the snapshot's format, and that the codec
    takes."""
    return {
        (i, name): (part.size("h"), part.size("d"))
        for i, name, part in snapshot.layout.parts()
        if part.tokens is not None and part.dtype == snapshot.dtype and takes(part)
    }
