"""Pairs of keys that `predictive` codes as they were before RoPE turned them in bf16."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictive_profiles import (
    ORIGIN,
    PAIRS,
    SHAPES,
    angles,
    encode,
    kinds,
    random_profile,
    turned_snapshot,
    with_rope,
)
from predictive_reference import Chain
from support import assert_same, cache_like, examples, random_bits, rotated, tiny_model
from support import tiny_documents as documents

import kvzip
from kvzip import Context, dtypes, get_codec
from kvzip.codecs import _native
from kvzip.codecs.common.rotation import ROUNDINGS
from kvzip.codecs.predictive import codec as predictive
from kvzip.codecs.predictive.codec import measure, native_model, new_chain
from kvzip.errors import CorruptError, KVZipError, UnsupportedError
from kvzip.layout import LayerLayout
from kvzip.selftest import instructions
from kvzip.testing import nearest_bits

PROFILES = {
    "plain": {},
    "lanes": {"group": 16, "lanes": 4, "regions": 3},
    "tables": {"lanes": 2, "regions": 2, "tables": (2, 1, 2)},
    "wild": {"group": 4, "lanes": 2, "regions": 2, "tables": (1, 2), "wild": True},
}


def profile_of(name, rounding=1):
    settings = PROFILES[name] | {"pairs": PAIRS, "side_by_side": rounding > 3}
    return random_profile(0, SHAPES, **settings)


def parts(found):
    return [
        (i, p, np.ascontiguousarray(part if part.ndim == 4 else part[np.newaxis]))
        for i, layer in enumerate(found.layers)
        for p, part in enumerate(layer)
    ]


def chains(profile, found, start):
    """The native chain and a plain one, before the first part."""
    form, ids = dtypes.get("bf16"), np.atleast_2d(found.token_ids)
    rows, tokens = ids.shape
    return (
        new_chain(native_model(profile), profile.tensors, rows, tokens, start, form, ids),
        Chain(profile.tensors, profile.description, rows, tokens, start, form, ids),
    )


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(
    ("start", "batch", "strange"), [(0, None, 0.1), (1 << 20, 2, 0.0), (3, 3, 1.0)]
)
@pytest.mark.drawn(12)
def test_native_code_is_what_the_page_says(name, rounding, start, batch, strange):
    """The same bytes, the same code length, and one reads what the other wrote; with pairs that
    nothing turns to, and numbers of any size among them."""
    profile = profile_of(name, rounding)
    found = turned_snapshot(1, 70, rounding, start, batch, strange)
    native, plain = chains(profile, found, start)
    by = angles(start, 70, rounding)
    modelled = []
    for i, p, block in parts(found):
        rotation = (by, rounding) if p == 0 else (None, 0)
        streams, bits = plain.model(i, p, block, *rotation)
        modelled.append(streams)
        assert native.model(i, p, block, *rotation) == pytest.approx(bits)
        native.keep()
    coded = native.encode()
    assert coded == plain.encode(modelled)
    assert {(data[0], data[2]) for data in coded[::2]} == {(4, rounding)}
    assert {(data[0], data[2]) for data in coded[1::2]} == {(3, 0)}
    native, plain = chains(profile, found, start)
    for (i, p, block), data in zip(parts(found), coded, strict=True):
        assert np.array_equal(plain.decode(i, p, data, by), block)
        out = np.empty_like(block)
        whole = np.frombuffer(data, np.uint8)
        native.decode(i, p, whole[:16], whole[16:], out, by if p == 0 else None)
        assert np.array_equal(out, block)
    assert plain.at_the_end()


@pytest.mark.parametrize("rounding", [1, 3, 4, 5, 6])
@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.drawn(3)
def test_the_same_bytes_by_all_instructions(name, rounding):
    profile = profile_of(name, rounding)
    found = turned_snapshot(2, 150, rounding, strange=0.1)
    before, made = _native.simd(), {}
    for simd in instructions():
        _native.set_simd(simd)
        try:
            made[simd] = kvzip.encode(found, "predictive", profile, block_tokens=100, threads=1)
            assert_same(kvzip.decode(made[simd], profile, threads=1), found)
        finally:
            _native.set_simd(before)
    assert len(set(made.values())) == 1


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_keys_that_were_turned_so_are_known(monkeypatch, rounding):
    """Files of caches that came about in another way stay as they were."""
    profile = profile_of("plain", rounding)
    found = turned_snapshot(3, 100, rounding)
    blob = encode(found, profile, monkeypatch, block_tokens=50)
    assert_same(kvzip.decode(blob, profile), found)
    assert all(kinds(blob, profile)[i, "k"] == {4} for i in range(3))
    assert all(kinds(blob, profile)[i, "v"] == {3} for i in range(3))
    with kvzip.open(blob, profile) as reader:
        rows = reader.index.rows[0, "k"][1:]
        assert {int(reader._blocks.stored(row)[2]) for row in rows} == {rounding}
    rng = np.random.default_rng(0)
    random = [tuple(random_bits(rng, "bf16", part.shape) for part in x) for x in found.layers]
    others = [
        with_rope(random, found.token_ids),
        turned_snapshot(3, 100, rounding, start=7),  # as if from other positions
        turned_snapshot(3, 100, (rounding + 2) % 6 + 1),  # and other pairs
        with_rope(found.layers, found.token_ids, rope=None),
        with_rope(found.layers, found.token_ids, kvzip.Origin()),
    ]
    for each in others:
        blob = encode(each, profile, monkeypatch, block_tokens=50)
        assert_same(kvzip.decode(blob, profile), each)
        assert set().union(*kinds(blob, profile).values()) == {3}


def test_blocks_of_every_kind(monkeypatch):
    """What others are predicted from is the same to reader and writer when keys that would have
    been coded as before RoPE are stored by `channel` or as they are."""
    profile, found = profile_of("tables"), turned_snapshot(4, 90)
    plain = {(0, "k"), (2, "k")}
    blob = encode(found, profile, monkeypatch, plain, block_tokens=40)
    found_kinds = kinds(blob, profile)
    assert found_kinds[1, "k"] == {4}
    assert not (found_kinds[0, "k"] | found_kinds[2, "k"]) & {3, 4}
    assert_same(kvzip.decode(blob, profile), found)
    with kvzip.open(blob, profile) as reader:
        cut = reader.tokens(30, 75)
    for a, b in zip(cut.layers, found.layers, strict=True):
        assert np.array_equal(a.k, b.k[:, 30:75]) and np.array_equal(a.v, b.v[:, 30:75])


def test_a_models_keys_take_less(monkeypatch):
    loaded = tiny_model("Llama", vocab_size=100, num_hidden_layers=4, head_dim=16)
    profile = kvzip.Profile.fit(documents(loaded, 12))
    unseen = documents(loaded, 1, tokens=300, seed=99)[0]
    blob = kvzip.encode(unseen, "predictive", profile)
    assert 4 in set().union(*kinds(blob, profile).values())
    spent = [bits for *_, bits, _ in measure(native_model(profile), profile.tensors, unseen)]
    with monkeypatch.context() as patch:
        patch.setattr("kvzip.codecs.predictive.rotation.rotation_of", lambda *_: None)
        without = kvzip.encode(unseen, "predictive", profile)
        more = [bits for *_, bits, _ in measure(native_model(profile), profile.tensors, unseen)]
    assert_same(kvzip.decode(without, profile), unseen)
    assert set().union(*kinds(without, profile).values()) <= {0, 2, 3}
    assert sum(spent[::2]) < 0.99 * sum(more[::2])
    assert len(blob) < 0.995 * len(without)


@examples(30)
@given(
    seed=st.integers(0, 1 << 32), tokens=st.integers(1, 400), constant=st.sampled_from([0, 5, 31])
)
def test_channel_is_tried_wherever_it_may_take_less(seed, tokens, constant):
    """What it is thought to take at least, it takes, of keys before RoPE and of channels with one
    number, too: otherwise a block could be larger than `channel` makes it."""
    found = rotated(seed % 1000, tokens)
    known = Context(dtypes.get("bf16"), 0, "k", 0, found.origin, rope=0, scratch={})
    keys = found.layers[0].block("k")
    rng = np.random.default_rng(seed)
    for k in (keys, random_bits(rng, "bf16", keys.shape)):
        k = np.array(k)
        some = rng.permutation(k.shape[3])[:constant]
        k[..., some] = random_bits(rng, "bf16", (1, k.shape[1], 1, len(some)))
        taken = len(predictive._plain(k, known))
        for enough in (math.inf, taken, 0.9 * taken, 0):  # all tokens tell, some, none
            least = get_codec("channel").least_bytes(k, known, enough)
            assert min(least, k.nbytes) <= taken


@examples(60)
@given(
    seed=st.integers(0, 1 << 32),
    dtype=st.sampled_from(["bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2"]),
    shape=st.tuples(*map(st.sampled_from, ([1, 3], [1, 2], [1, 7, 9, 64, 300], [1, 5, 64]))),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    spread=st.booleans(),
)
def test_channel_takes_no_less_than_is_thought(seed, dtype, shape, share, spread):
    """Of every format, of channels with one number, and of numbers that lie apart; what fewer
    tokens tell is no more than what all tell."""
    rng = np.random.default_rng(seed)
    k = (cache_like if seed % 2 else random_bits)(rng, dtype, shape)
    k = np.where(rng.random(shape[3]) < share, k[:1, :, :1], k)
    if spread:
        k = np.repeat(k, 2, axis=3).transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)[..., ::2]
    known = Context(dtypes.get(dtype), 0, "v", 0, kvzip.Origin(), scratch={})
    taken = len(predictive._plain(k, known))
    thought = [
        get_codec("channel").least_bytes(k, known, enough)
        for enough in (0, 0.5 * taken, taken, 1.1 * taken, math.inf)
    ]
    assert max(thought) <= thought[-1] * (1 + 1e-12)
    assert min(thought[-1], k.nbytes) <= taken


def in_format(snapshot, dtype):
    layers = []
    for layer in snapshot.layers:
        k, v = (nearest_bits(dtypes.to_float64(part, "bf16"), dtype) for part in layer)
        form = LayerLayout.of_kv(k.shape, v.shape, dtype, snapshot.tokens, "full", None, 0)
        layers.append(kvzip.Layer.of_kv(k, v, form))
    return kvzip.Snapshot(layers, dtype, snapshot.token_ids, snapshot.origin)


def side_by_side(snapshot):
    """The same numbers of a model whose pairs i and i + pairs are 2i and 2i + 1."""
    pairs = len(snapshot.origin.rope[0]["inv_freq"])
    layers = []
    for layer in snapshot.layers:
        order = np.arange(layer.k.shape[-1])
        order[: 2 * pairs] = order[: 2 * pairs].reshape(2, pairs).T.reshape(-1)
        layers.append(kvzip.Layer.of_kv(layer.k[..., order], layer.v, layer.layout))
    return kvzip.Snapshot(layers, snapshot.dtype, snapshot.token_ids, snapshot.origin)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn"])
def test_pairs_side_by_side_are_the_same_pairs_elsewhere(dtype):
    """Whatever keys are in, their pairs are found when a profile is learned; files take what they
    would of the same numbers elsewhere, and less than by a profile of other pairs."""
    found = [in_format(rotated(seed, 200, layers=3), dtype) for seed in range(6)]
    others = [side_by_side(snapshot) for snapshot in found]
    profile, other = (kvzip.Profile.fit(some[:5]) for some in (found, others))
    assert profile.description["version"] == 1 and other.description["version"] == 2
    halves, paired, wrong = (
        kvzip.encode(snapshot, "predictive", by)
        for snapshot, by in ((found[5], profile), (others[5], other), (others[5], profile))
    )
    assert_same(kvzip.decode(paired, other), others[5])
    assert abs(len(halves) - len(paired)) < 0.001 * len(halves)
    assert len(paired) < 0.95 * len(wrong)
    assert kinds(paired, other)[1, "k"] == {4 if dtype == "bf16" else 3}


@pytest.mark.parametrize("name", ["plain", "tables"])
def test_a_profile_of_other_pairs_refuses_a_block(name):
    """Of a rounding whose pairs are not the profile's."""
    for rounding in (1, 4):
        profile, found = profile_of(name, rounding), turned_snapshot(5, 40, rounding)
        native, _ = chains(profile, found, 0)
        _, _, block = parts(found)[0]
        with pytest.raises(ValueError, match="not the profile's"):
            native.model(0, 0, block, angles(0, 40), 5 - rounding)


