"""Learns the predictive codec's profile: floating point here, integers in what comes out.

spec.md says what the tensors mean. Two passes over the documents: one for the regressions' Gram
matrices and the token table, one over a few documents for the shapes of what is left.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.codecs.predictive import rope
from kvzip.errors import ProfileError
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

CLIP = 6.0  # standard deviations that 127 stands for in an input
UNIT_BITS = 14  # a residual's standard deviation is about 2^14 units
RESIDUAL_SHIFT = 10
TABLE_SHIFT = 3
INPUT_SHIFT = 28
ANGLES = 32
CELLS = 64
SINK_TOKENS = 4  # first tokens, whose values are unlike all others
MEAN_DEVIATION = 0.75  # of the standard deviation, to begin with


def inputs_of(layer: int) -> list[int]:
    """The layers that predict `layer`: the first and the two before it."""
    return sorted({0, layer - 1, layer - 2} & set(range(layer)))


def sine_table() -> NDArray[np.int16]:
    """A full turn in 4,096 steps, 2^14 is 1."""
    return np.round(np.sin(2 * np.pi * np.arange(4096) / 4096) * (1 << 14)).astype(np.int16)


# --- densities ---------------------------------------------------------------------------------


def cell_edges() -> Doubles:
    """|z| at the edges of the cells of a density's table, 1 is the mean deviation."""
    return np.array([(8 + i % 8) / 16 * 2.0 ** (i // 8) - 0.5 for i in range(CELLS + 1)])


def densities() -> tuple[NDArray[np.uint32], Doubles]:
    """Tables of the share of numbers below |z|, and the densities' mean log-densities by cell.

    Student's t from heavy tails to nearly normal, each with a mean deviation of 1, and mixtures of
    two normal distributions for what is calmer at times than at others.
    """
    edges = cell_edges()
    grid = np.concatenate([np.linspace(0, 60, 60001), np.geomspace(60.01, 4096, 20000)])
    tables = []
    for shape in (1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 100.0):
        density = (1 + grid**2 / shape) ** (-(shape + 1) / 2)
        share = _integral(density, grid)
        mean = _integral(density * grid, grid)[-1] / share[-1]
        tables.append(np.interp(edges * mean, grid, share / share[-1]))
    table = np.round(np.array(tables) * (1 << 23)).astype(np.int64)
    # No cell is empty, and the last edge is all there is.
    table = np.maximum.accumulate(table + np.arange(len(edges)), axis=1)
    table = np.minimum(table, (1 << 23) - np.arange(len(edges))[::-1])
    table[:, 0], table[:, -1] = 0, 1 << 23
    return table.astype(np.uint32), np.diff(table, axis=1) / (1 << 24)


def _integral(values: Doubles, grid: Doubles) -> Doubles:
    steps = np.diff(grid) * (values[1:] + values[:-1]) / 2
    return np.concatenate([[0.0], np.cumsum(steps)])


# --- the regressions ---------------------------------------------------------------------------


class _Sums:
    """Sums over documents that the regressions need."""

    def __init__(self, widths: Sequence[int]):
        self.widths, self.count = widths, 0
        pairs = {(0, 0)}
        for layer in range(len(widths)):
            inputs = inputs_of(layer)
            pairs |= {(a, b) for a in inputs for b in inputs if a <= b}
        self.gram = {(a, b): np.zeros((widths[a], widths[b])) for a, b in pairs}
        self.cross = {
            (a, layer): np.zeros((widths[a], widths[layer]))
            for layer in range(len(widths))
            for a in inputs_of(layer)
        }
        self.own = [np.zeros((w, w)) for w in widths]
        self.input = [np.zeros(w) for w in widths]
        self.target = [np.zeros(w) for w in widths]

    def add(self, targets: Sequence[Floats], inputs: Sequence[Floats]) -> None:
        self.count += len(targets[0])
        for (a, b), total in self.gram.items():
            total += inputs[a].T @ inputs[b]
        for (a, layer), total in self.cross.items():
            total += inputs[a].T @ targets[layer]
        for layer, (target, given) in enumerate(zip(targets, inputs, strict=True)):
            self.own[layer] += target.T @ target
            self.target[layer] += target.sum(axis=0)
            self.input[layer] += given.sum(axis=0)

    def of(self, layer: int) -> tuple[Doubles, Doubles, Doubles, Doubles, Doubles]:
        """Centred: inputs' Gram matrix, inputs by targets, targets by targets; both means."""
        inputs, n = inputs_of(layer), self.count
        mean_y = self.target[layer] / n
        own = self.own[layer] / n - np.outer(mean_y, mean_y)
        if not inputs:
            empty = np.zeros((0, self.widths[layer]))
            return np.zeros((0, 0)), empty, own, np.zeros(0), mean_y
        mean_x = np.concatenate([self.input[a] for a in inputs]) / n
        gram = np.block(
            [[self.gram[a, b] if a <= b else self.gram[b, a].T for b in inputs] for a in inputs]
        )
        cross = np.concatenate([self.cross[a, layer] for a in inputs])
        gram = gram / n - np.outer(mean_x, mean_x)
        cross = cross / n - np.outer(mean_x, mean_y)
        return gram, cross, own, mean_x, mean_y


def round_weights(weights: Doubles, gram: Doubles) -> tuple[NDArray[np.int8], Doubles]:
    """Weights [inputs, outputs] as int8 and a scale for each output.

    One input after the other is rounded, and the error spread over the inputs to come so that it
    shows least in the outputs (Frantar et al. 2022, GPTQ, arXiv 2210.17323).
    """
    scale = np.maximum(np.abs(weights).max(axis=0), 1e-30) / 127
    left = weights.copy()
    rounded = np.zeros(weights.shape, np.int8)
    n = len(gram)
    damped = gram + np.eye(n) * max(np.trace(gram) / n, 1e-9) * 1e-3
    inverse = np.linalg.inv(damped)
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    for i in range(n):
        rounded[i] = np.clip(np.round(left[i] / scale), -127, 127).astype(np.int8)
        error = (left[i] - rounded[i] * scale) / factor[i, i]
        left[i + 1 :] -= np.outer(factor[i, i + 1 :], error)
    return rounded, scale


def within(
    covariance: Doubles, pairs: Sequence[tuple[int, int]]
) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """Each channel from the channels before it: coefficients [channels, channels], what variance
    is left, and of each pair (first, second), which do not see each other, the covariance left
    and the second's variance."""
    lower = _cholesky(covariance)
    spread = np.diag(lower).copy()
    # L^-1 with a unit diagonal: a row is minus the coefficients on the channels before.
    inverse = np.linalg.inv(lower / spread)
    coefficients = -np.tril(inverse, -1)
    variance = spread**2
    covariances = np.zeros(len(pairs))
    for p, (a, b) in enumerate(pairs):
        m = coefficients[b, a]
        coefficients[b] += m * coefficients[a]
        coefficients[b, a] = 0.0
        covariances[p] = m * variance[a]
        variance[b] += m * m * variance[a]
    return coefficients, variance, covariances, np.array([variance[b] for _, b in pairs])


def _cholesky(covariance: Doubles) -> Doubles:
    """Its lower factor; a covariance of too few tokens is made definite first."""
    diagonal = np.diag(covariance)
    floor = max(diagonal.max(initial=0.0) * 1e-9, 1e-30)
    for share in 10.0 ** np.arange(-4, 1):
        try:
            found = np.linalg.cholesky(covariance + np.diag(np.maximum(diagonal * share, floor)))
        except np.linalg.LinAlgError:
            continue
        return np.asarray(found)
    return np.diag(np.sqrt(np.maximum(diagonal, floor)))


def turned(a: Doubles, b: Doubles, c: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Pairs of variances a, b and covariance c, turned by the middle of each angle's cell:
    deviation of the first, of the second given the first, slope. Each [pairs, ANGLES]."""
    angle = (np.arange(ANGLES) + 0.5) * 2 * np.pi / ANGLES
    sin, cos = np.sin(angle), np.cos(angle)
    a, b, c = a[:, None], b[:, None], c[:, None]
    first = np.maximum(a * cos**2 - 2 * c * sin * cos + b * sin**2, 1e-30)
    both = (a - b) * sin * cos + c * (cos**2 - sin**2)
    rest = np.maximum(a * b - c * c, 1e-6 * a * b + 1e-30) / first
    return np.sqrt(first), np.sqrt(rest), both / first


def multiplications(profile: Profile) -> list[int]:
    """Products of a weight and a number, for each token and layer, that prediction takes."""
    found = []
    for i, layer in enumerate(profile.description["layers"]):
        n = len(profile.tensors[f"{i}.bias"])
        columns = sum(len(profile.tensors[f"{a}.bias"]) for a in layer["inputs"])
        found.append(n * columns + n * (n - 1) // 2)
    return found


# --- the whole -----------------------------------------------------------------------------------


def fit(
    snapshots: Sequence[Snapshot | str | os.PathLike[str]],
    progress: Callable[[str, int, int], None] | None = None,
    *,
    token_table: bool = True,
    calibration: int = 12,
) -> Profile:
    """A profile for the predictive codec; see :meth:`kvzip.Profile.fit`.

    `token_table`: keep what the first layer makes of each token seen, an exact prediction when it
    is seen again. `calibration`: documents over which scales and densities are set.
    """
    if not snapshots:
        raise ProfileError("a profile needs at least one snapshot to learn from")

    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)

    first = _load(snapshots[0])
    layout, width = first.layout, [rope.width(layer) for layer in first.layout.layers]
    orders = [rope.Order(layer, first.origin, first.dtype) for layer in layout.layers]
    few = _spread(len(snapshots), 8)
    mean, deviation = _moments((_check(_load(snapshots[i]), first) for i in few), orders)
    sums = _Sums(width)
    table = _TokenTable(width[0]) if token_table else None
    for done, item in enumerate(snapshots):
        snapshot = _check(_load(item), first)
        targets = [o.unturned(layer) for o, layer in zip(orders, snapshot.layers, strict=True)]
        if table is not None and snapshot.token_ids is not None:
            table.add(snapshot.token_ids, targets[0])
        _, used = _cut(targets)
        inputs = [
            np.clip(np.round((y - m) * (127 / CLIP / d)), -127, 127).astype(np.float32)
            for y, m, d in zip(used, mean, deviation, strict=True)
        ]
        sums.add(used, inputs)
        tell("regressions", done + 1, len(snapshots))
    tensors: dict[str, NDArray[Any]] = {"sine": sine_table()}
    tensors["densities"], _ = densities()
    description: dict[str, Any] = {
        "codec": "predictive",
        "model": first.origin.model,
        "revision": first.origin.revision,
        "architecture": first.origin.architecture,
        "dtype": first.dtype,
        "tokens": sums.count,
        "documents": len(snapshots),
        "layers": [],
    }
    for i, layer in enumerate(layout.layers):
        made = _layer(sums, i, orders[i], mean[i], deviation[i])
        if i == 0 and table is not None and len(table):
            tensors["token_ids"] = table.ids()
            made["table"] = table.values(made["bias"][0], made["unit"])
            for name in ("inverse", "pair_inverse", "pair_slope"):
                made[name] = np.concatenate([made[name]] * 2)
        tensors |= {f"{i}.{name}": array for name, array in made.items()}
        description["layers"].append(
            {
                "inputs": inputs_of(i),
                "k": [layer.k[-3], layer.k[-1]],
                "v": [layer.v[-3], layer.v[-1]],
            }
        )
        tell("layers", i + 1, len(width))
    chosen = [snapshots[i] for i in _spread(len(snapshots), calibration)]
    for turn in range(2):

        def tell_turn(done: int, turn: int = turn) -> None:
            tell("densities", done + turn * len(chosen), 2 * len(chosen))

        _calibrate(tensors, description, chosen, tell_turn)
    return Profile(tensors, description)


def _load(item: Snapshot | str | os.PathLike[str]) -> Snapshot:
    return item if isinstance(item, Snapshot) else Snapshot.load(item)


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted))})


def _check(snapshot: Snapshot, first: Snapshot) -> Snapshot:
    shapes = [(a.k[-3], a.k[-1], a.v[-3], a.v[-1]) for a in snapshot.layout.layers]
    wanted = [(a.k[-3], a.k[-1], a.v[-3], a.v[-1]) for a in first.layout.layers]
    if shapes != wanted or snapshot.origin.model != first.origin.model:
        raise ProfileError(
            f"the snapshots are of different models: {first.origin.model or 'unnamed'} and "
            f"{snapshot.origin.model or 'unnamed'}"
        )
    return snapshot


def _cut(targets: Sequence[Floats]) -> tuple[int, list[Floats]]:
    """The tokens that all layers hold, without the first few of the sequence."""
    held = min(len(t) for t in targets)
    skip = SINK_TOKENS if held > 4 * SINK_TOKENS and held == len(targets[0]) else 0
    return skip, [t[len(t) - held + skip :] for t in targets]


def _moments(
    snapshots: Iterable[Snapshot], orders: Sequence[rope.Order]
) -> tuple[list[Floats], list[Floats]]:
    """Mean and standard deviation of each channel, from a few documents."""
    total, squares, count = [], [], 0
    for snapshot in snapshots:
        _, used = _cut([o.unturned(s) for o, s in zip(orders, snapshot.layers, strict=True)])
        total.append([y.sum(axis=0, dtype=np.float64) for y in used])
        squares.append([(y.astype(np.float64) ** 2).sum(axis=0) for y in used])
        count += len(used[0])
    mean = [sum(t[i] for t in total) / count for i in range(len(orders))]
    second = [sum(s[i] for s in squares) / count for i in range(len(orders))]
    deviation = [
        np.sqrt(np.maximum(s - m * m, 1e-8 * s + 1e-30)) for m, s in zip(mean, second, strict=True)
    ]
    return [m.astype(np.float32) for m in mean], [d.astype(np.float32) for d in deviation]


def _layer(
    sums: _Sums, i: int, order: rope.Order, mean: Floats, deviation: Floats
) -> dict[str, NDArray[Any]]:
    """The integer tensors of one layer."""
    gram, cross, own, mean_x, mean_y = sums.of(i)
    n, columns = len(own), len(gram)
    if columns:
        # Few tokens say little of many inputs: then the weights are held back.
        ridge = np.trace(gram) / columns * max(1e-4, 0.02 * columns / sums.count)
        exact = np.linalg.solve(gram + ridge * np.eye(columns), cross)
        rounded, scale = round_weights(exact, gram)
        weights = rounded * scale
        residual = own - weights.T @ cross - cross.T @ weights + weights.T @ gram @ weights
        bias = mean_y - mean_x @ weights
    else:
        rounded, scale = np.zeros((0, n), np.int8), np.ones(n)
        residual, bias = own, mean_y
    residual = (residual + residual.T) / 2
    pairs = order.pairs
    # A channel that never changes has no deviation to measure in; its value stands in.
    size = np.sqrt(np.maximum(np.diag(residual), 1e-12 * (mean_y**2 + np.diag(own))))
    for a, b in pairs:
        size[a] = size[b] = max(size[a], size[b])
    exponent = np.clip(np.round(np.log2(np.maximum(size, 1e-30))) - UNIT_BITS, -120, 60)
    unit = 2.0**exponent
    coefficients, variance, covariance, second = within(residual, pairs)
    # From an input residual in steps of 2^10 of its units to this channel's units.
    coefficients = coefficients * unit[None, :] * (1 << RESIDUAL_SHIFT) / unit[:, None]
    within_scale = np.maximum(np.abs(coefficients).max(axis=1), 1e-9) / 127
    within_rounded = np.round(coefficients / within_scale[:, None]).astype(np.int8)
    deviations = np.sqrt(variance) / unit * MEAN_DEVIATION
    firsts = np.array([a for a, _ in pairs], np.int64)
    first = variance[firsts]
    one, two, slope = turned(first, second, covariance)
    of_unit = unit[firsts][:, None]
    pair_deviations = np.stack([one, two], axis=1) / of_unit[..., None] * MEAN_DEVIATION
    # Every layer's channels begin at a multiple of four inputs.
    widths = [sums.widths[a] for a in inputs_of(i)]
    pieces = np.split(rounded.T, np.cumsum(widths)[:-1], axis=1) if widths else [rounded.T]
    weight = np.concatenate([_padded(piece, 1, 4) for piece in pieces], axis=1)
    return {
        "order": order.order.astype(np.int32),
        "step": order.step,
        "unit": exponent.astype(np.int8),
        "bias": _int32(bias / unit)[None],
        "weight": packed(weight)[None],
        "weight_scale": _int32(scale / unit * (1 << 20))[None],
        "within": packed(within_rounded)[None],
        "within_scale": _int32(within_scale * (1 << 20))[None],
        "mean": _int32(mean / unit),
        "input_scale": _int32(127 / CLIP / deviation * unit * (1 << INPUT_SHIFT)),
        "density": np.full(n, 5, np.uint8),
        "inverse": _inverse(deviations)[None],
        "pair_inverse": _inverse(pair_deviations)[None],
        "pair_slope": _int32(np.clip(slope * (1 << 12), -(2**20), 2**20))[None],
    }


def _padded(matrix: NDArray[Any], axis: int, to: int) -> NDArray[Any]:
    room = [(0, 0)] * matrix.ndim
    room[axis] = (0, -matrix.shape[axis] % to)
    return np.pad(matrix, room)


def packed(matrix: NDArray[np.int8]) -> NDArray[np.int8]:
    """[outputs, inputs] in blocks of four by four, [outputs/4, inputs/4, 4, 4]."""
    whole = _padded(_padded(matrix, 0, 4), 1, 4)
    rows, columns = whole.shape
    return np.ascontiguousarray(whole.reshape(rows // 4, 4, columns // 4, 4).transpose(0, 2, 1, 3))


def _int32(values: Any) -> NDArray[np.int32]:
    return np.asarray(np.clip(np.round(values), -(2**31) + 1, 2**31 - 1), np.int32)


def _inverse(deviations: Any) -> NDArray[np.int32]:
    """2^28 / mean deviation in units."""
    values = (1 << 28) / np.maximum(deviations, 1e-9)
    return np.asarray(np.clip(np.round(values), 1, 1 << 26), np.int32)


class _TokenTable:
    """Mean of the first layer's vector for each token id seen."""

    def __init__(self, width: int):
        self.width = width
        self.place: dict[int, int] = {}
        self.sums = np.zeros((1024, width))
        self.counts = np.zeros(1024)

    def __len__(self) -> int:
        return len(self.place)

    def add(self, token_ids: NDArray[Any], vectors: Floats) -> None:
        flat = np.asarray(token_ids).reshape(-1)
        if len(flat) != len(vectors):
            return  # a sliding layer that holds only some tokens
        rows = np.array([self.place.setdefault(int(t), len(self.place)) for t in flat])
        if len(self.place) > len(self.counts):
            room = 2 * len(self.place) - len(self.counts)
            self.sums = np.concatenate([self.sums, np.zeros((room, self.width))])
            self.counts = np.concatenate([self.counts, np.zeros(room)])
        np.add.at(self.sums, rows, vectors)
        np.add.at(self.counts, rows, 1)

    def _sorted(self) -> list[int]:
        return sorted(self.place)

    def ids(self) -> NDArray[np.uint32]:
        return np.array(self._sorted(), np.uint32)

    def values(self, bias: NDArray[Any], unit: NDArray[Any]) -> NDArray[np.int16]:
        """What is to be added to the bias, in units, [tokens, width]."""
        rows = np.array([self.place[t] for t in self._sorted()])
        means = self.sums[rows] / self.counts[rows, None]
        steps = np.round((means / 2.0**unit - bias) / (1 << TABLE_SHIFT))
        return np.asarray(np.clip(steps, -32768, 32767), np.int16)


def _calibrate(
    tensors: dict[str, NDArray[Any]],
    description: dict[str, Any],
    items: Sequence[Any],
    tell: Callable[[int], None],
) -> None:
    """Set each channel's density and scale to what codes the documents in the fewest bits."""
    from kvzip.codecs.predictive.codec import build, new_chain

    model = build(tensors, description)
    layers = description["layers"]
    counts: list[list[Any]] = [[0, 0] for _ in layers]
    for done, item in enumerate(items):
        snapshot = _load(item)
        held = min(layer.layout.stored for layer in snapshot.layers)
        form = dtypes.get(snapshot.dtype)
        ids = None if snapshot.token_ids is None else np.atleast_2d(snapshot.token_ids)[:, -held:]
        rows = snapshot.layers[0].k.shape[0] if snapshot.layers[0].k.ndim == 4 else 1
        start = snapshot.tokens - held
        chain = new_chain(model, tensors, rows, held, start, form, ids)
        for i, layer in enumerate(snapshot.layers):
            for p, part in enumerate(layer):
                block = part if part.ndim == 4 else part[np.newaxis]
                block = block[:, :, -held:]
                if form.bits == 32:
                    block = (block >> np.uint32(16)).astype(np.uint16)
                counts[i][p] = counts[i][p] + chain.measure(i, p, np.ascontiguousarray(block))[
                    0
                ].astype(np.int64)
        tell(done + 1)
    _, shares = densities()
    edges = cell_edges()
    for i in range(len(layers)):
        both = np.concatenate(counts[i], axis=1)  # [classes, channels, cells]
        factor, shape = best_fit(both[0], edges, shares)
        all_factors = [factor]
        for known in both[1:]:
            own, _ = best_fit(known, edges, shares, shape)
            all_factors.append(np.where(known.sum(axis=-1) > 0, own, factor))
        factors = np.stack(all_factors)
        tensors[f"{i}.density"] = shape.astype(np.uint8)
        tensors[f"{i}.inverse"] = _rescaled(tensors[f"{i}.inverse"], factors)
        heads = layers[i]["k"][0]
        pairs = len(tensors[f"{i}.step"])
        if pairs:
            dim = layers[i]["k"][1]
            turned_places = [
                h * dim + 2 * j + s for h in range(heads) for j in range(pairs) for s in (0, 1)
            ]
            of_pairs = factors[:, turned_places].reshape(-1, heads * pairs, 2, 1)
            tensors[f"{i}.pair_inverse"] = _rescaled(tensors[f"{i}.pair_inverse"], of_pairs)


def _rescaled(inverse: NDArray[Any], factors: Doubles) -> NDArray[np.int32]:
    return np.asarray(np.clip(np.round(inverse / factors), 1, 1 << 26), np.int32)


def best_fit(
    counts: NDArray[Any], edges: Doubles, shares: Doubles, shape: NDArray[Any] | None = None
) -> tuple[Doubles, NDArray[Any]]:
    """For each row of cell counts [channels, cells]: the factor on the scale and the density that
    code it in the fewest bits. `shape`: the densities are chosen already."""
    steps = 2.0 ** (np.arange(-24, 25) / 8)
    middle = (edges[1:] + edges[:-1]) / 2
    density = np.log2(shares / np.diff(edges))  # [shapes, cells], per unit of |z|
    costs = np.empty((len(steps), len(counts), len(density)))
    for s, step in enumerate(steps):
        # A number at z costs what it would at z / step, and log2(step) more.
        at = np.array([np.interp(middle / step, middle, d) for d in density])
        costs[s] = counts @ (-at.T) + counts.sum(axis=1, keepdims=True) * math.log2(step)
    if shape is None:
        shape = costs.min(axis=0).argmin(axis=1)
    own = np.take_along_axis(costs, shape[None, :, None], axis=2)[..., 0]
    return steps[own.argmin(axis=0)], shape
