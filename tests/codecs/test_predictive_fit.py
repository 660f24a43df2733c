"""Learning a profile, and the codec's arithmetic against a second account of it."""

from __future__ import annotations

import itertools
import json
import tracemalloc

import msgspec
import numpy as np
import pytest
from predictive_profiles import encode, random_profile
from predictive_reference import Chain
from support import assert_same, cache_like, random_bits, tiny_model
from support import tiny_documents as documents

import kvzip
from kvzip import dtypes
from kvzip.capture import prefill
from kvzip.codecs.predictive import allotment, input_layers
from kvzip.codecs.predictive import layers as fitted_layers
from kvzip.codecs.predictive.codec import native_model, new_chain
from kvzip.codecs.predictive.density import Chooser, cell_edges, densities
from kvzip.codecs.predictive.documents import Documents, Vocabulary
from kvzip.codecs.predictive.groups import arrange, default_group, default_lanes, starts
from kvzip.codecs.predictive.layer_inputs import Known
from kvzip.codecs.predictive.regions import Scores, find
from kvzip.codecs.predictive.regression import SHRINK_TOKENS, Sums, round_weights
from kvzip.errors import ProfileError, UsageError
from kvzip.snapshot import Layer, Snapshot
from kvzip.statistics.gaussian import cholesky, conditional


def tiny(kind="Llama", **more):
    return tiny_model(kind, **{"vocab_size": 100, "num_hidden_layers": 4, "head_dim": 16} | more)


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.fixture(scope="module")
def learned(llama):
    return documents(llama, 12)


@pytest.fixture(scope="module")
def regions(learned):
    return kvzip.Profile.fit(learned, regions=3)


# --- the arithmetic ----------------------------------------------------------------------------


def chains(profile, snapshot, start=0):
    form = dtypes.get(snapshot.dtype)
    ids = None if snapshot.token_ids is None else np.atleast_2d(snapshot.token_ids)
    rows = snapshot.layers[0].k.shape[0] if snapshot.layers[0].k.ndim == 4 else 1
    tokens = snapshot.layers[0].layout.stored
    native = new_chain(native_model(profile), profile.tensors, rows, tokens, start, form, ids)
    return native, [
        Chain(profile.tensors, profile.description, rows, tokens, start, form, ids)
        for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        ("Llama", "bf16", {}),
        ("Gemma3Text", "bf16", {"regions": 3, "group": 6}),
        ("Phi", "fp16", {"regions": [1, 2, 5, 1], "group": 32}),
        ("Llama", "fp8_e4m3fn", {"regions": 2, "token_table": False, "group": 2}),
        ("GPT2", "fp8_e5m2", {}),
    ],
)
@pytest.mark.drawn(3)
def test_native_code_is_what_the_page_says(kind, dtype, settings):
    """The same bytes, the same code length, and one reads what the other wrote."""
    more = {"n_embd": 32, "n_head": 4, "n_layer": 4} if kind == "GPT2" else {}
    loaded = tiny(kind, **more)
    profile = kvzip.Profile.fit(documents(loaded, 6, 120, dtype=dtype), **settings)
    snapshot = documents(loaded, 1, tokens=70, seed=9, dtype=dtype)[0]
    coded = check_chains(profile, snapshot)
    reader = chains(profile, snapshot)[1][0]
    for (i, p, block), data in coded:
        assert np.array_equal(reader.decode(i, p, data), block)
    assert reader.at_the_end()


def check_chains(profile, snapshot, start=0):
    """Both accounts model and code a snapshot alike; what they made of each part."""
    native, (writer, _) = chains(profile, snapshot, start)
    measured = chains(profile, snapshot, start)[0]
    parts = [
        (i, p, np.ascontiguousarray(part if part.ndim == 4 else part[np.newaxis]))
        for i, layer in enumerate(snapshot.layers)
        for p, part in enumerate(layer)
    ]
    modelled = []
    for i, p, block in parts:
        streams, bits = writer.model(i, p, block)
        modelled.append(streams)
        assert native.model(i, p, block) == pytest.approx(bits)
        native.keep()
        counts, spent = measured.measure(i, p, block)
        assert spent == pytest.approx(bits) and counts.sum() == block.size
    coded = native.encode()
    assert coded == writer.encode(modelled)
    return list(zip(parts, coded, strict=True))


def test_a_batch_from_a_later_position(regions, llama):
    rng = np.random.default_rng(1)
    snapshot = prefill(llama, rng.integers(0, 100, (2, 70), np.uint32))
    check_chains(regions, snapshot, start=1 << 20)


