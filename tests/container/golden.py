"""Golden files: a file of each codec and dtype, which every later version must still read.

`python tests/container/golden.py` writes those that are missing for this version of the container.
Files that are there stay as they are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import kvzip
from kvzip import PartLayout, dtypes
from kvzip.container.format import VERSION
from kvzip.snapshot import Layer

FOLDER = Path(__file__).parents[1] / "golden"
MANY, MANY_HEADS = "channel-of-47-heads", 47
"""Names the file whose blocks have more than one stream."""
ON_GRID = "channel-on-a-grid"
"""Names the file whose keys are on a grid."""
BEFORE_ROPE = "channel-before-rope"
"""Names the file whose keys are stored as they were before RoPE."""
BLOCK_TOKENS = 48
"""Each part has two blocks, of which the second is smaller."""


def snapshot(dtype: str, heads: int = 2) -> kvzip.Snapshot:
    """Numbers from integer arithmetic alone, so that they are the same for ever."""
    form = dtypes.get(dtype)
    layers = []
    for layer in range(2):
        parts = []
        for part in range(2):
            n = np.arange(heads * 70 * 5, dtype=np.uint64) + np.uint64(1000 * layer + 100 * part)
            n = n * np.uint64(0x9E3779B97F4A7C15)
            if form.is_float:
                exponent = np.uint64((1 << (form.exponent_bits - 1)) - 2) - (n >> np.uint64(62))
                bits = (n >> np.uint64(61) & np.uint64(1)) << np.uint64(form.bits - 1)
                bits |= exponent << np.uint64(form.mantissa_bits)
                bits |= n >> np.uint64(20) & np.uint64((1 << form.mantissa_bits) - 1)
            else:
                bits = n >> np.uint64(60)
            parts.append(bits.reshape(heads, 70, 5).astype(form.uint))
        layers.append(tuple(parts))
    return kvzip.Snapshot.from_arrays(layers, dtype, np.arange(70), kvzip.Origin(model="golden"))


def on_grid() -> kvzip.Snapshot:
    """Keys of which 32 channels are fp8 times a power of two for each token, but for a few, and 8
    are not; and values that are on no grid. From integer arithmetic alone."""
    layers = []
    for layer in range(2):
        n = np.arange(2 * 70 * 40, dtype=np.uint64) + np.uint64(10_000 * layer)
        n = (n * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(30)).reshape(2, 70, 40)
        some = n >> np.uint64(20) & np.uint64(7)
        noise = (n & np.uint64(0x807F)) | (some + np.uint64(118)) << np.uint64(7)
        scale = (np.arange(70, dtype=np.uint64) * np.uint64(7) % np.uint64(5))[:, None]
        k = (n & np.uint64(0x8070)) | (some + scale + np.uint64(118)) << np.uint64(7)
        k[..., 32:] = noise[..., 32:]
        k[1, 5::20, 3] |= np.uint64(1)
        layers.append((k.astype(np.uint16), noise.astype(np.uint16)))
    return kvzip.Snapshot.from_arrays(layers, "bf16", np.arange(70), kvzip.Origin(model="golden"))


def before_rope() -> kvzip.Snapshot:
    """Keys that RoPE turned, but for a pair in each layer, after the first 30 tokens, which are
    gone; 4 of their 12 channels are not turned. From single steps of IEEE 754, which are the same
    for ever, and of cosines and sines 8 bits."""
    frequencies = np.float32(2) ** -np.arange(4, dtype=np.float32)
    angle = np.arange(30, 100, dtype=np.float32)[:, None] * frequencies
    cos, sin = (_bf16(f(angle.astype(np.float64)).astype(np.float32)) for f in (np.cos, np.sin))
    layers = []
    for layer in range(2):
        n = np.arange(2 * 70 * 12, dtype=np.uint64) + np.uint64(10_000 * layer)
        n = (n * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(30)).reshape(2, 70, 12)
        channel = np.arange(12, dtype=np.uint64)
        some = n >> np.uint64(22) & np.uint64(1)
        k = n & np.uint64(0x7F) | (some + channel + np.uint64(118)) << np.uint64(7)
        k = (k | (channel & np.uint64(1)) << np.uint64(15)).astype(np.uint16)
        wide = (k.astype(np.uint32) << 16).view(np.float32)
        a, b = wide[..., :4], wide[..., 4:8]
        first = _bf16(_bf16(a * cos) - _bf16(b * sin))
        second = _bf16(_bf16(b * cos) + _bf16(a * sin))
        turned = np.concatenate([first, second, wide[..., 8:]], -1).view(np.uint32) >> 16
        keys = turned.astype(np.uint16)
        keys[1, 60, 2] ^= 0x4003
        layers.append((keys, k))
    form = kvzip.LayerLayout.of_kv((2, 70, 12), (2, 70, 12), "bf16", 100, "sliding", 70, 0)
    origin = kvzip.Origin(model="golden", rope=({"inv_freq": frequencies.tolist()},))
    held = [Layer.of_kv(*pair, form) for pair in layers]
    return kvzip.Snapshot(held, "bf16", np.arange(100), origin)


def _bf16(x: np.ndarray) -> np.ndarray:
    """Each float32 to the nearest number of bf16, of two as near ones to the even one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def names() -> dict[str, tuple[str, str]]:
    """Of the files of each codec and each dtype that it takes, the codec and the dtype."""
    return {
        f"{codec}-{dtype}": (codec, dtype)
        for codec in kvzip.codec_names()
        for dtype in dtypes.NAMES
        if kvzip.get_codec(codec).takes(PartLayout(dtype, (2, 9, 64), "htd"), "full", "k")
    }


def write_missing(folder: Path = FOLDER) -> list[Path]:
    """Write the files that `folder` lacks, of every codec that needs no profile. Returns their
    paths."""
    now = folder / f"v{VERSION}"
    now.mkdir(exist_ok=True)
    written = []
    for name, (codec, dtype) in names().items():
        path = now / f"{name}.kvz"
        if not kvzip.get_codec(codec).needs_profile and not path.exists():
            path.write_bytes(kvzip.encode(snapshot(dtype), codec, block_tokens=BLOCK_TOKENS))
            written.append(path)
    path = now / f"{MANY}-bf16.kvz"
    if not path.exists():
        path.write_bytes(kvzip.encode(snapshot("bf16", MANY_HEADS), "channel"))
        written.append(path)
    path = now / f"{BEFORE_ROPE}-bf16.kvz"
    if not path.exists():
        path.write_bytes(kvzip.encode(before_rope(), "channel", block_tokens=BLOCK_TOKENS))
        written.append(path)
    path = now / f"{ON_GRID}-bf16.kvz"
    if not path.exists():
        path.write_bytes(kvzip.encode(on_grid(), "channel", block_tokens=BLOCK_TOKENS))
        written.append(path)
    return written


if __name__ == "__main__":
    for path in write_missing():
        print(path)
