"""What `kvzip eval scaling` finds: how small caches become, model by model, with how much to learn
from and how large a profile; and what that says of a model that was not measured."""

from __future__ import annotations

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result
from kvzip.eval.results.ratios import (
    DocumentRow,
    TextFile,
    check_figures,
    is_in_both_splits,
)


class KindSizes(msgspec.Struct, frozen=True):
    """The test documents of one kind of text, all together."""

    kind: str
    documents: int
    numbers: int
    raw_bytes: int
    encoded_bytes: int
    """Of whole files, without a profile."""


class ScalingPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One codec, with what it learned, on the test documents of a model."""

    codec: str
    train_documents: int
    """What its profile was learned from; 0 without one."""
    train_tokens: int
    asked: float | None = None
    """The profile's bytes that it was given, as a share of the model's matrices in bf16; None where
    its size was not chosen."""
    profile_bytes: int = 0
    profile_id: str = ""
    regions: list[int] = []
    """Predictors of each layer, of `predictive`."""
    products: list[int] = []
    """Products of a weight and a number that prediction takes for a token, layer by layer."""
    kinds: list[KindSizes]
    layer_bytes: list[int]
    """Blocks and tables of each layer, over all test documents."""
    bits_per_value: float
    """Bits of all files for each number of the caches."""
    ratio: float
    exact: bool
    """Every decoded cache was the same, bit for bit."""

    @property
    def numbers(self) -> int:
        return sum(kind.numbers for kind in self.kinds)

    @property
    def encoded_bytes(self) -> int:
        return sum(kind.encoded_bytes for kind in self.kinds)

    @property
    def raw_bytes(self) -> int:
        return sum(kind.raw_bytes for kind in self.kinds)


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What of a model ratios are set against."""

    name: str
    layers: int
    hidden_size: int
    numbers_per_token: float
    parameters: float
    """Those that multiply with every token: as many products a prefill takes for it, but for
    attention's own."""

    @property
    def matrix_bytes(self) -> float:
        """What those parameters take in bf16."""
        return 2 * self.parameters

    @property
    def cache_width(self) -> float:
        """Numbers that a layer keeps of a token, over the width of the residual stream."""
        return self.numbers_per_token / self.layers / self.hidden_size


class ScaledModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model and its points."""

    shape: Shape
    revision: str
    architecture: str
    dtype: str
    source: str = ""
    """The stored result of `kvzip eval ratios` that the points are from; "" where they were
    measured in this run."""
    document_tokens: int
    texts: list[TextFile]
    documents: list[DocumentRow]
    points: list[ScalingPoint]


class Gain(msgspec.Struct, frozen=True, kw_only=True):
    """What more of something saved on one model, with `predictive`: slopes of bits a number, by
    least squares."""

    model: str
    tokens: float | None
    """Bits that twice the training tokens save, with profiles of one size; None where there is one
    number only."""
    tokens_range: tuple[int, int]
    """The numbers of training tokens that it is from."""
    profile: float | None
    """Bits that twice the profile's bytes save, of the largest training set; None where there is
    one size only."""
    profile_range: tuple[int, int]
    """The sizes that it is from, in bytes."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """The line through the models along one property, read at the target."""

    axis: str
    values: list[float]
    """Of the models."""
    target: float
    bits: float
    beyond: float
    """How far the target lies outside of the models, in widths of the range that they span."""


class Extrapolation(msgspec.Struct, frozen=True, kw_only=True):
    """What the measured models say of one that was not: an estimate, and no figure of that model.

    Taken at one number of training tokens, with profiles of one size.
    """

    train_tokens: int
    models: list[str]
    bits: list[float]
    """Of the models, measured."""
    mean: float
    half: tuple[float, float]
    """Where the next model of such a kind lies in half of all cases, if models were drawn from one
    normal distribution (Student's t)."""
    most: tuple[float, float]
    """The same in 95 of 100 cases; neither below 0 nor above `ceiling`."""
    ceiling: float
    """What `channel` took of the model that it took most of: a writer can always use that."""
    lines: list[Line]


class ScalingResult(Result, frozen=True, kw_only=True, tag="scaling"):
    """The file that `kvzip eval scaling -o` writes."""

    writer = "kvzip eval scaling"

    models: list[ScaledModel]
    gains: list[Gain]
    target: Shape
    extrapolations: list[Extrapolation]
    """Empty where the target itself is among the models."""

    def check(self) -> None:
        if not any(model.points for model in self.models):
            raise KVZipError("there is no figure in it")
        for model in self.models:
            if is_in_both_splits(model.documents):
                raise KVZipError(f"{model.shape.name}: a document is in both splits")
            for point in model.points:
                _check_point(model, point)


def _check_point(model: ScaledModel, point: ScalingPoint) -> None:
    """Raise KVZipError unless a point's figures follow from each other."""
    what = f"{model.shape.name}, {point.codec} learned from {point.train_tokens} tokens"
    check_figures(what, point)
    if len(point.layer_bytes) != model.shape.layers:
        raise KVZipError(f"{what}: it has not {model.shape.layers} layers")
    if sum(point.layer_bytes) > point.encoded_bytes:
        raise KVZipError(f"{what}: its layers are greater than its files")
