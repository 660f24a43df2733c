"""Which layers a layer is predicted from: the three that together leave the least of it.

They are found one after the other, each the one that says most of what the others left, among all
earlier layers. Where layers are many and wide, their products with each other are more than memory
holds. So a sample of tokens is looked at, and of each layer only as many directions as leave all
layers together with 12,288: products of all of them take 300 MB then, and the sample as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.predictive.documents import Documents
from kvzip.codecs.predictive.integers import quantised
from kvzip.codecs.predictive.regression import log_volume, normalised
from kvzip.statistics.documents import inputs_of
from kvzip.statistics.gaussian import cholesky
from kvzip.statistics.ridge import ridge, shrinkage

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

INPUT_LAYERS = 3
TOKENS = 12_288
DOCUMENTS = 16  # at least, if there are so many
DIRECTIONS = 12_288  # of all layers together
TOKENS_EACH = 16  # for each direction of a layer, at least
JUDGED = 4  # one token of so many is not learned from, but settles whether the choice is taken
MOST_INPUTS = 1 << 16  # that a layer can have (spec.md)


class Unit(NamedTuple):
    """A layer's mean and standard deviation, [channels] each."""

    mean: Floats
    deviation: Floats


def most_inputs(widths: Sequence[int], layer: int) -> int:
    """How many inputs a layer can get, whichever layers are chosen."""
    return sum(sorted(w + -w % 4 for w in widths[:layer])[-INPUT_LAYERS:])