@pytest.mark.parametrize("seed", range(3))
def test_any_layers_before_it_predict_a_layer(monkeypatch, seed):
    shapes = [
        ((1, 8), (1, 6)),
        ((2, 4), (1, 4)),
        ((1, 6), (1, 2)),
        ((1, 4), (2, 4)),
        ((1, 8), (1, 8)),
    ]
    profile = random_profile(seed, shapes, lanes=2, pairs=2, regions=2, far=True)
    rng = np.random.default_rng(seed)
    snapshot = Snapshot.from_arrays(
        [tuple(cache_like(rng, "bf16", (h, 40, d)) for h, d in layer) for layer in shapes], "bf16"
    )
    check_chains(profile, snapshot)
    blob = encode(snapshot, profile, monkeypatch, block_tokens=16)
    assert_same(kvzip.decode(blob, profile), snapshot)
    with kvzip.open(blob, profile) as reader:
        for i in (4, 2, 3):
            assert np.array_equal(reader.layer(i).k, snapshot.layers[i].k)
        cut = reader.tokens(20, 37)
    assert all(
        np.array_equal(a.v, b.v[:, 20:37]) for a, b in zip(cut.layers, snapshot.layers, strict=True)
    )


def test_numbers_that_nothing_expects(regions, llama):
    """Infinities, NaNs, zeros, subnormals: most of them escape."""
    rng = np.random.default_rng(2)

    def strange(k, v):
        for a in (k, v):
            flat = a.reshape(-1)
            at = rng.integers(0, flat.size, flat.size // 5)
            flat[at] = rng.choice([0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FFF, 0xFFFF], len(at))

    snapshot = spoiled(documents(llama, 1, tokens=70, seed=3)[0], strange)
    coded = check_chains(regions, snapshot)
    native, (reader, _) = chains(regions, snapshot)
    for (i, p, block), data in coded:
        out = np.empty_like(block)
        stored = np.frombuffer(data, np.uint8)
        native.decode(i, p, stored[:16], stored[16:], out)
        assert np.array_equal(out, block)
        assert np.array_equal(reader.decode(i, p, data), block)


def test_headers_and_states_that_make_no_sense(regions, llama):
    snapshot = documents(llama, 1, tokens=70, seed=4)[0]
    ((i, p, block), data), *_ = check_chains(regions, snapshot)
    native, (reader, _) = chains(regions, snapshot)
    stored = np.frombuffer(data, np.uint8)
    out = np.empty_like(block)
    native.decode(i, p, stored[:16], stored[16:], out)
    assert np.array_equal(out, block)

    def refused(changed):
        fresh, found = chains(regions, snapshot)[0], np.frombuffer(bytes(changed), np.uint8)
        with pytest.raises(ValueError, match="its words do not fit"):
            fresh.decode(i, p, found[:16], found[16:], np.empty_like(block))

    refused(data[:10])
    # Another kind, counts of too many bits, none at all, no zeros, another sum; a bit behind them.
    changes = [(0, 1), (0, 2), (1, 18), (1, 255), (1, 0), (2, 1), (3, 128), (4, data[4] ^ 1)]
    for at, value in [*changes, (7, data[7] ^ 0x80), (15, data[15] | 0x80)]:
        changed = bytearray(data)
        changed[at] = value
        refused(changed)
    states, rest = reader.taken(data[16:])
    assert reader.stored(states) == data[16 : len(data) - len(rest)]
    for x in (0, 1, (1 << 31) - 1, 1 << 63, (1 << 64) - 1):
        refused(data[:16] + reader.stored([[x], *states[1:]]) + rest)
    # A byte more than the state has, and lengths of states that there are not.
    short = [[1 << 31]] * len(states)
    plain = reader.stored(short)
    for at, more in ((5 * 70, 1), (5 * 70 + 17, 1 << 4)):
        changed = bytearray(plain)
        changed[at] |= more
        refused(data[:16] + changed + rest)
    refused(data[:16] + plain[: 5 * 70])


# --- the pieces --------------------------------------------------------------------------------


def test_rounding_with_feedback_loses_less():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 150)) @ rng.normal(size=(150, 150))
    weights = rng.normal(size=(150, 20))
    rounded, scale, _ = round_weights(weights, cholesky(x.T @ x), 4000, np.ones(20), 0.0)
    plain = np.rint(weights / scale) * scale
    error = [((x @ (w - weights)) ** 2).sum() for w in (rounded * scale, plain)]
    assert error[0] < 0.5 * error[1]


