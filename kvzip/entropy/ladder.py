"""The ladder: ideal code lengths of snapshots under models from the simplest up.

The first rungs are tables of frequencies; the next need other documents to learn from (`fit`); the
last is a profile's own model. All rungs look at the same numbers: of the tokens that every layer
holds, all.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.entropy import linear, profiled
from kvzip.entropy.linear import Doubles, Floats, Linear, Moments
from kvzip.entropy.residual import (
    Density,
    LayerBits,
    PartBits,
    View,
    Within,
    by_channel,
    head_shapes,
    held_layers,
    orders,
    part_bits,
)
from kvzip.entropy.tables import LEVELS, Frequencies
from kvzip.errors import KVZipError, ProfileError, UnsupportedError
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.statistics.documents import (
    SINK_TOKENS,
    Item,
    Progress,
    check_channels,
    check_tokens,
    hold_out,
    inputs_of,
    load,
)
from kvzip.statistics.rope import ChannelOrder, width

PREDICTED = (
    "density by channel",
    "from layers before",
    "and channels before",
    "and token energy",
)
"""The rungs that `fit` learns: a mean and a density for each channel; a linear map from the first
layer and the two before; besides, from the residuals of the channels before; spreads that follow
the token's residuals so far."""
PROFILE = "the profile's integers"
_CALIBRATION = 16  # documents at most
SAMPLE = 1536
"""About how many tokens a density is learned from."""


class Rung(msgspec.Struct, frozen=True):
    """One model's ideal code length in bits per number."""

    name: str
    learned: str
    """What it was learned from: "these documents", "other documents" or "profile"."""
    bits: float
    k: float
    v: float
    layers: list[LayerBits]


class Spectrum(msgspec.Struct, frozen=True):
    """Eigenvalues of one layer's covariances, largest first, its channels (RoPE undone, keys and
    values) in units of their own deviations."""

    before: list[float]
    """Those of the numbers themselves: of their correlations."""
    residual: list[float]
    """Those of what the map from the layers before leaves."""


class Ladder(msgspec.Struct, frozen=True):
    """What `measure` found of documents, model after model."""

    model: str
    revision: str
    dtype: str
    texts: list[str]
    documents: int
    tokens: int
    numbers: int
    train_documents: int
    train_tokens: int
    profile: str | None
    rungs: list[Rung]
    spectra: list[Spectrum]
    """By layer; empty where nothing was learned."""


class _Rungs:
    """One layer's learned models, by rung: a map from the layers before, what channels say of each
    other, and a density."""

    def __init__(self, parts: Sequence[tuple[Linear, Within, Density]]):
        self.parts = parts

    def expected(self, view: View, vectors: linear.Vectors) -> list[_Expected]:
        """The density of each rung, where it expects each number, and with what spread."""
        found: list[_Expected] = []
        made: dict[int, tuple[Floats, Floats]] = {}
        for base, within, density in self.parts:
            if id(within) not in made:
                made[id(within)] = within.expect(view, base(vectors))
            found.append((density, *made[id(within)]))
        return found


_Expected = tuple[Density, Floats, Floats]


class Fitted:
    """What `fit` learned: the layers' models, the documents' frequencies and fingerprints."""

    def __init__(
        self, first: Snapshot, layers: list[_Rungs], frequencies: Frequencies, seen: set[bytes]
    ):
        self.first, self.layers, self.frequencies, self.seen = first, layers, frequencies, seen
        self.documents = self.tokens = 0
        self.spectra: list[Spectrum] = []


def check_same_model(snapshot: Snapshot, first: Snapshot) -> None:
    """Raise KVZipError unless both are caches of one model, in one dtype."""
    shapes = [[head_shapes(layer) for layer in s.layers] for s in (snapshot, first)]
    if shapes[0] != shapes[1] or snapshot.origin.model != first.origin.model:
        raise KVZipError(
            f"the snapshots are of different models: {first.origin.model or 'unnamed'} and "
            f"{snapshot.origin.model or 'unnamed'}"
        )
    if snapshot.dtype != first.dtype:
        raise KVZipError(f"the snapshots differ in dtype: {first.dtype} and {snapshot.dtype}")


def fingerprint(snapshot: Snapshot) -> bytes:
    """What tells one document from another: its token ids, or a part of its numbers."""
    if snapshot.token_ids is not None:
        return snapshot.token_ids.tobytes()
    return np.ascontiguousarray(snapshot.layers[0].k[..., -64:, :]).tobytes()


