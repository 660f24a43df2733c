"""A document that is predicted about as well as a real one, and the profile that does it, of any
shape: for speed where there is no model. Its ratio means nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvzip
from kvzip.codecs.predictive.density import START, densities, sine_table
from kvzip.codecs.predictive.groups import default_group, default_lanes
from kvzip.codecs.predictive.integers import packed

FOLLOWS, OWN = 0.97, 0.25
"""How much of a channel is that of the layer before, and how much is its own: two bits less."""


def predictable(
    layers: int, heads: int, dim: int, tokens: int, seed: int = 1
) -> tuple[kvzip.Snapshot, kvzip.Profile]:
    """A bf16 snapshot, and its profile: as large, and as much work, as one that was learned of a
    model without regions of tokens, whose layers each are predicted from up to three. Pairs of keys
    are turned by no angle."""
    rng = np.random.default_rng(seed)
    scale = 2.0 ** rng.uniform(-3, 3, 2 * heads * dim)
    state = rng.normal(size=(tokens, len(scale))).astype(np.float32)
    pairs: list[tuple[Any, Any]] = []
    for i in range(layers):
        if i:
            state = FOLLOWS * state + OWN * rng.normal(size=state.shape).astype(np.float32)
        bits = _bf16(state * scale.astype(np.float32)).reshape(tokens, 2, heads, dim)
        keys, values = (np.ascontiguousarray(bits[:, n].swapaxes(0, 1)) for n in range(2))
        pairs.append((keys, values))
    snapshot = kvzip.Snapshot.from_arrays(pairs, "bf16")
    return snapshot, _profile(layers, heads, dim, scale)


def _bf16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (numbers.view(np.uint32) + np.uint32(0x8000) >> np.uint32(16)).astype(np.uint16)


def _profile(layers: int, heads: int, dim: int, scale: NDArray[np.float64]) -> kvzip.Profile:
    width, half = len(scale), dim // 2
    group = default_group(width)
    turned = [h * dim + p for h in range(heads) for p in range(half)]
    keys = np.stack([turned, np.array(turned) + half], axis=1).reshape(-1)
    order = np.concatenate([keys, np.arange(width - len(keys))])
    scale = scale[np.concatenate([keys, len(keys) + np.arange(width - len(keys))])]
    tensors: dict[str, NDArray[Any]] = {"densities": densities()[0], "sine": sine_table()}
    about = []
    # What a step of an input is, in deviations; a chain of layers keeps them about the same.
    step = 6 / 127
    for i in range(layers):
        inputs = sorted({0, max(i - 2, 0), i - 1}) if i else []
        own = scale * (OWN if i else 1)
        unit = np.round(np.log2(own)) - 16
        size = 2.0**unit
        weight = np.zeros((width, width * len(inputs)), np.int8)
        if inputs:
            weight[:, -width:][np.diag_indices(width)] = 127
        deviation = 2**28 / np.maximum(0.8 * own / size, 1)
        all_pairs = heads * half
        turning = deviation[: 2 * all_pairs].reshape(all_pairs, 2, 1)
        layer: dict[str, NDArray[Any]] = {
            "order": order.astype(np.int32),
            "step": np.zeros(half, np.uint64),
            "unit": unit.astype(np.int8),
            "mean": np.zeros(width, np.int32),
            "input_scale": _int32(size / (step * scale) * 2**28),
            "bias": np.zeros((1, width), np.int32),
            "weight": packed(weight)[None],
            "weight_scale": _int32(FOLLOWS * step * scale / (127 * size) * 2**20)[None],
            "within": packed(np.zeros((width, width), np.int8))[None],
            "within_scale": np.zeros((1, width), np.int32),
            "density": np.full(width, START + 4, np.uint8),
            "inverse": _int32(deviation)[None],
            "pair_inverse": _int32(np.repeat(turning, 32, axis=2))[None],
            "pair_slope": np.zeros((1, all_pairs, 32), np.int32),
        }
        tensors |= {f"{i}.{name}": array for name, array in layer.items()}
        about.append({"inputs": inputs, "k": [heads, dim], "v": [heads, dim]})
    lanes = default_lanes([width] * layers, group)
    return kvzip.Profile(
        tensors, {"codec": "predictive", "group": group, "lanes": lanes, "layers": about}
    )


def _int32(values: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.clip(np.round(values), -(2**31) + 1, 2**31 - 1).astype(np.int32)