def test_coarse_weights_cost_what_they_may():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 150)) @ rng.normal(size=(150, 150))
    weights = rng.normal(size=(150, 20))
    left = 10 ** rng.uniform(2, 4, 20)
    finest = np.abs(weights).max(axis=0) / 127
    for cost in (0.01, 0.1, 0.4):
        rounded, scale, added = round_weights(weights, cholesky(x.T @ x), 4000, left, cost)
        seen = ((x @ (rounded * scale - weights)) ** 2).mean(axis=0)
        assert np.median(seen / added) == pytest.approx(1, abs=0.15)
        spent = np.log2(1 + added / left) / 2
        coarse = scale > finest
        assert coarse.sum() > 10
        assert spent[coarse] == pytest.approx(cost, rel=1e-3)
        assert (spent[~coarse] >= cost).all()


def test_within_leaves_what_nothing_before_explains():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 12))
    covariance = root @ root.T + 9 * np.eye(12)
    coefficients, variance, shared = conditional(cholesky(covariance), [(0, 1), (4, 5)])
    left = (np.eye(12) - coefficients) @ covariance @ (np.eye(12) - coefficients).T
    assert np.allclose(np.triu(coefficients), 0)
    assert coefficients[1, 0] == coefficients[5, 4] == 0
    assert np.allclose(np.diag(left), variance, rtol=1e-3)
    assert np.allclose([left[0, 1], left[4, 5]], shared, atol=1e-2)
    # A pair's second is told by the first what is still shared; nothing else is.
    for a, b in ((0, 1), (4, 5)):
        left[b] -= left[a, b] / left[a, a] * left[a]
    assert np.allclose(np.tril(left, -1), 0, atol=1e-2)


def lost(covariance, places, ends):
    """Nats that channels of a group lose by not seeing each other, given the groups before."""
    found, ordered = 0.0, covariance[np.ix_(places, places)]
    for a, b in itertools.pairwise(ends):
        said = np.linalg.solve(ordered[:a, :a], ordered[:a, a:b]) if a else np.zeros((0, b - a))
        left = ordered[a:b, a:b] - ordered[a:b, :a] @ said
        found += (np.log(np.diag(left)).sum() - np.linalg.slogdet(left)[1]) / 2
    return found


@pytest.mark.parametrize("group", [2, 6, 8, 64])
def test_channels_of_a_group_are_those_that_tell_least_of_each_other(group):
    rng = np.random.default_rng(0)
    # Neighbours are alike, as a model's channels are.
    near = np.exp(-np.abs(np.subtract.outer(np.arange(44), np.arange(44))) / 3)
    covariance = near * np.outer(*[rng.uniform(0.5, 3, 44)] * 2)
    pairs, keys = [(4 * i, 4 * i + 1) for i in range(5)], 21
    places = arrange(covariance, pairs, keys, group)
    assert sorted(places) == list(range(44))
    assert sorted(zip(places[:10:2], places[1:10:2], strict=True)) == pairs
    assert set(places[:keys]) == set(range(keys))
    turned = [c for pair in pairs for c in pair]
    natural = turned + [c for c in range(keys) if c not in turned] + list(range(keys, 44))
    ends = starts((keys, 44 - keys), group)
    assert (ends[0], ends[-1]) == (0, 44) and keys in ends
    if 2 < group < 20:  # with larger ones there is little to choose
        assert lost(covariance, places, ends) < 0.8 * lost(covariance, natural, ends)


