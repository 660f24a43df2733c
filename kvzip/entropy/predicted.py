"""Which layers predict each other: those with keys and values of the sequence's tokens in the
cache's own format, whatever else they have. They follow each other in the order of the model."""

from __future__ import annotations

from kvzip.layout import KV, LayerLayout
from kvzip.snapshot import Snapshot
from kvzip.statistics.rope import ChannelOrder, has_pairs_side_by_side

_AXES = {"h", "t", "d"}


def predicted_layers(snapshot: Snapshot) -> list[int]:
    """The numbers of the layers whose keys and values are predicted."""
    layers = enumerate(snapshot.layout.layers)
    return [i for i, layer in layers if not obstacle(layer, snapshot.dtype)]


def unpredicted(snapshot: Snapshot) -> dict[str, list[int]]:
    """What is not predicted, and the numbers of the layers that have it. Layers without parts have
    nothing to predict."""
    found: dict[str, list[int]] = {}
    for i, layer in enumerate(snapshot.layout.layers):
        said = obstacle(layer, snapshot.dtype)
        others = ", ".join(name for name in layer.parts if name not in KV)
        if not said and others:
            said = f"{others} beside keys and values"
        if layer.parts and said:
            found.setdefault(said, []).append(i)
    return found


def orders(snapshot: Snapshot) -> list[ChannelOrder]:
    """The coding order of each predicted layer."""
    layers = [snapshot.layers[i] for i in predicted_layers(snapshot)]
    origin, dtype = snapshot.origin, snapshot.dtype
    side_by_side = has_pairs_side_by_side(layers, origin, dtype)
    return [ChannelOrder(layer.layout, origin, dtype, side_by_side) for layer in layers]


def obstacle(layer: LayerLayout, dtype: str) -> str:
    """What a layer has that is not predicted, in place of keys and values that are; "" for a layer
    whose keys and values are predicted."""
    if not layer.parts:
        return "no parts"
    if not set(KV) <= set(layer.parts):
        return f"{', '.join(layer.parts)} in place of keys and values"
    if not layer.counts_tokens:
        return "an encoder's keys and values"
    parts = [layer.parts[name] for name in KV]
    if any(set(part.axes) - {"b"} != _AXES for part in parts):
        return "keys and values of other axes than heads, tokens and dim"
    formats = list(dict.fromkeys(part.dtype for part in parts))
    if formats != [dtype]:
        return f"keys and values in {' and '.join(formats)}, not {dtype}"
    if not all(part.line_numbers for part in parts):
        return "keys or values without channels"
    return ""
