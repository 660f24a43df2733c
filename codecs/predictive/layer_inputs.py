"""A layer's inputs as the codec has them, and its targets, document after document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.predictive.documents import Documents
from kvzip.codecs.predictive.integers import quantised

Floats = NDArray[np.float32]


class Known(NamedTuple):
    """What the layers after a layer need to know of it, channels in the order of documents."""

    mean: Floats
    deviation: Floats
    places: NDArray[np.int64]
    """Which channel stands at each place of the codec's order."""


class Reader:
    """A layer's inputs as integers, and its targets."""

    def __init__(
        self, documents: Documents, layer: int, known: Sequence[Known], inputs: Sequence[int]
    ):
        self.documents, self.layer, self.known, self.inputs = documents, layer, known, inputs
        widths = [documents.padded_widths[a] for a in self.inputs]
        self.columns = sum(widths)
        first = 0
        places = []
        for a, width in zip(self.inputs, widths, strict=True):
            at = np.arange(first, first + width)
            at[: documents.widths[a]] = first + known[a].places
            places.append(at)
            first += width
        self.places = np.concatenate([np.zeros(0, np.int64), *places])
        """Which input stands at each place of the codec's order."""

    def read(
        self, which: Sequence[int]
    ) -> Iterator[tuple[int, NDArray[np.int8], Floats, NDArray[np.uint32] | None]]:
        """Read documents one after the other: the number of each, its inputs [tokens, inputs], its
        targets [tokens, channels], its token ids."""
        for i, values, ids in self.documents.read([*self.inputs, self.layer], which):
            parts = [
                quantised(y, self.known[a].mean, self.known[a].deviation)
                for a, y in zip(self.inputs, values[:-1], strict=True)
            ]
            inputs = (
                np.concatenate(parts, axis=1) if parts else np.zeros((len(values[-1]), 0), np.int8)
            )
            yield i, inputs, values[-1], ids

    def fold(self, document: int, tokens: int, folds: int) -> NDArray[np.intp]:
        """Which fold each token of a document counts to; of few documents, parts of each."""
        if len(self.documents) >= 2 * folds:
            return np.full(tokens, document % folds)
        return np.arange(tokens) * 2 * folds // max(tokens, 1) % folds
