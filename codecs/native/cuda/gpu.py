"""A GPU of NVIDIA's, through the driver; kernels are compiled where they run, by NVRTC.

Needs the extra ``kvzip[gpu]`` and a driver, and no toolkit. Everything is done in the device's
primary context, which torch and others use too. Compiled kernels are kept in the user's cache
folder, by the hash of their sources and the architecture.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from kvzip.codecs.native.cuda.device import (
    SOURCES,
    Device,
    Event,
    Kernel,
    Memory,
    MemoryFullError,
    Pinned,
    Stream,
    cache_folder,
    keep,
    source_hash,
)
from kvzip.errors import KVZipError, UnsupportedError, extra_told, first_line

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""What the kernels are compiled for in the tests; others from sm_80 on, as they are met."""

_HOST_MEMORY = 1
_STATIC_SHARED = 48 << 10
_LEAST_DRIVER = 13000
"""The CUDA version, as a driver tells it, from which on machine code of the NVRTC that we install
runs."""


def _driver() -> Any:
    with extra_told("a GPU needs CUDA for Python", "gpu", UnsupportedError):
        from cuda.bindings import driver
    return driver


def _called(result: Any) -> Any:
    """What a call to the driver gave. Raises KVZipError when it failed."""
    status, *values = result
    if int(status):
        raise KVZipError(f"the GPU's driver says {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


@cache
def _initialized() -> Any:
    driver = _driver()
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # the package has no class for a driver that is not there
        raise UnsupportedError(f"there is no NVIDIA driver here: {error}") from None
    if int(status):
        raise UnsupportedError(f"there is no NVIDIA GPU here: the driver says {status.name}")
    version = _called(driver.cuDriverGetVersion())
    if version < _LEAST_DRIVER:
        raise UnsupportedError(
            f"the NVIDIA driver here is of CUDA {version // 1000}.{version % 1000 // 10}: kvzip "
            "needs one of CUDA 13 (580 or later)"
        )
    return driver


def cuda_device(ordinal: int | None = None) -> CudaDevice:
    """The GPU of that number; by default the one that torch or CUDA uses now. One object each."""
    if ordinal is None:
        torch, ordinal = sys.modules.get("torch"), 0
        if torch is not None and torch.cuda.is_available():
            try:
                ordinal = torch.cuda.current_device()
            except RuntimeError as error:  # in a process forked from one that used it
                raise UnsupportedError(f"torch cannot use CUDA: {first_line(error)}") from None
    found = _device(ordinal)
    found.check_process()
    return found


class About(NamedTuple):
    """What there is to say of a GPU."""

    name: str
    architecture: str
    memory_gib: float


def gpus() -> list[About]:
    """The GPUs that there are, in the driver's order. Raises UnsupportedError where there is no
    driver or none of them."""
    driver, found = _initialized(), []
    for ordinal in range(_called(driver.cuDeviceGetCount())):
        device = _called(driver.cuDeviceGet(ordinal))
        name = _called(driver.cuDeviceGetName(256, device)).split(b"\0")[0].decode(errors="replace")
        memory = _called(driver.cuDeviceTotalMem(device)) / 2**30
        found.append(About(name, _architecture(driver, device), round(memory, 1)))
    return found


def _architecture(driver: Any, device: Any) -> str:
    """What kernels are compiled for: "sm_90"."""
    attribute = driver.CUdevice_attribute
    major, minor = (
        _called(driver.cuDeviceGetAttribute(a, device))
        for a in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return f"sm_{major}{minor}"


@cache
def _device(ordinal: int) -> CudaDevice:
    driver = _initialized()
    if ordinal >= _called(driver.cuDeviceGetCount()):
        raise UnsupportedError(f"there is no GPU number {ordinal} here")
    return CudaDevice(driver, ordinal)


def compiled(kernel_source: str, architecture: str, kept: bool = True) -> bytes:
    """The machine code of a source for an architecture ("sm_90"), from the cache folder or NVRTC.
    `kept`: whether what is in the folder may be taken.

    Needs no GPU. Raises UnsupportedError when there is no NVRTC.
    """
    name = (
        f"{kernel_source.replace('/', '-')}-{source_hash(kernel_source)[:32]}-{architecture}.cubin"
    )
    path = cache_folder() / "cubins" / name
    if kept:
        with suppress(OSError):
            data = path.read_bytes()
            code, digest = data[:-_DIGEST], data[-_DIGEST:]
            if _digest(code) == digest:
                return code
    code = compiled_anew(kernel_source, architecture)[0]
    # The driver is not told how long code is: of a file that was cut short it would read on.
    keep(path, code + _digest(code))
    return code


_DIGEST = 32


def _digest(code: bytes) -> bytes:
    return hashlib.sha256(code).digest()


def compiled_anew(kernel_source: str, architecture: str) -> tuple[bytes, str]:
    """The same by NVRTC at any rate, and what its assembler tells of registers and spills."""
    with extra_told("compiling for a GPU needs CUDA for Python", "gpu", UnsupportedError):
        try:
            from cuda.core import Program, ProgramOptions
        except ImportError:  # before cuda.core 0.5
            from cuda.core.experimental import Program, ProgramOptions
    options = ProgramOptions(
        std="c++17",
        arch=architecture,
        include_path=[str(SOURCES)],
        name=kernel_source,
        ptxas_options=["-v"],
        # Functions that C++ evaluates when it compiles are the device's.
        device_as_default_execution_space=True,
    )
    source, logs = (SOURCES / kernel_source).read_text(), io.StringIO()
    try:
        code = Program(source, "c++", options).compile("cubin", logs=logs).code
    except Exception as error:  # there is no NVRTC, or it does not know the architecture
        raise UnsupportedError(
            f"{kernel_source} does not compile for {architecture}: {first_line(error)}"
        ) from error
    return bytes(code), logs.getvalue()


class CudaDevice(Device):
    """A GPU in its primary context."""

    kind = "cuda"

    def __init__(self, driver: Any, ordinal: int):
        super().__init__()
        self._driver, self.ordinal = driver, ordinal
        device = _called(driver.cuDeviceGet(ordinal))
        self.architecture = _architecture(driver, device)
        if int(self.architecture.removeprefix("sm_")) < 80:
            raise UnsupportedError(
                f"GPU {ordinal} is {self.architecture}; sm_80 or later is needed"
            )
        self._context = _called(driver.cuDevicePrimaryCtxRetain(device))
        self._process = os.getpid()
        self._modules: dict[str, Any] = {}
        self._functions: dict[Kernel, Any] = {}
        self._shared: dict[str, int] = {}
        """The most shared memory that each function has been allowed."""

    @contextmanager
    def current(self) -> Iterator[None]:
        self.check_process()
        with self.lock, self._in_context():
            yield

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        _called(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()

    def check_process(self) -> None:
        """Raise UnsupportedError in a process that was forked from the one that uses the device:
        CUDA does not work there, and the lock may be held by a thread that was not taken along."""
        if self._process != os.getpid():
            raise UnsupportedError(
                f"GPU {self.ordinal} was in use when this process was forked, and CUDA does not "
                'work in such a process: start it by "spawn"'
            )

    def give_back(self, call: str, handle: Any) -> None:
        """Give memory, an event or a stream back to the driver, by this call of its. In any thread,
        whoever holds the lock: Python finds what nobody holds any more where it likes, also in a
        thread that one with the lock waits for."""
        if self._process != os.getpid():
            return
        with self._in_context():
            if call.startswith("cuMem"):
                # What runs may still use it. "This API may perform implicit synchronization", says
                # the driver's manual, so it may not, either.
                self._driver.cuCtxSynchronize()
            getattr(self._driver, call)(handle)

    # --- memory ----------------------------------------------------------------------------

    def allocate(self, size: int) -> Memory:
        status, found = self._driver.cuMemAlloc(max(size, 1))
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise MemoryFullError(f"GPU {self.ordinal} has no {size:,} bytes of memory left")
        address = int(_called((status, found)))
        return Memory(address, size, _Freed(self, "cuMemFree", address))

    def pinned(self, size: int) -> Pinned:
        address = int(_called(self._driver.cuMemHostAlloc(max(size, 1), 0)))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address))
        return Pinned(array[:size], _Freed(self, "cuMemFreeHost", address))

    def holds(self, tensor: Any) -> bool:
        return bool(tensor.device.type == "cuda" and (tensor.device.index or 0) == self.ordinal)

    def is_pinned(self, address: int, size: int) -> bool:
        # Of a buffer a beginning alone may be registered.
        ends = address, address + size - 1
        return all(self._attribute("MEMORY_TYPE", end) == _HOST_MEMORY for end in ends)

    def reaches(self, address: int) -> bool:
        kind = self._attribute("MEMORY_TYPE", address)
        if kind is None or kind == _HOST_MEMORY:
            return kind is not None
        return bool(
            self._attribute("DEVICE_ORDINAL", address) == self.ordinal
            or self._attribute("IS_MANAGED", address)
        )

    def _attribute(self, name: str, address: int) -> int | None:
        """What the driver says of an address; None if it knows nothing of it."""
        attribute = getattr(self._driver.CUpointer_attribute, f"CU_POINTER_ATTRIBUTE_{name}")
        status, value = self._driver.cuPointerGetAttribute(attribute, address)
        return None if int(status) else int(value)

    def upload(self, stream: Stream, address: int, source: int, size: int) -> None:
        _called(self._driver.cuMemcpyHtoDAsync(address, source, size, stream.handle))

    def download(self, stream: Stream, target: int, address: int, size: int) -> None:
        if size:
            _called(self._driver.cuMemcpyDtoHAsync(target, address, size, stream.handle))

    def clear(self, stream: Stream, address: int, size: int) -> None:
        if size:
            _called(self._driver.cuMemsetD8Async(address, 0, size, stream.handle))

    # --- order -----------------------------------------------------------------------------

    def stream(self) -> Stream:
        handle = _called(self._driver.cuStreamCreate(1))  # CU_STREAM_NON_BLOCKING
        return _Handle(handle, _Freed(self, "cuStreamDestroy", handle))

    def stream_of(self, given: Any) -> Stream:
        if isinstance(given, _Handle):
            return given
        if given is None:
            torch = sys.modules.get("torch")
            handle = (
                torch.cuda.current_stream(self.ordinal).cuda_stream
                if torch is not None and torch.cuda.is_initialized()
                else 0
            )
        elif hasattr(given, "cuda_stream"):
            handle = given.cuda_stream
        elif hasattr(given, "__cuda_stream__"):
            handle = given.__cuda_stream__()[1]
        else:
            handle = given
        return _Handle(self._driver.CUstream(int(handle)))

    def record(self, stream: Stream) -> Event:
        handle = _called(self._driver.cuEventCreate(2))  # CU_EVENT_DISABLE_TIMING
        event = _Handle(handle, _Freed(self, "cuEventDestroy", handle))
        _called(self._driver.cuEventRecord(handle, stream.handle))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        _called(self._driver.cuStreamWaitEvent(stream.handle, event.handle, 0))

    def synchronize(self, event: Event) -> None:
        _called(self._driver.cuEventSynchronize(event.handle))

    # --- kernels ---------------------------------------------------------------------------

    def _function(self, kernel: Kernel) -> Any:
        found = self._functions.get(kernel)
        if found is not None:
            return found
        module = self._modules.get(kernel.source)
        if module is None:
            module = self._modules[kernel.source] = self._loaded(kernel.source)
        found = _called(self._driver.cuModuleGetFunction(module, kernel.name.encode()))
        # Of one function there are kernels that need more and less.
        if kernel.shared > self._shared.get(kernel.name, _STATIC_SHARED):
            self._shared[kernel.name] = kernel.shared
            attribute = self._driver.CUfunction_attribute
            key = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _called(self._driver.cuFuncSetAttribute(found, key, kernel.shared))
        self._functions[kernel] = found
        return found

    def _loaded(self, source: str) -> Any:
        """The kernels of a source. What was kept of them may be damaged, as a power cut leaves a
        file: then they are compiled anew."""
        found = self._driver.cuModuleLoadData(compiled(source, self.architecture))
        if int(found[0]):
            anew = compiled(source, self.architecture, kept=False)
            found = self._driver.cuModuleLoadData(anew)
        return _called(found)

    def launch(self, stream: Stream, kernel: Kernel, count: int, given: Mapping[str, int]) -> None:
        values = kernel.values(given)
        kinds = tuple(ctypes.c_uint64 if address else ctypes.c_uint32 for _, address in values)
        _called(
            self._driver.cuLaunchKernel(
                self._function(kernel),
                *(kernel.grid(count), 1, 1),
                *(kernel.threads, 1, 1),
                kernel.shared,
                stream.handle,
                (tuple(value for value, _ in values), kinds),
                0,
            )
        )


class _Freed:
    """Gives something back to the driver when nobody holds it any more."""

    def __init__(self, device: CudaDevice, call: str, handle: Any):
        self._device, self._call, self._handle = device, call, handle

    def __del__(self) -> None:
        with suppress(Exception):  # the driver is gone already
            self._device.give_back(self._call, self._handle)


class _Handle:
    """A stream or an event, and what gives it back if it is ours."""

    def __init__(self, handle: Any, owner: _Freed | None = None):
        self.handle, self._owner = handle, owner

    def __int__(self) -> int:
        return int(self.handle)
