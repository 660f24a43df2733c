"""What measured models say of one that was not measured, and how little that is.

Bits are compared at the same number of training tokens and with each model's smallest profile, one
predictor a layer where the models are small. Two ways to say how sure the result is: as if models
were drawn from one normal distribution, by Student's t, which for two models means that 95 % of
further ones lie anywhere; and by lines along single properties, whose answers differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

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


def gains(models: Sequence[ScaledModel]) -> list[Gain]:
    """What twice the tokens and twice the profile saved, of each model with enough points."""
    found = []
    for model in models:
        points = _predictive(model)
        columns = [[1, -math.log2(p.train_tokens), -math.log2(p.profile_bytes)] for p in points]
        if len(points) < 4 or np.linalg.matrix_rank(columns) < 3:
            continue
        bits = np.array([p.bits_per_value for p in points])
        solved = np.linalg.lstsq(np.array(columns), bits, rcond=None)[0]
        error = float(np.sqrt(np.mean((np.array(columns) @ solved - bits) ** 2)))
        found.append(
            Gain(
                model=model.shape.name,
                points=len(points),
                tokens=float(solved[1]),
                profile=float(solved[2]),
                error=error,
            )
        )
    return found


def extrapolations(models: Sequence[ScaledModel], target: Shape) -> list[Extrapolation]:
    """One for each number of training tokens that two models or more were measured at; none where
    the target was measured. Models in other formats than the first stay out."""
    if measured(models, target) is not None:
        return []
    able = [m for m in models if m.dtype == models[0].dtype and _predictive(m)]
    tokens = sorted({p.train_tokens for m in able for p in _predictive(m)})
    found = []
    for count in tokens:
        smallest = {}
        for model in able:
            here = [p for p in _predictive(model) if p.train_tokens == count]
            if here and model.shape.name not in smallest:
                smallest[model.shape.name] = model, min(here, key=lambda p: p.profile_bytes)
        if len(smallest) > 1:
            found.append(_extrapolation(count, list(smallest.values()), target))
    return found


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
