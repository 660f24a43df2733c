from __future__ import annotations

import numpy as np
import pytest
import torch

from kvzip import dtypes
from kvzip.errors import UnsupportedError

FLOATS = [name for name in dtypes.NAMES if dtypes.get(name).is_float]
INTEGERS = ["int8", "uint8", "bytes"]


def all_bits(dtype):
    """Every pattern of a format; of those of more than 16 bits, many, and what is special."""
    form = dtypes.get(dtype)
    if form.bits > 16:
        rng = np.random.default_rng(0)
        some = rng.integers(0, 2**form.bits, 1 << 16, np.uint64, endpoint=False)
        infinity = (1 << form.exponent_bits) - 1 << form.mantissa_bits
        ends = [0, 1, infinity - 1, infinity, infinity + 1, (1 << form.bits - 1) - 1]
        signed = [x | sign << form.bits - 1 for x in ends for sign in (0, 1)]
        return np.concatenate([some, np.array(signed, np.uint64)]).astype(form.uint)
    return np.arange(2**form.bits, dtype=np.uint32).astype(form.uint)


def test_fields_make_the_number(dtype):
    bits = all_bits(dtype)
    form = dtypes.get(dtype)
    whole = dtypes.sign_exponent(bits, dtype) << bits.dtype.type(form.mantissa_bits)
    assert np.array_equal(whole | dtypes.mantissa(bits, dtype), bits)
    assert dtypes.sign_exponent(bits, dtype).max() < form.symbols


def test_order_is_that_of_the_numbers(dtype):
    bits = all_bits(dtype)
    ordered = dtypes.to_ordered(bits, dtype)
    assert np.array_equal(dtypes.from_ordered(ordered, dtype), bits)
    values = dtypes.as_tensor(bits[np.argsort(ordered)].copy(), dtype).double()
    values = values[~values.isnan()]
    assert (values[1:] >= values[:-1]).all()


def test_numbers_are_what_torch_says(dtype):
    """Every pattern, NaNs and infinities too, and which are neither."""
    bits = all_bits(dtype)
    meant = dtypes.as_tensor(bits.copy(), dtype)
    found = dtypes.to_float64(bits, dtype)
    assert np.array_equal(found, meant.double().numpy(), equal_nan=True)
    zeros = found == 0
    assert np.array_equal(np.signbit(found[zeros]), np.signbit(meant.double().numpy()[zeros]))
    rounded = dtypes.to_float32(bits, dtype)
    assert rounded.dtype == np.float32
    assert np.array_equal(rounded, meant.float().numpy(), equal_nan=True)
    real = np.ones(len(bits), bool) if dtype in INTEGERS else meant.double().isfinite().numpy()
    assert np.array_equal(dtypes.finite(bits, dtype), real)


def test_what_is_special_of_each_format():
    def of(dtype, *patterns):
        return dtypes.to_float32(np.array(patterns, np.uint8), dtype).tolist()

    assert of("fp8_e4m3fnuz", 0x00, 0x08, 0x7F, 0xFF) == [0.0, 2.0**-7, 240.0, -240.0]
    assert of("fp8_e5m2fnuz", 0x04, 0x7F) == [2.0**-15, 57344.0]
    assert of("e8m0", 0x00, 127, 254) == [2.0**-127, 1.0, 2.0**127]
    assert of("int8", 0x00, 0x7F, 0x80, 0xFF) == [0, 127, -128, -1]
    assert of("uint8", 0xFF) == [255]
    for dtype, nans in [
        ("fp8_e4m3fn", [0x7F, 0xFF]),
        ("fp8_e4m3fnuz", [0x80]),
        ("fp8_e5m2fnuz", [0x80]),
        ("e8m0", [0xFF]),
        ("int8", []),
    ]:
        assert np.flatnonzero(np.isnan(of(dtype, *range(256)))).tolist() == nans


def test_views_share_memory_and_keep_strides(dtype):
    form = dtypes.get(dtype)
    tensor = torch.zeros(2, 3, 4, dtype=getattr(torch, form.torch)).transpose(0, 1)
    bits, name = dtypes.as_bits(tensor, dtype)
    assert name == dtype
    assert bits.shape == (3, 2, 4)
    bits[1, 0, 2] = 1
    assert dtypes.as_bits(tensor, dtype)[0][1, 0, 2] == 1
    if dtype != "bytes":
        assert dtypes.as_bits(tensor)[1] == dtype


def test_names_and_aliases():
    assert dtypes.get("torch.bfloat16").name == dtypes.get("BF16").name == "bf16"
    assert dtypes.get("U8").name == dtypes.get(torch.uint8).name == "uint8"
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
        dtypes.as_bits(np.zeros(3, np.complex128))


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_integers_of_numpy_hold_bits_and_those_of_torch_are_numbers(kind):
    numbers = np.arange(-3, 3).astype(kind)
    with pytest.raises(UnsupportedError, match="say dtype="):
        dtypes.as_bits(numbers)
    tensor = torch.from_numpy(numbers)
    assert dtypes.as_bits(tensor)[1] == np.dtype(kind).name
    for name in ("fp8_e4m3fn", "e8m0", "int8", "uint8", "bytes"):
        for array in (numbers, tensor):
            bits, found = dtypes.as_bits(array, name)
            assert (found, bits.dtype) == (name, np.uint8)
            assert np.array_equal(bits, numbers.view(np.uint8))
    with pytest.raises(UnsupportedError, match="cannot hold bf16"):
        dtypes.as_bits(tensor, "bf16")


@pytest.mark.parametrize("kind", [torch.int16, torch.int32, torch.int64, torch.bool])
def test_other_integers_are_stored_as_bytes(kind):
    tensor = torch.tensor([[1, 0, 1]], dtype=kind)
    with pytest.raises(UnsupportedError, match="uint8"):
        dtypes.as_bits(tensor)
    bits, _ = dtypes.as_bits(tensor.view(torch.uint8), "bytes")
    assert bits.tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("kind", ["complex64", "float4_e2m1fn_x2"])
def test_other_formats_of_torch_are_stored_as_bytes(kind):
    if not hasattr(torch, kind):
        pytest.skip("this torch is older")
    tensor = torch.arange(16, dtype=torch.uint8).view(getattr(torch, kind))
    for name in (None, "bytes", "bf16"):
        with pytest.raises(UnsupportedError, match=r"view\(torch.uint8\)"):
            dtypes.as_bits(tensor, name)
    assert dtypes.as_bits(tensor.view(torch.uint8))[0].tolist() == list(range(16))


def test_a_dtype_is_named_in_any_way(dtype):
    form = dtypes.get(dtype)
    own = getattr(torch, form.torch)
    assert dtypes.get(form.name) is dtypes.get(form) is form
    for name in (form.torch, form.safetensors, own, str(own)):
        assert dtypes.get(name) is dtypes.get("uint8" if dtype == "bytes" else dtype)
    numpys = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64, "int8": np.int8}
    if form.name in numpys:
        assert dtypes.get(numpys[form.name]) is dtypes.get(np.dtype(numpys[form.name])) is form


@pytest.mark.parametrize(
    "wrong", [torch.int16, torch.complex64, np.int64, float, None, 5, "", "torch."]
)
def test_other_dtypes_say_what_there_is(wrong):
    with pytest.raises(UnsupportedError, match="use one of bf16"):
        dtypes.get(wrong)
