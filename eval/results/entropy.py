"""What `kvzip entropy` finds: the ideal code lengths of :mod:`kvzip.entropy`, and what they were
computed on and with."""

from __future__ import annotations

import msgspec

from kvzip.entropy import Ladder, Measure
from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result, above_zero


class FilePlanes(msgspec.Struct, frozen=True):
    """Bits per number of one snapshot, by field of its numbers."""

    file: str
    dtype: str
    planes: list[Measure]


class EntropyResult(Result, frozen=True, kw_only=True, tag="entropy"):
    """The file entropy.json that `kvzip entropy --out` writes into its folder."""

    writer = "kvzip entropy"

    files: list[FilePlanes]
    ladder: Ladder

    def check(self) -> None:
        if not self.ladder.rungs:
            raise KVZipError("there is no figure in it")
        for rung in self.ladder.rungs:
            for field in ("bits", "k", "v"):
                above_zero(f"{rung.name}: {field}", getattr(rung, field))
