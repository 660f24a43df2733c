"""Learns the predictive codec's profile: floating point here, integers in what comes out.

spec.md says what the tensors mean. One layer after the other: its sums of products over all
documents, then its predictors; last, over documents kept apart, the scales and shapes of what is
left, measured by the codec itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.predictive.calibrate import calibrate
from kvzip.codecs.predictive.density import START, densities, sine_table
from kvzip.codecs.predictive.documents import (
    Documents,
    Floats,
    Item,
    Progress,
    Vocabulary,
    inputs_of,
)
from kvzip.codecs.predictive.groups import MOST, arrange, default_group, default_lanes, starts
from kvzip.codecs.predictive.regions import Scores, find
from kvzip.codecs.predictive.regression import (
    ANGLES,
    SHRINK_TOKENS,
    Doubles,
    Predictor,
    Sums,
    cholesky,
    int32,
    inverse,
    normalised,
    packed,
    turned,
    within,
)
from kvzip.codecs.predictive.store import Store
from kvzip.errors import ProfileError
from kvzip.profile import Profile, hold_out

CLIP = 6.0  # standard deviations that 127 stands for in an input
UNIT_BITS = 16  # a residual's standard deviation is about 2^16 units
RESIDUAL_SHIFT = 12
INPUT_SHIFT = 28
MEAN_DEVIATION = 0.75  # of the standard deviation, to begin with
MOMENT_DOCUMENTS, MOMENT_TOKENS = 16, 16_384
SCOUT_TOKENS = 98_304  # regions are looked for among so many
MOST_REGIONS = 64
DEFAULT_BYTES = 134_000_000
TABLE_ROWS = {1: 8192}  # most frequent tokens with a mean of their own, by layer
UNSEEN = 0.25  # share of new tokens up to which the first layer is made for the others
TABLE_SHRINK = 2.0  # unseen occurrences without a deviation that count in a token's mean


def multiplications(profile: Profile) -> list[int]:
    """Products of a weight and a number, for each token and layer, that prediction takes."""
    found = []
    for i, layer in enumerate(profile.description["layers"]):
        regions, n = profile.tensors[f"{i}.bias"].shape
        columns = sum(profile.tensors[f"{a}.bias"].shape[1] for a in layer["inputs"])
        found.append(n * columns + n * (n - 1) // 2 + columns * (regions if regions > 1 else 0))
    return found


def fit(
    snapshots: Sequence[Item],
    progress: Progress | None = None,
    *,
    regions: int | Sequence[int] | Literal["auto"] = "auto",
    max_bytes: int = DEFAULT_BYTES,
    token_table: bool = True,
    group: int | None = None,
    calibration: int | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Profile:
    """A profile for the predictive codec; see :meth:`kvzip.Profile.fit`.

    `regions`: how many predictors a layer has, of which each token takes one: for all layers, for
    each, or as many as the documents and `max_bytes`, the size of the profile's file, allow.
    `token_table`: keep what the first layers make of each token seen. `group`: how many channels
    do not look at each other, so that they can be decoded at the same time; by default 8, of wide
    models 16. `calibration`: documents
    that are not learned from, over which scales and densities are set; default: one in sixteen,
    at most 24. `resume`: a folder in which finished layers are kept, so that the same call goes on
    where an earlier one ended.
    """
    if not snapshots:
        raise ProfileError("a profile needs at least one snapshot to learn from")
    tell = progress or (lambda what, done, total: None)
    count = _calibration(len(snapshots)) if calibration is None else calibration
    if not 0 <= count < len(snapshots):
        raise ProfileError(f"{count} of {len(snapshots)} documents cannot be kept apart")
    learned_from, held_out = hold_out(snapshots, count)
    learned = Documents(learned_from)
    widths = learned.widths
    if group is None:
        group = default_group(max(widths))
    group = default_group(max(widths)) if group is None else group
    if not (2 <= group <= MOST and group % 2 == 0):
        raise ProfileError(f"group={group}: want an even number of channels, 2 to {MOST}")
    settings = {
        "regions": regions if isinstance(regions, int | str) else list(regions),
        "max_bytes": max_bytes,
        "token_table": token_table,
        "group": group,
        "calibration": count,
    }
    if not (2 <= group <= MOST and group % 2 == 0):
        raise ProfileError(f"group={group}: want an even number of channels, 2 to {MOST}")
    _check_regions(regions, len(widths))
    store = None if resume is None else Store(Path(resume), settings, snapshots)
    tensors: dict[str, NDArray[Any]] = {"sine": sine_table(), "densities": densities()[0]}
    known: list[_Known] = []
    counts = [1]
    vocabulary = Vocabulary(learned) if token_table else None
    for i in range(len(widths)):
        if i == 1:
            counts = _allot(learned, regions, max_bytes, vocabulary)
        made = None if store is None else store.layer(i)
        if made is None:
            made = _layer(learned, i, counts[i], known, vocabulary, group, tell)
            if store is not None:
                store.keep(i, made)
        known.append(_Known(*(made.pop(f"fit.{name}") for name in _Known._fields)))
        tensors |= {f"{i}.{name}": array for name, array in made.items()}
        tell("layers", i + 1, len(widths))
    if vocabulary is not None and len(vocabulary.ids):
        tensors["token_ids"] = vocabulary.ids
    first = learned.first
    description: dict[str, Any] = {
        "codec": "predictive",
        "model": first.origin.model,
        "revision": first.origin.revision,
        "architecture": first.origin.architecture,
        "dtype": first.dtype,
        "tokens": learned.tokens,
        "documents": len(learned),
        "group": group,
        "lanes": default_lanes(widths, group),
        "layers": [
            {"inputs": inputs_of(i), "k": [s.k[-3], s.k[-1]], "v": [s.v[-3], s.v[-1]]}
            for i, s in enumerate(first.layout.layers)
        ],
    }
    spent = calibrate(tensors, description, held_out or list(snapshots), tell)
    if held_out:
        description["held_out_bits"] = spent.bits_per_number
    return Profile(tensors, description)


def _calibration(documents: int) -> int:
    """How many documents are kept apart."""
    return 0 if documents < 8 else min(max(documents // 16, 1), 24)


def _check_regions(regions: int | Sequence[int] | str, layers: int) -> None:
    given = [regions] if isinstance(regions, int) else regions
    if regions == "auto":
        return
    if isinstance(given, str) or not all(1 <= r <= 256 for r in given):
        raise ProfileError(f'regions={regions!r}: want "auto", or 1 to 256')
    if not isinstance(regions, int) and len(given) != layers:
        raise ProfileError(f"regions for {len(given)} layers are given, the model has {layers}")


def _quantised(values: Floats, mean: Floats, deviation: Floats) -> NDArray[np.int8]:
    """What the codec makes of a layer's values for the layers after it."""
    with np.errstate(over="ignore"):
        steps = np.rint((values - mean) * (127 / CLIP / deviation))
    room = [(0, 0), (0, -values.shape[1] % 4)]
    return np.pad(np.clip(steps, -127, 127).astype(np.int8), room)


