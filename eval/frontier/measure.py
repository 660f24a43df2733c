"""The rate-compute frontier: bits per number against what it takes to predict them.

Predictors from none to a whole second prefill, each with the ideal code length that it leaves on
the same documents, the multiplications it takes as a share of the model's own prefill, and the
bytes it must know. All in floating point: ideal code lengths, not files. Points are kept on disk
as they are found, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import capture
from kvzip.codecs.predictive import rope
from kvzip.codecs.predictive.documents import SINK_TOKENS, Progress
from kvzip.entropy.ladder import check_same_model, fingerprint
from kvzip.entropy.linear import Floats
from kvzip.entropy.residual import View, held_layers
from kvzip.errors import KVZipError
from kvzip.eval.frontier import copies, predictors
from kvzip.eval.frontier.predictors import COPY, Document, LayerData, LayerPoint
from kvzip.eval.results import stored
from kvzip.eval.results.provenance import Made, made_by
from kvzip.files import replacing
from kvzip.models import LoadedModel, load_model
from kvzip.snapshot import Layer, Snapshot

_log = logging.getLogger("kvzip.eval")

VERSION = 1
"""Of what is measured: points of another version are measured anew."""
COPY_DOCUMENTS = 6
"""Calibration documents that copies of the model are run on, at most."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One predictor: means over the layers that were measured."""

    key: str
    title: str
    family: str
    """tables, linear, piecewise, copy, recomputation, or floor, which no codec can reach."""
    bits: float
    k: float
    v: float
    products: float
    """Multiplications of a weight for a token, all layers of the model."""
    share: float
    """Of the multiplications of the model's own prefill."""
    profile_bytes: float
    """For all layers of the model, a byte a weight; of a copy, its weights."""
    layers: list[LayerPoint]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """From one point of the lower convex hull to the next dearer one."""

    cheaper: str
    dearer: str
    bits_saved: float
    share_more: float
    worth_below_mbps: float | None
    """The link's rate below which the bits saved take longer than the multiplications, if those go
    as fast as the measured prefill's. None where no prefill was timed."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """All points for one format of the cache."""

    dtype: str
    cast_from: str | None
    """The format that the model's cache was in before it was cast."""
    points: list[Point]
    steps: list[Step]
    missing: dict[str, str] = {}
    """Predictors that were not measured, and why."""


class Frontier(Made, frozen=True, kw_only=True):
    version: int
    model: str
    revision: str
    architecture: str
    layers: list[int]
    """That were measured, of `model_layers`."""
    model_layers: int
    train: list[str]
    calibrate: list[str]
    test: list[str]
    """Texts of the documents, as they were captured."""
    train_tokens: int
    test_tokens: int
    document_tokens: int
    numbers_per_token: int
    prefill_products: float
    """Multiplications of a weight for a token of the model's prefill: as many bytes, half of what
    those weights take in bf16, are the room that a predictor on the hull has."""
    attention_products: float
    """The products of attention itself beside them, the mean over a document's tokens."""
    prefill_seconds: float | None
    """Of one document of the first dtype on `machine`; copies and predictors are not timed."""
    runs: list[Run]


def load(path: str | os.PathLike[str]) -> Frontier:
    """A stored result. Raises KVZipError when it is none."""
    return stored.load(path, Frontier, "`kvzip eval frontier`")


def hull(points: Sequence[Point], room: float) -> list[Point]:
    """The lower convex hull of the predictors by share: no mixture of others is below these.

    Recomputation, which is the prefill itself, stays out, and so does what must know more than
    `room` bytes beside the model, which a copy is made from."""
    able = [
        p
        for p in points
        if p.family == "copy"
        or (p.family not in ("recomputation", "floor") and p.profile_bytes <= room)
    ]
    found: list[Point] = []
    for p in sorted(able, key=lambda p: (p.share, p.bits)):
        if found and p.bits >= min(q.bits for q in found):
            continue
        while len(found) > 1 and _turns_up(found[-2], found[-1], p):
            found.pop()
        found.append(p)
    return found


def _turns_up(a: Point, b: Point, c: Point) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b.bits - a.bits) * (c.share - a.share) >= (c.bits - a.bits) * (b.share - a.share)


def steps(
    points: Sequence[Point], room: float, numbers: int, prefill_seconds_per_token: float | None
) -> list[Step]:
    """`numbers`: of a token. The bits that a step saves take numbers * bits / rate to send."""
    chain = hull(points, room)
    found = []
    for a, b in pairwise(chain):
        saved, more = a.bits - b.bits, b.share - a.share
        rate = None
        if prefill_seconds_per_token is not None and more > 0:
            rate = saved * numbers / (more * prefill_seconds_per_token) / 1e6
        found.append(
            Step(
                cheaper=a.key,
                dearer=b.key,
                bits_saved=saved,
                share_more=more,
                worth_below_mbps=rate,
            )
        )
    return found


