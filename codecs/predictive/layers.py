"""Learns one layer of a profile: sums of products over all documents, then its predictors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.predictive.allotment import Allotment
from kvzip.codecs.predictive.documents import Documents, Vocabulary
from kvzip.codecs.predictive.groups import arrange
from kvzip.codecs.predictive.input_layers import InputLayers
from kvzip.codecs.predictive.integers import Arrangement, layer_tensors, packed
from kvzip.codecs.predictive.layer_inputs import Known, Reader
from kvzip.codecs.predictive.regions import Scores, find
from kvzip.codecs.predictive.regression import Sums
from kvzip.codecs.predictive.token_tables import TABLE_ROWS, first_table, later_table
from kvzip.statistics.documents import Progress

Floats = NDArray[np.float32]

MOMENT_DOCUMENTS, MOMENT_TOKENS = 16, 16_384
SCOUT_TOKENS = 98_304  # regions are looked for among so many


def _moments(documents: Documents, layer: int) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each channel, from a few documents; rare numbers far from
    all others do not count in full."""
    which, found, before = documents.spread(MOMENT_DOCUMENTS), [], 0
    step = -(-sum(documents.counts[i] for i in which) // MOMENT_TOKENS)
    for _, (y,), _ in documents.read([layer], which):
        found.append(y[-before % step :: step].copy())  # a view would keep all of the document's
        before += len(y)
    values = np.concatenate(found).astype(np.float64)
    low, high = np.quantile(values, [0.005, 0.995], axis=0)
    values = np.clip(values, low - 4 * (high - low), high + 4 * (high - low))
    mean, second = values.mean(axis=0), (values**2).mean(axis=0)
    deviation = np.sqrt(np.maximum(values.var(axis=0), 1e-8 * second + 1e-30))
    return mean.astype(np.float32), deviation.astype(np.float32)


def _gather(reader: Reader, sums: Sums, scores: Scores | None, tell: Progress) -> None:
    """All documents' products; a few documents at a time, since products of many rows are quick."""
    regions, folds = sums.count.shape
    enough = max(8192, 512 * regions * folds)
    held: list[tuple[NDArray[np.int8], Floats, NDArray[np.intp]]] = []

    def flush() -> None:
        if not held:
            return
        inputs, targets, fold = (np.concatenate(parts) for parts in zip(*held, strict=True))
        region = np.zeros(len(inputs), np.intp) if scores is None else scores.regions(inputs)
        for r in range(regions):
            for f in range(folds):
                rows = np.nonzero((region == r) & (fold == f))[0]
                for begin in range(0, len(rows), 16384):
                    some = rows[begin : begin + 16384]
                    sums.add(r, f, inputs[some], targets[some])
        held.clear()

    count = len(reader.documents)
    for done, (i, inputs, targets, _) in enumerate(reader.read(range(count))):
        held.append((inputs, targets, reader.fold(i, len(inputs), folds)))
        if sum(len(h[0]) for h in held) >= enough:
            flush()
        tell("regressions", reader.layer * count + done + 1, len(reader.documents.widths) * count)
    flush()


def _scout(reader: Reader, mean: Floats, deviation: Floats, regions: int) -> Scores:
    """Regions, found in a part of the documents."""
    documents = reader.documents
    each = max(documents.tokens // len(documents), 1)
    which = documents.spread(-(-SCOUT_TOKENS // each))
    sums = Sums(reader.columns, mean, deviation, 1, 1)
    samples = []
    for _, inputs, targets, _ in reader.read(which):
        sums.add(0, 0, inputs, targets)
        samples.append(inputs[::2])
    total = sums.total[0, 0].astype(np.float64)
    weights = sums.solve(total)
    left = sums.left(weights, total) / max(sums.count[0, 0], 1)
    return find(np.concatenate(samples), weights[1:] / 16, left, regions)


def fit_layer(
    documents: Documents,
    layer: int,
    allotted: Allotment,
    earlier: Sequence[Known],
    choice: InputLayers,
    vocabulary: Vocabulary | None,
    group: int,
    tell: Progress,
) -> dict[str, NDArray[Any]]:
    """The integer tensors of one layer, and what the layers to come need to know."""
    regions, rounding = allotted.regions[layer], allotted.rounding
    mean, deviation = _moments(documents, layer)
    inputs = choice.choose(layer, earlier, mean, deviation)
    reader = Reader(documents, layer, earlier, inputs)
    scores = _scout(reader, mean, deviation, regions) if regions > 1 else None
    folds = 2 if regions > 1 else 4
    sums = Sums(reader.columns, mean, deviation, regions, folds)
    _gather(reader, sums, scores, tell)
    predictors, saved = sums.predictors(rounding)
    if regions > 1 and saved <= 0:
        # Too little to learn from: one predictor does better on documents apart.
        scores, sums.total = None, sums.total.sum(axis=0, keepdims=True)
        sums.count = sums.count.sum(axis=0, keepdims=True)
        predictors, _ = sums.predictors(rounding)
    del sums
    order = documents.orders[layer]
    table = known = None
    if vocabulary is not None and len(vocabulary.ids):
        if layer == 0:
            first = first_table(documents, vocabulary, mean, deviation, predictors[0])
            table, known = first
        elif layer in TABLE_ROWS:
            table = later_table(
                reader, vocabulary, mean, deviation, predictors, scores, TABLE_ROWS[layer]
            )
    shared = np.mean([p.covariance for p in predictors], axis=0)
    places = arrange(shared, order.pairs, order.keys, group)
    at = Arrangement(places, reader.places, len(order.pairs), order.keys, group)
    made = layer_tensors(at, mean, deviation, predictors, table, known)
    made |= {"order": order.order[places].astype(np.int32), "step": order.step}
    made |= {"fit.mean": mean, "fit.deviation": deviation, "fit.places": places.astype(np.int64)}
    made["fit.inputs"] = np.array(inputs, np.int64)
    if scores is not None:
        made |= {"centre": packed(scores.centre[:, reader.places]), "centre_bias": scores.bias}
    return made
