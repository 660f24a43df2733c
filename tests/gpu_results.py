"""Measurements of a GPU as tests make them up."""

from __future__ import annotations

from collections.abc import Sequence

from kvzip.eval.results.gpu import GpuResult, GpuRow
from kvzip.eval.results.provenance import Machine


def gpu_row(name: str, tokens: int = 1, gbps: float = 1.0, runs: int = 9) -> GpuRow:
    return GpuRow(name=name, tokens=tokens, seconds=1.0, least_seconds=1.0, gbps=gbps, runs=runs)


def gpu_result(rows: Sequence[GpuRow], gpu: str = "Some GPU") -> GpuResult:
    return GpuResult(
        command="python -m kvzip.benchmarks.gpu",
        date="2026-11-28T00:00:00+00:00",
        machine=Machine("some CPU", 2, 16.0),
        versions={},
        gpu=gpu,
        dtype="bf16",
        shape={},
        ratio={},
        rows=list(rows),
    )
