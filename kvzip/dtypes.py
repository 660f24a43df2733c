"""Formats of numbers as bits: names, integer views, and the fields of a number.

A codec never casts. It sees the unsigned integer that holds a number's bits, so NaN payloads,
infinities, negative zeros and subnormals come back as they went in.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvzip.errors import UnsupportedError, UsageError, extra_told, told_as

Bits = NDArray[Any]
"""An array of uint8, uint16, uint32 or uint64 that holds the raw bits of numbers."""

Kind = Literal["ieee", "fn", "fnuz", "signed", "unsigned", "scale", "bytes"]
"""What bit patterns mean. Floats: "ieee" has infinities and NaNs at the highest exponent; "fn" has
no infinities, and a NaN at the highest magnitude of either sign; "fnuz" has one NaN, in the place
of the negative zero. Integers: "signed" is two's complement. "scale" is a power of two without a
sign, 0xFF a NaN (OCP's e8m0). "bytes" mean nothing that is known here."""


@dataclass(frozen=True)
class DType:
    """A format of numbers.

    A float has 1 sign bit, then exponent, then mantissa, from the top bit down. Other numbers have
    8 bits and no such fields: all of it counts as sign and exponent.
    """

    name: str
    kind: Kind
    exponent_bits: int
    mantissa_bits: int
    safetensors: str
    torch: str

    @cached_property
    def is_float(self) -> bool:
        """Whether a number has a sign, an exponent and a mantissa."""
        return self.kind in ("ieee", "fn", "fnuz")

    @cached_property
    def bits(self) -> int:
        """Bits of one number."""
        return 1 + self.exponent_bits + self.mantissa_bits if self.is_float else 8

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
        return 1 << (self.bits - self.mantissa_bits)

    @property
    def bias(self) -> int:
        """What a float's exponent field is above its exponent."""
        return (1 << (self.exponent_bits - 1)) - (self.kind != "fnuz")


_ALL = (
    DType("bf16", "ieee", 8, 7, "BF16", "bfloat16"),
    DType("fp16", "ieee", 5, 10, "F16", "float16"),
    DType("fp32", "ieee", 8, 23, "F32", "float32"),
    DType("fp8_e4m3fn", "fn", 4, 3, "F8_E4M3", "float8_e4m3fn"),
    DType("fp8_e5m2", "ieee", 5, 2, "F8_E5M2", "float8_e5m2"),
    DType("fp8_e4m3fnuz", "fnuz", 4, 3, "F8_E4M3FNUZ", "float8_e4m3fnuz"),
    DType("fp8_e5m2fnuz", "fnuz", 5, 2, "F8_E5M2FNUZ", "float8_e5m2fnuz"),
    DType("fp64", "ieee", 11, 52, "F64", "float64"),
    DType("int8", "signed", 0, 0, "I8", "int8"),
    DType("uint8", "unsigned", 0, 0, "U8", "uint8"),
    DType("e8m0", "scale", 0, 0, "F8_E8M0", "float8_e8m0fnu"),
    DType("bytes", "bytes", 0, 0, "U8", "uint8"),
)
NAMES: tuple[str, ...] = tuple(d.name for d in _ALL)
# Where two formats have a name in common, it is the first one's.
_BY_NAME = {alias: d for d in _ALL[::-1] for alias in (d.safetensors, d.torch)}
_BY_NAME |= {d.name: d for d in _ALL}


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

    `array` is a numpy array, a CPU torch tensor, or anything with DLPack. An array of integers
    holds the bits of numbers, and needs `dtype`, the name of their format; a torch tensor of int8
    or uint8 holds just that unless `dtype` says otherwise. Shape and strides are kept.
    Raises UnsupportedError when the format is not one of ours, UsageError for what is no array.
    """
    if dtype is not None and type(array) is np.ndarray and array.dtype is (form := get(dtype)).uint:
        return array, form.name
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        bits, found = _of_tensor(array, dtype, torch)
        with told_as(UsageError, f"{_named(array)} holds no plain bits"):
            values = bits.cpu().numpy()
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
    form = _format_of(values.dtype, found, dtype)
    return values.view(form.uint), form.name


def held_bits(
    array: Any, dtype: str | None = None, *, written: bool = False
) -> tuple[Bits | DeviceBits, str]:
    """As :func:`as_bits`, but a torch tensor in a GPU's memory stays there; what was to be written
    to it on torch's current stream is there when this returns. `written`: it is there already."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(array, torch.Tensor) or not on_gpu(array):
        return as_bits(array, dtype)
    bits = tensor_bits(array, dtype)
    if array.is_cuda and not written:
        torch.cuda.current_stream(array.device).synchronize()
    return bits, bits.form.name


def tensor_bits(tensor: Any, dtype: str | None = None) -> DeviceBits:
    """The bits of a torch tensor where it lies, as :func:`as_bits` has them, and raises."""
    bits, found = _of_tensor(tensor, dtype, sys.modules["torch"])
    return DeviceBits(bits, _format_of(np.dtype(f"i{bits.element_size()}"), found, dtype))


def on_gpu(tensor: Any) -> bool:
    """Whether a torch tensor lies in a GPU's memory, where kernels of ours can be."""
    return bool(tensor.is_cuda)


class DeviceBits:
    """Raw bits in a GPU's memory, where elsewhere a numpy array is: a torch tensor of integers, to
    be looked at. Copied when they are read."""

    def __init__(self, tensor: Any, form: DType):
        self.tensor, self.form = tensor, form

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy's."""
        return tuple(self.tensor.shape)

    def transpose(self, axes: Any) -> DeviceBits:
        """As numpy's."""
        return DeviceBits(self.tensor.permute(axes), self.form)

    def __getitem__(self, where: Any) -> DeviceBits:
        return DeviceBits(self.tensor[where], self.form)

    def read(self) -> Bits:
        """A copy of them on the host."""
        with _beside_models(self.tensor):
            bits: Bits = self.tensor.cpu().numpy().view(self.form.uint)
        return bits


def _beside_models(tensor: Any) -> AbstractContextManager[Any]:
    """Torch reads a tensor in a GPU's memory at once, and not when a model is done that computes on
    torch's current stream."""
    if not tensor.is_cuda:
        return nullcontext()
    import torch

    beside: AbstractContextManager[Any] = torch.cuda.stream(_own_stream(tensor.device))
    return beside


@cache
def _own_stream(device: Any) -> Any:
    """A stream of torch's that nothing else is given to."""
    import torch

    return torch.cuda.Stream(device)


def _format_of(stored: np.dtype[Any], found: DType | None, dtype: str | None) -> DType:
    """The format of numbers in an array of this dtype: the one that it tells itself, `found`, or
    `dtype`. Raises UnsupportedError."""
    if found is None:
        if dtype is None:
            raise UnsupportedError(
                f"an array of {stored} could be any format: say dtype=, one of "
                f"{', '.join(NAMES)}; its bytes, whatever they are, are view(uint8) with "
                "dtype='bytes'"
            )
        found = get(dtype)
    elif dtype is not None and get(dtype) is not found:
        raise UnsupportedError(f"the array is {found.name}, not {dtype}")
    if stored.itemsize != found.itemsize or stored.byteorder == ">":
        raise UnsupportedError(f"an array of {stored} cannot hold {found.name}")
    return found


def _of_tensor(tensor: Any, dtype: str | None, torch: Any) -> tuple[Any, DType | None]:
    """A torch tensor's memory as a tensor of integers, and the format that its own dtype tells;
    None where `dtype` must tell."""
    kind = tensor.dtype
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(kind.itemsize)
    own = _BY_NAME.get(str(kind).removeprefix("torch."))
    holds_bits = not (kind.is_floating_point or kind.is_complex or kind is torch.bool)
    if signed is None or not (own or holds_bits):
        raise UnsupportedError(
            f"a tensor of {kind} holds no numbers of ours: its bytes are tensor.view(torch.uint8)"
        )
    if tensor.is_neg():  # its bits in memory are those of other numbers
        raise UsageError("a tensor is a negative view: give its resolve_neg()")
    with told_as(UsageError, f"{_named(tensor)} holds no plain bits"):
        values = tensor.detach().view(signed)
    # int8 and uint8 may hold the bits of another format.
    return values, None if holds_bits and dtype is not None else own


def _named(tensor: Any) -> str:
    return f"a {tensor.layout} tensor on {tensor.device}"


def as_tensor(bits: Bits, dtype: str) -> Any:
    """A torch tensor on the same memory as `bits` (which must be writable). Raises KVZipError where
    torch is not installed."""
    with extra_told("tensors need torch", "hf"):
        import torch

    signed: NDArray[Any] = bits.view(np.dtype(f"<i{bits.dtype.itemsize}"))
    return torch.from_numpy(signed).view(getattr(torch, get(dtype).torch))


def to_ordered(bits: Bits, dtype: str) -> Bits:
    """Map bits to unsigned integers in the numbers' own order (-NaN lowest, +NaN highest).

    Two numbers that are neighbours on the real line become neighbouring integers.
    """
    form, top = get(dtype), _top_bit(bits)
    if form.kind == "signed":
        return np.asarray(bits ^ top)
    if not form.is_float:
        return bits.copy()
    # The NaN of "fnuz" comes lowest, not between the least numbers and 0.
    negative = -bits & ~top if form.kind == "fnuz" else ~bits
    return np.where(bits & top, negative, bits | top)


def from_ordered(ordered: Bits, dtype: str) -> Bits:
    """The inverse of :func:`to_ordered`."""
    form, top = get(dtype), _top_bit(ordered)
    if form.kind == "signed":
        return np.asarray(ordered ^ top)
    if not form.is_float:
        return ordered.copy()
    negative = -ordered | top if form.kind == "fnuz" else ~ordered
    return np.where(ordered & top, ordered ^ top, negative)


def _top_bit(bits: Bits) -> Any:
    return bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))


