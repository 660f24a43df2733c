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

FOLDER = Path(__file__).parents[1] / "golden"
MANY = "channel-of-31-heads"
"""Names the files whose blocks have more than one stream; they are not written anew here."""
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
    return written


if __name__ == "__main__":
    for path in write_missing():
        print(path)