def test_orders_that_are_no_pairs():
    """Pairs of either kind, and not of both."""
    profile = profile_of("plain", 4)
    order = profile.tensors["0.order"]
    assert all(order[1:6:2] == order[:6:2] + 1)
    for change in ([1, 0], [2, 1], [0, PAIRS], [5, 6]):
        tensors = dict(profile.tensors)
        changed = order.copy()
        at = [int(np.nonzero(order[: 2 * 12] == c)[0][0]) for c in change]
        changed[:2], changed[at] = change, order[:2]
        with pytest.raises(kvzip.ProfileError):
            native_model(kvzip.Profile(tensors | {"0.order": changed}, profile.description))


def context(profile, rope=0, form="bf16", part="k", origin=ORIGIN):
    return Context(dtypes.get(form), 0, part, 0, origin, None, profile, scratch={}, rope=rope)


@pytest.fixture(scope="module", params=ROUNDINGS)
def coded(request):
    """A block of keys before RoPE."""
    rounding = request.param
    profile, found = profile_of("plain", rounding), turned_snapshot(5, 40, rounding)
    native, _ = chains(profile, found, 0)
    for i, p, block in parts(found):
        native.model(i, p, block, *((angles(0, 40, rounding), rounding) if p == 0 else ()))
        native.keep()
    return profile, found.layers[0].block("k"), native.encode()[0]


