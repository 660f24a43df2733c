"""The kernels' sources on a CPU, compiled by g++ with shim.hpp: for tests where there is no GPU.

The host's memory is the device's memory too. Everything is done at once, in the order of the calls,
so what must wait for what is not tested here.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvzip.codecs.native.cuda.device import (
    SOURCES,
    Device,
    Event,
    Kernel,
    Memory,
    Pinned,
    Stream,
    cache_folder,
    keep,
    source_hash,
)
from kvzip.errors import UnsupportedError
from kvzip.files import scratch_folder

_TEMPLATE = """
#include "{source}"
#include <utility>
template <typename... A, std::size_t... I>
void run(void (*kernel)(A...), std::index_sequence<I...>, unsigned blocks, unsigned threads,
         unsigned long shared, unsigned long long seed, void** arguments) {{
  kvzip::shim::launch(blocks, threads, shared, [&] {{
    kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
  }}, seed);
}}
template <typename... A>
void run(void (*kernel)(A...), unsigned blocks, unsigned threads, unsigned long shared,
         unsigned long long seed, void** arguments) {{
  run(kernel, std::index_sequence_for<A...>(), blocks, threads, shared, seed, arguments);
}}
template <typename... A>
constexpr unsigned arguments_of(void (*)(A...)) {{
  return sizeof...(A);
}}
extern "C" const unsigned kvzip_arguments = arguments_of(&{space}::{name});
extern "C" void kvzip_run(unsigned blocks, unsigned threads, unsigned long shared,
                          unsigned long long seed, void** arguments) {{
  run(&{space}::{name}, blocks, threads, shared, seed, arguments);
}}
"""
_FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror=return-type"),
)


class ShimDevice(Device):
    """A CPU that takes itself for a GPU. `seed`: 0 runs threads in order, else in random order.
    `tensors`: what is decoded becomes torch tensors of the numbers' dtype, not arrays of bits."""

    kind = "shim"
    architecture = "shim"

    def __init__(self, seed: int = 0, flags: tuple[str, ...] = (), tensors: bool = False):
        super().__init__()
        self.seed, self._flags, self.tensors = seed, flags, tensors
        self._functions: dict[Kernel, Any] = {}
        self.launched: list[str] = []
        """Names of the kernels that ran, in order."""

    def allocate(self, size: int) -> Memory:
        # Filled with what no kernel should read before it is written.
        array = np.full(size + 256, 0xA5, np.uint8)
        return Memory((array.ctypes.data + 255) & ~255, size, array)

    def pinned(self, size: int) -> Pinned:
        whole = np.full(size + 256, 0x5A, np.uint8)
        at = -whole.ctypes.data % 256
        return Pinned(whole[at : at + size])

    def holds(self, tensor: Any) -> bool:
        return bool(tensor.device.type == "cpu")

    def is_pinned(self, address: int, size: int) -> bool:
        return False

    def reaches(self, address: int) -> bool:
        return True

    def upload(self, stream: Stream, address: int, source: int, size: int) -> None:
        ctypes.memmove(address, source, size)

    def download(self, stream: Stream, target: int, address: int, size: int) -> None:
        ctypes.memmove(target, address, size)

    def clear(self, stream: Stream, address: int, size: int) -> None:
        ctypes.memset(address, 0, size)

    def stream(self) -> Stream:
        return None

    def stream_of(self, given: Any) -> Stream:
        return None

    def record(self, stream: Stream) -> Event:
        return None

    def wait(self, stream: Stream, event: Event) -> None:
        pass

    def synchronize(self, event: Event) -> None:
        pass

    def launch(self, stream: Stream, kernel: Kernel, count: int, given: Mapping[str, int]) -> None:
        run = self._functions.get(kernel)
        if run is None:
            run = self._functions[kernel] = ctypes.CDLL(str(self._library(kernel))).kvzip_run
            run.restype = None
            run.argtypes = [
                *(ctypes.c_uint, ctypes.c_uint, ctypes.c_ulong, ctypes.c_ulonglong),
                ctypes.c_void_p,
            ]
        self.launched.append(kernel.name)
        # Smaller ones are read from the low bytes.
        values = [ctypes.c_uint64(value) for value, _ in kernel.values(given)]
        places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        run(kernel.grid(count), kernel.threads, kernel.shared, self.seed, places)

    def _library(self, kernel: Kernel) -> Path:
        """The kernel as a shared library, compiled unless it was before."""
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            raise UnsupportedError("the shim needs a C++ compiler")
        text = _TEMPLATE.format(source=kernel.source, space=kernel.space, name=kernel.name)
        made_of = "\0".join(
            (source_hash(kernel.source), text, compiler, *_FLAGS, *self._flags, sys.platform)
        )
        name = f"{kernel.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.so"
        path = cache_folder() / "shim" / name
        if not path.exists():
            with scratch_folder() as folder:
                source, library = folder / "kernel.cpp", folder / "kernel.so"
                source.write_text(text)
                command = [compiler, *_FLAGS, *self._flags, f"-I{SOURCES}", str(source)]
                done = subprocess.run(
                    [*command, "-o", str(library)], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise UnsupportedError(f"the shim does not compile: {done.stderr[-4000:]}")
                keep(path, library.read_bytes())
        return path