class InputLayers:
    """Chooses the layers that each layer is predicted from."""

    def __init__(self, documents: Documents):
        self._documents = documents
        each = max(documents.tokens // len(documents), 1)
        self._which = documents.spread(max(DOCUMENTS, -(-TOKENS // each)))
        self._step = max(-(-each * len(self._which) // TOKENS), 1)
        self._learned = self._split()
        tokens = len(self._learned)
        self._directions = min(DIRECTIONS // len(documents.widths), tokens // TOKENS_EACH)
        self._seen: list[NDArray[np.float16]] = []  # of each layer [tokens, directions]
        self._products: list[Floats] = []
        """Of the learned tokens, a layer's inputs with those of the layers up to it, [directions of
        all of these, its own]."""

    def choose(self, layer: int, units: Sequence[Unit], own: Unit) -> list[int]:
        """The layers that predict `layer`, lowest first. `units` are those of the layers before it,
        `own` is its own."""
        usual = inputs_of(layer)
        if layer <= INPUT_LAYERS or not self._directions:
            return usual
        for a in range(len(self._seen), layer):
            self._add(a, units[a])
        targets = self._narrowed(layer, normalised(self._values(layer), *own))
        targets -= targets[self._learned].mean(axis=0)
        found = sorted(self._greedy(layer, targets))
        if found == usual or self._left(found, targets) < self._left(usual, targets):
            return found
        return usual

    # --- the sample ----------------------------------------------------------------------------

    def _split(self) -> NDArray[np.bool_]:
        """Which of the sample's tokens are learned from: whole documents, or parts of a few."""
        found = []
        few = len(self._which) < 2 * JUDGED
        for n, (_, (values,), _) in enumerate(self._documents.read([0], self._which)):
            tokens = len(values[:: self._step])
            part = np.arange(tokens) * JUDGED // max(tokens, 1) if few else np.full(tokens, n)
            found.append(part % JUDGED != JUDGED - 1)
        return np.concatenate(found)

    def _values(self, layer: int) -> Floats:
        """The sample's values of a layer, [tokens, width]."""
        read = self._documents.read([layer], self._which)
        return np.concatenate([values[:: self._step] for _, (values,), _ in read])

    def _narrowed(self, layer: int, values: Floats) -> Floats:
        """Values in directions drawn at random, of a layer that has more channels than these."""
        width, directions = values.shape[1], self._directions
        if width <= directions:
            return values
        rng = np.random.default_rng(layer)
        onto = rng.normal(0, width**-0.5, (width, directions)).astype(np.float32)
        found: Floats = values @ onto
        return found

    def _add(self, layer: int, unit: Unit) -> None:
        """Take up a layer that is to be chosen from."""
        width = len(unit.mean)
        inputs = quantised(self._values(layer), *unit)[:, :width].astype(np.float32)
        inputs *= 1 / 16
        seen = self._narrowed(layer, inputs)
        seen -= seen[self._learned].mean(axis=0)
        self._seen.append(seen.astype(np.float16))
        own = seen[self._learned]
        self._products.append(np.concatenate([self._with(a, own) for a in range(layer + 1)]))

    def _with(self, layer: int, values: Floats) -> Floats:
        """Products of a layer's inputs with values of the learned tokens."""
        found: Floats = self._seen[layer][self._learned].astype(np.float32).T @ values
        return found

    # --- the choice ----------------------------------------------------------------------------

    def _between(self, a: int, b: int) -> Floats:
        """Products of the inputs of two layers."""
        low, high = min(a, b), max(a, b)
        ends = np.cumsum([0, *(s.shape[1] for s in self._seen)])
        found = self._products[high][ends[low] : ends[low + 1]]
        return found if a == low else found.T

    def _greedy(self, layer: int, targets: Floats) -> list[int]:
        """The layers that say most, the first of them alone, each other beside those before it."""
        own = targets[self._learned]
        left: Doubles = (own.T @ own).astype(np.float64)
        room = MOST_INPUTS
        widths = [w + -w % 4 for w in self._documents.widths]
        # What the layers chosen so far say nothing of: of each layer's inputs, and the targets.
        grams = [self._between(a, a).astype(np.float64) for a in range(layer)]
        for gram in grams:
            inputs = INPUT_LAYERS * len(gram)
            variance = max(np.trace(gram) / max(len(gram), 1), 1e-9)
            gram[np.diag_indices(len(gram))] += variance * shrinkage(inputs, len(own))
        crosses = [self._with(a, own) for a in range(layer)]
        said: list[list[Floats]] = [[] for _ in range(layer)]
        chosen: list[int] = []
        for _ in range(INPUT_LAYERS):
            best: tuple[float, int, Doubles, Doubles] | None = None
            for a in range(layer):
                if a in chosen or widths[a] > room:
                    continue
                factor = cholesky(grams[a])
                cross = crosses[a].astype(np.float64)
                explained: Doubles = np.asarray(np.linalg.solve(factor, cross), np.float64)
                bits = log_volume(left - explained.T @ explained)
                if best is None or bits < best[0]:
                    best = bits, a, factor, explained
            if best is None:
                break
            _, new, factor, explained = best
            chosen.append(new)
            room -= widths[new]
            left -= explained.T @ explained
            inverse = np.linalg.inv(factor).astype(np.float32)
            of_new = said[new]
            for a in (a for a in range(layer) if a not in chosen):
                before = zip(of_new, said[a], strict=True)
                shared = self._between(new, a) - sum(n.T @ o for n, o in before)
                told = inverse @ shared
                said[a].append(told)
                grams[a] -= told.T @ told
                crosses[a] = crosses[a] - told.T @ explained.astype(np.float32)
        return chosen

    def _left(self, layers: Sequence[int], targets: Floats) -> float:
        """Bits of what these layers leave of the tokens that are judged, but for a constant."""
        grams = [np.concatenate([self._between(a, b) for b in layers], axis=1) for a in layers]
        gram = np.concatenate(grams).astype(np.float64)
        cross = np.concatenate([self._with(a, targets[self._learned]) for a in layers])
        tokens = self._learned.sum()
        penalty = np.trace(gram) / max(len(gram), 1) * shrinkage(len(gram), tokens) + 1e-9
        weights = ridge(gram, cross.astype(np.float64), np.full(len(gram), penalty))
        apart = ~self._learned
        inputs = np.concatenate([self._seen[a][apart] for a in layers], axis=1)
        rest = targets[apart] - inputs.astype(np.float32) @ weights.astype(np.float32)
        return log_volume((rest.T @ rest).astype(np.float64) / max(len(rest), 1))
