"""What `kvzip entropy` finds: the ideal code lengths of :mod:`kvzip.entropy`, and what they were
computed on and with."""

from __future__ import annotations

import math

import msgspec

from kvzip.entropy import Ladder, Measure
from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result


class FilePlanes(msgspec.Struct, frozen=True):
    """Bits per number of one snapshot, by field of its numbers, for each format that it has."""

    file: str
    dtype: str
    planes: list[Measure]


class EntropyResult(Result, frozen=True, kw_only=True, tag="entropy"):
    """The file entropy.json that `kvzip entropy --out` writes into its folder."""

    writer = "kvzip entropy"

    version: int = 2
    files: list[FilePlanes]
    ladder: Ladder

    def check(self) -> None:
        if not self.ladder.rungs:
            raise KVZipError("there is no figure in it")
        for rung in self.ladder.rungs:
            figures = {"bits": rung.bits} | {f"bits of {p.part}": p.bits for p in rung.parts}
            for name, bits in figures.items():
                if not (math.isfinite(bits) and bits >= 0):  # 0: numbers that are all alike
                    raise KVZipError(f"{rung.name}: {name} is {bits}; it must be zero or above")
