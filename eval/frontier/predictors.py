"""Predictors of one layer from layers before it, and the ideal code length that each leaves.

Every predictor gives a base for each token. What it leaves goes the same way for all: channels
before, density on the dtype's grid, token energy (`kvzip.entropy.residual`). Floating point, ideal
code lengths; documents to learn from, to calibrate on and to measure are three sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.entropy import linear
from kvzip.entropy.ladder import SAMPLE
from kvzip.entropy.linear import Doubles, Floats, Linear, Moments, Vectors
from kvzip.entropy.residual import Density, View, Within
from kvzip.entropy.tables import Frequencies
from kvzip.eval.results.frontier import Family, LayerPoint
from kvzip.snapshot import Layer
from kvzip.statistics.clusters import k_means, nearest
from kvzip.statistics.ridge import ridge

DIRECTIONS = 32
"""Principal directions of the layer before that regions are told by."""
COPY = -1
"""The name, beside numbers of layers, of the vectors that a copy of the model predicts."""
RANKS = (32, 64, 128, 256)
REGIONS = (4, 16, 64)
_CHANNEL_BYTES = 24  # of a channel's mean, scale, density and quantisation
_SHRINK = 2000.0  # tokens that stand for the common map behind a region's own
_SHRINK_COVARIANCE = 1000.0


@dataclass
class Document:
    """One layer of a document, and the vectors it is predicted from, by layer or `COPY`."""

    view: View
    vectors: dict[int, Floats]


@dataclass
class LayerData:
    """What predictors of one layer learn from and are measured on."""

    layer: int
    learning: list[dict[int, Floats]]
    """Vectors of the layer and of those before it."""
    calibration: list[Document]
    test: list[Document]
    seen: Frequencies
    """How often signs and exponents occur in the calibration documents."""
    new: Frequencies
    """The same in the test documents."""
    moments: Moments = field(init=False)

    def __post_init__(self) -> None:
        names = sorted({name for vectors in self.learning for name in vectors})
        self.moments = Moments((a, b) for a in names for b in names)
        for vectors in self.learning:
            self.moments.add(vectors)

    @property
    def width(self) -> int:
        return self.test[0].view.y.shape[1]


Base = Callable[[Vectors], tuple[Floats, NDArray[np.int64]]]
"""From vectors to the expected vector of each token [tokens, channels], and its region [tokens]."""


@dataclass(frozen=True)
class Predictor:
    """What is expected of each token, and what is made of what that leaves."""

    base: Base
    products: float
    """Multiplications of a weight that `base` takes for a token."""
    bytes: float
    """What `base` must know, a byte a weight."""
    regions: int = 1
    """How many regions tokens are in; each has a covariance of its own."""
    within: bool = True
    """Whether channels before are used."""
    energy: bool = True
    """Whether the density looks at the energy of a token's channels before."""


