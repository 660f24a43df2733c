"""Floating-point formats as bits: names, integer views, and the fields of a number.

A codec never casts. It sees the unsigned integer that holds a number's bits, so NaN payloads,
infinities, negative zeros and subnormals come back as they went in.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.errors import UnsupportedError, UsageError, told_as

Bits = NDArray[Any]
"""An array of uint8, uint16 or uint32 that holds the raw bits of floating-point numbers."""


@dataclass(frozen=True)
class DType:
    """A floating-point format: 1 sign bit, then exponent, then mantissa, from the top bit down."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    safetensors: str
    torch: str

    @cached_property
    def bits(self) -> int:
        """Bits of one number."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.bits // 8

    @cached_property
    def uint(self) -> np.dtype[Any]:
        """The numpy dtype of the integer view."""
        return np.dtype(f"<u{self.itemsize}")

    @property
    def symbols(self) -> int:
        """How many values sign and exponent together can take."""
        return 1 << (1 + self.exponent_bits)


_ALL = (
    DType("bf16", 8, 7, "BF16", "bfloat16"),
    DType("fp16", 5, 10, "F16", "float16"),
    DType("fp32", 8, 23, "F32", "float32"),
    DType("fp8_e4m3fn", 4, 3, "F8_E4M3", "float8_e4m3fn"),
    DType("fp8_e5m2", 5, 2, "F8_E5M2", "float8_e5m2"),
)
NAMES: tuple[str, ...] = tuple(d.name for d in _ALL)
_BY_NAME = {alias: d for d in _ALL for alias in (d.name, d.safetensors, d.torch)}


def get(name: Any) -> DType:
    """The format called `name`: ours ("bf16"), torch's (torch.bfloat16, or its name), numpy's
    (numpy.float16, or a dtype of ml_dtypes) or safetensors' ("BF16").

    Raises UnsupportedError for any other.
    """
    if not isinstance(name, str):
        name = name.__name__ if isinstance(name, type) else getattr(name, "name", str(name))
    try:
        return _BY_NAME.get(name) or _BY_NAME[name.removeprefix("torch.")]
    except (KeyError, AttributeError, TypeError):
        raise UnsupportedError(f"dtype {name!r}: use one of {', '.join(NAMES)}") from None


def as_bits(array: Any, dtype: str | None = None) -> tuple[Bits, str]:
    """The bits of `array` as an unsigned integer view, without a copy, and the format's name.

    `array` is a numpy array, a CPU torch tensor, or anything with DLPack. An integer array needs
    `dtype`, the name of the format that its bits are in. Shape and strides are kept.
    Raises UnsupportedError when the format is not one of ours, UsageError for what is no array.
    """
    if dtype is not None and type(array) is np.ndarray and array.dtype is (form := get(dtype)).uint:
        return array, form.name
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        found = get(str(array.dtype)) if array.dtype.is_floating_point else None
        signed = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(array.element_size())
        if signed is None or array.dtype is torch.bool or array.dtype.is_complex:
            raise UnsupportedError(f"a tensor of {array.dtype} holds no numbers of ours")
        if array.is_neg():  # its bits in memory are those of other numbers
            raise UsageError("a tensor is a negative view: give its resolve_neg()")
        with told_as(UsageError, f"a {array.layout} tensor on {array.device} holds no plain bits"):
            values = array.detach().cpu().view(signed).numpy()
    else:
        # A subclass (np.memmap) makes slow work of every slice.
        if isinstance(array, np.ndarray):
            values = np.asarray(array)
        elif hasattr(array, "__dlpack__"):
            with told_as(UsageError, f"a {type(array).__name__} cannot be looked at by DLPack"):
                values = np.from_dlpack(array)
        else:
            raise UsageError(f"a {type(array).__name__} is no array: give numpy's, torch's, DLPack")
        # ml_dtypes' bfloat16 and float8 types are numpy dtypes of kind "V", known by name.
        found = get(values.dtype.name) if values.dtype.kind not in "iu" else None
    if found is None:
        if dtype is None:
            raise UnsupportedError(
                f"an array of {values.dtype} could be any format: say dtype=, one of "
                + ", ".join(NAMES)
            )
        found = get(dtype)
    elif dtype is not None and get(dtype) is not found:
        raise UnsupportedError(f"the array is {found.name}, not {dtype}")
    if values.dtype.itemsize != found.itemsize or values.dtype.byteorder == ">":
        raise UnsupportedError(f"an array of {values.dtype} cannot hold {found.name}")
    return values.view(found.uint), found.name


def as_tensor(bits: Bits, dtype: str) -> Any:
    """A torch tensor on the same memory as `bits` (which must be writable)."""
    import torch

    signed: NDArray[Any] = bits.view(np.dtype(f"<i{bits.dtype.itemsize}"))
    return torch.from_numpy(signed).view(getattr(torch, get(dtype).torch))


def to_ordered(bits: Bits) -> Bits:
    """Map bits to unsigned integers in the numbers' own order (-NaN lowest, +NaN highest).

    Two numbers that are neighbours on the real line become neighbouring integers.
    """
    width = bits.dtype.itemsize * 8
    top = bits.dtype.type(1 << (width - 1))
    return np.where(bits & top, ~bits, bits | top)


def from_ordered(ordered: Bits) -> Bits:
    """The inverse of :func:`to_ordered`."""
    width = ordered.dtype.itemsize * 8
    top = ordered.dtype.type(1 << (width - 1))
    return np.where(ordered & top, ordered ^ top, ~ordered)


def sign_exponent(bits: Bits, dtype: str) -> Bits:
    """Sign and exponent of each number as one integer below ``get(dtype).symbols``."""
    fields: Bits = bits >> bits.dtype.type(get(dtype).mantissa_bits)
    return fields


def mantissa(bits: Bits, dtype: str) -> Bits:
    """The mantissa field of each number."""
    fields: Bits = bits & bits.dtype.type((1 << get(dtype).mantissa_bits) - 1)
    return fields


def finite(bits: Bits, dtype: str) -> NDArray[np.bool_]:
    """Which numbers are neither infinite nor NaN."""
    form = get(dtype)
    magnitude = bits & bits.dtype.type((1 << (form.bits - 1)) - 1)
    # e4m3fn has no infinities; only the last pattern is a NaN.
    first = (1 << form.exponent_bits) - 1 << form.mantissa_bits
    if form.name == "fp8_e4m3fn":
        first = (1 << (form.bits - 1)) - 1
    return np.asarray(magnitude < bits.dtype.type(first))


def to_float32(bits: Bits, dtype: str) -> NDArray[np.float32]:
    """The numbers as float32, exactly: all our formats fit."""
    form = get(dtype)
    wide = bits.astype(np.uint32)
    if form.exponent_bits == 8:
        return (wide << np.uint32(32 - form.bits)).view(np.float32)
    sign = wide >> (form.bits - 1)
    exponent = (wide >> form.mantissa_bits) & ((1 << form.exponent_bits) - 1)
    fraction = wide & ((1 << form.mantissa_bits) - 1)
    bias = (1 << (form.exponent_bits - 1)) - 1
    whole = fraction + ((exponent > 0).astype(np.uint32) << form.mantissa_bits)
    power = np.maximum(exponent, 1).astype(np.int32) - bias - form.mantissa_bits
    values = np.ldexp(whole.astype(np.float32), power)
    return np.asarray(np.where(sign.astype(bool), -values, values), np.float32)
