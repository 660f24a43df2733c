"""A few documents decoded on a GPU, good and damaged: what `make test-gpu` sanitizes."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

import kvzip
from kvzip import dtypes
from kvzip.benchmarks.predictable import predictable


def main() -> None:
    rng = np.random.default_rng(1)
    for dtype in ("bf16", "fp32", "fp8_e4m3fn"):
        kind = getattr(torch, dtypes.get(dtype).torch)
        bits = dtypes.as_bits(torch.randn(2, 300, 128).mul(3).to(kind))[0]
        snapshot = kvzip.Snapshot.from_arrays([(bits, bits[:, ::-1])], dtype)
        for codec in ("channel", "planes", "raw"):
            blob = kvzip.encode(snapshot, codec, block_tokens=256)
            kvzip.decode(blob, device="cuda")
            kvzip.decode(blob, device="cuda", tokens=(5, 290))
            cache = torch.zeros(2, 24, 16, 2, 128, dtype=kind, device="cuda")
            pages = list(range(19, 0, -1))
            kvzip.decode(blob, device="cuda", out=[(cache[0], cache[1])], pages=pages)
            damaged = bytearray(blob)
            for at in rng.integers(len(blob) // 2, len(blob), 40):
                damaged[at] ^= 1 << int(rng.integers(8))
            with contextlib.suppress(kvzip.KVZipError):
                kvzip.decode(bytes(damaged), device="cuda")
    snapshot, profile = predictable(3, 2, 64, 300)
    blob = kvzip.encode(snapshot, "predictive", profile, block_tokens=128)
    for bad in (0, *rng.integers(len(blob) // 2, len(blob), 10)):
        damaged = bytearray(blob)
        damaged[bad] ^= 255 if bad else 0
        with contextlib.suppress(kvzip.KVZipError):
            kvzip.decode(bytes(damaged), profile, device="cuda")


if __name__ == "__main__":
    main()
