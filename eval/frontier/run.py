"""The rate-compute frontier: bits per number against what it takes to predict them.

Predictors from none to a whole second prefill, each with the ideal code length that it leaves on
the same documents, the multiplications it takes as a share of the model's own prefill, and the
bytes it must know. All in floating point: ideal code lengths, not files. Points are kept on disk
as they are found, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from kvzip import capture
from kvzip.errors import UsageError
from kvzip.eval.frontier import copies, predictors
from kvzip.eval.frontier.document_sets import (
    DocumentSets,
    by_format,
    copy_data,
    layer_data,
    texts,
)
from kvzip.eval.frontier.hull import steps
from kvzip.eval.frontier.predictors import LayerData
from kvzip.eval.kept import kept
from kvzip.eval.results.frontier import Frontier, LayerPoint, Point, Run
from kvzip.eval.results.provenance import made_by
from kvzip.eval.speed.inputs import width
from kvzip.models import LoadedModel, load_model
from kvzip.snapshot import Snapshot
from kvzip.statistics.documents import Progress


def run(
    train: Sequence[Path],
    calibrate: Sequence[Path],
    test: Sequence[Path],
    *,
    model: str,
    out: Path,
    layers: Sequence[int] | None = None,
    casts: Sequence[str] = (),
    kinds: Sequence[str] = tuple(copies.COPIES),
    command: str = "",
    progress: Progress | None = None,
) -> Frontier:
    """Measure every predictor, or take from `out` what was measured before.

    `train`: documents for the regressions, in any one format; `calibrate`: for covariances and
    densities; `test`: to measure. There is a run for each format that test documents are in, and
    one for each of `casts`, a format that those of the first are cast to; after the first, with
    the main predictors only. `layers`: which layers, by default six over the model. `kinds`: which
    copies of the model. Raises UsageError when there is nothing to learn from or to measure, or a
    document is in two of the three sets, and ProfileError when documents are of different models.
    """
    if not (train and calibrate and test):
        raise UsageError("documents are needed to learn from, to calibrate on and to measure")
    if unknown := sorted(set(kinds) - set(copies.COPIES)):
        raise UsageError(
            f"no copy is called {unknown[0]!r}: use some of {', '.join(copies.COPIES)}"
        )
    first = Snapshot.load(test[0])
    chosen = _layers(layers, len(first.layers))
    out.mkdir(parents=True, exist_ok=True)
    tell: Progress = progress or (lambda what, done, total: None)
    sets = by_format(train, calibrate, test, casts)
    cost = _prefill_cost(model, first, out, tell)
    numbers = first.layout.numbers // first.tokens
    runs = []
    for documents in sets:
        measuring = _Measuring(documents, model, chosen, kinds, out, tell)
        points = measuring.points(cost, len(first.layers))
        runs.append(
            Run(
                dtype=documents.dtype,
                cast_from=documents.cast_from,
                points=points,
                steps=steps(points, cost.products, numbers, cost.seconds_per_token),
                missing=measuring.missing,
            )
        )
    return Frontier(
        model=first.origin.model,
        revision=first.origin.revision,
        architecture=first.origin.architecture,
        layers=chosen,
        model_layers=len(first.layers),
        train=texts(train),
        calibrate=texts(calibrate),
        test=texts(sets[0].test),
        train_tokens=Snapshot.load(train[0]).tokens * len(train),
        test_tokens=sum(Snapshot.load(p).tokens for p in sets[0].test),
        document_tokens=first.tokens,
        numbers_per_token=numbers,
        prefill_products=cost.products,
        attention_products=cost.attention,
        prefill_seconds=cost.prefill_seconds,
        **made_by(command or shlex.join(["kvzip", *sys.argv[1:]])),
        runs=runs,
    )


def _layers(given: Sequence[int] | None, count: int) -> list[int]:
    """The layers to measure: those that are given, or six over the model."""
    chosen = sorted(set(given or map(int, np.linspace(1, count - 1, 6).round())))
    if chosen[0] < 0 or chosen[-1] >= count:
        raise UsageError(f"the model has layers 0 to {count - 1}")
    return chosen


# --- the prefill, which all is compared with -----------------------------------------------------


class _PrefillCost(msgspec.Struct, frozen=True):
    """What a prefill of the model takes."""

    model: str
    revision: str
    tokens: int
    products: float
    """Multiplications of a weight for a token."""
    attention: float
    """Products of attention itself for a token."""
    bytes: dict[str, float]
    """What the weights of each kind of copy take."""
    prefill_seconds: float | None
    """For a document of so many tokens; None where its token ids are not known."""

    @property
    def seconds_per_token(self) -> float | None:
        return None if self.prefill_seconds is None else self.prefill_seconds / self.tokens


def _prefill_cost(ref: str, first: Snapshot, out: Path, tell: Progress) -> _PrefillCost:
    """What a prefill of the model takes; timed once and kept."""

    def measure() -> _PrefillCost:
        tell("timing the prefill", 0, 1)
        loaded = load_model(ref, capture.computed_in(first.dtype))
        return _PrefillCost(
            ref,
            first.origin.revision,
            first.tokens,
            float(copies.products_of(loaded.model)),
            _attention_products(loaded, first.tokens),
            {kind: copies.bytes_of(kind, loaded.model) for kind in copies.COPIES},
            _prefill_seconds(loaded, first),
        )

    def fits(known: _PrefillCost) -> bool:
        wanted = ref, first.origin.revision, first.tokens
        return (known.model, known.revision, known.tokens) == wanted

    return kept(out / "model.json", _PrefillCost, measure, fits)


def _prefill_seconds(loaded: LoadedModel, document: Snapshot) -> float | None:
    """The median of three prefills of a document, after one to warm up."""
    if document.token_ids is None or document.token_ids.ndim != 1:
        return None
    ids, times = np.array(document.token_ids), []
    for _ in range(4):
        began = time.perf_counter()
        capture.prefill(loaded, ids)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _attention_products(loaded: LoadedModel, tokens: int) -> float:
    """Products of queries with keys and of weights with values, a token's mean."""
    layers = loaded.model.config.get_text_config(decoder=True).num_hidden_layers
    return float(layers * width(loaded.model) * 2 * (tokens + 1) / 2)


