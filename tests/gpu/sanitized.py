"""A few documents decoded on a GPU, good and damaged: what `make test-gpu` sanitizes."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

import kvzip
from kvzip import dtypes
from kvzip.benchmarks.predictable import predictable
from kvzip.codecs import _native
from kvzip.testing import reseal


def turned_keys(rng: np.random.Generator) -> None:
    """Keys before RoPE, some with exceptions, into arrays and pages."""
    frequencies = (1e4 ** -(np.arange(32) / 32)).astype(np.float32)
    wide = np.exp2(rng.integers(-6, 6, (1, 2, 1, 80)))
    k = (rng.standard_normal((1, 2, 300, 80)) * wide).astype(np.float32).view(np.uint32) >> 16
    k = k.astype(np.uint16)
    _native.Rotation(frequencies).turn(k, 0, 1)
    k[0, :, ::40, ::32] = 0x7F80
    layout = kvzip.LayerLayout.of_kv(k[0].shape, k[0].shape, "bf16", 300, rope=0)
    origin = kvzip.Origin(rope=({"inv_freq": frequencies.tolist()},))
    layer = kvzip.Layer.of_kv(k[0], k[0, ::-1], layout)
    snapshot = kvzip.Snapshot([layer], "bf16", origin=origin)
    blob = kvzip.encode(snapshot, "channel:keys=before_rope", block_tokens=128)
    k, v = (tensor.cuda() for tensor in snapshot.tensors()[0])
    parts = {name: dtypes.held_bits(tensor)[0] for name, tensor in (("k", k), ("v", v))}
    there = kvzip.Snapshot([kvzip.Layer(parts, layout)], "bf16", origin=origin)
    assert kvzip.encode(there, block_tokens=128, device="cuda") == blob
    kvzip.decode(blob, device="cuda", tokens=(5, 290))
    cache = torch.zeros(2, 24, 16, 2, 80, dtype=torch.bfloat16, device="cuda")
    out = [(cache[0], cache[1])]
    kvzip.decode(blob, device="cuda", out=out, pages=list(range(19, 0, -1)))
    with kvzip.open(blob) as reader:
        row = reader.index.rows[0, "k"][1]
        begin = reader.index.offset[row]
    for at in (4, 5, 16, 17, 18, 19, 24, 32, 300):
        damaged = bytearray(blob)
        damaged[begin + at] ^= 255
        with contextlib.suppress(kvzip.KVZipError):
            kvzip.decode(reseal(damaged), device="cuda")


def main() -> None:
    rng = np.random.default_rng(1)
    for dtype in ("bf16", "fp32", "fp8_e4m3fn"):
        kind = getattr(torch, dtypes.get(dtype).torch)
        bits = dtypes.as_bits(torch.randn(2, 300, 128).mul(3).to(kind))[0]
        snapshot = kvzip.Snapshot.from_arrays([(bits, bits[:, ::-1])], dtype)
        for codec in ("channel", "planes", "raw", "lz4"):
            blob = kvzip.encode(snapshot, codec, block_tokens=256)
            kvzip.decode(blob, device="cuda")
            there = kvzip.Snapshot.from_arrays([[t.cuda() for t in snapshot.tensors()[0]]])
            assert (
                kvzip.decode(kvzip.encode(there, codec, block_tokens=256, device="cuda"))
                == snapshot
            )
            kvzip.decode(blob, device="cuda", tokens=(5, 290))
            cache = torch.zeros(2, 24, 16, 2, 128, dtype=kind, device="cuda")
            pages = list(range(19, 0, -1))
            kvzip.decode(blob, device="cuda", out=[(cache[0], cache[1])], pages=pages)
            damaged = bytearray(blob)
            for at in rng.integers(len(blob) // 2, len(blob), 40):
                damaged[at] ^= 1 << int(rng.integers(8))
            with contextlib.suppress(kvzip.KVZipError):
                kvzip.decode(bytes(damaged), device="cuda")
    turned_keys(rng)
    snapshot, profile = predictable(3, 2, 64, 300)
    blob = kvzip.encode(snapshot, "predictive", profile, block_tokens=128)
    for bad in (0, *rng.integers(len(blob) // 2, len(blob), 10)):
        damaged = bytearray(blob)
        damaged[bad] ^= 255 if bad else 0
        with contextlib.suppress(kvzip.KVZipError):
            kvzip.decode(bytes(damaged), profile, device="cuda")


if __name__ == "__main__":
    main()
