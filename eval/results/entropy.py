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


class CheckRow(msgspec.Struct, frozen=True):
    """One document's numbers as we say that they are coded, and as constriction codes them under
    the same model. Bits are of all numbers together."""

    file: str
    model: str
    """"by channel", the ladder's tables; or the codec of a whole file, the blocks of which are
    coded with its own tables or densities."""
    profile: str
    """SHA-256 of the profile; "" without one."""
    numbers: int
    ideal_bits: float
    """What a coder without rounding would take."""
    coder_bits: float
    """What constriction takes."""
    our_bits: float
    """The ladder's figure; the file's size."""
    left_out: int
    """Numbers that stand in the file in another way, which counts as it is on both sides."""

    @property
    def more(self) -> float:
        """The share by which ours takes more than constriction's."""
        return self.our_bits / self.coder_bits - 1 if self.coder_bits else 0.0


class EntropyResult(Result, frozen=True, kw_only=True, tag="entropy"):
    """The file entropy.json that `kvzip entropy --out` writes into its folder."""

    writer = "kvzip entropy"

    version: int = 2
    files: list[FilePlanes]
    ladder: Ladder
    checks: list[CheckRow] = msgspec.field(default_factory=list)
    """What constriction took; empty unless it was asked."""

    def check(self) -> None:
        if not self.ladder.rungs:
            raise KVZipError("there is no figure in it")
        for rung in self.ladder.rungs:
            figures = {"bits": rung.bits} | {f"bits of {p.part}": p.bits for p in rung.parts}
            for name, bits in figures.items():
                if not (math.isfinite(bits) and bits >= 0):  # 0: numbers that are all alike
                    raise KVZipError(f"{rung.name}: {name} is {bits}; it must be zero or above")
