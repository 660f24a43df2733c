"""The ladder: ideal code lengths of snapshots under models from the simplest up.

The first rungs are tables of frequencies, the last of these of keys before RoPE, where a model
turned them in bf16; the next need other documents to learn from (`fit`); the last is a profile's
own: the integer model of one that predicts, or the tables of one of `channel`. All rungs look at
the same numbers: of the tokens that every layer holds, all, and whatever layers keep that has no
tokens. What a rung does not predict, states for one, counts with a table for each channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.entropy import linear, profiled
from kvzip.entropy.before_rope import BeforeRope
from kvzip.entropy.linear import Doubles, Floats, Linear, Moments
from kvzip.entropy.predicted import obstacle, orders, predicted_layers, unpredicted
from kvzip.entropy.residual import (
    Density,
    LayerBits,
    PartBits,
    View,
    Within,
    by_channel,
    head_shapes,
    held_layers,
    part_bits,
)
from kvzip.entropy.tables import LEVELS, Frequencies, Key
from kvzip.errors import KVZipError, ProfileError, UnsupportedError
from kvzip.layout import KV
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.statistics.documents import (
    SINK_TOKENS,
    Item,
    Progress,
    check_channels,
    check_held,
    difference,
    fingerprint,
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
BEFORE_ROPE = "by channel, keys before RoPE"
"""Tables for each channel, of keys as they were before RoPE in the layers where `channel` stores
them so. There is no such rung where it does in none."""
PROFILE = "the profile's integers"
TABLES = "the profile's tables"
_CALIBRATION = 16  # documents at most
SAMPLE = 1536
"""About how many tokens a density is learned from."""
ENOUGH_TOKENS = 8
"""Tokens to learn from for each number that one is predicted from, without which a prediction is
more of chance than of the model: as many as `predictive` wants for a predictor more. For SmolLM2
that is 9,216; of 4,096 its codec comes to 7.94 bits, of 491,520 to 6.87 (docs/research.md)."""


class FormatBits(msgspec.Struct, frozen=True):
    """Bits per number of all parts of one name and format."""

    part: str
    dtype: str
    numbers: int
    """How many numbers they have, in all documents."""
    bits: float


class Rung(msgspec.Struct, frozen=True):
    """One model's ideal code length in bits per number."""

    name: str
    learned: str
    """What it was learned from: "these documents", "other documents" or "profile"."""
    bits: float
    """The mean over all numbers."""
    parts: list[FormatBits]
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
    """Those that every layer with tokens holds; of states alone, those that they have seen."""
    numbers: int
    width: float
    """Bits that a number has as it is stored, the mean over all parts."""
    train_documents: int
    train_tokens: int
    profile: str | None
    rungs: list[Rung]
    spectra: list[Spectrum]
    """By layer that is predicted; empty where nothing was learned."""
    unpredicted: dict[str, list[int]]
    """What has no prediction in the rungs that are learned from other documents, and the layers
    that have it: it counts as "by channel" there. Empty where nothing was learned."""


