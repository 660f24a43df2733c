"""What measured models say of one that was not measured, and how little that is.

Bits are compared at the same number of training tokens, and with profiles of one size. Two ways to
say how sure the result is: as if models were drawn from one normal distribution, by Student's t,
which for two models means that 95 % of further ones lie anywhere; and by lines along single
properties, whose answers differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from kvzip.eval.results.scaling import Extrapolation, Gain, Line, ScaledModel, ScalingPoint, Shape

QWEN3_4B = Shape(
    name="Qwen/Qwen3-4B",
    layers=36,
    hidden_size=2560,
    numbers_per_token=73_728,
    parameters=3.6e9,
)
"""Its config.json and model card; parameters without the embedding."""

AXES: dict[str, Callable[[Shape], float]] = {
    "(K+V) / hidden size": lambda shape: shape.cache_width,
    "layers": lambda shape: float(shape.layers),
    "parameters, binary logarithm": lambda shape: math.log2(shape.parameters),
}
_HALF = (1.0, 0.816, 0.765, 0.741, 0.727)
_MOST = (12.706, 4.303, 3.182, 2.776, 2.571)
"""Student's t for 50 and 95 of 100 cases, by degrees of freedom from 1 on."""


def measured(models: Sequence[ScaledModel], target: Shape) -> ScaledModel | None:
    """The target among the models, if it is there with points of `predictive`."""
    name = _plain(target.name)
    of = (m for m in models if _plain(m.shape.name) == name and _predictive(m))
    return next(of, None)


def _plain(name: str) -> str:
    """A model's name without its publisher."""
    return name.rpartition("/")[2].lower()


def _predictive(model: ScaledModel) -> list[ScalingPoint]:
    return [point for point in model.points if point.codec == "predictive"]


def of_one_size(model: ScaledModel) -> list[ScalingPoint]:
    """A point at each number of training tokens, the fewest first, with profiles of one size: that
    which was asked for at most of these numbers, the larger of two such. Of points that are alike
    in this, the one with the smallest profile."""
    by_size: dict[float, dict[int, list[ScalingPoint]]] = {}
    for point in _predictive(model):
        by_size.setdefault(point.asked or 0, {}).setdefault(point.train_tokens, []).append(point)
    if not by_size:
        return []
    size = max(by_size, key=lambda asked: (len(by_size[asked]), asked))
    by_tokens = by_size[size]
    return [min(by_tokens[n], key=lambda p: p.profile_bytes) for n in sorted(by_tokens)]


def gains(models: Sequence[ScaledModel]) -> list[Gain]:
    """What twice the tokens and twice the profile saved, of each model that says either."""
    found = []
    for model in models:
        alike = of_one_size(model)
        if not alike:
            continue
        most = alike[-1].train_tokens
        sizes = [p for p in _predictive(model) if p.train_tokens == most]
        tokens = _saved([(p.train_tokens, p.bits_per_value) for p in alike])
        profile = _saved([(p.profile_bytes, p.bits_per_value) for p in sizes])
        if tokens is not None or profile is not None:
            by_size = [p.profile_bytes for p in sizes]
            found.append(
                Gain(
                    model=model.shape.name,
                    tokens=tokens,
                    tokens_range=(alike[0].train_tokens, most),
                    profile=profile,
                    profile_range=(min(by_size), max(by_size)),
                )
            )
    return found


def _saved(points: Sequence[tuple[int, float]]) -> float | None:
    """Bits that a doubling saves; None where there is nothing to compare."""
    if len({size for size, _ in points}) < 2:
        return None
    logs = [math.log2(size) for size, _ in points]
    return -statistics.linear_regression(logs, [bits for _, bits in points]).slope


def extrapolations(models: Sequence[ScaledModel], target: Shape) -> list[Extrapolation]:
    """One for each number of training tokens that two models or more were measured at; none where
    the target was measured. Models in other formats than the first stay out."""
    if measured(models, target) is not None:
        return []
    able = [m for m in models if m.dtype == models[0].dtype and _predictive(m)]
    by_tokens: dict[int, dict[str, tuple[ScaledModel, ScalingPoint]]] = {}
    for model in able:
        for point in of_one_size(model):
            # Of a model that is there twice, the first counts.
            by_tokens.setdefault(point.train_tokens, {}).setdefault(
                model.shape.name, (model, point)
            )
    return [
        _extrapolation(count, list(of.values()), target)
        for count, of in sorted(by_tokens.items())
        if len(of) > 1
    ]


def _extrapolation(
    tokens: int, found: Sequence[tuple[ScaledModel, ScalingPoint]], target: Shape
) -> Extrapolation:
    bits = [point.bits_per_value for _, point in found]
    ceiling = max(
        point.bits_per_value
        for model, _ in found
        for point in model.points
        if point.codec == "channel"
    )
    mean, count = statistics.fmean(bits), len(bits)
    spread = statistics.stdev(bits) * math.sqrt(1 + 1 / count)
    free = min(count - 1, len(_MOST)) - 1

    def interval(t: float) -> tuple[float, float]:
        return max(mean - t * spread, 0.0), min(mean + t * spread, ceiling)

    lines = [_line(axis, [model.shape for model, _ in found], bits, target) for axis in AXES]
    return Extrapolation(
        train_tokens=tokens,
        models=[model.shape.name for model, _ in found],
        bits=bits,
        mean=mean,
        half=interval(_HALF[free]),
        most=interval(_MOST[free]),
        ceiling=ceiling,
        lines=[line for line in lines if line is not None],
    )


def _line(axis: str, shapes: Sequence[Shape], bits: Sequence[float], target: Shape) -> Line | None:
    """The line by least squares; None where all models are the same."""
    values, at = [AXES[axis](shape) for shape in shapes], AXES[axis](target)
    low, high = min(values), max(values)
    if low == high:
        return None
    slope, start = statistics.linear_regression(values, bits)
    beyond = max(low - at, at - high, 0.0) / (high - low)
    return Line(axis=axis, values=values, target=at, bits=start + slope * at, beyond=beyond)
