"""The frontier of whole models: bits a number over whole files against work, all layers.

Files of each codec and profile are measured (`kvzip eval scaling`). Beside them stands what
needs no predictor: the first layers are computed, and the others loaded. The keys and values of the
first m layers take m - 1 whole layers and two matrices of the last one, and what is loaded takes
its predictor's products and its layers' bytes. That is derived, no decoder does it; and what is
computed must be computed as it was for the file (the same kernels, pieces and batch), or it is not
the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Literal

import msgspec

from kvzip.eval.frontier.hull import lower_hull
from kvzip.eval.quantities import significant
from kvzip.eval.results.frontier import Frontier, Point
from kvzip.eval.results.provenance import made_by
from kvzip.eval.results.scaling import ScaledModel, ScalingPoint, ScalingResult, Shape
from kvzip.eval.results.whole_frontier import WholeFrontier, WholePoint, WholeRun
from kvzip.parsing import from_toml

COMPUTED = (0.25, 0.5, 0.75, 1.0)
"""Shares of the layers that are computed, in points of that kind."""
TRIED = (0.2, 0.5)
"""Shares of a prefill's products between which predictors of single layers are shown."""


class Stated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of stated.toml: an earlier measurement. `model`: as `kvzip capture` takes it."""

    model: str
    title: str
    label: str
    family: Literal["file", "tried"]
    bits: float
    share: float
    about: str
    profile_bytes: float = 0.0


def stated() -> list[Stated]:
    """What was measured before there was `kvzip eval scaling`."""
    text = (files(__package__) / "stated.toml").read_text(encoding="utf-8")
    return from_toml(text, dict[str, list[Stated]])["stated"]


def whole(
    results: Sequence[tuple[str, ScalingResult]],
    predictors: Sequence[tuple[str, Frontier]] = (),
    command: str = "kvzip eval frontier --whole",
) -> WholeFrontier:
    """The frontier of every model of `results`, by the names of their files; `predictors` have
    measured some of its layers."""
    models = [model for _, result in results for model in result.models]
    return WholeFrontier(
        **made_by(command),
        sources=[name for name, _ in (*results, *predictors)],
        runs=[_run(model, [found for _, found in predictors]) for model in models],
    )


def _run(model: ScaledModel, predictors: Sequence[Frontier]) -> WholeRun:
    # Of a result of `kvzip eval ratios` it is not known what its prediction takes.
    files = [p for p in model.points if p.codec != "predictive" or p.products]
    points = [_file(model.shape, point) for point in files]
    best = min((p for p in files if p.products), key=lambda p: p.bits_per_value, default=None)
    for point in files:
        if point is best or (point.codec == "channel" and not point.profile_bytes):
            points += _computed(model.shape, point)
    points += _tried(model, predictors)
    room = model.shape.parameters
    able = [p for p in points if p.basis != "stated" and p.profile_bytes <= room]
    return WholeRun(
        shape=model.shape,
        dtype=model.dtype,
        document_tokens=model.document_tokens,
        points=points,
        hull=[p.key for p in lower_hull(able)],
    )


def _names(point: ScalingPoint) -> tuple[str, str]:
    """A point's title and key."""
    if not point.profile_bytes:
        return point.codec, point.codec
    size, tokens = significant(point.profile_bytes / 1e6), point.train_tokens
    title = f"{point.codec}, profile of {size} MB from {tokens:,} tokens"
    return title, f"{point.codec}-{tokens}-{point.profile_bytes}"


def _file(shape: Shape, point: ScalingPoint) -> WholePoint:
    title, key = _names(point)
    label = point.codec
    if point.products:
        label = f"{point.codec} {point.profile_bytes / 1e6:.0f} MB, {point.train_tokens:,} tokens"
    elif point.profile_bytes:
        label = ""  # a profile takes next to nothing off `channel`: the points meet
    return WholePoint(
        key=key,
        title=title,
        label=label,
        family="file",
        basis="measured",
        bits=point.bits_per_value,
        share=sum(point.products) / shape.parameters,
        profile_bytes=float(point.profile_bytes),
    )


def _computed(shape: Shape, point: ScalingPoint) -> Iterator[WholePoint]:
    """The first layers computed, the others loaded from that codec's files."""
    title, key = _names(point)
    for part in COMPUTED:
        first = round(part * shape.layers)
        if not first:
            continue
        yield WholePoint(
            key=f"{key}-first-{first}",
            title=f"the first {first} layers computed, {title} for the others",
            label=f"{first} layers, {point.codec}",
            family="recompute",
            basis="derived",
            bits=bits_without(point, first),
            share=compute_share(shape, first) + sum(point.products[first:]) / shape.parameters,
            profile_bytes=float(point.profile_bytes),
            computed_layers=first,
        )


def compute_share(shape: Shape, first: int) -> float:
    """What the keys and values of the first layers take of a prefill's products: all of the layers
    before the last of them, and of that one the two matrices that make its keys and values."""
    keys_and_values = shape.hidden_size * shape.numbers_per_token / shape.layers
    return (first - 1) / shape.layers + keys_and_values / shape.parameters


def bits_without(point: ScalingPoint, first: int) -> float:
    """Bits a number of all layers' where the first ones are not in the file: header, token ids and
    index stay."""
    return 8 * (point.encoded_bytes - sum(point.layer_bytes[:first])) / point.numbers


def _tried(model: ScaledModel, predictors: Sequence[Frontier]) -> Iterator[WholePoint]:
    """What was measured earlier: stated files and predictors, and predictors of single layers at 20
    to 50 % of a prefill."""
    for n, row in enumerate(stated()):
        if row.model == model.shape.name and model.dtype == "bf16":
            fields = {name: getattr(row, name) for name in row.__struct_fields__ if name != "model"}
            yield WholePoint(key=f"stated-{n}", basis="stated", **fields)
    for found in predictors:
        if found.model == model.shape.name:
            for run in found.runs:
                if run.dtype == model.dtype:
                    yield from (
                        _of_predictor(found, point) for point in run.points if _shown(point)
                    )


def _shown(point: Point) -> bool:
    return TRIED[0] <= point.share <= TRIED[1]


def _of_predictor(found: Frontier, point: Point) -> WholePoint:
    layers = ", ".join(map(str, found.layers))
    return WholePoint(
        key=f"predictor-{point.key}",
        title=point.title,
        label=point.label,
        family="tried",
        basis="stated",
        about=f"kvzip eval frontier: layer {layers} of {found.model_layers}, ideal code length",
        bits=point.bits,
        share=point.share,
        profile_bytes=point.profile_bytes,
    )
