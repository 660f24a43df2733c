"""What `kvzip eval inputs` finds: the measured inputs of a verdict, all of one run on one machine.

How long a model's prefill takes at several lengths, and each codec's ratio and decode speed on the
caches of those lengths.
"""

from __future__ import annotations

import math

import msgspec

from kvzip.choice.cost import CodecFigures, PrefillFit, fit_prefill
from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result, above_zero


class CodecRow(msgspec.Struct, frozen=True):
    """One codec on one cache. Speeds are raw gigabytes (10^9) a second."""

    codec: str
    dtype: str
    tokens: int
    raw_bytes: int
    ratio: float
    encode_gbps: float
    decode_gbps: float
    exact: bool
    profile_bytes: int | None = None
    """In memory, of the profile that it was measured with; None where there was none, or where it
    was not noted."""

    @property
    def figures(self) -> CodecFigures:
        return CodecFigures(
            self.codec,
            self.ratio,
            1e9 * self.decode_gbps,
            float(self.profile_bytes or 0),
            1e9 * self.encode_gbps,
        )


class Missing(msgspec.Struct, frozen=True):
    """A codec that gave no figures."""

    codec: str
    dtype: str
    reason: str


class Inputs(Result, frozen=True, kw_only=True, tag="inputs"):
    """What one run measured; the file that `kvzip eval inputs -o` writes."""

    writer = "kvzip eval inputs"

    model: str
    revision: str
    text: str
    layers: int
    numbers_per_token: float
    """Numbers that a token leaves in the cache, at the greatest length."""
    parameters: int
    """Those that multiply with every token."""
    width: int
    """Query heads x head dimension."""
    prefill: PrefillFit
    prefill_dtype: str
    """What the timed prefill computed in."""
    threads: int
    """That codecs had; the prefill had torch's own number."""
    rows: list[CodecRow]
    missing: list[Missing]

    def figures(self, dtype: str, tokens: float) -> list[CodecFigures]:
        """Every codec's figures on a cache of that dtype at the measured length nearest to
        `tokens`, in ratio. Raises KVZipError when none was measured of that dtype."""
        able = [row for row in self.rows if row.dtype == dtype]
        if not able:
            raise KVZipError(
                f"no codec was measured on {dtype}; there are: "
                + ", ".join(dict.fromkeys(row.dtype for row in self.rows))
            )
        nearest = min({r.tokens for r in able}, key=lambda n: abs(math.log(n / tokens)))
        return [row.figures for row in able if row.tokens == nearest]

    def check(self) -> None:
        if not self.rows:
            raise KVZipError("there is no codec in it")
        for row in self.rows:
            for field in ("tokens", "ratio", "encode_gbps", "decode_gbps"):
                above_zero(f"{row.codec}: {field}", getattr(row, field))
            if not row.exact:
                raise KVZipError(f"{row.codec} was not exact; its figures are none")
        fit_prefill(self.prefill.points)  # names a point that cannot be
