"""Encoding on a device: the bytes that the CPU writes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from kvzip import dtypes
from kvzip.codec import Context, get_codec
from kvzip.codecs.channel.gpu import encode
from kvzip.codecs.native.cuda.work import Target
from kvzip.snapshot import Origin

DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2", "fp8_e5m2fnuz")


def numbers(form, shape, seed, escapes=0, constants=False):
    """Numbers whose exponents differ from channel to channel; some are far from all others."""
    random = np.random.default_rng(seed)
    wide = random.standard_normal(shape).astype(np.float32)
    wide *= np.exp2(random.integers(-4, 3, (1, shape[1], 1, shape[3]))).astype(np.float32)
    if escapes:
        far = random.random(shape) < 1 / escapes
        wide[far] *= np.exp2(random.integers(-12, 12, int(far.sum()))).astype(np.float32)
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(
        form.name, form.name.replace("fp8", "float8")
    )
    tensor = torch.from_numpy(wide).to(getattr(torch, name))
    bits = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[form.itemsize]).numpy()
    bits = bits.view(f"u{form.itemsize}").copy()
    if constants:
        bits[..., ::3] = bits[:1, :, :1, ::3]
    return bits


def blocks_of(tokens, size):
    return [(first, min(size, tokens - first)) for first in range(0, tokens, size)]


def check(device, room, form, bits, size, pages=0):
    """Every block is what the CPU writes, and at least one is coded."""
    codec = get_codec("channel")
    context = Context(form, 0, "k", 0, Origin())
    tables = codec.load_tables(memoryview(codec.make_tables(bits, context)), bits.shape, context)
    context = msgspec.structs.replace(context, tables=tables)
    batch, heads, tokens, dim = bits.shape
    signed = torch.from_numpy(bits.view(f"i{form.itemsize}" if form.itemsize > 1 else "u1"))
    if pages:
        count = -(-tokens // pages)
        table = np.random.default_rng(1).permutation(count).astype(np.int32)
        flat, paged = room.tensor((count, batch, heads, pages, dim), form.itemsize)
        for t in range(tokens):
            paged[int(table[t // pages]), :, :, t % pages] = signed[:, :, t].to(room.where)
        strides = (heads * pages * dim, pages * dim, dim)
        target = Target(
            paged.data_ptr(), strides, bits.shape, 0, table, pages, strides[0] * batch, flat
        )
    else:
        flat, whole = room.tensor(bits.shape, form.itemsize)
        whole.copy_(signed)
        target = Target(whole.data_ptr(), whole.stride()[:3], bits.shape, 0, owner=flat)
    if room.where == "cuda":
        torch.cuda.synchronize()
    spans = blocks_of(tokens, size)
    found = encode(device, form, tables, target, spans)
    expected = [codec.encode(bits[:, :, first : first + n], context) for first, n in spans]
    for got, want in zip(found, expected, strict=True):
        assert got == (None if want[0] == 0 else want)
    assert any(found)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        # Whole strips: several streams.
        *((dtype, (1, 2, 256, 128), 256) for dtype in ("bf16", "fp32", "fp8_e4m3fn")),
        *((dtype, (1, 1, 300, 64), 128) for dtype in DTYPES),  # the last group is shorter
        *((dtype, (2, 3, 70, 36), 70) for dtype in DTYPES),  # two states a thread
        *((dtype, (1, 2, 24, 80), 24) for dtype in DTYPES),  # one
    ],
)
@pytest.mark.drawn(3)
def test_blocks_are_what_the_cpu_writes(device, room, dtype, shape, size):
    form = dtypes.get(dtype)
    check(device, room, form, numbers(form, shape, 3), size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.drawn(2)
def test_escapes_and_constant_channels(device, shuffled, room, dtype):
    form = dtypes.get(dtype)
    check(device, room, form, numbers(form, (1, 2, 200, 64), 5, escapes=40, constants=True), 128)
    check(shuffled, room, form, numbers(form, (1, 1, 128, 64), 6, escapes=15), 128)


@pytest.mark.parametrize("pages", [16, 10])
def test_from_pages(device, room, pages):
    form = dtypes.get("bf16")
    check(device, room, form, numbers(form, (1, 2, 144, 64), 7), 128, pages)


def test_what_does_not_get_shorter_is_left_to_the_cpu(device, room):
    form = dtypes.get("bf16")
    bits = numbers(form, (1, 1, 512, 64), 8)
    bits[:, :, 384:] = np.random.default_rng(0).integers(0, 1 << 16, (1, 1, 128, 64))
    check(device, room, form, bits, 128)