# --- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Set:
    """The documents of one run, and what they are brought to."""

    train: list[Path]
    calibrate: list[Path]
    test: list[Path]
    dtype: str
    cast_from: str | None
    given: str
    """What all points of the run depend on, as a hash."""
    whole: bool
    """Whether every predictor is measured, or the main ones."""

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
            view = View(layer, rope.Order(layer.layout, snapshot.origin, dtype), dtype)
            found[n] = view.take(slice(skip if layer.layout.stored > 4 * skip else 0, None))
        return found


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
    the main predictors only. `layers`: which layers,
    by default six over the model. `kinds`: which copies of the model. Raises KVZipError when
    documents are of different models, or in two of the three sets.
    """

    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)

    if not (train and calibrate and test):
        raise KVZipError("documents are needed to learn from, to calibrate on and to measure")
    if unknown := sorted(set(kinds) - set(copies.COPIES)):
        raise KVZipError(
            f"no copy is called {unknown[0]!r}: use some of {', '.join(copies.COPIES)}"
        )
    first = Snapshot.load(test[0])
    count = len(first.layers)
    chosen = sorted(set(layers if layers else np.linspace(1, count - 1, 6).round().astype(int)))
    chosen = [int(i) for i in chosen]
    if chosen[0] < 0 or chosen[-1] >= count:
        raise KVZipError(f"the model has layers 0 to {count - 1}")
    out.mkdir(parents=True, exist_ok=True)
    sets = _sets(train, calibrate, test, casts)
    about = _about(model, first, out, tell)
    runs = []
    for documents in sets:
        found: dict[str, tuple[str, str, list[LayerPoint]]] = {}
        missing: dict[str, str] = {}
        for layer in chosen:
            for key, family, title, point in _layer(
                documents, layer, chosen, out, tell, model, kinds, missing
            ):
                found.setdefault(key, (family, title, []))[2].append(point)
        points = [_point(key, *parts, about, count) for key, parts in found.items()]
        rate = about["prefill_seconds"]
        rate = None if rate is None else rate / first.tokens
        numbers = first.layout.numbers // first.tokens
        runs.append(
            Run(
                dtype=documents.dtype,
                cast_from=documents.cast_from,
                points=points,
                steps=steps(points, about["products"], numbers, rate),
                missing=missing,
            )
        )
    config = Snapshot.load(train[0])
    return Frontier(
        version=VERSION,
        model=first.origin.model,
        revision=first.origin.revision,
        architecture=first.origin.architecture,
        layers=chosen,
        model_layers=count,
        train=_texts(train),
        calibrate=_texts(calibrate),
        test=_texts(sets[0].test),
        train_tokens=config.tokens * len(train),
        test_tokens=sum(Snapshot.load(p).tokens for p in sets[0].test),
        document_tokens=first.tokens,
        numbers_per_token=first.layout.numbers // first.tokens,
        prefill_products=about["products"],
        attention_products=about["attention"],
        prefill_seconds=about["prefill_seconds"],
        **made_by(command or shlex.join(["kvzip", *sys.argv[1:]])),
        runs=runs,
    )


def _texts(paths: Sequence[Path]) -> list[str]:
    """The documents' texts; of texts that are files, the name."""
    found = []
    for path in paths:
        text = Snapshot.load(path).origin.text
        head, comma, rest = text.partition(", document ")
        found.append(Path(head).name + comma + rest if comma else text)
    return found