@pytest.mark.parametrize("widths", [[16], [384] * 30, [2048] * 36, [8192] * 80, [2048, 65536]])
def test_a_stream_counts_its_words(widths):
    group = default_group(max(widths))
    lanes = default_lanes(widths, group)
    assert 1 <= lanes <= group // 2 and lanes & (lanes - 1) == 0
    # Keys or values, a half of a layer's channels, by groups.
    pairs = -(-(group // 2) // lanes)
    assert 32 * 2 * pairs * -(-(max(widths) // 2) // group) <= 65535


def test_regions_that_are_there_are_found():
    """Tokens of two kinds with predictors of their own: two regions predict both."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 8000)
    x = rng.normal(0, 15, (8000, 12))
    x[:, 0] += np.where(kind, 60, -60)
    x = np.clip(np.rint(x), -127, 127).astype(np.int8)
    maps = rng.normal(size=(2, 12, 8))
    y = np.einsum("ti,tio->to", x.astype(float), maps[kind]) + rng.normal(size=(8000, 8))
    mean, deviation = y.mean(0).astype(np.float32), y.std(0).astype(np.float32)

    def learn(scores, regions):
        sums = Sums(12, mean, deviation, regions, 2)
        owner = scores.regions(x) if scores else np.zeros(8000, int)
        for r in range(regions):
            for f in range(2):
                mine = (owner == r) & (np.arange(8000) % 2 == f)
                sums.add(r, f, x[mine], y[mine].astype(np.float32))
        return sums

    one = learn(None, 1)
    total = one.total.sum(axis=(0, 1)).astype(float)
    weights = one.solve(total)
    scores = find(x, weights[1:] / 16, one.left(weights, total) / 8000, 2)
    assert scores.centre.dtype == np.int8 and scores.bias.dtype == np.int32
    owner = scores.regions(x)
    assert max((owner == kind).mean(), (owner != kind).mean()) > 0.9
    made, saved = learn(scores, 2).predictors(0.0)
    assert saved > 0.5
    off = np.concatenate(
        [
            (x[owner == r] @ (p.rounded * p.scale) + p.bias) * deviation + mean - y[owner == r]
            for r, p in enumerate(made)
        ]
    )
    assert off.std() < 0.5 * (x @ (weights[1:] / 16) * deviation - y).std()


def test_noise_has_no_regions():
    rng = np.random.default_rng(0)
    x = rng.integers(-60, 60, (600, 40)).astype(np.int8)
    y = rng.normal(size=(600, 6)).astype(np.float32)
    sums = Sums(40, y.mean(0), y.std(0), 4, 2)
    owner = Scores(rng.normal(size=(40, 4)), np.zeros(4)).regions(x)
    for r in range(4):
        for f in range(2):
            mine = (owner == r) & (np.arange(600) % 2 == f)
            sums.add(r, f, x[mine], y[mine])
    assert sums.predictors(0.0)[1] < 0.02


def test_one_fold_alone_counts_for_itself():
    """Its own tokens stand in for those of the others, and are in no sum twice."""
    rng = np.random.default_rng(0)
    x = rng.integers(-60, 60, (600, 40)).astype(np.int8)
    y = rng.normal(size=(600, 6)).astype(np.float32)
    for r in range(2):
        y[r::2] += x[r::2] @ rng.normal(size=(40, 6)).astype(np.float32)
    sums = Sums(40, y.mean(0), y.std(0), 2, 2)
    for r in range(2):
        sums.add(r, 0, x[r::2], y[r::2])
    whole = sums.total.sum(axis=(0, 1))
    made, _ = sums.predictors(0.0)
    for r, predictor in enumerate(made):
        own = sums.total[r].sum(axis=0) + whole * np.float32(SHRINK_TOKENS / 600)
        wanted = sums.solve(own)[1:] / 16
        weights = predictor.rounded * predictor.scale
        assert np.abs(weights - wanted).max() < predictor.scale.max() * 4
        constant = (own[0, 41:] - own[0, 1:41] @ (weights * 16)) / own[0, 0]
        assert predictor.bias == pytest.approx(constant, abs=1e-4)


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0])
def test_scale_and_shape_are_recovered(factor):
    edges, choose = cell_edges(), Chooser()
    _, shares = densities()
    z = np.abs(np.random.default_rng(0).standard_t(4, 200_000)) * factor
    z /= np.abs(np.random.default_rng(0).standard_t(4, 200_000)).mean()
    counts = np.histogram(z, edges)[0][np.newaxis]
    found, shape = choose(counts)
    assert found[0] == pytest.approx(factor, rel=0.08)
    assert fitting_shape(shape[0]) in (3.0, 4.0, 5.0)
    # Entropy of the cells under what was chosen, against their own.
    assert shares.shape[1] == len(edges) - 1


def fitting_shape(i):
    from kvzip.codecs.predictive.density import SHAPES

    return SHAPES[i]


# --- which layers predict a layer -----------------------------------------------------------------


def related(seed, says, tokens=400, noise=0.1):
    """A document of six layers without RoPE: each has numbers of its own, but the last one has
    those of the layers in `says`, mixed."""
    rng, mixes = np.random.default_rng(seed), np.random.default_rng(0)
    layers = [rng.normal(size=(tokens, 16)) for _ in range(6)]
    mixed = sum(layers[a] @ mixes.normal(size=(16, 16)) for a in range(5) if a in says)
    layers[5] = mixed + noise * layers[5]
    arrays = [
        (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)[None]
        for x in layers
    ]
    return kvzip.Snapshot.from_arrays([(x[..., :8], x[..., 8:]) for x in arrays], "bf16")


@pytest.mark.parametrize("directions", [None, 12])
@pytest.mark.parametrize("says", [(1, 2, 3), (0, 2, 4), (2,)])
def test_the_layers_that_say_most_are_chosen(monkeypatch, says, directions):
    if directions is not None:  # of a layer, fewer than it has channels
        monkeypatch.setattr(input_layers, "DIRECTIONS", 6 * directions)
    learned = [related(seed, says) for seed in range(8)]
    profile = kvzip.Profile.fit(learned, token_table=False)
    inputs = [layer["inputs"] for layer in profile.description["layers"]]
    assert inputs[:4] == [[], [0], [0, 1], [0, 1, 2]]
    assert len(inputs[5]) == 3 and set(says) <= set(inputs[5])
    snapshot = related(9, says)
    blob = kvzip.encode(snapshot, "predictive", profile)
    assert_same(kvzip.decode(blob, profile), snapshot)
    with monkeypatch.context() as patch:
        patch.setattr(
            input_layers.InputLayers, "choose", lambda self, layer, *_: [[], [0]][layer > 0]
        )
        least = kvzip.Profile.fit(learned, token_table=False)
    assert len(blob) < 0.96 * len(kvzip.encode(snapshot, "predictive", least))


def test_where_nothing_says_anything_the_usual_layers_are_taken():
    """What was chosen by chance must hold for tokens apart."""
    usual = 0
    for seed in range(4):
        read = Documents([related(100 * seed + n, (), noise=1) for n in range(8)])
        mean, deviation = np.zeros(16, np.float32), np.ones(16, np.float32)
        earlier = [Known(mean, deviation, np.arange(16))] * 5
        found = input_layers.InputLayers(read).choose(5, earlier, mean, deviation)
        assert len(found) == 3
        usual += found == [0, 3, 4]
    assert usual


# --- the whole -----------------------------------------------------------------------------------


def test_few_documents_get_one_region(learned):
    profile = kvzip.Profile.fit(learned)
    counts = [len(profile.tensors[f"{i}.bias"]) for i in range(4)]
    assert counts == [1, 1, 1, 1]
    assert all(0 < b < 16 for b in profile.description["calibration_bits"])


def test_few_documents_are_calibrated_over_themselves(learned):
    """So no bits are told that might be taken for those of other documents."""
    few = kvzip.Profile.fit(learned[:7]).description
    assert few["documents"] == 7
    assert "calibration_bits" not in few
    assert kvzip.Profile.fit(learned[:8]).description["documents"] == 7


def test_one_document_of_few_tokens(llama):
    snapshot = documents(llama, 1, tokens=6)[0]
    profile = kvzip.Profile.fit([snapshot])
    assert_same(kvzip.decode(kvzip.encode(snapshot, "predictive", profile), profile), snapshot)


def test_bytes_are_kept_to(learned, monkeypatch):
    monkeypatch.setattr(allotment, "MOST_REGIONS", 6)
    read = Documents(learned)
    read.tokens = 10**6
    one = allotment.file_bytes(read, [1] * 4, 0, allotment.ROUNDING)
    for budget in (one, one + 60_000, 10**9):
        found = allotment.allot(read, "auto", budget, None)
        assert allotment.file_bytes(read, found.regions, 0, allotment.ROUNDING) <= budget
        assert (max(found.regions) > 1) == (budget > one)
        assert found.rounding == allotment.ROUNDING
    assert found.regions == [1, 6, 6, 6]
    read.tokens = 2000
    assert allotment.allot(read, "auto", 10**9, None).regions == [1, 1, 1, 1]


def test_few_bytes_have_coarser_weights_and_know_fewer_tokens(learned):
    read = Documents(learned)
    vocabulary = Vocabulary(read)
    tokens = len(vocabulary.ids)
    all_of_it = allotment.file_bytes(read, [1] * 4, tokens, allotment.ROUNDING)
    found = allotment.allot(read, "auto", all_of_it, vocabulary)
    assert found == ([1] * 4, tokens, allotment.ROUNDING)
    least = allotment.least_bytes(read)
    for budget in [*range(all_of_it - 1, least, -(all_of_it - least) // 50), least]:
        found = allotment.allot(read, "auto", budget, vocabulary)
        assert found.regions == [1] * 4
        assert found.rows <= tokens and found.rounding >= allotment.ROUNDING
        assert allotment.file_bytes(read, [1] * 4, found.rows, found.rounding) <= budget
    assert found.rows == 0 and found.rounding == pytest.approx(allotment.MOST_ROUNDING, rel=1e-3)


def test_a_small_profile_still_loses_nothing(learned):
    sizes = []
    whole = kvzip.Profile.fit(learned)
    read = Documents(learned)
    half = allotment.file_bytes(read, [1] * 4, len(whole.tensors["token_ids"]) // 2, 0.05)
    for budget in (half, allotment.least_bytes(read)):
        profile = kvzip.Profile.fit(learned, max_bytes=budget)
        known = len(profile.tensors.get("token_ids", ()))
        assert known < len(whole.tensors["token_ids"])
        for snapshot in learned[:2]:
            encoded = kvzip.encode(snapshot, "predictive", profile)
            assert_same(kvzip.decode(encoded, profile), snapshot)
        sizes.append(profile.nbytes)
    assert whole.nbytes > sizes[0] > sizes[1]


def test_too_few_bytes_are_told_before_anything_is_learned(learned):
    told = []

    def progress(what, done, total):
        told.append(what)

    for vocabulary in (True, False):
        least = allotment.least_bytes(Documents(learned))
        for few in (0, 10, least - 1):
            with pytest.raises(UsageError, match=f"up to about {least:,}. Allow"):
                kvzip.Profile.fit(learned, progress, max_bytes=few, token_table=vocabulary)
    assert not told
    # About: weights of so small a model are finer than their cost would have them.
    assert kvzip.Profile.fit(learned, max_bytes=least).nbytes < least + 15_000


def test_weights_are_counted_by_their_steps():
    """A bit less for steps twice as wide, which is what `round_weights` makes of a cost."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 1, (32, 8)).astype(np.float32)
    costs = (allotment.ROUNDING, 0.05, 0.2, allotment.MOST_ROUNDING)
    found = [
        round_weights(weights, np.eye(32, dtype=np.float32), 1.0, np.full(8, 9.0), cost)[1]
        for cost in costs
    ]
    for cost, scale in zip(costs, found, strict=True):
        fewer = allotment.WEIGHT_BITS - allotment.weight_bits(cost)
        assert np.log2(scale / found[0]) == pytest.approx(fewer, abs=1e-4)
        assert allotment._rounding(fewer) == pytest.approx(cost)


@pytest.mark.parametrize("shape", [(2, 8), (4, 16), (6, 32)])
def test_what_is_no_matrix_is_counted_well(shape):
    """Names, tables and vectors; how well matrices pack shows only in the end."""
    layers, dim = shape
    snapshots = documents(tiny(num_hidden_layers=layers, head_dim=dim), 3)
    read = Documents(snapshots)
    profile = kvzip.Profile.fit(snapshots, token_table=False, regions=1)
    length = int.from_bytes(profile.file[:8], "little")
    entries = json.loads(profile.file[8 : 8 + length])
    del entries["__metadata__"]
    packs = ("weight", "within", "pair_inverse", "pair_slope")
    packed = sum(
        end - begin
        for name, entry in entries.items()
        for begin, end in [entry["data_offsets"]]
        if name.partition(".")[2] in packs
    )
    vectors = sum(16 * width for width in read.widths)  # of the one region
    counted = allotment.fixed_bytes(read) + vectors
    assert counted == pytest.approx(profile.nbytes - packed, rel=0.03)


def test_a_limit_that_would_not_be_kept_to_is_refused(learned):
    """So many regions take what they take."""
    with pytest.raises(UsageError, match="give it or regions"):
        kvzip.Profile.fit(learned, regions=2, max_bytes=10**9)
    whole = kvzip.Profile.fit(learned, regions="auto", max_bytes=None)
    assert whole.id == kvzip.Profile.fit(learned).id


def test_a_wide_model_has_the_smallest_profile_where_nothing_is_said(learned, monkeypatch):
    least = kvzip.Profile.fit(learned, max_bytes=allotment.least_bytes(Documents(learned)))
    monkeypatch.setattr("kvzip.codecs.predictive.fit.DEFAULT_BYTES", 1000)
    assert kvzip.Profile.fit(learned).id == least.id


def test_the_budget_is_the_files(learned):
    profile = kvzip.Profile.fit(learned, regions=4)
    read = Documents(learned)
    counts = [len(profile.tensors[f"{i}.bias"]) for i in range(4)]
    bound = sum(c * allotment.region_bytes(read, i, True) for i, c in enumerate(counts))
    tables = sum(a.nbytes for n, a in profile.tensors.items() if n.endswith("table"))
    assert profile.nbytes < bound + tables + 30_000


def trained_on(document):
    """What a model makes of a document whose last layer is another."""
    layers = [Layer(dict(layer.parts), layer.layout) for layer in document.layers]
    layers[-1].k = layers[-1].k ^ np.uint16(1)
    return Snapshot(layers, document.dtype, document.token_ids, document.origin)


def turned_otherwise(document):
    """The same numbers, turned by other frequencies before."""
    rope = tuple(each | {"inv_freq": [0.5] * 8} for each in document.origin.rope)
    origin = msgspec.structs.replace(document.origin, rope=rope)
    return Snapshot(document.layers, document.dtype, document.token_ids, origin)


def test_it_goes_on_where_it_was_ended(learned, tmp_path):
    whole = kvzip.Profile.fit(learned, regions=2)
    folder = tmp_path / "kept"

    class Ended(Exception):
        pass

    def stop(what, done, total):
        if what == "layers" and done == 2:
            raise Ended

    with pytest.raises(Ended):
        kvzip.Profile.fit(learned, progress=stop, regions=2, resume=folder)
    seen = []
    profile = kvzip.Profile.fit(
        learned, progress=lambda *a: seen.append(a[:2]), regions=2, resume=folder
    )
    done = [d for what, d in seen if what == "regressions"]
    assert min(done) == 2 * 11 + 1 and max(done) == 4 * 11
    read = [d for what, d in seen if what == "documents read"]
    assert read == [*range(1, len(learned) + 1)]
    assert profile.id == whole.id
    (folder / "layer-003.safetensors").write_bytes(b"cut")
    assert kvzip.Profile.fit(learned, regions=2, resume=folder).id == whole.id
    with pytest.raises(ProfileError, match="regions=2, not 3"):
        kvzip.Profile.fit(learned, regions=3, resume=folder)
    with pytest.raises(ProfileError, match="other documents"):
        kvzip.Profile.fit([*learned[1:], learned[0]], regions=2, resume=folder)
    for other in (trained_on(learned[4]), turned_otherwise(learned[4])):
        changed = [*learned[:4], other, *learned[5:]]
        with pytest.raises(ProfileError, match="other documents"):
            kvzip.Profile.fit(changed, regions=2, resume=folder)
    (folder / "fit.json").write_text("{")
    with pytest.raises(ProfileError, match="damaged"):
        kvzip.Profile.fit(learned, regions=2, resume=folder)


def test_samples_of_long_documents_take_no_more_memory_for_more_of_them(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{n}.safetensors" for n in range(16)]
    for path in paths:
        k, v = (random_bits(rng, "bf16", (2, 10_000, 8)) & 0x3FFF for _ in "kv")
        kvzip.Snapshot.from_arrays([(k, v)] * 2, "bf16").save(path)

    def peak(count):
        documents_ = Documents([kvzip.Snapshot.load(path) for path in paths[:count]])
        choice = input_layers.InputLayers(documents_)
        tracemalloc.start()
        fitted_layers._moments(documents_, 1)
        choice._values(1)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(16) < 1.5 * peak(4)


@pytest.mark.parametrize("group", [0, 1, 7, 66])
def test_groups_that_make_no_sense(learned, group):
    with pytest.raises(ProfileError, match="group"):
        kvzip.Profile.fit(learned, group=group)


@pytest.mark.parametrize("regions", [0, 257, [1, 2], [1, 2, 0, 1]])
def test_regions_that_make_no_sense(learned, regions):
    with pytest.raises(ProfileError, match="regions"):
        kvzip.Profile.fit(learned, regions=regions)


def test_calibration_leaves_something_to_learn_from(learned):
    with pytest.raises(ProfileError, match="kept apart"):
        kvzip.Profile.fit(learned[:2], calibration=2)


def spoiled(snapshot, change):
    layers = []
    for layer in snapshot.layers:
        k, v = layer.k.copy(), layer.v.copy()
        change(k, v)
        layers.append(Layer.of_kv(k, v, layer.layout))
    return Snapshot(layers, snapshot.dtype, snapshot.token_ids, snapshot.origin)


def test_strange_training_documents_do_little_harm(learned, llama):
    """Infinities, NaNs, huge numbers and dead channels in some of the documents."""
    rng = np.random.default_rng(0)

    def strange(k, v):
        for a in (k, v):
            flat = a.reshape(-1)
            flat[rng.integers(0, flat.size, 4)] = [0x7F80, 0xFF80, 0x7FC0, 0x7F00]
            a[..., 3] = 0x3F80

    documents_ = [spoiled(d, strange) if i % 4 == 1 else d for i, d in enumerate(learned)]
    profile = kvzip.Profile.fit(documents_)
    snapshot = documents(llama, 1, seed=5)[0]
    for s in (snapshot, spoiled(snapshot, strange)):
        blob = kvzip.encode(s, "predictive", profile)
        assert_same(kvzip.decode(blob, profile), s)
    clean = kvzip.Profile.fit(learned)
    size = [len(kvzip.encode(snapshot, "predictive", p)) for p in (profile, clean)]
    assert size[0] < 1.6 * size[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("regions", [1, 3])
def test_few_tokens_of_noise(count, constant, regions):
    """A few tokens of noise, or of channels that never change: nothing is left of what predicts
    them, or by rounding less."""
    rng = np.random.default_rng(0)
    shape = (2, 1 if constant else 40, 16)

    def numbers():
        return np.repeat(random_bits(rng, "bf16", shape), 40 // shape[1], axis=1)

    documents_ = [
        kvzip.Snapshot.from_arrays([(numbers(), numbers()) for _ in range(3)], "bf16")
        for _ in range(count)
    ]
    profile = kvzip.Profile.fit(documents_, regions=regions)
    for snapshot in documents_:
        blob = kvzip.encode(snapshot, "predictive", profile)
        assert_same(kvzip.decode(blob, profile), snapshot)


@pytest.mark.parametrize("axes", ["thd", "hdt"])
def test_axes_in_another_order(learned, axes):
    """What is learned and what a file takes does not depend on how numbers lie."""

    def turned(document):
        layers = []
        for layer in document.layers:
            order = ["htd".index(axis) for axis in axes]
            parts = {n: np.ascontiguousarray(layer.once(n).transpose(order)) for n in "kv"}
            layouts = {n: kvzip.PartLayout("bf16", bits.shape, axes) for n, bits in parts.items()}
            held = msgspec.structs.replace(layer.layout, parts=layouts)
            layers.append(Layer(parts, held))
        return Snapshot(layers, "bf16", document.token_ids, document.origin)

    profile = kvzip.Profile.fit([turned(document) for document in learned[:3]])
    assert profile.id == kvzip.Profile.fit(learned[:3]).id
    snapshot = turned(learned[3])
    blob = kvzip.encode(snapshot, "predictive", profile)
    assert_same(kvzip.decode(blob, profile), snapshot)
    assert abs(len(blob) - len(kvzip.encode(learned[3], "predictive", profile))) < 100


def test_unequal_layers_and_no_token_ids(learned):
    """Heads of other shapes layer by layer, and channels that never change."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(6, 200, 40))

    def one(x, constant):
        layers = []
        for heads, dim, vdim in ((2, 8, 8), (1, 6, 10), (3, 4, 2)):
            mix = np.random.default_rng(heads).normal(size=(2, 40, heads * 16))
            k = (x @ mix[0])[:, : heads * dim].reshape(-1, heads, dim).transpose(1, 0, 2)
            v = (x @ mix[1])[:, : heads * vdim].reshape(-1, heads, vdim).transpose(1, 0, 2)
            k, v = (np.ascontiguousarray(a, np.float32) for a in (k, v))
            k[..., 1], v[..., 0] = constant, 0
            layers.append(tuple((a.view(np.uint32) >> 16).astype(np.uint16) for a in (k, v)))
        return kvzip.Snapshot.from_arrays(layers, "bf16")

    profile = kvzip.Profile.fit([one(x, 2.5) for x in hidden[:5]])
    for constant in (2.5, -1.0):
        snapshot = one(hidden[5], constant)
        blob = kvzip.encode(snapshot, "predictive", profile)
        assert_same(kvzip.decode(blob, profile), snapshot)
    assert len(kvzip.encode(one(hidden[5], 2.5), "predictive", profile)) < 0.96 * len(
        kvzip.encode(one(hidden[5], 2.5), "channel")
    )


def test_the_command(learned, tmp_path, capsys):
    from kvzip.cli import main

    for i, document in enumerate(learned[:9]):
        document.save(tmp_path / f"{i}.safetensors")
    files = [str(tmp_path / f"{i}.safetensors") for i in range(9)]
    output, folder = tmp_path / "a.kvprofile", tmp_path / "kept"
    command = ["fit", *files, "-o", str(output), "--regions", "2", "--resume", str(folder)]
    results = []
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_:
            main([*command, "--json"])
        assert exit_.value.code == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["id"] == results[1]["id"] == kvzip.Profile.load(output).id
    assert results[0]["bytes"] == output.stat().st_size
    assert results[0]["regions"] == [1, 2, 2, 2]
    assert results[0]["held_out_bits_per_value"] < 9
    assert results[0]["calibration_documents"] == 1  # of the eight that are not held out
    assert len(results[0]["multiplications_per_token_and_layer"]) == 4
    with pytest.raises(SystemExit) as exit_:
        main([*command[:-4], "--regions", "3", "--resume", str(folder)])
    assert exit_.value.code != 0
    assert "regions=2, not 3" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "count, told", [(3, "that the predictors were learned from"), (8, "1 of them, from which no")]
)
def test_the_command_says_over_what_it_calibrates(learned, tmp_path, capsys, count, told):
    from kvzip.cli import main

    files = [tmp_path / f"{i}.safetensors" for i in range(count)]
    for document, file in zip(learned, files, strict=False):
        document.save(file)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *map(str, files), "-o", str(tmp_path / "a.kvprofile"), "--held-out", "0"])
    assert exit_.value.code == 0
    assert told in " ".join("".join(capsys.readouterr()).split())
