"""What is on a grid is found and widened to the same bits; what is on none costs nothing."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from grids.reference import NARROW, WIDE, bits, values, widened
from hypothesis import given
from hypothesis import strategies as st
from support import cache_like, random_bits

import kvzip
from kvzip.codecs import _native
from kvzip.errors import KVZipError
from kvzip.grids import Found, Grid, find, widen

SHAPES = [(2, 40, 80), (1, 3, 64, 48), (96, 130), (2, 70, 20), (3, 20, 100)]
GROUPS = [(1, 32), (1, 64), (1, 128), (1, "row"), (32, 1), (64, 1), ("row", 1), ("row", "row")]


def grouped(shape, group):
    """The group as numbers, and the shape of its scales."""
    tokens, channels = shape[-2:]
    group = tuple(
        n if whole == "row" else whole for n, whole in zip((tokens, channels), group, strict=True)
    )
    return group, (*shape[:-2], -(-tokens // group[0]), -(-channels // group[1]))


def scales_of(rng, kind, shape, low=-20, high=20):
    if kind == "e8m0":
        return np.exp2(rng.integers(low, high, shape).astype(float))
    bits = np.exp2(rng.uniform(low, high, shape)).astype(np.float32).view(np.uint32)
    if kind == "bf16":
        bits &= np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(float)


def codes_of(rng, how, narrow, shape):
    """Codes of finite numbers: any alike, as normal numbers become, or few different."""
    table = values(narrow)
    finite = np.flatnonzero(np.isfinite(table)).astype(np.uint8)
    if how == "any":
        return rng.choice(finite, shape)
    if how == "few":
        chosen = rng.choice(finite, 3)
        return np.where(rng.random(shape) < 0.3, 0, rng.choice(chosen, shape)).astype(np.uint8)
    order = finite[np.argsort(table[finite], kind="stable")]
    x = rng.normal(size=shape) * np.max(table[finite]) / 4
    near = np.searchsorted(table[order], x).clip(0, len(order) - 1)
    return order[near]


cases = st.fixed_dictionaries(
    {
        "wide": st.sampled_from(list(WIDE)),
        "narrow": st.sampled_from(NARROW),
        "kind": st.sampled_from(["e8m0", "bf16", "fp32"]),
        "group": st.sampled_from(GROUPS),
        "shape": st.sampled_from(SHAPES),
        "rounding": st.sampled_from(["once", "through_fp32"]),
        "how": st.sampled_from(["any", "normal", "few"]),
        "seed": st.integers(0, 2**32 - 1),
    }
)


def made(wide, narrow, kind, group, shape, rounding, how, seed, low=-6, high=6):
    rng = np.random.default_rng(seed)
    group, scale_shape = grouped(shape, group)
    scales = scales_of(rng, kind, scale_shape, low, high)
    if wide == "fp16":  # of 2^-14 ... 2^15 without loss
        scales = scales * 2.0 ** -np.floor(
            np.log2(np.nanmax(np.where(np.isfinite(values(narrow)), values(narrow), 0)))
        )
    codes = codes_of(rng, how, narrow, shape)
    return widened(codes, narrow, scales, group, wide, rounding)


def assert_widens(found, bits):
    assert np.array_equal(widen(found), bits)
    assert msgspec.json.decode(msgspec.json.encode(found.grid), type=Grid) == found.grid


@given(case=cases)
def test_found_and_widened(case):
    numbers = made(**case)
    found = find(numbers, case["wide"])
    assert found is not None
    assert found.nbytes < 0.85 * numbers.nbytes
    assert_widens(found, numbers)


@given(case=cases, simd=st.sampled_from(["scalar", "avx2", "avx512", "neon"]))
def test_widening_is_the_rounded_product(case, simd):
    """Codes and scales of any kind: NaN, overflow, subnormal products; some tokens; strides."""
    rng = np.random.default_rng(case["seed"])
    group, scale_shape = grouped(case["shape"], case["group"])
    narrow, wide, kind = case["narrow"], case["wide"], case["kind"]
    codes = rng.integers(0, len(values(narrow)), case["shape"]).astype(np.uint8)
    reach = (-126, 127) if case["how"] == "any" else (-16, 10)
    scales = scales_of(rng, kind, scale_shape, *reach)
    fp32 = scales.astype(np.float32).view(np.uint32)
    shift, small = {"e8m0": (23, np.uint8), "bf16": (16, np.uint16), "fp32": (0, np.uint32)}[kind]
    stored = (fp32 >> shift).astype(small)
    grid = Grid(wide, narrow, (0, codes.shape[-1]), kind, group, case["rounding"])
    uint = np.uint32 if wide == "fp32" else np.uint16
    rest, nowhere = np.empty((*codes.shape[:-1], 0), uint), np.empty(0, np.uint64)
    found = Found(grid, codes, stored, rest, nowhere, np.empty(0, uint))
    part = msgspec.structs.replace(found, codes=codes[..., 7:19, :], rest=rest[..., 7:19, :])
    turned = np.empty((*codes.shape[:-2], codes.shape[-1], 12), uint).swapaxes(-1, -2)
    expected = widened(codes, narrow, scales, group, wide, case["rounding"])
    before = _native.simd()
    if not _native.set_simd(simd):
        return
    try:
        whole = widen(found)
        widen(part, turned, first_token=7)
    finally:
        _native.set_simd(before)
    assert np.array_equal(whole, expected)
    assert np.array_equal(turned, expected[..., 7:19, :])


@pytest.mark.parametrize("wide", list(WIDE))
def test_what_is_off_the_grid_is_an_exception(wide):
    rng = np.random.default_rng(3)
    numbers = made(wide, "fp8_e4m3fn", "fp32", (1, 64), (2, 50, 128), "once", "normal", 5)
    damaged = numbers.copy()
    at = np.unique(rng.integers(0, numbers.size, 40))
    damaged.reshape(-1)[at] ^= 1 << (1 if wide == "bf16" else 6)
    found = find(damaged, wide)
    assert_widens(found, damaged)
    assert 0 < len(found.positions) <= len(at)
    assert (found.grid.narrow, found.grid.group) == ("fp8_e4m3fn", (1, 64))
    part = msgspec.structs.replace(found, codes=found.codes[:, 20:41], rest=found.rest[:, 20:41])
    assert np.array_equal(widen(part, first_token=20), damaged[:, 20:41])
    # One in four: no grid.
    damaged = numbers.copy()
    damaged.reshape(-1)[::4] = random_bits(rng, wide, (damaged.size // 4,))
    assert find(damaged, wide) is None


@pytest.mark.parametrize("kind, group", [("fp32", (1, 64)), ("bf16", (1, 32)), ("fp32", (32, 1))])
def test_what_was_on_the_grid_is_found_as_it_was(kind, group):
    shape = (3, 60, 192)
    numbers = made("bf16", "fp8_e4m3fn", kind, group, shape, "once", "normal", 1)
    found = find(numbers, "bf16")
    grid = found.grid
    assert grid.narrow == "fp8_e4m3fn" and not len(found.positions)
    assert (grid.scale, grid.group) == (kind, group)
    assert find(numbers, "bf16", like=grid).grid == grid


def test_channels_beside_the_grid_stay_as_they_are():
    """A latent may have some rounded channels, in groups of 64, and others that hold positions."""
    rng = np.random.default_rng(0)
    shape = (1, 1, 300, 448)
    numbers = cache_like(rng, "bf16", (1, 1, 300, 512)).copy()
    numbers[..., :448] = made("bf16", "fp8_e4m3fn", "fp32", (1, 64), shape, "once", "normal", 2)
    found = find(numbers, "bf16")
    assert found.grid.channels == (0, 448) and found.grid.group == (1, 64)
    assert found.rest.shape == (1, 1, 300, 64)
    assert_widens(found, numbers)
    numbers = np.roll(numbers, 64, -1)
    found = find(numbers, "bf16")
    assert found.grid.channels == (64, 512)
    assert_widens(found, numbers)
    turned = np.ascontiguousarray(numbers.swapaxes(0, 2)).swapaxes(0, 2)
    assert_widens(find(turned, "bf16"), numbers)


@pytest.mark.parametrize("group", [(1, 64), (1, 32), (32, 1)])
@pytest.mark.parametrize("on", [(64, 128), (0, 64), (32, 96), (48, 112), (0, 112), (16, 128)])
def test_half_of_the_channels_or_more_are_on_the_grid(on, group):
    """Wherever in a head they are; and only they are codes."""
    rng = np.random.default_rng(on[0])
    shape = (2, 4, 96, on[1] - on[0])
    numbers = cache_like(rng, "bf16", (2, 4, 96, 128)).copy()
    numbers[..., slice(*on)] = made("bf16", "fp8_e4m3fn", "fp32", group, shape, "once", "normal", 9)
    found = find(numbers, "bf16")
    assert found.grid.channels == on and found.grid.narrow == "fp8_e4m3fn"
    assert not len(found.positions)
    assert_widens(found, numbers)


def test_one_scale_for_all_channels_on_the_grid():
    """A token's group is as wide as the grid is, which need not be a power of two."""
    numbers = cache_like(np.random.default_rng(0), "bf16", (2, 96, 128)).copy()
    shape = (2, 96, 112)
    numbers[..., 16:] = made("bf16", "fp8_e4m3fn", "fp32", (1, "row"), shape, "once", "normal", 9)
    assert find(numbers, "bf16").grid.group == (1, 112)


