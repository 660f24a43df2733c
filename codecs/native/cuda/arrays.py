"""Arrays on a device (torch tensors, CuPy arrays and the like) as addresses and strides."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np

from kvzip import dtypes
from kvzip.codecs.native.cuda.device import Device, Memory
from kvzip.codecs.native.cuda.work import Target
from kvzip.dtypes import DType
from kvzip.errors import UnsupportedError, told_as

_LEGACY, _DL_CUDA = 1, 2
"""DLPack's numbers of the stream that CUDA calls its legacy default, and of CUDA's memory."""


class View(NamedTuple):
    """An array's memory; strides in numbers."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class DeviceArray:
    """Memory of a GPU as an array of the numbers' bits, where there is no torch: has
    ``__cuda_array_interface__`` and ``__dlpack__``. C order but for cuts."""

    def __init__(
        self,
        memory: Memory,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        itemsize: int,
    ):
        self._memory, self.address, self.shape, self.strides = memory, address, shape, strides
        self.itemsize = itemsize
        """Bytes of a number; strides are in numbers."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": f"<u{self.itemsize}",
            "data": (self.address, False),
            "strides": tuple(self.itemsize * n for n in self.strides),
            "version": 3,
            "stream": None,
        }

    def _strided(self) -> Any:
        from cuda.core.utils import StridedMemoryView

        return StridedMemoryView.from_cuda_array_interface(self, stream_ptr=-1)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._strided().__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self._strided().__dlpack_device__()

    def cut(self, begin: int, end: int) -> DeviceArray:
        """Only tokens begin to end: of the last axis but one."""
        shape = (*self.shape[:-2], end - begin, self.shape[-1])
        address = self.address + begin * self.strides[-2] * self.itemsize
        return DeviceArray(self._memory, address, shape, self.strides, self.itemsize)

    def row(self) -> DeviceArray:
        """Its only batch row, without the axis."""
        return DeviceArray(
            self._memory, self.address, self.shape[1:], self.strides[1:], self.itemsize
        )


def target_of(tensor: Any) -> Target:
    """Where a torch tensor [batch, heads, tokens, dim] of a device lies."""
    batch, heads, tokens, _ = tensor.stride()
    shape = tuple(tensor.shape)
    return Target(tensor.data_ptr(), (batch, heads, tokens), shape, 0, owner=tensor)


def torch_of(device: Device) -> Any:
    """torch, if it can hold arrays of the device."""
    if device.kind != "cuda":
        return None
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def empty(device: Device, shape: tuple[int, ...], form: DType) -> tuple[Any, View]:
    """A new array for numbers of a format: a torch tensor of its dtype on a GPU where there is
    torch, else a DeviceArray; of the shim a numpy array of bits."""
    strides = tuple(int(n) // form.itemsize for n in np.empty(shape, form.uint).strides)
    if device.kind != "cuda":
        array = np.empty(shape, form.uint)
        made = dtypes.as_tensor(array, form.name) if getattr(device, "tensors", False) else array
        return made, View(array.ctypes.data, shape, strides)
    torch = torch_of(device)
    if torch is not None:
        dtype = getattr(torch, form.torch)
        tensor = torch.empty(shape, dtype=dtype, device=f"cuda:{device.ordinal}")  # type: ignore[attr-defined]
        return tensor, View(tensor.data_ptr(), shape, strides)
    memory = device.allocate(int(np.prod(shape, dtype=np.int64)) * form.itemsize)
    made = DeviceArray(memory, memory.address, shape, strides, form.itemsize)
    return made, View(memory.address, shape, strides)


def cut(array: Any, begin: int, end: int, batched: bool) -> Any:
    """Tokens begin to end of [batch, heads, tokens, dim], without the batch if not `batched`."""
    if isinstance(array, DeviceArray):
        part = array if end - begin == array.shape[2] else array.cut(begin, end)
        return part if batched else part.row()
    part = array if end - begin == array.shape[2] else array[:, :, begin:end]
    return part if batched else part[0]


def view_of(array: Any, device: Device, form: DType) -> View:
    """An array that numbers of a format are to be written to: of its dtype, or of integers as wide.

    Where whoever made it names the stream that still writes to it, this waits for that. Raises
    UnsupportedError if it is none, lies elsewhere or must not be written to, UsageError for a
    tensor without plain bits.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if not device.holds(array):
            raise UnsupportedError(f"out is on {array.device}, not on the device that decodes")
        bits = dtypes.tensor_bits(array, form.name).tensor
        found = View(bits.data_ptr(), tuple(bits.shape), tuple(bits.stride()))
        return _checked(found, form.itemsize, form)
    interface = getattr(array, "__cuda_array_interface__", None)
    if device.kind != "cuda":
        if not isinstance(array, np.ndarray) or not array.flags.writeable:
            raise UnsupportedError("out: want writable numpy arrays or CPU tensors")
        interface = array.__array_interface__
    if interface is None:
        if not hasattr(array, "__dlpack__"):
            raise UnsupportedError(f"out: a {type(array).__name__} is not an array on a GPU")
        from cuda.core.utils import StridedMemoryView

        with told_as(UnsupportedError, "out cannot be looked at by DLPack"):
            writer = _LEGACY if int(array.__dlpack_device__()[0]) == _DL_CUDA else None
            # -1: whoever made it need not say when it is written.
            strided = StridedMemoryView.from_dlpack(array, -1 if writer is None else writer)
            shape, stored = tuple(strided.shape), strided.dtype
        if not strided.is_device_accessible:
            raise UnsupportedError("out is not on a GPU")
        address, fixed, strides = strided.ptr, strided.readonly, strided.strides
    else:
        shape, (address, fixed) = tuple(interface["shape"]), interface["data"]
        writer = interface.get("stream")
        stored = np.dtype(interface["typestr"])
        strides = interface.get("strides")
        strides = None if strides is None else tuple(n // stored.itemsize for n in strides)
    if strides is None:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if fixed:
        raise UnsupportedError("out is an array that must not be written to")
    if math.prod(shape) and not device.reaches(address):
        raise UnsupportedError("out is not in the memory of the device that decodes")
    if writer is not None:
        device.synchronize(device.record(device.stream_of(writer)))
    # Of kind "V" are ml_dtypes' formats, of which no more is told.
    if stored.kind not in "iuV" and dtypes.get(stored.name) is not form:
        raise UnsupportedError(f"the array is {stored.name}, not {form.name}")
    if stored.byteorder == ">":
        raise UnsupportedError(f"an array of {stored} cannot hold {form.name}")
    return _checked(View(address, shape, tuple(strides)), stored.itemsize, form)


def _checked(found: View, itemsize: int, form: DType) -> View:
    if itemsize != form.itemsize:
        raise UnsupportedError(f"an array of {itemsize} bytes a number cannot hold {form.name}")
    if found.shape and found.shape[-1] > 1 and found.strides[-1] != 1:
        raise UnsupportedError("out: the numbers of a token and head must lie side by side")
    return found
