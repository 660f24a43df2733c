"""Numbers that only look like a cache's, for trying a sweep out: they are the cache of no model,
and no verdict on one."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvzip import dtypes
from kvzip.codec_spec import parse_spec
from kvzip.errors import UnsupportedError, UsageError
from kvzip.snapshot import Snapshot

PREFIX = "synthetic"
"""What such a model's name begins with, as in ``synthetic:layers=4,heads=3,dim=64``."""


def names(model: str) -> bool:
    """Whether a model's name stands for synthetic numbers."""
    return model.partition(":")[0] == PREFIX


def shape(model: str) -> dict[str, int]:
    """Layers, heads and dim that the name gives. Raises UsageError when it gives anything else."""
    found = {"layers": 4, "heads": 3, "dim": 64}
    wanted = UsageError(f"model {model!r}: write synthetic:layers=4,heads=3,dim=64")
    try:
        given = parse_spec(model)
    except UnsupportedError:
        raise wanted from None
    del given["id"]
    for name, value in given.items():
        if name not in found or not isinstance(value, int) or value < 1:
            raise wanted
        found[name] = value
    return found


def make(model: str, dtype: str, tokens: int, seed: int) -> Snapshot:
    """A snapshot of numbers that have a scale and a mean for each channel, their bits cut from
    float32. Raises UsageError for a dtype other than bf16, fp16 and fp32."""
    form, sizes = dtypes.get(dtype), shape(model)
    if form.name not in ("bf16", "fp16", "fp32"):
        raise UsageError(f"model {model!r} makes bf16, fp16 and fp32, not {form.name}")
    rng = np.random.default_rng(seed)
    heads, dim = sizes["heads"], sizes["dim"]

    def part() -> Any:
        scale = 2.0 ** rng.uniform(-6, 3, (heads, 1, dim))
        mean = rng.normal(size=scale.shape) * (rng.random(scale.shape) < 0.3)
        numbers = ((rng.normal(size=(heads, tokens, dim)) + mean) * scale).astype(np.float32)
        if form.name == "fp16":
            return numbers.astype(np.float16).view(np.uint16)
        bits = numbers.view(np.uint32)
        return bits if form.name == "fp32" else (bits >> 16).astype(np.uint16)

    layers = [(part(), part()) for _ in range(sizes["layers"])]
    return Snapshot.from_arrays(layers, form.name, rng.integers(0, 1000, tokens))
