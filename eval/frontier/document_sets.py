"""The documents of a frontier's runs, and what predictors of a layer see of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvzip import capture
from kvzip.entropy.ladder import check_same_model
from kvzip.entropy.linear import Floats
from kvzip.entropy.residual import View, held_layers
from kvzip.errors import UsageError
from kvzip.eval.frontier import predictors
from kvzip.eval.frontier.predictors import COPY, Document, LayerData
from kvzip.eval.results.frontier import POINTS_VERSION
from kvzip.layout import KV
from kvzip.snapshot import Layer, Snapshot
from kvzip.statistics.documents import SINK_TOKENS, Progress, fingerprint
from kvzip.statistics.rope import ChannelOrder, heads_and_dim

COPY_DOCUMENTS = 6
"""Calibration documents that copies of the model are run on, at most."""


@dataclass(frozen=True)
class DocumentSets:
    """The documents of one run by what they are for, and the format that they are brought to."""

    train: list[Path]
    """To learn regressions from."""
    calibrate: list[Path]
    """To learn covariances and densities from."""
    test: list[Path]
    """To measure."""
    dtype: str
    cast_from: str | None
    """The format that the snapshots are in, where it is another one."""
    given: str
    """What all points of the run depend on, as a hash."""
    whole: bool
    """Whether every predictor is measured, or the main ones."""

    @property
    def native(self) -> str:
        """The format that the model computed the cache in."""
        return self.cast_from or self.dtype

    def layers(self, snapshot: Snapshot, names: Sequence[int]) -> dict[int, Layer]:
        """Some layers, in the run's format, cut to the tokens that all layers hold."""
        held = held_layers(snapshot)
        if self.cast_from is None:
            return {n: held[n] for n in names}
        return {n: capture.cast_layer(held[n], snapshot.dtype, self.dtype) for n in names}

    def views(self, snapshot: Snapshot, names: Sequence[int], skip: int) -> dict[int, View]:
        """Some layers without the first `skip` tokens."""
        dtype, found = self.dtype if self.cast_from else snapshot.dtype, {}
        for n, layer in self.layers(snapshot, names).items():
            view = View(layer, ChannelOrder(layer.layout, snapshot.origin, dtype), dtype)
            found[n] = view.take(slice(skip if layer.layout.stored > 4 * skip else 0, None))
        return found


def by_format(
    train: Sequence[Path], calibrate: Sequence[Path], test: Sequence[Path], casts: Sequence[str]
) -> list[DocumentSets]:
    """A run's documents for each format of the test documents, then for each of `casts`, which
    those of the first format are cast to.

    Raises UsageError when a document is in two of the three sets, or a format has none to
    calibrate on, and ProfileError when documents are of different models.
    """
    first = Snapshot.load(test[0])
    formats, prints = {}, {}
    for path in (*train, *calibrate, *test):
        snapshot = Snapshot.load(path)
        if _shapes(snapshot) != _shapes(first):
            check_same_model(snapshot, first)
        formats[path] = snapshot.dtype
        prints[path] = hashlib.sha256(fingerprint(snapshot)).hexdigest()
    _check_apart({"--train": train, "--calibrate": calibrate, "--test": test}, prints)

    def of_format(dtype: str, paths: Sequence[Path]) -> list[Path]:
        return [path for path in paths if formats[path] == dtype]

    found: list[DocumentSets] = []
    own = list(dict.fromkeys(formats[path] for path in test))
    for native, cast in [*((dtype, None) for dtype in own), *((own[0], cast) for cast in casts)]:
        learned = of_format(native, train) or list(train)
        calibrated, tested = of_format(native, calibrate), of_format(native, test)
        if not calibrated:
            raise UsageError(f"no --calibrate document is {native}")
        dtype, source = (native, None) if cast is None else (cast, native)
        inputs = [prints[p] for p in (*learned, *calibrated, *tested)]
        given = "\n".join([str(POINTS_VERSION), dtype, str(source), first.origin.revision, *inputs])
        digest = hashlib.sha256(given.encode()).hexdigest()[:16]
        found.append(
            DocumentSets(learned, calibrated, tested, dtype, source, digest, whole=not found)
        )
    return found


def _shapes(snapshot: Snapshot) -> list[tuple[tuple[int, int], ...]]:
    """Heads and channels of every layer's keys and values."""
    layers = snapshot.layout.layers
    return [tuple(heads_and_dim(layer, part) for part in KV) for layer in layers]


def _check_apart(sets: dict[str, Sequence[Path]], prints: dict[Path, str]) -> None:
    """Raise UsageError when a document, by its fingerprint, is in two sets."""
    seen: dict[str, str] = {}
    for name, paths in sets.items():
        for path in paths:
            before = seen.setdefault(prints[path], name)
            if before != name:
                raise UsageError(f"{path} is given with {before} and {name}")


def texts(paths: Sequence[Path]) -> list[str]:
    """The texts that documents were captured from; of texts that are files, the name."""
    found = []
    for path in paths:
        text = Snapshot.load(path).origin.text
        head, comma, rest = text.partition(", document ")
        found.append(Path(head).name + comma + rest if comma else text)
    return found


def layer_data(documents: DocumentSets, layer: int, label: str, tell: Progress) -> LayerData:
    """What predictors of a layer from the layers before it learn from and are measured on."""
    names = predictors.needed(layer)
    what = f"{label}: reading"
    total = len(documents.train) + len(documents.calibrate) + len(documents.test)
    learning: list[dict[int, Floats]] = []
    for path in documents.train:
        views = documents.views(Snapshot.load(path), names, SINK_TOKENS)
        learning.append({n: view.y for n, view in views.items()})
        tell(what, len(learning), total)
    made: list[list[Document]] = [[], []]
    layers: list[list[Layer]] = [[], []]
    for i, paths in enumerate((documents.calibrate, documents.test)):
        for path in paths:
            snapshot = Snapshot.load(path)
            views = documents.views(snapshot, names, 0 if i else SINK_TOKENS)
            made[i].append(Document(views[layer], {n: view.y for n, view in views.items()}))
            layers[i].append(documents.layers(snapshot, [layer])[layer])
            tell(what, len(learning) + len(made[0]) + len(made[1]), total)
    frequencies = (predictors.frequencies(found) for found in layers)
    return LayerData(layer, learning, made[0], made[1], *frequencies)


def copy_data(
    documents: DocumentSets, layer: int, predicted: Callable[[Sequence[Path]], list[Path]]
) -> LayerData:
    """What a copy of the model, as a predictor of a layer, learns from and is measured on.

    `predicted`: from documents to the files of what the copy says of them (`copies.predictions`).
    """
    calibrate = documents.calibrate[:COPY_DOCUMENTS]
    paths = [*calibrate, *documents.test]
    made: list[list[Document]] = [[], []]
    for n, (path, place) in enumerate(zip(paths, predicted(paths), strict=True)):
        learned, y = n < len(calibrate), np.load(place)[str(layer)]
        skip = SINK_TOKENS if learned else 0
        view = documents.views(Snapshot.load(path), [layer], skip)[layer]
        made[0 if learned else 1].append(Document(view, {COPY: y[len(y) - len(view.y) :]}))
    nothing = predictors.frequencies([])
    return LayerData(layer, [], made[0], made[1], nothing, nothing)
