"""Caches that are rounded to integers: references that are not exact, beside codecs that are."""

from __future__ import annotations

import numpy as np

from kvzip import dtypes
from kvzip.dtypes import Bits
from kvzip.errors import UnsupportedError
from kvzip.snapshot import Layer, Snapshot

LOSSY = {"int8": 8, "int4": 4}
"""Bits of the references that are not exact."""


def quantised(snapshot: Snapshot, bits: int) -> tuple[Snapshot, int]:
    """The snapshot with every number rounded to `bits`, and the bytes that it would take.

    Each channel of each head, keys and values apart, has its own scale, the largest magnitude over
    its tokens; ``round(x / scale * m) / m * scale`` with m = 2^(bits - 1) - 1. Bytes: the integers
    and one fp16 scale a channel. The last token stays as it is: `load_cache` compares its keys with
    what the model computes, and would take rounded ones for another text. Raises UnsupportedError
    for 8-bit floats.
    """
    import torch

    form = dtypes.get(snapshot.dtype)
    if form.bits == 8:
        raise UnsupportedError(f"{form.name} has eight bits already: no lossy reference for it")
    most = 2 ** (bits - 1) - 1
    layers, size = [], 0

    def rounded(part: Bits) -> Bits:
        nonlocal size
        kind = getattr(torch, form.torch)
        signed = part.view(part.dtype.str.replace("u", "i"))
        numbers = torch.from_numpy(np.array(signed)).view(kind).float()
        scale = numbers.abs().amax(dim=-2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        size += numbers.numel() * bits // 8 + 2 * scale.numel()
        back = (numbers / scale * most).round() / most * scale
        back[..., -1, :] = numbers[..., -1, :]
        return dtypes.as_bits(back.to(kind))[0]

    for layer in snapshot.layers:
        layers.append(Layer.of_kv(rounded(layer.k), rounded(layer.v), layer.layout))
    return Snapshot(layers, form.name, snapshot.token_ids, snapshot.origin), size