def measure(predictor: Predictor, data: LayerData) -> LayerPoint:
    """What the predictor leaves of the test documents."""
    pairs, width = data.test[0].view.order.pairs, data.width
    # Covariances and densities see different documents: what fits too well would show.
    shapes = data.calibration[::3] if len(data.calibration) > 2 else data.calibration
    apart = {id(d) for d in shapes} if len(data.calibration) > 2 else set()
    covariances = _covariances(predictor, [d for d in data.calibration if id(d) not in apart])
    withins = [Within(c, pairs, alone=not predictor.within) for c in covariances]
    parts = len(shapes) * predictor.regions
    density = Density(predictor.energy, max(64, SAMPLE // parts))
    for document in shapes:
        for view, p, s in _expected(predictor, withins, document):
            density.learn(view, p, s)
    total, tokens = np.zeros(width), 0
    for document in data.test:
        for view, p, s in _expected(predictor, withins, document):
            total += density.code_length(view, p, s).sum(axis=0, dtype=np.float64)
            tokens += len(p)
    mean, keys = total / tokens, data.test[0].view.order.keys
    triangle = width * (width - 1) / 2 if predictor.within else 0.0
    return LayerPoint(
        data.layer,
        float(mean.mean()),
        float(mean[:keys].mean()),
        float(mean[keys:].mean()),
        predictor.products + triangle,
        predictor.bytes + predictor.regions * (triangle + _CHANNEL_BYTES * width),
    )


def tables(data: LayerData) -> LayerPoint:
    """A table of signs and exponents for each channel, as `channel` has, from the calibration
    documents; a byte for each entry that occurs."""
    found = data.new.code_lengths(data.seen)["by channel"]
    k, v = (float(found[0, part].mean()) for part in ("k", "v"))
    sizes = [found[0, part].size for part in ("k", "v")]
    entries = sum(int((counts > 0).sum()) for counts in data.seen.values.values())
    bits = (k * sizes[0] + v * sizes[1]) / sum(sizes)
    return LayerPoint(data.layer, bits, k, v, 0.0, float(entries))


def _expected(
    predictor: Predictor, withins: Sequence[Within], document: Document
) -> Iterator[tuple[View, Floats, Floats]]:
    """Views of the tokens of each region, where their numbers are expected, and their spreads."""
    base, region = predictor.base(document.vectors)
    for r, within in enumerate(withins):
        rows = np.flatnonzero(region == r) if len(withins) > 1 else slice(None)
        view = document.view.take(rows)
        if len(view.y):
            yield view, *within.expect(view, base[rows])


def _covariances(predictor: Predictor, documents: Sequence[Document]) -> list[Doubles]:
    """The covariance of what is left in each region; that of a region with few tokens leans on all
    together."""
    width = documents[0].view.y.shape[1]
    sums, counts = np.zeros((predictor.regions, width, width)), np.zeros(predictor.regions)
    for document in documents:
        base, region = predictor.base(document.vectors)
        left = document.view.y - base
        for r in range(predictor.regions):
            own = left[region == r] if predictor.regions > 1 else left
            sums[r] += own.T @ own
            counts[r] += len(own)
    common = sums.sum(axis=0) / counts.sum()
    if predictor.regions == 1:
        return [common]
    lean = _SHRINK_COVARIANCE
    return [(s + lean * common) / (n + lean) for s, n in zip(sums, counts, strict=True)]


# --- the predictors ------------------------------------------------------------------------------


def inputs(layer: int, back: int, first: bool) -> tuple[int, ...]:
    """The `back` layers before `layer`, and the first one."""
    names = set(range(max(layer - back, 0), layer))
    return tuple(sorted(names | {0} if first and layer else names))


def needed(layer: int) -> tuple[int, ...]:
    """All layers that a predictor of `layer` looks at, and itself."""
    return (*inputs(layer, 4, True), layer)


class Entry(NamedTuple):
    """What is said of a predictor."""

    family: Family
    title: str
    label: str
    """The title in a few words, beside its point in a chart."""


CATALOGUE: dict[str, Entry] = {
    "channel": Entry("tables", "tables for each channel (`channel`)", "channel"),
    "density": Entry("tables", "a density for each channel", "density"),
    "within": Entry("linear", "channels before only", "channels before"),
    **{f"rank-{r}": Entry("linear", f"three layers, rank {r}", f"rank {r}") for r in RANKS},
    "one": Entry("linear", "the layer before", "one layer"),
    "two": Entry("linear", "the two before", "two layers"),
    "full": Entry("linear", "the first and the two before", "three layers"),
    "wide": Entry("linear", "the first and the four before", "five layers"),
    **{
        f"regions-{n}": Entry("piecewise", f"three layers, {n} regions", f"regions {n}")
        for n in REGIONS
    },
}
"""The predictors that look at no copy of the model."""
MAIN = ("channel", "density", "within", "one", "full", "regions-16")
"""The predictors that formats after the first are measured with."""


def measure_key(key: str, data: LayerData) -> LayerPoint:
    """Measure a predictor of the catalogue."""
    if key == "channel":
        return tables(data)
    name, _, size = key.partition("-")
    if name == "regions":
        return measure(piecewise(data, int(size)), data)
    if name in ("density", "within"):
        found = linear.constant(data.moments, data.layer)
        alone = name == "density"
        return measure(_linear(data, found, within=not alone, energy=not alone), data)
    back, first = {"one": (1, False), "two": (2, False), "wide": (4, True)}.get(name, (2, True))
    found = linear.regress(data.moments, inputs(data.layer, back, first), data.layer)
    return measure(_linear(data, found, int(size) if name == "rank" else None), data)


def _linear(data: LayerData, found: Linear, rank: int | None = None, **how: bool) -> Predictor:
    """A regression as a predictor; with a rank, as two thin matrices."""
    columns = len(found.weights)
    products = columns * data.width
    if rank is not None and columns:
        found = linear.low_rank(data.moments, found, data.layer, rank)
        products = rank * (columns + data.width)

    def base(vectors: Vectors) -> tuple[Floats, NDArray[np.int64]]:
        y = found(vectors)
        return y, np.zeros(len(y), np.int64)

    return Predictor(base, float(products), float(products), **how)


def copied(data: LayerData, within: bool) -> Predictor:
    """What a copy of the model says, with channels before or without."""

    def base(vectors: Vectors) -> tuple[Floats, NDArray[np.int64]]:
        y = vectors[COPY]
        return y, np.zeros(len(y), np.int64)

    return Predictor(base, 0.0, 0.0, within=within)


class _Regions:
    """Tokens by the nearest of k-means' centres, on the principal directions of a vector."""

    def __init__(self, data: LayerData, name: int, count: int):
        moments = data.moments
        self.name, self.count, self.mean = name, count, moments.mean(name).astype(np.float32)
        covariance = moments.covariance(name, name)
        unit = 1 / np.sqrt(np.maximum(np.diag(covariance), 1e-30))
        _, vectors = np.linalg.eigh(covariance * np.outer(unit, unit))
        self.directions = (unit[:, None] * vectors[:, ::-1][:, :DIRECTIONS]).astype(np.float32)
        every = np.concatenate([self.project(v) for v in data.learning])
        some = every[:: max(1, len(every) // 40_000)]
        rng = np.random.default_rng(0)
        start = some[rng.choice(len(some), count, replace=len(some) < count)]
        self.centres = k_means(some, start, steps=20)
        self.products = self.directions.size + self.centres.size

    def project(self, vectors: Vectors) -> Floats:
        return np.asarray((vectors[self.name] - self.mean) @ self.directions)

    def __call__(self, vectors: Vectors) -> NDArray[np.int64]:
        return np.asarray(nearest(self.project(vectors), self.centres), np.int64)


def piecewise(data: LayerData, count: int) -> Predictor:
    """Each region corrects the common map by a regression of what it leaves, held back as if
    2,000 tokens had needed no correction."""
    layer, moments = data.layer, data.moments
    names = inputs(layer, 2, True)
    common = linear.regress(moments, names, layer)
    if not names:
        return _linear(data, common)
    regions = _Regions(data, layer - 1, count)
    mean = np.concatenate([moments.mean(n) for n in names]).astype(np.float32)
    columns = len(mean) + 1

    def given(vectors: Vectors) -> Floats:
        x = np.concatenate([vectors[n] for n in names], axis=1) - mean
        return np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)

    gram = np.zeros((count, columns, columns))
    cross = np.zeros((count, columns, data.width))
    for vectors in data.learning:
        x, region = given(vectors), regions(vectors)
        left = vectors[layer] - common(vectors)
        for r in range(count):
            own = x[region == r]
            gram[r] += own.T @ own
            cross[r] += own.T @ left[region == r]
    behind = np.eye(columns)
    behind[:-1, :-1] = moments.covariances(names, names)
    unit = np.sqrt(np.maximum(np.diag(behind), 1e-30))
    penalty = _SHRINK * 1e-4 * unit**2
    corrections = [
        ridge(g + _SHRINK * behind, c, penalty).astype(np.float32)
        for g, c in zip(gram, cross, strict=True)
    ]

    def base(vectors: Vectors) -> tuple[Floats, NDArray[np.int64]]:
        x, region = given(vectors), regions(vectors)
        y = common(vectors)
        for r, correction in enumerate(corrections):
            rows = region == r
            y[rows] += x[rows] @ correction
        return y, region

    products = common.weights.size + regions.products
    return Predictor(
        base, float(products), float(common.weights.size * count + regions.products), count
    )


def frequencies(layers: Sequence[Layer]) -> Frequencies:
    """How often each sign and exponent occurs in one layer of several documents."""
    found = Frequencies()
    for layer in layers:
        found.add([layer])
    return found