def views(snapshot: Snapshot, how: Sequence[ChannelOrder], skip: int = 0) -> list[View]:
    """The layers, without the first `skip` tokens of the sequence if there are enough others."""
    layers = held_layers(snapshot)
    found = [View(layer, order, snapshot.dtype) for layer, order in zip(layers, how, strict=True)]
    skip = skip - layers[0].layout.first if layers else 0
    if skip > 0 and layers[0].k.ndim == 3 and layers[0].k.shape[-2] > 4 * skip:
        return [view.take(slice(skip, None)) for view in found]
    return found


def split(count: int) -> tuple[list[int], list[int]]:
    """Which of `count` training documents regressions learn from, and which calibrate the rest: a
    fifth, spread over all. One document alone does both."""
    if count < 2:
        return list(range(count)), list(range(count))
    return hold_out(range(count), min(max(1, count // 5), _CALIBRATION))


def fit(documents: Sequence[Item], progress: Progress | None = None) -> Fitted:
    """Learn all rungs from documents of one model. One document is in memory at a time."""
    if not documents:
        raise KVZipError("there is no document to learn from")
    first = load(documents[0])
    check_tokens(first)
    if dtypes.get(first.dtype).bits > 32:
        raise UnsupportedError(f"numbers of {first.dtype} are not predicted: only of up to 32 bits")
    how, count = orders(first), len(first.layers)
    learning, calibrating = split(len(documents))
    moments = Moments.of_layers(count)
    fitted = Fitted(first, [], Frequencies(first.dtype), set())

    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)

    for done, i in enumerate(sorted({*learning, *calibrating})):
        snapshot = load(documents[i])
        check_same_model(snapshot, first)
        check_tokens(snapshot)
        fitted.frequencies.add(held_layers(snapshot))
        fitted.seen.add(fingerprint(snapshot))
        fitted.documents += 1
        fitted.tokens += snapshot.tokens
        if i in learning:
            found = views(snapshot, how, SINK_TOKENS)
            moments.add({n: view.y for n, view in enumerate(found)})
        tell("regressions", done + 1, len(documents))
    bases = [linear.regress(moments, inputs_of(n), n) for n in range(count)]
    means = [linear.constant(moments, n) for n in range(count)]
    left = Moments((n, n) for n in range(count))
    for done, i in enumerate(calibrating):
        vectors = {n: v.y for n, v in enumerate(views(load(documents[i]), how, SINK_TOKENS))}
        left.add({n: y - bases[n](vectors) for n, y in vectors.items()})
        tell("residuals", done + 1, len(calibrating))
    sample = max(64, SAMPLE // len(calibrating))
    for n in range(count):
        own, rest = moments.covariance(n, n), left.covariance(n, n)
        fitted.spectra.append(_spectrum(own, rest))
        pairs = how[n].pairs
        alone = Within(rest, pairs, alone=True)
        whole = Within(rest, pairs)
        parts = [
            (means[n], Within(own, pairs, alone=True), Density(False, sample)),
            (bases[n], alone, Density(False, sample)),
            (bases[n], whole, Density(False, sample)),
            (bases[n], whole, Density(True, sample)),
        ]
        fitted.layers.append(_Rungs(parts))
    for done, i in enumerate(calibrating):
        found = views(load(documents[i]), how, SINK_TOKENS)
        vectors = {n: view.y for n, view in enumerate(found)}
        for n, view in enumerate(found):
            for density, p, s in fitted.layers[n].expected(view, vectors):
                density.learn(view, p, s)
        tell("densities", done + 1, len(calibrating))
    return fitted


def _spectrum(own: Doubles, rest: Doubles) -> Spectrum:
    """Eigenvalues of a layer's covariance, and of that of what is left of it."""
    unit = np.sqrt(np.maximum(np.diag(own), 1e-30))
    scaled = (np.linalg.eigvalsh(c / np.outer(unit, unit))[::-1] for c in (own, rest))
    return Spectrum(*([float(f"{max(v, 0):.4g}") for v in values] for values in scaled))


def measure(
    documents: Sequence[Item],
    fitted: Fitted | None = None,
    profile: Profile | None = None,
    progress: Progress | None = None,
) -> Ladder:
    """The ideal code length of documents, one in memory at a time, under every model there is.

    Tables know the documents' own frequencies, or, with `fitted`, those of the documents it
    learned from; these must be others. Raises KVZipError when they are not, or are of another
    model, ProfileError when the profile is.
    """
    if not documents:
        raise KVZipError("there is no document to measure")
    first = load(documents[0])
    check_channels(first)
    if fitted is not None:
        check_same_model(first, fitted.first)
    sums, texts = _Sums(first, fitted, profile), []
    for done, document in enumerate(documents):
        snapshot = load(document)
        check_same_model(snapshot, first)
        if fitted is not None or profile is not None:
            check_tokens(snapshot)
        if fitted is not None and fingerprint(snapshot) in fitted.seen:
            raise KVZipError(
                f"document {done} to measure is among those to learn from: take others"
            )
        sums.add(snapshot)
        texts.append(snapshot.origin.text)
        if progress is not None:
            progress("code lengths", done + 1, len(documents))
    return Ladder(
        model=first.origin.model,
        revision=first.origin.revision,
        dtype=first.dtype,
        texts=texts,
        documents=len(documents),
        tokens=sums.tokens,
        numbers=sums.tokens * sum(h * d for shape in sums.shapes for h, d in shape),
        train_documents=0 if fitted is None else fitted.documents,
        train_tokens=0 if fitted is None else fitted.tokens,
        profile=None if profile is None else profile.id,
        rungs=sums.rungs(),
        spectra=[] if fitted is None else fitted.spectra,
    )


class _Sums:
    """Documents' code lengths under every model, added up."""

    def __init__(self, first: Snapshot, fitted: Fitted | None, profile: Profile | None):
        self.fitted, self.profile = fitted, profile
        self.orders, self.shapes = orders(first), [head_shapes(layer) for layer in first.layers]
        self.frequencies = Frequencies(first.dtype)
        widths = [width(layer) for layer in first.layout.layers]
        self.predicted: dict[str, list[Doubles]] = {
            name: [np.zeros(n) for n in widths] for name in PREDICTED if fitted is not None
        }
        """Bits of each channel, by rung and layer."""
        self.integers = np.zeros((len(widths), 2))
        """Bits of each layer's keys and values with the profile."""
        self.tokens = 0

    def add(self, snapshot: Snapshot) -> None:
        """Add one document. Raises ProfileError when the profile is of another model."""
        layers = held_layers(snapshot)
        self.frequencies.add(layers)
        if layers:
            k = layers[0].k
            self.tokens += k.shape[-2] * (1 if k.ndim == 3 else len(k))
        if self.fitted is not None:
            found = views(snapshot, self.orders)
            vectors = {n: view.y for n, view in enumerate(found)}
            for n, view in enumerate(found):
                expected = self.fitted.layers[n].expected(view, vectors)
                for total, (density, p, s) in zip(self.predicted.values(), expected, strict=True):
                    total[n] += density.code_length(view, p, s).sum(axis=0, dtype=np.float64)
        if self.profile is not None:
            spent = profiled.code_lengths(snapshot, self.profile)
            if len(spent) != len(self.integers):
                raise ProfileError("the profile is of another model")
            self.integers += spent

    def rungs(self) -> list[Rung]:
        """All rungs, from the simplest model up."""
        learned = None if self.fitted is None else self.fitted.frequencies
        source = "these documents" if learned is None else "other documents"
        found = []
        tables = self.frequencies.code_lengths(learned)
        for level in LEVELS:
            layers = [
                LayerBits(part_bits(tables[level][n, "k"]), part_bits(tables[level][n, "v"]))
                for n in range(len(self.shapes))
            ]
            found.append(_rung(level, source, layers, self.shapes))
        for name, totals in self.predicted.items():
            layers = [
                by_channel(total / max(self.tokens, 1), order, shapes)
                for total, order, shapes in zip(totals, self.orders, self.shapes, strict=True)
            ]
            found.append(_rung(name, source, layers, self.shapes))
        if self.profile is not None:
            layers = _together(self.integers, self.shapes, self.tokens)
            found.append(_rung(PROFILE, "profile", layers, self.shapes))
        return found


def _together(
    spent: NDArray[np.float64], shapes: Sequence[Sequence[tuple[int, int]]], tokens: int
) -> list[LayerBits]:
    """The bits of each layer's keys and values, where single channels are not told apart."""
    return [
        LayerBits(
            *(
                PartBits(float(bits) / max(tokens * heads * dim, 1), [], [])
                for bits, (heads, dim) in zip(row, shape, strict=True)
            )
        )
        for row, shape in zip(spent, shapes, strict=True)
    ]


def _rung(
    name: str,
    learned: str,
    layers: list[LayerBits],
    shapes: Sequence[Sequence[tuple[int, int]]],
) -> Rung:
    """A rung with the means over all layers; `shapes`: (heads, dim) of keys and of values."""
    sizes = np.array([[h * d for h, d in shape] for shape in shapes], np.float64)
    bits = np.array([[layer.k.bits, layer.v.bits] for layer in layers])
    spent, numbers = (bits * sizes).sum(axis=0), np.maximum(sizes.sum(axis=0), 1)
    k, v = spent / numbers
    return Rung(name, learned, float(spent.sum() / numbers.sum()), float(k), float(v), layers)