# --- the points of one format --------------------------------------------------------------------


class _Measured(NamedTuple):
    """One predictor on one layer."""

    key: str
    about: predictors.Entry
    point: LayerPoint
    copy: str | None = None
    """The kind of the copy that it looks at, if it does."""
    within: bool = False
    """Whether channels before are used beside that copy."""


@dataclass
class _Measuring:
    """The measurement of every predictor on the documents of one format."""

    documents: DocumentSets
    model: str
    layers: Sequence[int]
    kinds: Sequence[str]
    """Copies of the model."""
    out: Path
    tell: Progress

    def __post_init__(self) -> None:
        documents = self.documents
        self.folder = self.out / "points" / f"{documents.dtype}-{documents.given}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.missing = {
            kind: f"it is measured in bf16, and the cache is {documents.native}"
            for kind in self.kinds
            if kind in copies.NATIVE and documents.native != "bf16"
        }
        """Copies that are not measured, and why."""

    def points(self, cost: _PrefillCost, model_layers: int) -> list[Point]:
        """Every predictor, its mean over the layers."""
        found: dict[str, list[_Measured]] = {}
        for layer in self.layers:
            for measured in (*self._catalogue(layer), *self._copies(layer)):
                found.setdefault(measured.key, []).append(measured)
        return [_point(measured, cost, model_layers) for measured in found.values()]

    def _remembered(self, key: str, layer: int, compute: Callable[[], LayerPoint]) -> LayerPoint:
        place = self.folder / f"{key}-{layer}.json"
        return kept(place, LayerPoint, compute)

    def _catalogue(self, layer: int) -> Iterator[_Measured]:
        """The predictors that look at layers before."""
        label = f"{self.documents.dtype}, layer {layer}"
        data = cache(lambda: layer_data(self.documents, layer, label, self.tell))

        def measure(key: str) -> LayerPoint:
            return predictors.measure_key(key, data())

        keys = list(predictors.CATALOGUE) if self.documents.whole else predictors.MAIN
        for done, key in enumerate(keys):
            point = self._remembered(key, layer, partial(measure, key))
            yield _Measured(key, predictors.CATALOGUE[key], point)
            self.tell(label, done + 1, len(keys))

    def _copies(self, layer: int) -> Iterator[_Measured]:
        """The copies of the model, by themselves and with channels before."""
        for kind in self.kinds:
            if kind in self.missing:
                continue
            about = copies.COPIES[kind]
            data = cache(partial(self._copy_data, kind, layer))

            def measure(within: bool, data: Callable[[], LayerData] = data) -> LayerPoint:
                return predictors.measure(predictors.copied(data(), within), data())

            point = self._remembered(kind, layer, partial(measure, within=False))
            yield _Measured(kind, about, point, kind)
            if self.documents.whole:
                key = f"{kind}-within"
                point = self._remembered(key, layer, partial(measure, within=True))
                more = about._replace(
                    title=f"{about.title}, channels before",
                    label=f"{about.label}, channels before",
                )
                yield _Measured(key, more, point, kind, within=True)

    def _copy_data(self, kind: str, layer: int) -> LayerData:
        def predicted(paths: Sequence[Path]) -> list[Path]:
            return copies.predictions(
                kind, self.model, self.documents.native, paths, self.layers, self.out, self.tell
            )

        return copy_data(self.documents, layer, predicted)


def _point(measured: Sequence[_Measured], cost: _PrefillCost, model_layers: int) -> Point:
    """A predictor from what was measured on some layers of a model of so many."""
    first = measured[0]
    layers = [found.point for found in measured]

    def mean(name: str) -> float:
        return statistics.fmean(getattr(p, name) for p in layers)

    products, known = model_layers * mean("products"), model_layers * mean("bytes")
    if first.copy is not None:
        products += cost.products if first.about.family != "floor" else 0.0
        known += cost.bytes[first.copy]
    return Point(
        key=first.key,
        title=first.about.title,
        label=first.about.label,
        family=first.about.family,
        within=first.within,
        bits=mean("bits"),
        k=mean("k"),
        v=mean("v"),
        products=products,
        share=products / cost.products,
        profile_bytes=known,
        layers=layers,
    )
