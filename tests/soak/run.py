"""Send many numbers through the codecs and compare every one: `make soak`.

    python tests/soak/run.py --hours 8 --log build/soak/log.jsonl channel/bf16 predictive

A target is a codec, a format and a set of instructions, such as `channel/bf16/avx2`; a beginning of
names picks all that begin so. The targets take turns until each has its number of numbers, or the
time is over. A line for each turn goes into the log, with commit and machine, and another run goes
on after the last round that is there. A round is made from its target's name and its number alone,
so that one that failed is run again by `--again channel/bf16/avx2:1234`. `--keep` moves the log to
kept.jsonl, in the repository, from which runs go on, too; `--counts` adds up both.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec
import numpy as np
import predictive_profiles
import pytest
import runs

import kvzip
from kvzip import dtypes
from kvzip.codecs import _native
from kvzip.codecs.common.rotation import ROUNDINGS
from kvzip.errors import UnsupportedError
from kvzip.selftest import instructions, vectors
from kvzip.snapshot import Layer
from kvzip.testing import assert_same, cache_like, nearest_bits, random_bits

TURN = 20.0
"""Seconds of a target before the next one's turn."""
MOST = 1 << 21
"""The most numbers of a part of a layer."""
KEPT = Path(__file__).with_name("kept.jsonl")
ORIGIN = kvzip.Origin(model="soak", revision="1", rope=({"rope_theta": 1e4},))


# --- caches --------------------------------------------------------------------------------


def few(rng, dtype, shape):
    """Numbers of which there are few different ones, and runs of the same."""
    known = random_bits(rng, dtype, (int(rng.integers(1, 40)),))
    return np.sort(known[rng.integers(0, len(known), shape)], axis=-2)


def rarely_odd(rng, dtype, shape):
    """Numbers like a cache's, with a few of any bits among them."""
    usual = cache_like(rng, dtype, shape)
    odd = rng.random(shape, np.float32) < 10.0 ** -rng.integers(1, 5)
    return np.where(odd, random_bits(rng, dtype, shape), usual)


