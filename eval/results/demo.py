"""What one run of the main job found: the object that `kvzip demo --json` prints and that
:func:`kvzip.eval.report.page.write_report` draws.

Plain values only, so that it goes to JSON and back unchanged. Bytes, seconds, GB = 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from kvzip.entropy import Measure
from kvzip.errors import KVZipError
from kvzip.eval.money.breakeven import BreakEven
from kvzip.eval.money.paper import PaperRow
from kvzip.eval.results.base import Result, above_zero
from kvzip.eval.speed import bench


class Model(msgspec.Struct, frozen=True):
    """The model whose cache it was."""

    id: str
    revision: str | None
    architecture: str


class CodecResult(bench.CodecResult, frozen=True):
    """One codec on the document; `name` is its spec, what :func:`kvzip.get_codec` takes."""

    tokens_equal: int
    """Greedy tokens equal to those from the same cache uncompressed, up to the first difference."""
    logits_max_diff: float


class FreshPrefill(msgspec.Struct, frozen=True):
    """The uncompressed cache against a prefill done anew, which may differ by itself."""

    tokens_equal: int
    logits_max_diff: float


class DemoResult(Result, frozen=True, kw_only=True, tag="demo"):
    """The file result.json in the folder of a demo."""

    writer = "kvzip demo"

    version: int = 2
    model: Model
    dtype: str
    text: str
    tokens: int
    layers: int
    layer_kinds: dict[str, int]
    raw_bytes: int
    sha256_raw: str
    planes: list[Measure]
    """Bits per number in a field of the numbers, in several of them, or in all."""
    prefill_seconds: float
    prefill_points: list[tuple[int, float]]
    """(tokens, seconds) as measured in this run."""
    codecs: list[CodecResult]
    fresh_prefill: FreshPrefill
    new_tokens: int
    exact: bool
    tokens_equal: int
    """The fewest of all codecs."""
    breakeven: list[BreakEven]
    paper: list[PaperRow]
    report: str | None = None

    def check(self) -> None:
        for name in ("tokens", "layers", "raw_bytes", "prefill_seconds", "new_tokens"):
            above_zero(name, getattr(self, name))
        for tokens, seconds in self.prefill_points:
            above_zero("prefill_points: tokens", tokens)
            above_zero("prefill_points: seconds", seconds)
        if not self.codecs or not self.breakeven:
            raise KVZipError("there is no codec or no break-even row")
        for codec in self.codecs:
            for field in ("encoded_bytes", "ratio", "bits_per_value", "encode_gbps", "decode_gbps"):
                above_zero(f"codec {codec.name}: {field}", getattr(codec, field))


def as_result(result: DemoResult | Mapping[str, Any]) -> DemoResult:
    """`result`, checked. Structs inside a mapping may be structs or plain dicts.

    Raises KVZipError that names the field when something is missing, of another type, or
    impossible: a report never shows a figure that cannot be.
    """
    try:
        checked = msgspec.convert(msgspec.to_builtins(result), DemoResult)
        checked.check()
    except (msgspec.ValidationError, TypeError, KVZipError) as error:
        raise KVZipError(f"demo result: {error}") from error
    return checked
