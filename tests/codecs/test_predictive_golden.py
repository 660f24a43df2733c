"""Files of the predictive codec, as earlier versions wrote them, with the profile that they need.

`write_golden` makes a set anew, for a format that changed before its release.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from predictive_profiles import kinds, with_rope
from support import assert_same

import kvzip
from kvzip import dtypes
from kvzip.codecs import _native

GOLDEN = Path(__file__).parents[1] / "golden"
PROFILES = sorted(GOLDEN.glob("v*/**/predictive.kvprofile"))
FILES = [(p, f) for p in PROFILES for f in sorted(p.parent.glob("predictive-*.kvz"))]
TOKENS, BLOCK = 150, 96
TURNED = "rope"
"""The folder of files whose keys RoPE turned in bf16."""
FREQUENCIES = np.array([1, 0.25, 0.0625], np.float32)


def noise(*where: np.ndarray | int) -> np.ndarray:
    """Integers of 16 bits, signed, that look random; the same for ever."""
    mixed = np.uint64(0)
    for value in np.broadcast_arrays(*where):
        mixed = (mixed ^ value.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return (mixed >> np.uint64(17) & np.uint64(0xFFFF)).astype(np.int64) - 0x8000


def bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of a format, the greatest that are not above multiples of 2^-12."""
    form = dtypes.get(dtype)
    numbers = np.arange(1 << min(form.bits, 16)).astype(form.uint if form.bits < 32 else np.uint16)
    with np.errstate(invalid="ignore"):  # NaNs
        known = dtypes.to_float32(numbers, dtype if form.bits < 32 else "bf16").astype(np.float64)
    finite = np.isfinite(known)
    order = np.argsort(known[finite], kind="stable")
    place = np.searchsorted(known[finite][order], values / 4096.0, side="right") - 1
    found = numbers[finite][order][place]
    if form.bits < 32:
        return found
    return found.astype(np.uint32) << np.uint32(16) | (values & 0xFFFF).astype(np.uint32)


def snapshot(dtype: str, document: int, turned: bool = False) -> kvzip.Snapshot:
    """Three layers whose numbers tell of each other, made of integers alone; `turned`: by RoPE in
    bf16, which is the same everywhere."""
    position = np.arange(TOKENS)
    ids = noise(position, document) % 40
    layers = []
    for layer in range(3):
        parts = []
        for part in range(2):
            channel = np.arange(2 * 6)[None, :]
            token = ids[:, None]
            values = noise(token, channel, 1) // 4 * (layer + 1)
            values += noise(token, (channel + 1) % 12, 1) // 8
            values += noise(position[:, None] + 1000 * document, channel, layer + 3 * part) // 32
            parts.append(
                np.ascontiguousarray(bits_of(values.reshape(TOKENS, 2, 6), dtype).swapaxes(0, 1))
            )
        layers.append(tuple(parts))
    if not turned:
        origin = kvzip.Origin(model="golden", rope=({"rope_theta": 1e4},))
        return kvzip.Snapshot.from_arrays(layers, dtype, ids.astype(np.uint32), origin)
    rotation = _native.Rotation(FREQUENCIES)
    for k, _ in layers:
        rotation.turn(k[np.newaxis], 0, 1)
    origin = kvzip.Origin(model="golden", rope=({"inv_freq": FREQUENCIES.tolist()},))
    return with_rope(layers, ids.astype(np.uint32), origin)


def write_golden(folder: Path) -> None:
    """The files of a version; those whose keys were turned into a folder of that name."""
    turned = folder.name == TURNED
    known = [snapshot("bf16", d, turned) for d in range(1, 13)]
    profile = kvzip.Profile.fit(known, regions=[1, 2, 3])
    profile.save(folder / "predictive.kvprofile")
    for dtype in ("bf16",) if turned else ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2"):
        made = snapshot(dtype, 0, turned)
        blob = kvzip.encode(made, "predictive", profile, block_tokens=BLOCK)
        (folder / f"predictive-{dtype}.kvz").write_bytes(blob)


def written(path: Path) -> kvzip.Snapshot:
    """What a golden file holds."""
    dtype = path.stem.removeprefix("predictive-")
    return snapshot(dtype, 0, path.parent.name == TURNED)


def test_there_are_files():
    assert len(FILES) >= 6 and any(f.parent.name == TURNED for _, f in FILES)


@pytest.mark.parametrize(("profile", "path"), FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
@pytest.mark.parametrize("simd", ["scalar", "avx2", "avx512"])
def test_every_released_version_stays_readable(profile, path, simd):
    known = kvzip.Profile.load(profile)
    before = _native.simd()
    if not _native.set_simd(simd):
        pytest.skip(f"this processor has no {simd}")
    try:
        decoded = kvzip.decode(path, known)
    finally:
        _native.set_simd(before)
    assert_same(decoded, written(path))


@pytest.mark.parametrize("path", [f for _, f in FILES], ids=lambda p: p.stem)
def test_they_are_predicted(path):
    """The profile's arithmetic is what a file is read by, not `channel` or `raw` in its place."""
    profile = kvzip.Profile.load(path.parent / "predictive.kvprofile")
    damaged = {name: array.copy() for name, array in profile.tensors.items()}
    damaged["1.bias"] += 1 << 10
    other = kvzip.Profile(damaged, profile.description)
    made = kvzip.encode(written(path), "predictive", other)
    assert len(made) != path.stat().st_size


def test_pairs_before_rope_are_among_them():
    path = next(f for _, f in FILES if f.parent.name == TURNED)
    profile = kvzip.Profile.load(path.parent / "predictive.kvprofile")
    assert 4 in kinds(path, profile)[1, "k"]
    assert_same(kvzip.decode(path, profile), written(path))
