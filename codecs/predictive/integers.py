"""From predictors in floating point to a layer's integer tensors; spec.md says what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.predictive.density import START
from kvzip.codecs.predictive.groups import starts
from kvzip.codecs.predictive.regression import Predictor
from kvzip.statistics import gaussian
from kvzip.statistics.gaussian import Conditional

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

CLIP = 6.0  # standard deviations that 127 stands for in an input
UNIT_BITS = 16  # a residual's standard deviation is about 2^16 units
RESIDUAL_SHIFT = 12
INPUT_SHIFT = 28
MEAN_DEVIATION = 0.75  # of the standard deviation, to begin with
ANGLES = 32
"""Cells of a full turn, for each of which a pair has spreads of its own."""

Tensors = dict[str, NDArray[Any]]


class Arrangement(NamedTuple):
    """A layer's channels as the codec takes them."""

    places: NDArray[np.intp]
    """Which channel stands at each place."""
    inputs: NDArray[np.int64]
    """Which input stands at each place."""
    pairs: int
    """How many pairs of channels RoPE turns; they come first."""
    keys: int
    group: int


def quantised(values: Floats, mean: Floats, deviation: Floats) -> NDArray[np.int8]:
    """What the codec makes of a layer's values for the layers after it, [tokens, inputs]."""
    with np.errstate(over="ignore"):
        steps = np.rint((values - mean) * (127 / CLIP / deviation))
    room = [(0, 0), (0, -values.shape[1] % 4)]
    return np.pad(np.clip(steps, -127, 127).astype(np.int8), room)


def layer_tensors(
    at: Arrangement,
    mean: Floats,
    deviation: Floats,
    predictors: Sequence[Predictor],
    table: Doubles | None,
    known: Doubles | None,
) -> Tensors:
    """The tensors that a layer's predictors come to, one a region.

    `mean`, `deviation`: the unit that predictors are in, [channels]. `table`: what they miss of
    each token on average, [tokens, channels]; `known`: the variance that is left of tokens in the
    table, which is then a fine one.
    """
    order = at.places
    mean, wide = mean[order], deviation[order].astype(np.float64)
    predictors = [_in_order(p, at) for p in predictors]
    pairs = [(2 * i, 2 * i + 1) for i in range(at.pairs)]
    exponent = _exponents(mean, wide, predictors, pairs)
    unit = 2.0**exponent
    ends = starts((at.keys, len(mean) - at.keys), at.group)
    regions = [_region(p, mean, wide, unit, pairs, ends) for p in predictors]
    tensors = {name: np.stack([region[name] for region in regions]) for name in regions[0]}
    if table is not None:
        most, step = (127, 1 << 12) if known is None else (32767, 1 << 5)
        steps = np.clip(np.round(table[:, order] * (wide / unit / step)), -most, most)
        tensors["table"] = steps.astype(np.int8 if known is None else np.int16)
        # Spreads of the tokens that the table knows come after those of the others.
        own = {name: tensors[name] for name in ("inverse", "pair_inverse", "pair_slope")}
        if known is not None:
            variance = np.maximum(known[order] * (wide / unit) ** 2, 1)
            alone = Conditional(np.zeros((0, 0)), variance, np.zeros(len(pairs)))
            own = {name: array[None] for name, array in _spreads(alone, pairs).items()}
        for name, array in own.items():
            tensors[name] = np.concatenate([tensors[name], array])
    return tensors | {
        "unit": exponent.astype(np.int8),
        "mean": int32(mean / unit),
        "input_scale": int32(127 / CLIP / wide * unit * (1 << INPUT_SHIFT)),
        "density": np.full(len(mean), START, np.uint8),
    }


def _in_order(predictor: Predictor, at: Arrangement) -> Predictor:
    """The predictor with inputs and channels at the places where the codec has them."""
    order = at.places
    return Predictor(
        predictor.rounded[at.inputs][:, order],
        predictor.scale[order],
        predictor.bias[order],
        predictor.covariance[np.ix_(order, order)],
    )


