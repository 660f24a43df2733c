from __future__ import annotations

import numpy as np
import pytest
import torch

from kvzip import dtypes
from kvzip.errors import UnsupportedError


def all_bits(dtype):
    form = dtypes.get(dtype)
    if form.bits == 32:
        return np.random.default_rng(0).integers(0, 2**32, 1 << 16, np.uint64).astype(np.uint32)
    return np.arange(2**form.bits, dtype=np.uint32).astype(form.uint)


def test_fields_make_the_number(dtype):
    bits = all_bits(dtype)
    form = dtypes.get(dtype)
    whole = dtypes.sign_exponent(bits, dtype) << bits.dtype.type(form.mantissa_bits)
    assert np.array_equal(whole | dtypes.mantissa(bits, dtype), bits)
    assert dtypes.sign_exponent(bits, dtype).max() < form.symbols


def test_order_is_that_of_the_numbers(dtype):
    bits = all_bits(dtype)
    ordered = dtypes.to_ordered(bits)
    assert np.array_equal(dtypes.from_ordered(ordered), bits)
    values = dtypes.as_tensor(bits[np.argsort(ordered)].copy(), dtype).double()
    values = values[~values.isnan()]
    assert (values[1:] >= values[:-1]).all()


def test_views_share_memory_and_keep_strides(dtype):
    form = dtypes.get(dtype)
    tensor = torch.zeros(2, 3, 4, dtype=getattr(torch, form.torch)).transpose(0, 1)
    bits, name = dtypes.as_bits(tensor)
    assert name == dtype
    assert bits.shape == (3, 2, 4)
    bits[1, 0, 2] = 1
    assert dtypes.as_bits(tensor)[0][1, 0, 2] == 1


def test_names_and_aliases():
    assert dtypes.get("torch.bfloat16").name == dtypes.get("BF16").name == "bf16"
    for wrong in ("int4", "", None):
        with pytest.raises(UnsupportedError, match="use one of"):
            dtypes.get(wrong)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(UnsupportedError, match="say dtype="):
        dtypes.as_bits(np.zeros(3, np.uint16))
    with pytest.raises(UnsupportedError, match="not bf16"):
        dtypes.as_bits(np.zeros(3, np.float16), "bf16")
    with pytest.raises(UnsupportedError, match="cannot hold"):
        dtypes.as_bits(np.zeros(3, np.uint8), "bf16")
    with pytest.raises(UnsupportedError):
        dtypes.as_bits(np.zeros(3, np.float64))


def test_a_dtype_is_named_in_any_way(dtype):
    form = dtypes.get(dtype)
    own = getattr(torch, form.torch)
    for name in (form.name, form.torch, form.safetensors, own, str(own), form):
        assert dtypes.get(name) is form
    numpys = {"fp16": np.float16, "fp32": np.float32}
    if form.name in numpys:
        assert dtypes.get(numpys[form.name]) is dtypes.get(np.dtype(numpys[form.name])) is form


@pytest.mark.parametrize(
    "wrong", [torch.int8, torch.float64, np.float64, float, None, 5, "", "torch."]
)
def test_other_dtypes_say_what_there_is(wrong):
    with pytest.raises(UnsupportedError, match="use one of bf16"):
        dtypes.get(wrong)
