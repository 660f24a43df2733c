"""The stand-in for nvCOMP (fake_nvcomp.cpp), compiled and with its decoders: those of the CPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

from kvzip.byte_coders import get_coder
from kvzip.codecs.native.cuda.nvcomp import NvComp
from kvzip.codecs.native.cuda.work import bytes_at
from kvzip.errors import CorruptError

SOURCE = Path(__file__).with_suffix(".cpp")
_Decode = ctypes.CFUNCTYPE(
    ctypes.c_longlong,
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t),
)


def compiled(folder: Path, *flags: str) -> Path:
    """The stand-in as a library."""
    library = folder / "libnvcomp.so.6"
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", *flags, str(SOURCE)]
    subprocess.run([*command, "-o", str(library), "-ldl"], check=True)
    return library


class FakeNvComp(NvComp):
    """The stand-in, and what it was asked to decode."""

    def __init__(self, path: Path):
        self.fake = ctypes.CDLL(str(path))
        self.decoded: list[tuple[str, bytes, int]] = []
        """Coder, stored bytes and room of each chunk."""

        def decode(lz4: int, source: int, length: int, target: int, room: int) -> int:
            name, stored = "lz4" if lz4 else "zstd", bytes(bytes_at(source, length))
            self.decoded.append((name, stored, room))
            try:
                raw = get_coder(name, 1).decode(memoryview(stored), room)
            except CorruptError:
                bytes_at(target, room)[:] = bytes(room)  # what fails may leave anything there
                return -1
            bytes_at(target, room)[:] = raw.data
            return room

        self._kept = _Decode(decode)
        self.fake.fake_decoder(self._kept)
        self.set()
        super().__init__(path)

    def set(self, version: int = 6000, alignment: int = 1, status: int = 0) -> None:
        """What it says of itself, what it wants of chunks, and how its calls end."""
        settings: Any = self.fake.fake_settings
        settings.argtypes = [ctypes.c_uint32, ctypes.c_size_t, ctypes.c_int]
        settings(version, alignment, status)
