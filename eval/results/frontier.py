"""What `kvzip eval frontier` finds: bits per number against multiplications, predictor by
predictor."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result, above_zero, not_below_zero

POINTS_VERSION = 1
"""The version of what is measured of a layer: points of another one are measured anew."""


Family = Literal["tables", "linear", "piecewise", "copy", "recomputation", "floor"]
"""A kind of predictor; a floor is what no codec can reach."""


class LayerPoint(msgspec.Struct, frozen=True):
    """One predictor on one layer."""

    layer: int
    bits: float
    """Ideal bits per number."""
    k: float
    v: float
    products: float
    """Multiplications of a weight for a token."""
    bytes: float
    """What the predictor must know takes so many, a byte a weight."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One predictor: means over the layers that were measured."""

    key: str
    title: str
    label: str
    """The title in a few words, beside its point in a chart."""
    family: Family
    within: bool = False
    """Whether it is a copy of the model, or a floor, with channels before used beside it; charts
    leave it out unless it is on the hull."""
    bits: float
    k: float
    v: float
    products: float
    """Multiplications of a weight for a token, all layers of the model."""
    share: float
    """`products` over the multiplications of the model's own prefill."""
    profile_bytes: float
    """What it must know for all layers, a byte a weight; a copy, its weights."""
    layers: list[LayerPoint]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The step from one point of the lower convex hull to the next dearer one."""

    cheaper: str
    dearer: str
    bits_saved: float
    share_more: float
    worth_below_mbps: float | None
    """The link's rate below which the bits saved take longer than the multiplications, if those go
    as fast as the measured prefill's. None where no prefill was timed."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """All points for one format of the cache."""

    dtype: str
    cast_from: str | None
    """The format that the model's cache was in before it was cast."""
    points: list[Point]
    steps: list[Step]
    missing: dict[str, str] = {}
    """Predictors that were not measured, and why."""


class Frontier(Result, frozen=True, kw_only=True, tag="frontier"):
    """What one run measured; the file frontier.json in its folder."""

    writer = "kvzip eval frontier"

    version: int = 2
    model: str
    revision: str
    architecture: str
    layers: list[int]
    """That were measured, of `model_layers`."""
    model_layers: int
    train: list[str]
    calibrate: list[str]
    test: list[str]
    """Texts of the documents, as they were captured."""
    train_tokens: int
    test_tokens: int
    document_tokens: int
    numbers_per_token: int
    prefill_products: float
    """Multiplications of a weight for a token of the model's prefill: as many bytes, half of what
    those weights take in bf16, are the room that a predictor on the hull has."""
    attention_products: float
    """The products of attention itself beside them, the mean over a document's tokens."""
    prefill_seconds: float | None
    """What one document of the first dtype takes on `machine`. Copies and predictors are not
    timed."""
    runs: list[Run]

    def check(self) -> None:
        points = [point for run in self.runs for point in run.points]
        if not points:
            raise KVZipError("there is no figure in it")
        for point in points:
            above_zero(f"{point.title}: bits", point.bits)
            not_below_zero(f"{point.title}: share", point.share)
            not_below_zero(f"{point.title}: profile_bytes", point.profile_bytes)