class _Rungs:
    """One layer's learned models, by rung: a map from the layers before, what channels say of each
    other, and a density."""

    def __init__(
        self,
        mean: Linear,
        base: Linear,
        own: Doubles,
        left: Doubles,
        pairs: Sequence[tuple[int, int]],
        sample: int,
    ):
        """Those of `PREDICTED`, whose densities are yet to be learned, each from about `sample`
        tokens of a document. `own`, `left`: the covariances, [channels, channels], of the layer's
        numbers and of what the map `base` leaves of them."""
        alone, whole = Within(left, pairs, alone=True), Within(left, pairs)
        self.parts: Sequence[tuple[Linear, Within, Density]] = [
            (mean, Within(own, pairs, alone=True), Density(False, sample)),
            (base, alone, Density(False, sample)),
            (base, whole, Density(False, sample)),
            (base, whole, Density(True, sample)),
        ]

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
    """What `fit` learned: the predicted layers' models, the documents' frequencies and
    fingerprints."""

    def __init__(self, first: Snapshot):
        self.first = first
        self.layers: list[_Rungs] = []
        self.frequencies, self.before, self.seen = Frequencies(), BeforeRope(), set[bytes]()
        self.documents = self.tokens = 0
        self.spectra: list[Spectrum] = []

    def add(self, snapshot: Snapshot) -> None:
        """Count a document in all tables. Raises KVZipError if it is of another model."""
        check_same_model(snapshot, self.first)
        check_held(snapshot)
        layers = held_layers(snapshot)
        self.frequencies.add(layers)
        self.before.add(layers, snapshot.origin)
        self.seen.add(fingerprint(snapshot))
        self.documents += 1
        self.tokens += snapshot.tokens

    @property
    def most_inputs(self) -> int:
        """How many numbers one is predicted from, at most; 0 where nothing is predicted."""
        return max((len(rungs.parts[-1][0].weights) for rungs in self.layers), default=0)

    @property
    def few_tokens(self) -> bool:
        """Whether there were so few tokens to learn from that figures tell of that above all."""
        return self.tokens < ENOUGH_TOKENS * self.most_inputs


def check_same_model(snapshot: Snapshot, first: Snapshot) -> None:
    """Raise KVZipError unless both are caches of one model, with parts of the same formats."""
    if found := difference(snapshot, first):
        raise KVZipError(found)


def views(snapshot: Snapshot, how: Sequence[ChannelOrder], skip: int = 0) -> list[View]:
    """The layers that are predicted, without the first `skip` tokens of the sequence if there are
    enough others."""
    held = held_layers(snapshot)
    layers = [held[i] for i in predicted_layers(snapshot)]
    found = [View(layer, order, snapshot.dtype) for layer, order in zip(layers, how, strict=True)]
    skip = skip - layers[0].layout.first if layers else 0
    if skip > 0 and layers[0].layout.batch is None and layers[0].layout.stored > 4 * skip:
        return [view.take(slice(skip, None)) for view in found]
    return found