def sign_exponent(bits: Bits, dtype: str) -> Bits:
    """Sign and exponent of each number as one integer below ``get(dtype).symbols``; the whole
    number where it is no float."""
    fields: Bits = bits >> bits.dtype.type(get(dtype).mantissa_bits)
    return fields


def mantissa(bits: Bits, dtype: str) -> Bits:
    """The mantissa field of each number; 0 where it is no float."""
    fields: Bits = bits & bits.dtype.type((1 << get(dtype).mantissa_bits) - 1)
    return fields


def finite(bits: Bits, dtype: str) -> NDArray[np.bool_]:
    """Which numbers are neither infinite nor NaN."""
    form, top = get(dtype), _top_bit(bits)
    if form.kind == "fnuz":
        return np.asarray(bits != top)
    if form.kind == "scale":
        return np.asarray(bits != 0xFF)
    if not form.is_float:
        return np.ones(bits.shape, bool)
    # "fn" has no infinities; only the last pattern is a NaN.
    highest = (1 << form.exponent_bits) - 1 << form.mantissa_bits
    first = int(top) - 1 if form.kind == "fn" else highest
    return np.asarray(bits & ~top < bits.dtype.type(first))


def to_float32(bits: Bits, dtype: str) -> NDArray[np.float32]:
    """The numbers as float32: exactly, but for those of fp64, which are rounded."""
    form = get(dtype)
    if form.bits == 8:
        return _all_of_8_bits(form)[bits]
    if form.name == "bf16":
        return np.asarray((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))
    values: NDArray[np.floating] = bits.view(f"<f{form.itemsize}")
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