def test_groups_that_say_little():
    numbers = made("bf16", "fp8_e4m3fn", "fp32", (1, 64), (2, 64, 128), "once", "normal", 8)
    numbers[0, 5] = 0  # no scale can be known
    numbers[1, 9, :64] = np.where(numbers[1, 9, :64] & 1, 0x3F81, 0xBF81)  # one magnitude
    numbers[1, 10, 64:] = 0x8000  # negative zeros
    found = find(numbers, "bf16")
    assert len(found.positions) == 0
    assert_widens(found, numbers)
    zeros = np.zeros((2, 64, 128), np.uint16)
    assert_widens(find(zeros, "bf16"), zeros)


@pytest.mark.parametrize("wide", list(WIDE))
def test_ordinary_numbers_are_on_no_grid(wide):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert find(random_bits(rng, wide, (2, 70, 64)), wide) is None
        assert find(cache_like(rng, wide, (2, 70, 64)), wide) is None
    assert find(np.zeros((3, 4), np.uint8), "fp8_e4m3fn") is None
    assert find(np.zeros((0, 4), np.uint16), "bf16") is None


@given(
    wide=st.sampled_from(list(WIDE)),
    tokens=st.integers(2, 40),
    turned=st.booleans(),
    near=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    simd=st.sampled_from(["scalar", "avx2", "avx512", "neon"]),
)
def test_few_tokens_of_int8_are_not_given_up(wide, tokens, turned, near, seed, simd):
    """Half of the channels, with as many numbers off the grid as the search takes for chance."""
    rng = np.random.default_rng(seed)
    shape = 3, tokens, int(rng.choice([9, 16, 40, 64]))
    channels = shape[-1]
    numbers = made(wide, "int8", "fp32", ("row", 1), shape, "once", "normal", seed, -4, 4)
    off = cache_like(rng, wide, shape)
    if near:  # as keys are: each channel has its own mean
        off = np.broadcast_to(off[:, :1], shape) + rng.integers(0, 8, shape).astype(off.dtype)
    start = int(rng.integers(0, channels // 2 + 1))
    numbers[..., :start] = off[..., :start]
    numbers[..., start + -(-channels // 2) :] = off[..., start + -(-channels // 2) :]
    few = min(tokens, 16)
    for row in range(3):
        for channel in range(channels):
            picked = rng.permutation(few)[: few - int(np.ceil(0.85 * few))]
            numbers[row, picked, channel] = off[row, picked, channel]
    if turned:
        numbers = np.ascontiguousarray(numbers.transpose(2, 0, 1)).transpose(1, 2, 0)
    before = _native.simd()
    if not _native.set_simd(simd):
        return
    try:
        assert _native.grid_may_have_even_channels(numbers, wide)
    finally:
        _native.set_simd(before)


def test_a_few_ordinary_tokens_are_given_up_at_once():
    given_up = 0
    for seed in range(100):
        numbers = cache_like(np.random.default_rng(seed), "bf16", (3, 16, 64))
        given_up += not _native.grid_may_have_even_channels(numbers, "bf16")
    assert given_up > 95
    # Zeros, and numbers that are not finite.
    assert _native.grid_may_have_even_channels(np.zeros((3, 16, 64), np.uint16), "bf16")
    assert not _native.grid_may_have_even_channels(np.full((3, 16, 64), 0x7F80, np.uint16), "bf16")


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_fp32_that_holds_half(half):
    """Every bit pattern: NaN payloads, infinities, subnormals, negative zeros."""
    codes = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16).reshape(4, 128, 128)
    long = codes.astype(np.uint32)
    if half == "bf16":
        numbers = long << 16
    else:
        x = torch.from_numpy(codes.view(np.int16)).view(torch.float16).double().numpy()
        # What a NaN's payload becomes is laid down in spec.md, not by a processor.
        payload = (long & 0x8000) << 16 | 0x7F800000 | (long & 0x3FF) << 13
        numbers = np.where(long & 0x7C00 == 0x7C00, payload, bits(x, "fp32"))
    found = find(numbers, "fp32")
    assert found.grid.narrow == half and found.scales is None
    # Where a processor makes NaNs quiet on their way to fp16, half of all NaNs.
    assert len(found.positions) <= (0 if half == "bf16" else 1 << 10)
    assert_widens(found, numbers)
    numbers = numbers.copy()
    numbers[0, ::40, 5] |= 1
    found = find(numbers, "fp32")
    assert len(found.positions) >= 4
    assert_widens(found, numbers)


@pytest.mark.parametrize("kind", ["e8m0", "fp32"])
def test_ratio_of_a_rounded_cache(kind):
    """Codes through `channel` and scales as they are, against the bf16 numbers' bytes."""
    rng = np.random.default_rng(0)
    parts, beside = [], 0
    for _ in range(2):
        x = torch.from_numpy(cache_like(rng, "bf16", (2, 1024, 64)).view(np.int16))
        x = x.view(torch.bfloat16).float()
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
        if kind == "e8m0":
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        numbers = (codes.float() * scale).to(torch.bfloat16).view(torch.int16).numpy()
        found = find(numbers.view(np.uint16), "bf16")
        assert found.grid.narrow == "fp8_e4m3fn"
        assert_widens(found, numbers.view(np.uint16))
        parts.append(found.codes)
        beside += found.nbytes - found.codes.nbytes
    coded = kvzip.encode(kvzip.Snapshot.from_arrays([tuple(parts)], "fp8_e4m3fn"), codec="channel")
    assert 2 * sum(part.size for part in parts) / (len(coded) + beside) >= 1.9


hostile = st.fixed_dictionaries(
    {},
    optional={
        "narrow": st.sampled_from([*NARROW, "bf16", "fp16", "fp64"]),
        "wide": st.sampled_from(list(WIDE)),
        "channels": st.tuples(st.integers(-1, 200), st.integers(-1, 200)),
        "scale": st.sampled_from(["e8m0", "bf16", "fp32", None]),
        "group": st.tuples(*[st.sampled_from([-1, 0, 1, 3, 64, 2**63, 2**64 - 1, 2**64])] * 2),
    },
)


@given(
    changes=hostile,
    what=st.sampled_from(["", "codes", "scales", "rest", "positions", "exceptions"]),
    how=st.sampled_from(["short", "flat", "bytes", "random", "none"]),
    first=st.sampled_from([0, 1, 40, 2**40, 2**64 - 1, 2**70]),
)
def test_hostile_grids_are_errors(changes, what, how, first):
    numbers = made("bf16", "fp8_e4m3fn", "fp32", (1, 64), (2, 40, 128), "once", "normal", 4)
    numbers[0, 3, 5] ^= 1
    found = find(numbers, "bf16")
    arrays = {}
    if what:
        array = getattr(found, what)
        noise = np.random.default_rng(0).integers(0, 256, array.nbytes).astype(np.uint8)
        arrays[what] = {
            "short": array[:-1],
            "flat": array.reshape(-1),
            "bytes": np.frombuffer(array.tobytes(), np.uint8),
            "random": noise.view(array.dtype).reshape(array.shape),
            "none": array[:0],
        }[how]
    grid = msgspec.structs.replace(found.grid, **changes)
    try:
        out = widen(msgspec.structs.replace(found, grid=grid, **arrays), first_token=first)
    except KVZipError:
        return
    assert out.shape[-2:] == (40, 128) or not out.size


def test_out_of_another_shape_is_an_error():
    numbers = made("bf16", "int8", "fp32", (1, 64), (2, 40, 64), "once", "normal", 4)
    found = find(numbers, "bf16")
    for out in (np.empty((2, 40, 65), np.uint16), np.empty((2, 40, 64), np.uint32)):
        with pytest.raises(KVZipError, match="out"):
            widen(found, out)
    with pytest.raises(KVZipError, match="first_token"):
        widen(found, first_token=-1)