def test_a_header_must_say_how_keys_are_turned(coded):
    profile, block, data = coded
    codec, out = get_codec("predictive"), np.empty_like(block)
    known = context(profile)
    codec.decode(memoryview(data), out, known)
    assert np.array_equal(out, block)
    wrong = kvzip.Origin(rope=({"inv_freq": [1.0, 0.5]},))
    endless = kvzip.Origin(rope=(ORIGIN.rope[0] | {"attention_scaling": 1e30},))
    for origin, rope in (
        (kvzip.Origin(), None),
        (ORIGIN, None),
        (ORIGIN, 1),
        (wrong, 0),
        (endless, 0),
    ):
        with pytest.raises(CorruptError):
            codec.decode(memoryview(data), out, context(profile, rope, origin=origin))


@pytest.mark.parametrize("head", [(4, 0), (4, 7), (3, 1), (5, 1), (4, -3)])
def test_heads_that_make_no_sense(coded, head):
    profile, block, data = coded
    # -3: pairs that are not the profile's.
    rounding = head[1] if head[1] >= 0 else (data[2] + 2) % 6 + 1
    data = bytes([head[0], data[1], rounding]) + data[3:]
    with pytest.raises(CorruptError if head in ((3, 1), (4, -3)) else UnsupportedError):
        get_codec("predictive").decode(memoryview(data), np.empty_like(block), context(profile))


def test_only_keys_of_bf16(coded):
    profile, block, data = coded
    wide = block.astype(np.uint32)
    for form, part, out in (("bf16", "v", block), ("fp16", "k", block), ("fp32", "k", wide)):
        with pytest.raises(CorruptError):
            get_codec("predictive").decode(
                memoryview(data),
                np.empty_like(out),
                context(profile, form=form, part=part),
            )


@given(data=st.data())
@examples(60)
def test_damage_never_gives_other_numbers_or_a_crash(coded, data):
    profile, block, whole = coded
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(whole), len(whole) - 4, 20, 3, 0]))
    damaged = bytearray(whole)
    damaged[at] = byte
    out = np.empty_like(block)
    try:
        get_codec("predictive").decode(memoryview(bytes(damaged[:cut])), out, context(profile))
    except KVZipError:
        pass  # what is damaged and fits all the same, a file's checksum of the numbers tells
    else:
        assert bytes(damaged[:cut]) != whole or np.array_equal(out, block)