def on_grid(rng, dtype, shape):
    """Numbers of a narrower format times scales, half the time a few of them off the grid."""
    if dtype not in ("bf16", "fp16", "fp32"):
        return cache_like(rng, dtype, shape)
    narrow = ("fp8_e4m3fn", "fp8_e5m2", "int8")[rng.integers(3)]
    codes = random_bits(rng, narrow, shape)
    group = (32, 64, 128, shape[-1])[rng.integers(4)]
    scales = 2.0 ** rng.uniform(-9, -3, (*shape[:-1], -(-shape[-1] // group)))
    scales = scales.astype(np.float32).repeat(group, axis=-1)[..., : shape[-1]]
    with np.errstate(invalid="ignore", over="ignore"):
        bits = nearest_bits(dtypes.to_float64(codes, narrow) * scales, dtype)
    if rng.random() < 0.5:
        bits.reshape(-1)[rng.integers(0, bits.size, 3)] ^= 1
    return bits


MAKERS = (random_bits, cache_like, few, rarely_odd, on_grid)


def lying(rng, bits):
    """The same numbers in another order in memory, as engines keep them."""
    axes = rng.permutation(bits.ndim)
    return np.ascontiguousarray(bits.transpose(axes)).transpose(np.argsort(axes))


def size_of(rng, most):
    """1 ... `most`: as often small as large, and often just at a power of two."""
    size = int(2 ** rng.uniform(0, np.log2(most + 1)))
    if rng.random() < 0.4:
        size = (1 << size.bit_length()) + int(rng.integers(-1, 2))
    return min(max(size, 1), most)


def like_a_model(rng, shapes, dtype, tokens):
    """Layers of which each tells of the next, so that predicting them pays."""
    hidden = rng.standard_normal((tokens, 24), np.float32)
    layers = []
    for number, (heads, dim) in enumerate(shapes):
        # The same mixture in every document: it is the model.
        mix = np.random.default_rng(number).standard_normal((24, 2 * heads * dim), np.float32)
        x = hidden @ mix + 0.2 * rng.standard_normal((tokens, 2 * heads * dim), np.float32)
        pair = np.moveaxis(x.reshape(tokens, 2, heads, dim), 0, 2)
        layers.append(tuple(nearest_bits(part, dtype) for part in pair))
        hidden = np.tanh(hidden + 0.1 * x[:, :24])
    return layers


def as_turned(rng, snapshot, pairs=None):
    """The same but for the keys, of bf16, which are as RoPE turned so many pairs, or any number of
    them, and say so."""
    dim = snapshot.layers[0].k.shape[-1]
    pairs = int(rng.integers(1, dim // 2 + 1)) if pairs is None else pairs
    radians = (1e4 ** -rng.random(pairs)).astype(np.float32)
    rotation, layers = _native.Rotation(radians), []
    for layer in snapshot.layers:
        keys = np.ascontiguousarray(layer.k)
        rotation.turn(keys.reshape(-1, *keys.shape[-3:]), 0, int(rng.choice(ROUNDINGS)))
        form = msgspec.structs.replace(layer.layout, rope=0)
        layers.append(Layer.of_kv(lying(rng, keys), layer.v, form))
    rope = ({"inv_freq": [float(f) for f in radians]},)
    origin = msgspec.structs.replace(snapshot.origin, rope=rope)
    return kvzip.Snapshot(layers, snapshot.dtype, snapshot.token_ids, origin)


# --- rounds: each compares all that it encodes, and says how many numbers those were --------


def compared(rng, snapshot, profile, blob):
    """Decode a file as a whole and in part, and compare; the numbers of the whole."""
    assert_same(kvzip.decode(blob, profile, threads=int(rng.integers(1, 5))), snapshot)
    first, last = sorted(rng.integers(0, snapshot.tokens + 1, 2).tolist())
    layer = int(rng.integers(len(snapshot.layers)))
    with kvzip.open(blob, profile, threads=int(rng.integers(1, 3))) as reader:
        found = reader.tokens(first, last)
        assert np.array_equal(
            found.layers[layer].k, snapshot.layers[layer].k[..., first:last, :]
        ), "a range of tokens"
        assert np.array_equal(reader.layer(layer).v, snapshot.layers[layer].v), "a layer"
    return sum(part.size for layer in snapshot.layers for part in (layer.k, layer.v))


def channel(rng, dtype):
    """A cache of any shape through `channel`, or pages of it through a profile's tables."""
    if rng.random() < 0.1:
        return pages(rng, dtype)
    maker = MAKERS[rng.integers(len(MAKERS))]
    heads, dim = size_of(rng, 9), size_of(rng, 130)
    tokens = size_of(rng, min(20_000, MOST // (heads * dim)))
    front = (int(rng.integers(1, 3)),) if rng.random() < 0.2 else ()
    layers = [
        tuple(lying(rng, maker(rng, dtype, (*front, heads, tokens, dim))) for _ in range(2))
        for _ in range(int(rng.integers(1, 4)))
    ]
    ids = rng.integers(0, 50_000, (*front, tokens))
    snapshot = kvzip.Snapshot.from_arrays(layers, dtype, ids, ORIGIN)
    if dtype == "bf16" and dim > 1 and rng.random() < 0.5:
        snapshot = as_turned(rng, snapshot)
    block = None if rng.random() < 0.5 else max(size_of(rng, tokens), -(-tokens // 200))
    blob = kvzip.encode(snapshot, "channel", threads=int(rng.integers(1, 5)), block_tokens=block)
    most = kvzip.max_encoded_size(snapshot, "channel", block_tokens=block)
    assert len(blob) <= most, "longer than the bound"
    return compared(rng, snapshot, None, blob)


@cache
def tables(dtype):
    """A profile of `channel`, of two layers whose values are wider than their keys."""
    rng = np.random.default_rng(1)
    layers = [tuple(cache_like(rng, dtype, (2, 400, d)) for d in (16, 24)) for _ in range(2)]
    return kvzip.Profile.fit([kvzip.Snapshot.from_arrays(layers, dtype)], codec="channel")


def pages(rng, dtype):
    """Pages of a few tokens; none of a format that has no tables."""
    numbers = 0
    try:
        profile = tables(dtype)
    except UnsupportedError:
        return 0
    for _ in range(20):
        tokens = size_of(rng, 300)
        maker = MAKERS[rng.integers(len(MAKERS))]
        pairs = [
            tuple(lying(rng, maker(rng, dtype, (2, tokens, dim))) for dim in (16, 24))
            for _ in range(2)
        ]
        page = kvzip.encode_page(pairs, profile)
        assert len(page) <= kvzip.max_page_size(profile, tokens), "a page longer than the bound"
        for one, other in zip(pairs, kvzip.decode_page(page, profile), strict=True):
            assert all(map(np.array_equal, one, other)), "a page"
            numbers += sum(part.size for part in one)
    return numbers


SHAPES = ((2, 16), (2, 16), (1, 24), (2, 16))


@cache
def learned():
    """A profile that was learned of documents of such a model."""
    documents = []
    for seed in range(8):
        rng = np.random.default_rng(1000 + seed)
        layers = like_a_model(rng, SHAPES, "bf16", 200)
        ids = rng.integers(0, 100, 200)
        documents.append(kvzip.Snapshot.from_arrays(layers, "bf16", ids, ORIGIN))
    return kvzip.Profile.fit(documents)


@cache
def drawn(seed):
    """A profile of random numbers, as wild as one may be or not, so that all branches are taken."""
    shapes = [(shape, shape) for shape in SHAPES]
    return predictive_profiles.random_profile(
        seed, shapes, lanes=1 + seed % 2, pairs=4 * (seed % 3), side_by_side=seed % 5 > 2,
        regions=1 + seed % 3, tables=((), (1, 2))[seed % 2], wild=seed % 4 == 3,
    )  # fmt: skip


def predictive(rng, _):
    """A cache through `predictive`: by a learned profile, or every block by a random one."""
    dtype = ("bf16", "bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2")[rng.integers(6)]
    tokens = int(rng.integers(1000, 5000)) if rng.random() < 0.5 else size_of(rng, 1000)
    maker = MAKERS[rng.integers(len(MAKERS))]
    if rng.random() < 0.6:
        layers = like_a_model(rng, SHAPES, dtype, tokens)
    else:
        layers = [
            tuple(lying(rng, maker(rng, dtype, (heads, tokens, dim))) for _ in range(2))
            for heads, dim in SHAPES
        ]
    ids = rng.integers(0, 100, tokens)
    snapshot = kvzip.Snapshot.from_arrays(layers, dtype, ids, ORIGIN)
    how = {"block_tokens": max(size_of(rng, tokens), 32, -(-tokens // 30))}
    if rng.random() < 0.5:
        profile = learned()
        blob = kvzip.encode(snapshot, "predictive", profile, int(rng.integers(1, 5)), **how)
        most = kvzip.max_encoded_size(snapshot, "predictive", **how)
        assert len(blob) <= most, "longer than the bound"
    else:
        profile = drawn(int(rng.integers(24)))
        pairs = len(profile.tensors["0.step"])
        if dtype == "bf16" and pairs and rng.random() < 0.7:
            snapshot = as_turned(rng, snapshot, pairs)
        blob = predictive_profiles.encode(snapshot, profile, pytest.MonkeyPatch(), **how)
    return compared(rng, snapshot, profile, blob)


# --- turns ---------------------------------------------------------------------------------

CODECS: dict[str, Callable[..., int]] = {"channel": channel, "predictive": predictive}


def targets() -> dict[str, int]:
    """Every target of this processor, and how many numbers are wanted of it."""
    sets = instructions()
    wanted = {f"channel/{dtype}/{simd}": 10**9 for dtype in dtypes.NAMES for simd in vectors()}
    # All write the same bytes; most numbers go through what is used.
    return wanted | {
        f"predictive/any/{simd}": 10**10 if simd == sets[-1] else 10**9 for simd in sets
    }


@contextmanager
def by(simd: str) -> Iterator[None]:
    """Run with a set of instructions."""
    before = _native.simd()
    if not _native.set_simd(simd):
        raise SystemExit(f"this processor has no {simd}")
    try:
        yield
    finally:
        _native.set_simd(before)


def round_of(target: str, number: int) -> int:
    """One round of a target; how many numbers were compared. AssertionError where any differ."""
    codec, dtype, simd = target.split("/")
    rng = np.random.default_rng([zlib.crc32(target.encode()), number])
    with by(simd):
        return CODECS[codec](rng, dtype)


def turn(target: str, first: int, seconds: float) -> dict[str, object]:
    """Rounds of a target from `first` on, for so many seconds: an entry of the log."""
    began, number, numbers, error = time.monotonic(), first, 0, ""
    while not error and (number == first or time.monotonic() - began < seconds):
        try:
            numbers += round_of(target, number)
        except Exception as failure:
            error = f"round {number}: {type(failure).__name__}: {failure}"
        number += 1
    return {
        "target": target,
        "rounds": [first, number],
        "numbers": numbers,
        "seconds": round(time.monotonic() - began, 1),
        "good": not error,
        **({"error": error} if error else {}),
    }


def counts(*logs: Path) -> dict[str, tuple[int, int]]:
    """The rounds and the numbers of each target, of all commits and machines."""
    rounds, numbers = Counter(), Counter()
    for entry in runs.entries(*logs):
        rounds[entry["target"]] += entry["rounds"][1] - entry["rounds"][0]
        numbers[entry["target"]] += entry["numbers"]
    return {target: (rounds[target], numbers[target]) for target in rounds}


def soak(log: Path, seconds: float, names: list[str], each: float = TURN) -> bool:
    """Take turns until all is done or the time is over; whether every number came back."""
    end, good = time.monotonic() + seconds, True
    ended = Counter[str]()
    for entry in runs.entries(KEPT, log):
        ended[entry["target"]] = max(ended[entry["target"]], entry["rounds"][1])
    done = Counter({target: numbers for target, (_, numbers) in counts(KEPT, log).items()})
    wanted = {t: n for t, n in targets().items() if not names or t.startswith(tuple(names))}
    place = runs.where()
    while time.monotonic() < end:
        behind = [target for target in wanted if done[target] < wanted[target]]
        if not behind:
            break
        # Whatever is furthest from what is wanted of it.
        target = min(behind, key=lambda name: done[name] / wanted[name])
        entry = turn(target, ended[target], min(each, end - time.monotonic()))
        runs.add(log, entry | place)
        ended[target] = entry["rounds"][1]
        done[target] += entry["numbers"]
        if not entry["good"]:
            print(f"{target}: {entry['error']}", flush=True)
            good = False
            del wanted[target]
    return good


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("targets", nargs="*")
    parse.add_argument("--hours", type=float, default=1.0)
    parse.add_argument("--log", type=Path, default=Path("build/soak/log.jsonl"))
    parse.add_argument("--again", metavar="TARGET:ROUND", help="one round, with its traceback")
    parse.add_argument("--counts", action="store_true", help="only add up the logs")
    parse.add_argument("--keep", action="store_true", help=f"move the log to {KEPT.name}")
    given = parse.parse_args()
    if given.again:
        target, number = given.again.rsplit(":", 1)
        print(f"{round_of(target, int(number)):,} numbers came back")
        return 0
    if given.keep:
        runs.keep(given.log, KEPT)
    good = given.counts or given.keep or soak(given.log, 3600 * given.hours, given.targets)
    for target, (rounds, numbers) in sorted(counts(KEPT, given.log).items()):
        print(f"{target}: {rounds:,} rounds, {numbers:,} numbers")
    return not good


if __name__ == "__main__":
    sys.exit(main())
