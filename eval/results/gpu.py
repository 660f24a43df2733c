"""What `python -m kvzip.benchmarks.gpu` finds: how fast a GPU decodes."""

from __future__ import annotations

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result, above_zero

KERNELS = "channel: kernels and checksums alone"
COPY = "device copy"
LINK = "link: the file's bytes from pinned memory"
"""Names of rows that models take: decoding on the device alone, a copy within its memory, and PCIe,
whose bytes are those that cross."""


class GpuRow(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was measured."""

    name: str
    tokens: int
    seconds: float
    """Median of the runs."""
    least_seconds: float
    gbps: float
    """10^9 raw bytes a second, from the median."""
    runs: int


class GpuResult(Result, frozen=True, kw_only=True, tag="bench-gpu"):
    """One run of this benchmark. `versions` names CUDA's version too."""

    writer = "python -m kvzip.benchmarks.gpu"

    gpu: str
    dtype: str
    shape: dict[str, int]
    """Layers, heads, dim."""
    ratio: dict[str, float]
    """What `channel` reaches, by tokens."""
    rows: list[GpuRow]

    def check(self) -> None:
        if not self.rows:
            raise KVZipError("there is no row in it")
        for row in self.rows:
            above_zero(f"{row.name}: gbps", row.gbps)
