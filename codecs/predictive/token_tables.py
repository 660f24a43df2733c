"""What the first layers make of each token: a mean of its own for each of the tokens seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.predictive.documents import Documents, Vocabulary
from kvzip.codecs.predictive.layer_inputs import Reader
from kvzip.codecs.predictive.regions import Scores
from kvzip.codecs.predictive.regression import SHRINK_TOKENS, Predictor, normalised

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

TABLE_ROWS = {1: 8192}  # most frequent tokens with a mean of their own, by layer
UNSEEN = 0.25  # share of new tokens up to which the first layer is made for the others
TABLE_SHRINK = 2.0  # unseen occurrences without a deviation that count in a token's mean


def first_table(
    documents: Documents,
    vocabulary: Vocabulary,
    mean: Floats,
    deviation: Floats,
    predictor: Predictor,
) -> tuple[Doubles, Doubles]:
    """What the first layer makes of each token, [tokens, width] in deviations from the mean, and
    the variance that is left of it. The predictor becomes that of a token that was never seen:
    each token of the table counts once."""
    total = np.zeros((len(vocabulary.ids), len(mean)))
    squares, counts = np.zeros(len(mean)), np.zeros(len(total))
    for _, (values,), ids in documents.read([0], range(len(documents)), sinks=True):
        if ids is None or len(ids) != len(values):
            continue
        rows = vocabulary.rows(ids)
        known = rows < len(total)
        left = normalised(values[known], mean, deviation)
        _add_rows(total, counts, rows[known], left)
        squares += (left.astype(np.float64) ** 2).sum(axis=0)
    means: Doubles = total / np.maximum(counts, 1)[:, None]
    seen = max(counts.sum(), 1)
    variance = np.maximum(squares - (total * means).sum(axis=0), 0) / seen
    if len(means) > 4 * means.shape[1]:
        predictor.bias = means.mean(axis=0)
        apart = means - predictor.bias
        predictor.covariance = apart.T @ apart / len(means)
    if (counts == 1).sum() < UNSEEN * seen:
        # By the share of tokens seen once, so many are new (Good 1953); of the others only
        # rounding is left, from which nothing follows for the channels to come.
        predictor.covariance = np.diag(np.diag(predictor.covariance))
    return means - predictor.bias, variance


def _add_rows(total: Doubles, counts: Doubles, rows: NDArray[Any], values: Floats) -> None:
    """Add each of the values [tokens, width] to its row, and count it."""
    if len(rows):
        order = np.argsort(rows, kind="stable")
        found, starts, seen = np.unique(rows[order], return_index=True, return_counts=True)
        total[found] += np.add.reduceat(values[order], starts, axis=0)
        counts[found] += seen


def later_table(
    reader: Reader,
    vocabulary: Vocabulary,
    mean: Floats,
    deviation: Floats,
    predictors: list[Predictor],
    scores: Scores | None,
    most: int,
) -> Doubles:
    """What the predictors miss of the most frequent tokens on average, [tokens, width]. Their
    covariances become those of what is left then, on documents apart."""
    rows, folds = min(most, len(vocabulary.ids)), 2
    total = np.zeros((folds, rows, len(mean)))
    counts = np.zeros((folds, rows))
    every = range(len(reader.documents))
    weights = [(p.rounded * p.scale).astype(np.float32) for p in predictors]
    bias = [p.bias.astype(np.float32) for p in predictors]

    def residuals() -> Iterator[tuple[NDArray[Any], Floats, NDArray[Any], NDArray[Any]]]:
        for i, inputs, targets, ids in reader.read(every):
            region = np.zeros(len(inputs), np.intp) if scores is None else scores.regions(inputs)
            left = normalised(targets, mean, deviation)
            for r in np.unique(region):
                mine = region == r
                left[mine] -= inputs[mine].astype(np.float32) @ weights[r] + bias[r]
            at = (
                np.full(len(inputs), rows)
                if ids is None or len(ids) != len(inputs)
                else vocabulary.rows(ids)
            )
            yield reader.fold(i, len(inputs), folds), left, at, region

    for fold, left, at, _ in residuals():
        for f in range(folds):
            mine = (at < rows) & (fold == f)
            _add_rows(total[f], counts[f], at[mine], left[mine])
    others = total[::-1] / (counts[::-1, :, None] + TABLE_SHRINK)
    products = np.zeros((len(predictors), len(mean), len(mean)))
    tokens = np.zeros(len(predictors))
    for fold, left, at, region in residuals():
        known = at < rows
        left, region = (
            left[known] - others[fold[known], at[known]].astype(np.float32),
            region[known],
        )
        for r in np.unique(region):
            mine = left[region == r]
            products[r] += mine.T @ mine
            tokens[r] += len(mine)
    common = products.sum(axis=0) / max(tokens.sum(), 1)
    for r, p in enumerate(predictors):
        if tokens.sum() > 4 * len(mean):
            p.covariance = (products[r] + SHRINK_TOKENS * common) / (tokens[r] + SHRINK_TOKENS)
    table: Doubles = total.sum(axis=0) / (counts.sum(axis=0)[:, None] + TABLE_SHRINK)
    return table