def _sets(
    train: Sequence[Path], calibrate: Sequence[Path], test: Sequence[Path], casts: Sequence[str]
) -> list[_Set]:
    """Documents by the format of the test documents; raises KVZipError when sets overlap."""
    first = Snapshot.load(test[0])
    kinds: dict[Path, str] = {}
    prints: dict[Path, str] = {}
    for path in (*train, *calibrate, *test):
        snapshot = Snapshot.load(path)
        shapes = [(s.k[-3], s.k[-1], s.v[-3], s.v[-1]) for s in snapshot.layout.layers]
        if shapes != [(s.k[-3], s.k[-1], s.v[-3], s.v[-1]) for s in first.layout.layers]:
            check_same_model(snapshot, first)
        kinds[path] = snapshot.dtype
        prints[path] = hashlib.sha256(fingerprint(snapshot)).hexdigest()
    names = {"--train": train, "--calibrate": calibrate, "--test": test}
    seen: dict[str, str] = {}
    for name, paths in names.items():
        for path in paths:
            if seen.setdefault(prints[path], name) != name:
                raise KVZipError(f"{path} is given with {seen[prints[path]]} and {name}")
    found: list[_Set] = []
    formats: list[tuple[str, str | None]] = [
        (dtype, None) for dtype in dict.fromkeys(kinds[p] for p in test)
    ]
    for dtype, source in (*formats, *((cast, formats[0][0]) for cast in casts)):
        own = source or dtype
        chosen = [p for p in calibrate if kinds[p] == own], [p for p in test if kinds[p] == own]
        learned = [p for p in train if kinds[p] == own] or list(train)
        if not chosen[0]:
            raise KVZipError(f"no --calibrate document is {own}")
        inputs = [prints[p] for p in (*learned, *chosen[0], *chosen[1])]
        given = "\n".join([str(VERSION), dtype, str(source), first.origin.revision, *inputs])
        digest = hashlib.sha256(given.encode()).hexdigest()[:16]
        found.append(_Set(learned, *chosen, dtype, source, digest, not found))
    return found


def _about(ref: str, first: Snapshot, out: Path, tell: Progress) -> dict[str, Any]:
    """What a prefill of the model takes; timed once and kept."""
    place = out / "model.json"
    wanted = {"model": ref, "revision": first.origin.revision, "tokens": first.tokens}
    if place.is_file():
        try:
            known = msgspec.json.decode(place.read_bytes(), type=dict[str, Any])
            if {k: known.get(k) for k in wanted} == wanted:
                return known
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            _log.warning("%s is damaged and measured anew: %s", place, error)
    tell("timing the prefill", 0, 1)
    loaded = load_model(ref, first.dtype if first.dtype in ("bf16", "fp16", "fp32") else "bf16")
    found = wanted | {
        "products": float(copies.products_of(loaded.model)),
        "attention": _attention_products(loaded, first.tokens),
        "bytes": {kind: copies.bytes_of(kind, loaded.model) for kind in copies.COPIES},
        "prefill_seconds": None,
    }
    if first.token_ids is not None and first.token_ids.ndim == 1:
        ids, times = np.array(first.token_ids), []
        for _ in range(4):
            began = time.perf_counter()
            capture.prefill(loaded, ids)
            times.append(time.perf_counter() - began)
        found["prefill_seconds"] = statistics.median(times[1:])
    with replacing(place) as file:
        file.write(msgspec.json.encode(found))
    return found


def _attention_products(loaded: LoadedModel, tokens: int) -> float:
    """Products of queries with keys and of weights with values, a token's mean."""
    config = loaded.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return float(config.num_hidden_layers * heads * dim * 2 * (tokens + 1) / 2)


def _point(
    key: str,
    family: str,
    title: str,
    layers: list[LayerPoint],
    about: Mapping[str, Any],
    count: int,
) -> Point:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(p, name) for p in layers)

    products, known = count * mean("products"), count * mean("bytes")
    kind = key.removesuffix("-within")
    if kind in copies.COPIES:
        products += about["products"] if family != "floor" else 0.0
        known += about["bytes"][kind]
    return Point(
        key=key,
        title=title,
        family=family,
        bits=mean("bits"),
        k=mean("k"),
        v=mean("v"),
        products=products,
        share=products / about["products"],
        profile_bytes=known,
        layers=layers,
    )


def _layer(
    documents: _Set,
    layer: int,
    chosen: Sequence[int],
    out: Path,
    tell: Progress,
    ref: str,
    kinds: Sequence[str],
    missing: dict[str, str],
) -> Iterator[tuple[str, str, str, LayerPoint]]:
    """Every predictor on one layer, measured or remembered."""
    folder = out / "points" / f"{documents.dtype}-{documents.given}"
    folder.mkdir(parents=True, exist_ok=True)
    label = f"{documents.dtype}, layer {layer}"

    def remembered(key: str, compute: Callable[[], LayerPoint]) -> LayerPoint:
        place = folder / f"{key}-{layer}.json"
        if place.is_file():
            try:
                return msgspec.json.decode(place.read_bytes(), type=LayerPoint)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                _log.warning("%s is damaged and measured anew: %s", place, error)
        point = compute()
        with replacing(place) as file:
            file.write(msgspec.json.encode(point))
        return point

    keep: list[LayerData] = []

    def compute(key: str) -> LayerPoint:
        if not keep:
            keep.append(_layer_data(documents, layer, label, tell))
        return predictors.measure_key(key, keep[0])

    keys = list(predictors.CATALOGUE) if documents.whole else predictors.MAIN
    for done, key in enumerate(keys):
        point = remembered(key, partial(compute, key))
        yield key, *predictors.CATALOGUE[key], point
        tell(label, done + 1, len(keys))
    keep.clear()
    for kind in kinds:
        family, title = copies.COPIES[kind]
        native = documents.cast_from or documents.dtype
        if kind in ("pieces", "stream") and native != "bf16":
            missing[kind] = f"it is measured in bf16, and the cache is {native}"
            continue
        made: list[LayerData] = []

        def copied(within: bool, kind: str = kind, made: list[LayerData] = made) -> LayerPoint:
            if not made:
                made.append(_copy_data(documents, layer, chosen, kind, ref, out, tell))
            return predictors.measure(predictors.copied(made[0], within), made[0])

        yield kind, family, title, remembered(kind, lambda: copied(False))
        if not documents.whole:
            continue
        key = f"{kind}-within"
        yield key, family, f"{title}, channels before", remembered(key, lambda: copied(True))