def _exponents(
    mean: Floats, wide: Doubles, predictors: Sequence[Predictor], pairs: Sequence[tuple[int, int]]
) -> Doubles:
    """The power of two that each channel's unit is."""
    shared = np.mean([np.diag(p.covariance) for p in predictors], axis=0)
    # Usual numbers stay far within the bounds of fixed point, where a channel hardly changes, too.
    size = np.maximum(wide * np.sqrt(np.maximum(shared, 0)), (np.abs(mean) + 16 * wide) / 2**11)
    for a, b in pairs:
        size[a] = size[b] = max(size[a], size[b])
    found: Doubles = np.clip(np.round(np.log2(np.maximum(size, 1e-30))) - UNIT_BITS, -120, 60)
    return found


def _region(
    predictor: Predictor,
    mean: Floats,
    wide: Doubles,
    unit: Doubles,
    pairs: Sequence[tuple[int, int]],
    ends: Sequence[int],
) -> Tensors:
    """The tensors of one region. In units from here on; input residuals in steps of 2^12 of
    theirs."""
    covariance = predictor.covariance * np.outer(wide / unit, wide / unit)
    known = gaussian.conditional(gaussian.cholesky(covariance), pairs, ends)
    coefficients = known.coefficients * (1 << RESIDUAL_SHIFT)
    within_scale = np.maximum(np.abs(coefficients).max(axis=1), 1e-9) / 127
    return {
        "bias": int32((mean + wide * predictor.bias) / unit),
        "weight": packed(predictor.rounded.T),
        "weight_scale": int32(predictor.scale * wide / unit * (1 << 20)),
        "within": packed(np.round(coefficients / within_scale[:, None]).astype(np.int8)),
        "within_scale": int32(within_scale * (1 << 20)),
        **_spreads(known, pairs),
    }


def _spreads(known: Conditional, pairs: Sequence[tuple[int, int]]) -> Tensors:
    """The inverse spreads of single channels, [channels], and of pairs turned by the middle of each
    angle's cell, [pairs, 2, ANGLES]; and the slopes of the pairs' second channels."""
    firsts = np.array([a for a, _ in pairs], np.int64)
    angle = (np.arange(ANGLES) + 0.5) * 2 * np.pi / ANGLES
    a, b, c = known.variance[firsts], known.variance[firsts + 1], known.shared
    first, rest, slope = gaussian.turned(
        a[:, None], b[:, None], c[:, None], np.sin(angle), np.cos(angle), least=1e-30
    )
    pair = np.stack([np.sqrt(first), np.sqrt(rest)], axis=1)
    return {
        "inverse": inverse(np.sqrt(known.variance) * MEAN_DEVIATION),
        "pair_inverse": inverse(pair * MEAN_DEVIATION),
        "pair_slope": int32(np.clip(slope * (1 << 12), -(2**20), 2**20)),
    }


def packed(matrix: NDArray[np.int8]) -> NDArray[np.int8]:
    """[outputs, inputs] in blocks of four by four, [outputs/4, inputs/4, 4, 4]."""
    whole = np.pad(matrix, [(0, -n % 4) for n in matrix.shape])
    rows, columns = whole.shape
    return np.ascontiguousarray(whole.reshape(rows // 4, 4, columns // 4, 4).transpose(0, 2, 1, 3))


def int32(values: Any) -> NDArray[np.int32]:
    """The nearest integers of 32 bits."""
    return np.asarray(np.clip(np.round(values), -(2**31) + 1, 2**31 - 1), np.int32)


def inverse(deviations: Any) -> NDArray[np.int32]:
    """2^28 / mean deviation in units."""
    return rescaled((1 << 28) / np.maximum(deviations, 1e-9), 1.0)


def rescaled(inverses: NDArray[Any], factors: Any) -> NDArray[np.int32]:
    """Inverses of deviations that are greater by these factors."""
    return np.asarray(np.clip(np.round(inverses / factors), 1, 1 << 26), np.int32)