def to_float64(bits: Bits, dtype: str) -> NDArray[np.float64]:
    """The numbers as float64, exactly."""
    if get(dtype).bits == 64:
        return bits.view(np.float64).copy()
    with np.errstate(invalid="ignore"):
        return to_float32(bits, dtype).astype(np.float64)


@cache
def _all_of_8_bits(form: DType) -> NDArray[np.float32]:
    """What each pattern of a format of 8 bits is, as float32."""
    bits = np.arange(256, dtype=np.uint8)
    if form.kind == "scale":
        values = np.ldexp(1.0, bits.astype(np.int32) - 127)
    elif form.is_float:
        exponent = (bits & 0x7F) >> form.mantissa_bits
        whole = (bits & ((1 << form.mantissa_bits) - 1)).astype(np.float32)
        whole += np.where(exponent > 0, np.float32(1 << form.mantissa_bits), np.float32(0))
        power = np.maximum(exponent, 1).astype(np.int32) - form.bias - form.mantissa_bits
        values = np.ldexp(np.where(bits & 0x80, -whole, whole), power)
    else:
        return bits.view(np.int8 if form.kind == "signed" else np.uint8).astype(np.float32)
    values = np.where(finite(bits, form.name), values, np.nan).astype(np.float32)
    if form.kind == "ieee":
        infinity = (1 << form.exponent_bits) - 1 << form.mantissa_bits
        values[infinity], values[infinity | 0x80] = np.inf, -np.inf
    return values
