"""Which layers a layer is predicted from: the three that together leave the least of it.

They are found one after the other, each the one that says most of what the others left, among all
earlier layers. Where layers are many and wide, their products with each other are more than memory
holds. So a sample of tokens is looked at, and of each layer only as many directions as leave all
layers together with 12,288: products of all of them take 300 MB then, and the sample as much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.predictive.documents import Documents
from kvzip.codecs.predictive.integers import quantised
from kvzip.codecs.predictive.layer_inputs import Known
from kvzip.codecs.predictive.regression import log_volume, normalised
from kvzip.statistics.documents import inputs_of
from kvzip.statistics.gaussian import cholesky
from kvzip.statistics.ridge import divided, ridge, shrinkage

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

INPUT_LAYERS = 3
TOKENS = 12_288
DOCUMENTS = 16  # at least, if there are so many
DIRECTIONS = 12_288  # of all layers together
TOKENS_EACH = 16  # for each direction of a layer, at least
JUDGED = 4  # one token of so many is not learned from, but settles whether the choice is taken
MOST_INPUTS = 1 << 16  # that a layer can have (spec.md)


def most_inputs(documents: Documents, layer: int) -> int:
    """How many inputs a layer can get, whichever layers are chosen."""
    return sum(sorted(documents.padded_widths[:layer])[-INPUT_LAYERS:])


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
        # Of each layer [tokens, directions]: the tokens that are learned from, and those apart.
        self._seen: list[NDArray[np.float16]] = []
        self._apart: list[NDArray[np.float16]] = []
        self._products: list[Floats] = []
        """Of the learned tokens, a layer's inputs with those of the layers up to it, [directions of
        all of these, its own]."""

    def choose(
        self, layer: int, earlier: Sequence[Known], mean: Floats, deviation: Floats
    ) -> list[int]:
        """The layers that predict `layer`, lowest first. `mean` and `deviation` are its own."""
        usual = inputs_of(layer)
        if layer <= INPUT_LAYERS or not self._directions:
            return usual
        for a in range(len(self._seen), layer):
            self._add(a, earlier[a])
        own, apart = self._centred(layer, normalised(self._values(layer), mean, deviation))
        found = sorted(self._greedy(layer, own))
        if found == usual or self._left(found, own, apart) < self._left(usual, own, apart):
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
        # Copies, as views would keep all of each document's.
        return np.concatenate([values[:: self._step].copy() for _, (values,), _ in read])

    def _centred(self, layer: int, values: Floats) -> tuple[Floats, Floats]:
        """Values of the tokens that are learned from and of those apart, less the mean of the
        first; in directions drawn at random, where a layer has more channels than these."""
        width, directions = values.shape[1], self._directions
        if width > directions:
            rng = np.random.default_rng(layer)
            values = values @ rng.normal(0, width**-0.5, (width, directions)).astype(np.float32)
        learned = values[self._learned]
        mean = learned.mean(axis=0)
        return learned - mean, values[~self._learned] - mean

    def _add(self, layer: int, known: Known) -> None:
        """Take up a layer that is to be chosen from."""
        small = quantised(self._values(layer), known.mean, known.deviation)
        inputs = small[:, : len(known.mean)].astype(np.float32)
        inputs *= 1 / 16
        own, apart = self._centred(layer, inputs)
        self._seen.append(own.astype(np.float16))
        self._apart.append(apart.astype(np.float16))
        self._products.append(np.concatenate([self._with(a, own) for a in range(layer + 1)]))

    def _with(self, layer: int, values: Floats) -> Floats:
        """Products of a layer's inputs with values of the learned tokens."""
        found: Floats = self._seen[layer].astype(np.float32).T @ values
        return found

    # --- the choice ----------------------------------------------------------------------------

    def _between(self, a: int, b: int) -> Floats:
        """Products of the inputs of two layers."""
        low, high = min(a, b), max(a, b)
        ends = np.cumsum([0, *(s.shape[1] for s in self._seen)])
        found = self._products[high][ends[low] : ends[low + 1]]
        return found if a == low else found.T

    def _greedy(self, layer: int, own: Floats) -> list[int]:
        """The layers that say most of `own`, the targets of the learned tokens: the first of them
        alone, each other beside those before it."""
        left: Doubles = (own.T @ own).astype(np.float64)
        room = MOST_INPUTS
        widths = self._documents.padded_widths
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
                explained = divided(factor, crosses[a].astype(np.float64))
                bits = log_volume(left - explained.T @ explained)
                if best is None or bits < best[0]:
                    best = bits, a, factor, explained
            if best is None:
                break
            _, new, factor, explained = best
            chosen.append(new)
            room -= widths[new]
            left -= explained.T @ explained
            factor, of_new = factor.astype(np.float32), said[new]
            for a in (a for a in range(layer) if a not in chosen):
                before = zip(of_new, said[a], strict=True)
                shared = self._between(new, a) - sum(n.T @ o for n, o in before)
                told = divided(factor, shared)
                said[a].append(told)
                grams[a] -= told.T @ told
                crosses[a] = crosses[a] - told.T @ explained.astype(np.float32)
        return chosen

    def _left(self, layers: Sequence[int], own: Floats, apart: Floats) -> float:
        """Bits of what these layers leave of the targets of the tokens apart, but for a constant;
        `own` are those of the learned tokens."""
        grams = [np.concatenate([self._between(a, b) for b in layers], axis=1) for a in layers]
        gram = np.concatenate(grams).astype(np.float64)
        cross = np.concatenate([self._with(a, own) for a in layers])
        penalty = np.trace(gram) / max(len(gram), 1) * shrinkage(len(gram), len(own)) + 1e-9
        weights = ridge(gram, cross.astype(np.float64), np.full(len(gram), penalty))
        inputs = np.concatenate([self._apart[a] for a in layers], axis=1)
        rest = apart - inputs.astype(np.float32) @ weights.astype(np.float32)
        return log_volume((rest.T @ rest).astype(np.float64) / max(len(rest), 1))