def split(count: int) -> tuple[list[int], list[int]]:
    """Which of `count` training documents regressions learn from, and which calibrate the rest: a
    fifth, spread over all. One document alone does both."""
    if count < 2:
        return list(range(count)), list(range(count))
    return hold_out(range(count), min(max(1, count // 5), _CALIBRATION))


def fit(documents: Sequence[Item], progress: Progress | None = None) -> Fitted:
    """Learn all rungs from documents of one model: the regressions for the layers that
    :func:`kvzip.entropy.predicted.predicted_layers` finds, tables for all. One document is in
    memory at a time."""
    if not documents:
        raise KVZipError("there is no document to learn from")
    first = load(documents[0])
    check_held(first)
    how = orders(first)
    if how and dtypes.get(first.dtype).bits > 32:
        raise UnsupportedError(f"numbers of {first.dtype} are not predicted: only of up to 32 bits")
    learning, calibrating = split(len(documents))
    moments, fitted = Moments.of_layers(len(how)), Fitted(first)
    tell = progress or (lambda what, done, total: None)
    for i, document in enumerate(documents):
        snapshot = load(document)
        fitted.add(snapshot)
        if how and i in learning:
            moments.add(_numbers(views(snapshot, how, SINK_TOKENS)))
        tell("regressions", i + 1, len(documents))
    if how:
        _learn_to_predict(fitted, how, moments, [documents[i] for i in calibrating], tell)
    return fitted


def _numbers(found: Sequence[View]) -> linear.Vectors:
    """The numbers of predicted layers, by the layers' places among these."""
    return {n: view.y for n, view in enumerate(found)}


def _learn_to_predict(
    fitted: Fitted,
    how: Sequence[ChannelOrder],
    moments: Moments,
    calibrating: Sequence[Item],
    tell: Progress,
) -> None:
    """Learn the rungs that predict: maps from the `moments` of the documents to learn from, and
    from those to calibrate with what the maps leave, and how it is spread."""
    layers = range(len(how))
    bases = [linear.regress(moments, inputs_of(n), n) for n in layers]
    left = Moments((n, n) for n in layers)
    for done, document in enumerate(calibrating):
        vectors = _numbers(views(load(document), how, SINK_TOKENS))
        left.add({n: y - bases[n](vectors) for n, y in vectors.items()})
        tell("residuals", done + 1, len(calibrating))
    sample = max(64, SAMPLE // len(calibrating))
    for n in layers:
        own, rest = moments.covariance(n, n), left.covariance(n, n)
        fitted.spectra.append(_spectrum(own, rest))
        mean = linear.constant(moments, n)
        fitted.layers.append(_Rungs(mean, bases[n], own, rest, how[n].pairs, sample))
    for done, document in enumerate(calibrating):
        found = views(load(document), how, SINK_TOKENS)
        vectors = _numbers(found)
        for n, view in enumerate(found):
            for density, p, s in fitted.layers[n].expected(view, vectors):
                density.learn(view, p, s)
        tell("densities", done + 1, len(calibrating))


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
            check_held(snapshot)
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
        numbers=sum(sums.frequencies.numbers().values()),
        width=sums.width(),
        train_documents=0 if fitted is None else fitted.documents,
        train_tokens=0 if fitted is None else fitted.tokens,
        profile=None if profile is None else profile.id,
        rungs=sums.rungs(),
        spectra=[] if fitted is None else fitted.spectra,
        unpredicted={} if fitted is None else unpredicted(first),
    )


class _Sums:
    """Documents' code lengths under every model, added up."""

    def __init__(self, first: Snapshot, fitted: Fitted | None, profile: Profile | None):
        self.fitted, self.profile, self.orders = fitted, profile, orders(first)
        layers = first.layout.layers
        self.predicted_layers, self.count = predicted_layers(first), len(layers)
        self.frequencies, self.before = Frequencies(), BeforeRope()
        widths = [width(layers[i]) for i in self.predicted_layers]
        self.shapes = [head_shapes(layers[i]) for i in self.predicted_layers]
        self.predicted: dict[str, list[Doubles]] = {
            name: [np.zeros(n) for n in widths] for name in PREDICTED if fitted and widths
        }
        """Bits of each channel, by rung and layer."""
        self.integers = np.zeros((self.count, 2))
        """Bits of each layer's keys and values with a profile that predicts."""
        self.tables: dict[Key, Doubles] = {}
        """Bits of each channel with a profile's tables, by layer and part."""
        self.tokens = 0
        self.has_tables = profile is not None and profiled.has_tables(profile)
        others = next((i for i, s in enumerate(layers) if i not in self.predicted_layers), None)
        if profile is not None and not self.has_tables and others is not None:
            raise ProfileError(
                "the profile is of another model: a profile predicts keys and values of every "
                f"layer, and layer {others} has {obstacle(layers[others], first.dtype)}"
            )

    def add(self, snapshot: Snapshot) -> None:
        """Add one document. Raises ProfileError when the profile is of another model."""
        layers = held_layers(snapshot)
        self.frequencies.add(layers)
        self.before.add(layers, snapshot.origin)
        timed = (s.layout.stored for s in layers if s.layout.counts_tokens and s.layout.stored)
        self.tokens += next(timed, _seen(snapshot)) * (snapshot.layout.batch or 1)
        if self.fitted is not None:
            found = views(snapshot, self.orders)
            vectors = _numbers(found)
            for n, view in enumerate(found):
                expected = self.fitted.layers[n].expected(view, vectors)
                for total, (density, p, s) in zip(self.predicted.values(), expected, strict=True):
                    total[n] += density.code_length(view, p, s).sum(axis=0, dtype=np.float64)
        if self.profile is not None and self.has_tables:
            for i, layer in enumerate(layers):
                bits = profiled.table_lengths(layer, i, snapshot.origin, self.profile)
                for name, own in bits.items():
                    self.tables[i, name] = self.tables.get((i, name), 0) + own
        elif self.profile is not None:
            spent = profiled.code_lengths(snapshot, self.profile)
            if len(spent) != len(self.integers):
                raise ProfileError("the profile is of another model")
            self.integers += spent

    def width(self) -> float:
        """Bits that a number has, the mean over all numbers."""
        numbers, forms = self.frequencies.numbers(), self.frequencies.forms
        stored = sum(forms[key].bits * count for key, count in numbers.items())
        return stored / max(sum(numbers.values()), 1)

    def rungs(self) -> list[Rung]:
        """All rungs, from the simplest model up."""
        learned = None if self.fitted is None else self.fitted.frequencies
        source = "these documents" if learned is None else "other documents"
        found = []
        tables = self.frequencies.code_lengths(learned)
        layers: list[LayerBits] = []
        for level in LEVELS:
            layers = [{} for _ in range(self.count)]
            for n, name in self.frequencies.forms:
                layers[n][name] = part_bits(tables[level][n, name])
            found.append(self._rung(level, source, layers))
        lengths = self.before.code_lengths(None if self.fitted is None else self.fitted.before)
        if lengths:
            found.append(self._rung(BEFORE_ROPE, source, _replaced(layers, lengths)))
        for rung, totals in self.predicted.items():
            kv = [
                by_channel(total / max(self.tokens, 1), order, shapes)
                for total, order, shapes in zip(totals, self.orders, self.shapes, strict=True)
            ]
            found.append(self._rung(rung, source, self._with(kv, layers)))
        if self.has_tables:
            numbers = {key: counts.sum(axis=-1) for key, counts in self.frequencies.values.items()}
            means = {key: bits / np.maximum(numbers[key], 1) for key, bits in self.tables.items()}
            found.append(self._rung(TABLES, "profile", _replaced(layers, means)))
        elif self.profile is not None:
            kv = _together(self.integers, self.shapes, self.tokens)
            found.append(self._rung(PROFILE, "profile", self._with(kv, layers)))
        return found

    def _with(self, kv: Sequence[LayerBits], others: Sequence[LayerBits]) -> list[LayerBits]:
        """All layers' bits: the predicted ones' keys and values, and of all else those of tables
        for each channel."""
        layers = [dict(layer) for layer in others]
        for n, predicted in zip(self.predicted_layers, kv, strict=True):
            layers[n] |= predicted
        return layers

    def _rung(self, name: str, learned: str, layers: list[LayerBits]) -> Rung:
        """A rung with its means: over all numbers, and over those of each part's name and
        format."""
        groups: dict[tuple[str, str], list[Key]] = {}
        for key, form in self.frequencies.forms.items():
            groups.setdefault((key[1], form.name), []).append(key)
        numbers = self.frequencies.numbers()
        parts = []
        for (part, dtype), keys in groups.items():
            count = sum(numbers[key] for key in keys)
            spent = sum(layers[n][part].bits * numbers[n, part] for n, _ in keys)
            parts.append(FormatBits(part, dtype, count, spent / max(count, 1)))
        bits = sum(p.bits * p.numbers for p in parts) / max(sum(p.numbers for p in parts), 1)
        return Rung(name, learned, bits, parts, layers)


def _replaced(layers: Sequence[LayerBits], means: Mapping[Key, Doubles]) -> list[LayerBits]:
    """All layers' bits, some parts' being those of their channels' mean bits."""
    found = [dict(layer) for layer in layers]
    for (i, name), mean in means.items():
        found[i][name] = part_bits(mean)
    return found


def _seen(snapshot: Snapshot) -> int:
    """How many tokens a cache of states alone has seen; 0 where a layer has an axis of tokens."""
    timed = any(s.kind != "state" and s.parts for s in snapshot.layout.layers if s.counts_tokens)
    return 0 if timed else snapshot.tokens


def _together(
    spent: NDArray[np.float64], shapes: Sequence[Sequence[tuple[int, int]]], tokens: int
) -> list[LayerBits]:
    """The bits of each layer's keys and values, where single channels are not told apart."""
    return [
        {
            name: PartBits(float(bits) / max(tokens * heads * dim, 1), [], [])
            for name, bits, (heads, dim) in zip(KV, row, shape, strict=True)
        }
        for row, shape in zip(spent, shapes, strict=True)
    ]
