"""Profiles of random numbers, so that every branch of the arithmetic is taken, and files that are
predicted by them where a test says so, however little that saves."""

from __future__ import annotations

import numpy as np
from support import cache_like, random_bits

import kvzip
from kvzip import dtypes
from kvzip.codecs import _native
from kvzip.codecs.predictive import codec as predictive
from kvzip.layout import LayerLayout
from kvzip.snapshot import Layer

SHAPES = [((2, 12), (1, 6)), ((1, 8), (2, 4)), ((3, 6), (1, 5))]
FREQUENCIES = np.array([1.0, 0.3, 0.01], np.float32)
PAIRS = len(FREQUENCIES)
ORIGIN = kvzip.Origin(rope=({"inv_freq": [float(f) for f in FREQUENCIES]},))
ROTATION = _native.Rotation(FREQUENCIES)
"""Documents whose keys RoPE turned in bf16."""


def angles(start, tokens, rounding=1):
    """The cosines and sines by which they were."""
    if rounding in (3, 6):
        return ROTATION.wide_angles_of(start, tokens)
    return dtypes.to_float32(ROTATION.angles_of(start, tokens), "bf16")


def blocked(matrix):
    """[..., outputs, inputs] in blocks of four by four."""
    *front, rows, columns = matrix.shape
    cut = matrix.reshape(*front, rows // 4, 4, columns // 4, 4)
    return np.ascontiguousarray(np.moveaxis(cut, -3, -2))


def up4(n):
    return -(-n // 4) * 4


def densities(rng, shapes):
    """Cells that rise from 0 to a half, narrow ones near 0 or anywhere."""
    found = np.zeros((shapes, 65), np.uint32)
    step = (1 << 23) // 64
    for edges in found:
        edges[1:64] = np.arange(1, 64) * step + rng.integers(0, step, 63)
        edges[64] = 1 << 23
    return found


def random_layer(
    rng, i, layers, group, *, pairs, side_by_side, regions, table, vocabulary, wild, shapes
):
    """The tensors of one layer, and whether they are as wild as a profile may be."""
    (heads, dim), values = layers[i]["k"], layers[i]["v"]
    keys, n = heads * dim, heads * dim + values[0] * values[1]
    wide = up4(n)
    inputs = sum(
        up4(int(np.prod(layers[a]["k"]) + np.prod(layers[a]["v"]))) for a in layers[i]["inputs"]
    )
    classes = regions * (2 if table else 1)
    most = 2**31 - 1 if wild else 1 << 20
    weigh = 127 if wild else 20

    def numbers(*shape, low=-most, high=most, dtype=np.int32):
        return rng.integers(low, high, shape, dtype=np.int64, endpoint=True).astype(dtype)

    step, apart = (2, 1) if side_by_side else (1, pairs)
    turned = [h * dim + step * p for h in range(heads) for p in range(pairs)]
    firsts = rng.permutation(turned).astype(np.int64)
    rest = [c for c in range(keys) if c % dim >= 2 * pairs]
    order = np.concatenate(
        [
            np.stack([firsts, firsts + apart], 1).reshape(-1),
            rng.permutation(rest),
            rng.permutation(n - keys),
        ]
    )
    within = numbers(regions, wide, wide, low=-weigh, high=weigh, dtype=np.int8)
    for c in range(n):
        first = 0 if c < keys else keys
        within[:, c, first + (c - first) // group * group :] = 0
    within[:, n:] = 0
    low, high = (-120, 60) if wild else (-20, -10)
    tensors = {
        "order": order.astype(np.int32),
        "step": rng.integers(0, 2**63, pairs).astype(np.uint64) * np.uint64(2),
        "unit": numbers(n, low=low, high=high, dtype=np.int8),
        "mean": numbers(n),
        "input_scale": numbers(n),
        "bias": numbers(regions, n),
        "weight": blocked(numbers(regions, wide, inputs, low=-weigh, high=weigh, dtype=np.int8)),
        "weight_scale": numbers(regions, n),
        "within": blocked(within),
        "within_scale": numbers(regions, n),
        "density": numbers(n, low=0, high=shapes - 1, dtype=np.uint8),
        "inverse": numbers(classes, n, low=1, high=1 << (26 if wild else 14)),
        "pair_inverse": numbers(
            classes, heads * pairs, 2, 32, low=1, high=1 << (26 if wild else 14)
        ),
        "pair_slope": numbers(classes, heads * pairs, 32, low=-most, high=most),
    }
    if regions > 1:
        tensors["centre"] = blocked(
            numbers(up4(regions), inputs, low=-127, high=127, dtype=np.int8)
        )
        tensors["centre_bias"] = numbers(regions, low=-(1 << 12), high=1 << 12)
    if table:
        dtype = np.int16 if table == 2 else np.int8
        tensors["table"] = numbers(vocabulary, n, low=-127, high=127, dtype=dtype)
    return {f"{i}.{name}": array for name, array in tensors.items()}


def random_profile(
    seed, shapes, group=8, lanes=1, *, pairs=0, side_by_side=False, regions=1, tables=(),
    wild=False, kinds=3, far=False,
):  # fmt: skip
    """A profile for layers of these shapes, ((heads, dim) of keys, the same of values) each.

    `pairs`: of a head that are turned, and whether they are `side_by_side`. `regions`: of all
    layers but the first. `tables`: bytes of a number of each layer's table, for as many layers.
    `wild`: anything that a profile may hold. `far`: a layer is predicted from any of those before
    it, in any order, or from none.
    """
    rng = np.random.default_rng(seed)
    inputs = [sorted({0, max(i - 2, 0), i - 1} & set(range(i))) for i in range(len(shapes))]
    if far:
        inputs = [rng.permutation(i)[: rng.integers(0, i + 1)].tolist() for i in range(len(shapes))]
    layers = [
        {"inputs": those, "k": list(k), "v": list(v)}
        for those, (k, v) in zip(inputs, shapes, strict=True)
    ]
    sine = np.round(np.sin(2 * np.pi * np.arange(4096) / 4096) * (1 << 14)).astype(np.int16)
    tensors = {"densities": densities(rng, kinds), "sine": sine}
    if tables:
        tensors["token_ids"] = rng.permutation(300)[:60].astype(np.uint32)
    for i in range(len(layers)):
        table = tables[i] if i < len(tables) else 0
        tensors |= random_layer(
            rng, i, layers, group, pairs=min(pairs, shapes[i][0][1] // 2),
            side_by_side=side_by_side, regions=regions if i else 1, table=table,
            vocabulary=60 if i == 0 else 25, wild=wild, shapes=kinds,
        )  # fmt: skip
    about = {"codec": "predictive", "group": group, "lanes": lanes, "layers": layers}
    about["version"] = 2 if side_by_side else 1
    return kvzip.Profile(tensors, about)


class Long(bytes):
    """Bytes that seem to be many."""

    def __len__(self):
        return 1 << 60


def encode(snapshot, profile, monkeypatch, plain=(), **options):
    """The file of a snapshot, all blocks predicted but those of the parts in `plain`, (layer,
    name), and those that nothing predicts; however long they are."""
    make, follows, Codec = predictive._plain, predictive._next_chain, predictive.PredictiveCodec
    predicted = []

    def next_chain(context, shape):
        predicted.append(follows(context, shape))
        return predicted[-1]

    def seems(block, context):
        if (context.layer, context.part) in plain or predicted[-1] is None:
            return make(block, context)
        return Long()

    with monkeypatch.context() as patch:
        patch.setattr(predictive, "_plain", seems)
        patch.setattr(predictive, "_next_chain", next_chain)
        patch.setattr(Codec, "encode_chain", lambda codec, blocks: codec._coded(blocks, ()))
        patch.setattr(Codec, "max_encoded_size", lambda codec, size: 2 * size + (1 << 20))
        return kvzip.encode(snapshot, "predictive", profile, threads=1, **options)


def with_rope(layers, ids, origin=ORIGIN, rope=0, first=0):
    """A snapshot whose layers say what turned their keys; behind `first` tokens that are gone."""
    built = []
    for k, v in layers:
        tokens = k.shape[-2]
        kind = ("sliding", tokens) if first else ("full", None)
        form = LayerLayout.of_kv(k.shape, v.shape, "bf16", first + tokens, *kind, rope)
        built.append(Layer.of_kv(k, v, form))
    return kvzip.Snapshot(built, "bf16", ids, origin)


def turned_snapshot(seed, tokens=70, rounding=1, start=0, batch=None, strange=0.0):
    """Keys that RoPE turned in bf16; a share of the tokens has keys of any bits."""
    rng = np.random.default_rng(seed)
    front = () if batch is None else (batch,)
    layers = []
    for (heads, dim), values in SHAPES:
        k = cache_like(rng, "bf16", (*front, heads, tokens, dim))
        ROTATION.turn(k if batch else k[np.newaxis], start, rounding)
        some = rng.random(tokens) < strange
        k[..., some, :] = random_bits(rng, "bf16", k[..., some, :].shape)
        layers.append((k, cache_like(rng, "bf16", (*front, values[0], tokens, values[1]))))
    ids = rng.integers(0, 300, (*front, tokens), np.uint32)
    return with_rope(layers, ids)


def kinds(blob, profile):
    """The kinds of a file's blocks, by layer and part."""
    with kvzip.open(blob, profile) as reader:
        return {
            key: {int(reader._blocks.stored(row)[0]) for row in rows[1:]}
            for key, rows in reader.index.rows.items()
        }
