"""What a processor does for a GPU that decodes a file: python -m kvzip.benchmarks.host_jobs FILE
[PROFILE]. It reads headers and tables and makes jobs; what the GPU would do, launches and copies
among it, is left out, so that no GPU is needed."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Mapping

import numpy as np

import kvzip
from kvzip.codecs.native.cuda.device import Kernel, Memory, Stream
from kvzip.codecs.native.cuda.shim_device import ShimDevice
from kvzip.container.index import Index


class Idle(ShimDevice):
    """A device that does nothing, and says of the file that it was told of that all is right."""

    def __init__(self) -> None:
        super().__init__()
        self._results = b""

    def expect(self, index: Index) -> None:
        """Checksums are to be those of this file, and flags zeros, as when all of it is decoded."""
        tables = {rows.start for rows in index.rows.values()}
        found = [sum_ for row, sum_ in enumerate(index.raw_checksum) if row not in tables]
        self._results = np.array(found, np.uint64).tobytes() + bytes(4 * len(found))

    def allocate(self, size: int) -> Memory:
        array = np.empty(size + 256, np.uint8)
        return Memory((array.ctypes.data + 255) & ~255, size, array)

    def is_pinned(self, address: int, size: int) -> bool:
        return True

    def upload(self, stream: Stream, address: int, source: int, size: int) -> None:
        pass

    def download(self, stream: Stream, target: int, address: int, size: int) -> None:
        ctypes.memmove(target, self._results[:size].ljust(size, b"\0"), size)

    def clear(self, stream: Stream, address: int, size: int) -> None:
        pass

    def launch(self, stream: Stream, kernel: Kernel, count: int, given: Mapping[str, int]) -> None:
        pass


def measure(path: str, profile: kvzip.Profile | None, runs: int) -> dict[str, float]:
    """Processor milliseconds of a whole file in memory, as if that were pinned: the least and the
    median of so many runs, and the least by layer."""
    blob = np.fromfile(path, np.uint8)
    device = Idle()
    with kvzip.open(blob, profile) as reader:
        device.expect(reader.index)
        layers = len(reader.layout.layers)
        out = [
            tuple(np.empty(part.shape, part.form.uint) for part in layer.parts.values())
            for layer in reader.layout.layers
        ]

    def decode() -> None:
        with kvzip.open(blob, profile) as reader:
            reader.decode(out=out, device=device)

    decode()
    spent = []
    for _ in range(runs):
        begin = time.process_time()
        decode()
        spent.append(1e3 * (time.process_time() - begin))
    return {"least": min(spent), "median": float(np.median(spent)), "a layer": min(spent) / layers}


def main(path: str, profile: str = "", runs: str = "20") -> None:
    """Print them."""
    known = kvzip.Profile.load(profile) if profile else None
    for name, spent in measure(path, known, int(runs)).items():
        print(f"{name:8} {spent:8.3f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
