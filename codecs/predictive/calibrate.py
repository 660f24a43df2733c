"""Sets the scales and densities of a profile by what the codec itself spends on documents: those
that were kept apart for this, or those that the predictors were learned from if none were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.predictive import codec
from kvzip.codecs.predictive.density import SHAPES, START, Chooser
from kvzip.codecs.predictive.integers import rescaled
from kvzip.statistics.documents import Item, Progress, load
from kvzip.statistics.gaussian import Doubles

TURNS = 3
SHRINK_COUNTS = 500  # of all classes that count in the scale of each
KNOWN_DOCUMENTS = 6  # over which the first layer's scales are searched


@dataclass
class Spent:
    """What the codec makes of documents."""

    counts: list[NDArray[np.int64]]
    """How often each cell of |z| occurs in each layer, [classes, channels, cells]."""
    bits: Doubles
    """Bits of each layer's keys and values, [layers, 2]."""
    numbers: Doubles

    @property
    def bits_per_number(self) -> list[float]:
        """Mean bits of each layer's numbers."""
        found = self.bits.sum(axis=1) / np.maximum(self.numbers.sum(axis=1), 1)
        return [float(b) for b in found]


def measure(
    tensors: Mapping[str, NDArray[Any]],
    description: Mapping[str, Any],
    items: Sequence[Item],
    tell: Progress = lambda *_: None,
    layers: int | None = None,
) -> Spent:
    """Code documents with a profile's tensors; only the first `layers`, if it is given."""
    model = codec.build(tensors, description)
    depth = len(description["layers"]) if layers is None else layers
    counts: list[list[Any]] = [[0, 0] for _ in range(depth)]
    bits, numbers = np.zeros((depth, 2)), np.zeros((depth, 2))
    for done, item in enumerate(items):
        for i, p, found, spent, count in codec.measure(model, tensors, load(item), depth):
            counts[i][p] = counts[i][p] + found.astype(np.int64)
            bits[i, p] += spent
            numbers[i, p] += count
        tell("densities", done + 1, len(items))
    return Spent([np.concatenate(parts, axis=1) for parts in counts], bits, numbers)


def calibrate(
    tensors: dict[str, NDArray[Any]],
    description: Mapping[str, Any],
    items: Sequence[Item],
    tell: Progress,
) -> Spent:
    """Set each channel's density and scales to what codes the documents in the fewest bits."""
    if "0.table" in tensors:
        _calibrate_known(tensors, description, items[:: -(-len(items) // KNOWN_DOCUMENTS)])
    choose = Chooser()
    for turn in range(TURNS + 1):

        def tell_turn(what: str, done: int, total: int, turn: int = turn) -> None:
            tell(what, turn * total + done, (TURNS + 1) * total)

        spent = measure(tensors, description, items, tell_turn)
        if turn == TURNS:
            break
        for i in range(len(description["layers"])):
            regions = len(tensors[f"{i}.bias"])
            factors, shape = _factors(spent.counts[i], regions, choose)
            if i > 1:
                factors /= _level(factors, spent.counts[i])
            if i == 0 and "0.table" in tensors:
                factors[regions:] = 1
            else:
                tensors[f"{i}.density"] = shape.astype(np.uint8)
            _widen(tensors, description, i, factors)
    return spent


def _widen(
    tensors: dict[str, NDArray[Any]],
    description: Mapping[str, Any],
    layer: int,
    factors: Doubles,
) -> None:
    """Make a layer's deviations greater by factors [classes, channels]."""
    tensors[f"{layer}.inverse"] = rescaled(tensors[f"{layer}.inverse"], factors)
    heads = description["layers"][layer]["k"][0]
    pairs = len(tensors[f"{layer}.step"])
    turned = factors[:, : 2 * heads * pairs].reshape(len(factors), heads * pairs, 2, 1)
    tensors[f"{layer}.pair_inverse"] = rescaled(tensors[f"{layer}.pair_inverse"], turned)


def _factors(
    counts: NDArray[np.int64], regions: int, choose: Chooser
) -> tuple[Doubles, NDArray[np.int64]]:
    """The factors on deviations [classes, channels] and the shapes [channels] that code `counts`
    [classes, channels, cells] in the fewest bits."""
    alone, shape = choose(counts.sum(axis=0))
    factors = np.empty(counts.shape[:2])
    for first in range(0, len(counts), regions):  # known tokens are another kind
        kind = counts[first : first + regions]
        total = kind.sum(axis=0)
        usual = SHRINK_COUNTS * total / np.maximum(total.sum(axis=1, keepdims=True), 1)
        for r in range(regions):
            own, _ = choose(kind[r] + usual, shape)
            factors[first + r] = np.where(total.any(axis=1), own, alone)
    return factors, shape


def _level(factors: Doubles, counts: NDArray[np.int64]) -> float:
    """Mean of a layer's factors. It is left out: tokens bring their energy from the layers before,
    so that a layer's level shows in the next one, and would never settle."""
    seen = counts.sum(axis=-1)
    return float(2 ** ((seen * np.log2(factors)).sum() / max(seen.sum(), 1)))


def _calibrate_known(
    tensors: dict[str, NDArray[Any]], description: Mapping[str, Any], items: Sequence[Item]
) -> None:
    """Set the first layer's scales and densities for tokens that its table knows. What is left of
    them is rounding, less than a step between numbers, so what counts is the bits spent."""
    regions, channels = len(tensors["0.bias"]), len(tensors["0.density"])
    keys = int(np.prod(description["layers"][0]["k"]))
    start = {f"0.{name}": tensors[f"0.{name}"] for name in ("inverse", "pair_inverse")}

    def spent(octaves: Doubles, shape: int) -> Doubles:
        """Bits of keys and values, [2], with deviations smaller by so many octaves."""
        factors = np.ones((2 * regions, channels))
        factors[regions:] = 2.0 ** -np.repeat(octaves, [keys, channels - keys])
        tensors.update(start)
        tensors["0.density"] = np.full(channels, shape, np.uint8)
        _widen(tensors, description, 0, factors)
        bits: Doubles = measure(tensors, description, items, layers=1).bits[0]
        return bits

    def best(options: Sequence[Doubles], shape: int) -> Doubles:
        costs = np.array([spent(o, shape) for o in options])
        found: Doubles = np.array(options)[costs.argmin(axis=0), [0, 1]]
        return found

    octaves = best([np.full(2, o) for o in np.arange(-4.0, 5)], START)
    shape = int(np.argmin([spent(octaves, k).sum() for k in range(len(SHAPES))]))
    octaves = best([octaves + o for o in (-0.5, 0.0, 0.5)], shape)
    spent(octaves, shape)