def _layer_data(documents: _Set, layer: int, label: str, tell: Progress) -> LayerData:
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
    frequencies = (predictors.frequencies(found, documents.dtype) for found in layers)
    return LayerData(layer, learning, made[0], made[1], *frequencies)


# --- copies --------------------------------------------------------------------------------------


def _copy_data(
    documents: _Set,
    layer: int,
    chosen: Sequence[int],
    kind: str,
    ref: str,
    out: Path,
    tell: Progress,
) -> LayerData:
    """The layer, and what a copy of the model says of it."""
    calibrate = documents.calibrate[:COPY_DOCUMENTS]
    paths = [*calibrate, *documents.test]
    predicted = _predictions(documents, paths, chosen, kind, ref, out, tell)
    made: list[list[Document]] = [[], []]
    for n, (path, place) in enumerate(zip(paths, predicted, strict=True)):
        learned, y = n < len(calibrate), np.load(place)[str(layer)]
        skip = SINK_TOKENS if learned else 0
        view = documents.views(Snapshot.load(path), [layer], skip)[layer]
        made[0 if learned else 1].append(Document(view, {COPY: y[len(y) - len(view.y) :]}))
    nothing = predictors.frequencies([], documents.dtype)
    return LayerData(layer, [], made[0], made[1], nothing, nothing)


def _predictions(
    documents: _Set,
    paths: Sequence[Path],
    chosen: Sequence[int],
    kind: str,
    ref: str,
    out: Path,
    tell: Progress,
) -> list[Path]:
    """Files of what a copy predicts, a chosen layer's vectors [tokens, channels], RoPE undone,
    under the layer's number. They are kept: formats that a cache is cast to need the same."""
    native = documents.cast_from or documents.dtype
    about = f"{ref}-{native if kind in ('pieces', 'stream') else ''}"
    folder = out / "copies" / f"{kind}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    copy: Callable[[NDArray[Any]], Snapshot] | None = None
    found = []
    for done, path in enumerate(paths):
        snapshot = Snapshot.load(path)
        if snapshot.token_ids is None or snapshot.token_ids.ndim != 1:
            raise KVZipError(f"{path}: a copy of the model needs token ids of a single document")
        name = hashlib.sha256(snapshot.token_ids.tobytes()).hexdigest()[:24]
        place = folder / f"{name}.npz"
        if not {str(n) for n in chosen} <= _kept(place):
            copy = copy or copies.make(kind, ref, native)
            layers, said = held_layers(snapshot), copy(np.array(snapshot.token_ids)).layers
            vectors: dict[str, Any] = {
                str(n): _unturned(said[n], layers[n], snapshot) for n in chosen
            }
            with replacing(place) as file:
                np.savez(file, **vectors)
        found.append(place)
        tell(f"{kind} copy", done + 1, len(paths))
    return found


def _kept(place: Path) -> set[str]:
    """The names of the arrays in a file; none if it is not there, or damaged."""
    try:
        with zipfile.ZipFile(place) as found:
            return set() if found.testzip() else {Path(n).stem for n in found.namelist()}
    except (OSError, zipfile.BadZipFile, ValueError):
        return set()


def _unturned(said: Layer, own: Layer, snapshot: Snapshot) -> Floats:
    """What a copy says of the tokens of `own`, in coding order with RoPE undone."""
    rows = slice(own.layout.first, own.layout.cumulative_length)
    order = rope.Order(own.layout, snapshot.origin, "fp32")
    return order.unturned(Layer(said.k[:, rows], said.v[:, rows], own.layout))
