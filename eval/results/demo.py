"""What one run of the main job found: the object that `kvzip demo --json` prints and that
:func:`kvzip.eval.report.page.write_report` draws.

Plain values only, so that it goes to JSON and back unchanged. Bytes, seconds, GB = 10^9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.money.breakeven import BreakEven
from kvzip.eval.money.paper import PaperRow
from kvzip.eval.results.provenance import Made
from kvzip.eval.speed import bench


class Model(msgspec.Struct, frozen=True):
    id: str
    revision: str | None
    architecture: str


class Plane(msgspec.Struct, frozen=True):
    """Bits per number in a field of the numbers, or in all of them."""

    plane: str
    """"sign", "exponent", "mantissa", or another cut, such as "sign+exponent per channel"."""
    width: int
    """Bits as stored."""
    k: float
    """Entropy over the keys, bits per number."""
    v: float
    """Entropy over the values, bits per number."""


class CodecResult(bench.CodecResult, frozen=True):
    """One codec on the document; `name` is its spec, what :func:`kvzip.get_codec` takes."""

    tokens_equal: int
    """Greedy tokens equal to those from the same cache uncompressed, up to the first difference."""
    logits_max_diff: float


class FreshPrefill(msgspec.Struct, frozen=True):
    """The uncompressed cache against a prefill done anew, which may differ by itself."""

    tokens_equal: int
    logits_max_diff: float


class DemoResult(Made, frozen=True, kw_only=True):
    model: Model
    dtype: str
    text: str
    tokens: int
    layers: int
    layer_kinds: dict[str, int]
    raw_bytes: int
    sha256_raw: str
    planes: list[Plane]
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


def as_result(result: DemoResult | Mapping[str, Any]) -> DemoResult:
    """`result`, checked. Structs inside a mapping may be structs or plain dicts.

    Raises KVZipError that names the field when something is missing, of another type, or
    impossible: a report never shows a figure that cannot be.
    """
    try:
        plain = msgspec.to_builtins(result)
        checked = msgspec.convert(plain, DemoResult)
    except (msgspec.ValidationError, TypeError) as error:
        raise KVZipError(f"demo result: {error}") from error
    for name in ("tokens", "layers", "raw_bytes", "prefill_seconds", "new_tokens"):
        _above_zero(name, getattr(checked, name))
    for tokens, seconds in checked.prefill_points:
        _above_zero("prefill_points: tokens", tokens)
        _above_zero("prefill_points: seconds", seconds)
    if not checked.codecs or not checked.breakeven:
        raise KVZipError("demo result: there is no codec or no break-even row")
    for codec in checked.codecs:
        for field in ("encoded_bytes", "ratio", "bits_per_value", "encode_gbps", "decode_gbps"):
            _above_zero(f"codec {codec.name}: {field}", getattr(codec, field))
    return checked


def _above_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise KVZipError(f"demo result: {name} is {value}; it must be above zero")