# --- one layer -----------------------------------------------------------------------------------


def _moments(documents: Documents, layer: int) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each channel, from a few documents; rare numbers far from
    all others do not count in full."""
    found = [y for _, (y,), _ in documents.read([layer], documents.spread(MOMENT_DOCUMENTS))]
    values = np.concatenate(found)
    values = values[:: -(-len(values) // MOMENT_TOKENS)].astype(np.float64)
    low, high = np.quantile(values, [0.005, 0.995], axis=0)
    values = np.clip(values, low - 4 * (high - low), high + 4 * (high - low))
    mean, second = values.mean(axis=0), (values**2).mean(axis=0)
    deviation = np.sqrt(np.maximum(values.var(axis=0), 1e-8 * second + 1e-30))
    return mean.astype(np.float32), deviation.astype(np.float32)


class _Known(NamedTuple):
    """What the layers after a layer need to know of it, channels in the order of documents."""

    mean: Floats
    deviation: Floats
    places: NDArray[np.int64]
    """Which channel stands at each place of the codec's order."""


class _Reader:
    """A layer's inputs as integers, and its targets."""

    def __init__(self, documents: Documents, layer: int, known: Sequence[_Known]):
        self.documents, self.layer, self.known = documents, layer, known
        self.inputs = inputs_of(layer)
        widths = [documents.widths[a] + -documents.widths[a] % 4 for a in self.inputs]
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
        """Of each document: its number, inputs, targets, token ids."""
        for i, values, ids in self.documents.read([*self.inputs, self.layer], which):
            parts = [
                _quantised(y, self.known[a].mean, self.known[a].deviation)
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


def _gather(reader: _Reader, sums: Sums, scores: Scores | None, tell: Progress) -> None:
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


def _scout(reader: _Reader, mean: Floats, deviation: Floats, regions: int) -> Scores:
    """Regions, found in a part of the documents."""
    documents = reader.documents
    each = max(documents.tokens // len(documents), 1)
    which = documents.spread(-(-SCOUT_TOKENS // each))
    sums = Sums(reader.columns, mean, deviation, 1, 1)
    samples = []
    for _, inputs, targets, _ in reader.read(which):
        sums.add(0, 0, inputs, targets)
        samples.append(inputs[::2])
    total, i = sums.total[0, 0].astype(np.float64), reader.columns
    weights = sums.solve(total)
    left = sums.left(weights, total) / max(sums.count[0, 0], 1)
    return find(np.concatenate(samples), weights[:i] / 16, left, regions)


def _layer(
    documents: Documents,
    layer: int,
    regions: int,
    earlier: Sequence[_Known],
    vocabulary: Vocabulary | None,
    group: int,
    tell: Progress,
) -> dict[str, NDArray[Any]]:
    """The integer tensors of one layer, and what the layers to come need to know."""
    mean, deviation = _moments(documents, layer)
    reader = _Reader(documents, layer, earlier)
    scores = _scout(reader, mean, deviation, regions) if regions > 1 else None
    folds = 2 if regions > 1 else 4
    sums = Sums(reader.columns, mean, deviation, regions, folds)
    _gather(reader, sums, scores, tell)
    predictors, saved = sums.predictors()
    if regions > 1 and saved <= 0:
        # Too little to learn from: one predictor does better on documents apart.
        scores, sums.total = None, sums.total.sum(axis=0, keepdims=True)
        sums.count = sums.count.sum(axis=0, keepdims=True)
        predictors, _ = sums.predictors()
    del sums
    order = documents.orders[layer]
    table = known = None
    if vocabulary is not None and len(vocabulary.ids):
        if layer == 0:
            first = _first_table(documents, vocabulary, mean, deviation, predictors[0])
            table, known = first
        elif layer in TABLE_ROWS:
            table = _table(
                reader, vocabulary, mean, deviation, predictors, scores, TABLE_ROWS[layer]
            )
    shared = np.mean([p.covariance for p in predictors], axis=0)
    places = arrange(shared, order.pairs, order.keys, group)
    at = _Arrangement(places, reader.places, len(order.pairs), order.keys, group)
    made = _integers(at, mean, deviation, predictors, table, known)
    made |= {"order": order.order[places].astype(np.int32), "step": order.step}
    made |= {"fit.mean": mean, "fit.deviation": deviation, "fit.places": places.astype(np.int64)}
    if scores is not None:
        made |= {"centre": packed(scores.centre[:, reader.places]), "centre_bias": scores.bias}
    return made


class _Arrangement(NamedTuple):
    """A layer's channels as the codec takes them."""

    places: NDArray[np.intp]
    inputs: NDArray[np.int64]
    """Which channel, which input stands at each place."""
    pairs: int
    keys: int
    group: int


def _first_table(
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
        left = normalised(values, mean, deviation)
        _add_rows(total, counts, vocabulary.rows(ids), left)
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


def _table(
    reader: _Reader,
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


def _integers(
    at: _Arrangement,
    mean: Floats,
    deviation: Floats,
    predictors: Sequence[Predictor],
    table: Doubles | None,
    known: Doubles | None,
) -> dict[str, NDArray[Any]]:
    """The tensors that predictors come to. `known`: variance of what is left of tokens in the
    table, which is then a fine one."""
    order = at.places
    mean, deviation = mean[order], deviation[order]
    table = None if table is None else table[:, order]
    known = None if known is None else known[order]
    predictors = [
        Predictor(
            p.rounded[at.inputs][:, order],
            p.scale[order],
            p.bias[order],
            p.covariance[np.ix_(order, order)],
        )
        for p in predictors
    ]
    n = len(mean)
    pairs = [(2 * i, 2 * i + 1) for i in range(at.pairs)]
    ends = starts((at.keys, n - at.keys), at.group)
    wide = deviation.astype(np.float64)
    shared = np.mean([np.diag(p.covariance) for p in predictors], axis=0)
    # Usual numbers stay far within the bounds of fixed point, where a channel hardly changes, too.
    size = np.maximum(wide * np.sqrt(np.maximum(shared, 0)), (np.abs(mean) + 16 * wide) / 2**11)
    for a, b in pairs:
        size[a] = size[b] = max(size[a], size[b])
    exponent = np.clip(np.round(np.log2(np.maximum(size, 1e-30))) - UNIT_BITS, -120, 60)
    unit = 2.0**exponent
    firsts = np.array([a for a, _ in pairs], np.int64)
    made: dict[str, list[NDArray[Any]]] = {}
    for p in predictors:
        # In units from here on; input residuals in steps of 2^12 of theirs.
        covariance = p.covariance * np.outer(wide / unit, wide / unit)
        coefficients, variance, shared_part, second = within(cholesky(covariance), pairs, ends)
        coefficients = coefficients * (1 << RESIDUAL_SHIFT)
        within_scale = np.maximum(np.abs(coefficients).max(axis=1), 1e-9) / 127
        one, two, slope = turned(variance[firsts], second, shared_part)
        one_region: dict[str, NDArray[Any]] = {
            "bias": int32((mean + wide * p.bias) / unit),
            "weight": packed(p.rounded.T),
            "weight_scale": int32(p.scale * wide / unit * (1 << 20)),
            "within": packed(np.round(coefficients / within_scale[:, None]).astype(np.int8)),
            "within_scale": int32(within_scale * (1 << 20)),
            "inverse": inverse(np.sqrt(variance) * MEAN_DEVIATION),
            "pair_inverse": inverse(np.stack([one, two], axis=1) * MEAN_DEVIATION),
            "pair_slope": int32(np.clip(slope * (1 << 12), -(2**20), 2**20)),
        }
        for name, array in one_region.items():
            made.setdefault(name, []).append(array)
    tensors = {name: np.stack(arrays) for name, arrays in made.items()}
    if table is not None:
        most, step = (127, 1 << 12) if known is None else (32767, 1 << 5)
        steps = np.clip(np.round(table * (wide / unit / step)), -most, most)
        tensors["table"] = steps.astype(np.int8 if known is None else np.int16)
        own = {name: tensors[name] for name in ("inverse", "pair_inverse", "pair_slope")}
        if known is not None:
            variance = np.maximum(known * (wide / unit) ** 2, 1)
            seconds = firsts + 1
            one, two, slope = turned(variance[firsts], variance[seconds], 0 * variance[firsts])
            own["inverse"] = inverse(np.sqrt(variance) * MEAN_DEVIATION)[None]
            own["pair_inverse"] = inverse(np.stack([one, two], axis=1) * MEAN_DEVIATION)[None]
            own["pair_slope"] = int32(np.clip(slope * (1 << 12), -(2**20), 2**20))[None]
        for name, array in own.items():
            tensors[name] = np.concatenate([tensors[name], array])
    return tensors | {
        "unit": exponent.astype(np.int8),
        "mean": int32(mean / unit),
        "input_scale": int32(127 / CLIP / wide * unit * (1 << INPUT_SHIFT)),
        "density": np.full(n, START, np.uint8),
    }


# --- how many regions ----------------------------------------------------------------------------


def _region_bytes(documents: Documents, layer: int, table: bool) -> int:
    """What one more region of a layer takes in the profile."""
    up = [w + -w % 4 for w in documents.widths]
    n, pairs = documents.widths[layer], len(documents.orders[layer].pairs)
    matrices = up[layer] * (sum(up[a] for a in inputs_of(layer)) + up[layer])
    return matrices + 12 * n + (1 + table) * 4 * (n + 3 * ANGLES * pairs)


def _allot(
    documents: Documents,
    regions: int | Sequence[int] | str,
    max_bytes: int,
    vocabulary: Vocabulary | None,
) -> list[int]:
    """Regions of each layer: what is given, or what bytes and tokens allow."""
    widths = documents.widths
    if isinstance(regions, int):
        return [1] + [regions] * (len(widths) - 1)
    if not isinstance(regions, str):
        return list(regions)
    layers = range(len(widths))
    tables = {0, *TABLE_ROWS} if vocabulary is not None and len(vocabulary.ids) else set()
    counts, each = [1] * len(widths), [_region_bytes(documents, i, i in tables) for i in layers]
    # What is not of a region, names and all.
    left = max_bytes - sum(each) - sum(4096 + 24 * w for w in widths)
    if vocabulary is not None:
        left -= len(vocabulary.ids) * (2 * widths[0] + 4)
        left -= sum(
            min(rows, len(vocabulary.ids)) * widths[i]
            for i, rows in TABLE_ROWS.items()
            if i < len(widths)
        )
    most = [
        documents.tokens // max(8 * sum(widths[a] for a in inputs_of(i)), 8000)
        for i in range(len(widths))
    ]
    most = [min(m, MOST_REGIONS) if m >= 4 and i else 1 for i, m in enumerate(most)]
    while True:
        # Each doubling gains about as much as the one before, more in early layers.
        gains = [
            (_worth(i, len(widths)) / counts[i] / each[i], i)
            for i in range(len(widths))
            if counts[i] < most[i] and each[i] <= left
        ]
        if not gains:
            return counts
        _, best = max(gains)
        counts[best] += 1
        left -= each[best]


def _worth(layer: int, layers: int) -> float:
    """What twice the regions gain, against the last layer: about twice as much in the first ones,
    as measured on SmolLM2 (docs/research.md)."""
    return 1 + 1.2 * (1 - layer / max(layers - 1, 1)) ** 2
