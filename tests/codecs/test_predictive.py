"""The predictive codec: everything the contract asks, with a profile, and what is its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import assert_same, examples, make_snapshot, random_bits, reseal, tiny_model
from support import tiny_documents as documents

import kvzip
from kvzip import Context, dtypes, get_codec
from kvzip.capture import prefill
from kvzip.codecs import _native
from kvzip.errors import CorruptError, KVZipError, ProfileError
from kvzip.selftest import instructions


def tiny(kind="Llama", **more):
    return tiny_model(kind, **{"vocab_size": 100, "num_hidden_layers": 5, "head_dim": 16} | more)


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.fixture(scope="module")
def profile(llama):
    return kvzip.Profile.fit(documents(llama, 12))


@pytest.fixture(scope="module")
def unseen(llama):
    return documents(llama, 1, tokens=300, seed=99)[0]


def test_it_predicts(profile, unseen):
    """Against the best codec that looks at one number at a time, with shared tables even."""
    blob = kvzip.encode(unseen, "predictive", profile)
    assert_same(kvzip.decode(blob, profile), unseen)
    assert len(blob) < 0.85 * len(kvzip.encode(unseen, "channel"))


def test_the_profile_on_disk_is_the_same(profile, unseen, tmp_path):
    profile.save(tmp_path / "a.kvprofile")
    loaded = kvzip.Profile.load(tmp_path / "a.kvprofile")
    assert loaded.id == profile.id
    blob = kvzip.encode(unseen, "predictive", profile)
    assert kvzip.encode(unseen, "predictive", loaded) == blob
    assert_same(kvzip.decode(blob, loaded), unseen)


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2"])
def test_other_formats(llama, dtype):
    """The same method on the same grid of numbers, whatever the format."""
    learned = kvzip.Profile.fit(documents(llama, 6, dtype=dtype))
    snapshot = documents(llama, 1, seed=5, dtype=dtype)[0]
    blob = kvzip.encode(snapshot, "predictive", learned)
    assert_same(kvzip.decode(blob, learned), snapshot)
    if dtype != "fp8_e5m2":
        assert len(blob) < len(kvzip.encode(snapshot, "channel", grids=False))


def test_a_profile_of_another_format_of_the_model(llama, profile):
    snapshot = documents(llama, 1, seed=5, dtype="fp16")[0]
    assert_same(kvzip.decode(kvzip.encode(snapshot, "predictive", profile), profile), snapshot)


@given(
    seed=st.integers(0, 2**32), tokens=st.integers(0, 200), block=st.sampled_from([1, 33, 64, 4096])
)
@examples(15)
def test_any_bits_and_no_worse_than_channel(profile, unseen, seed, tokens, block):
    """Unlike anything in training: exact all the same, and never dearer than `channel` plus 1 %."""
    rng = np.random.default_rng(seed)
    layers = [
        tuple(random_bits(rng, "bf16", (2, tokens, 16)) for _ in range(2)) for _ in unseen.layers
    ]
    snapshot = kvzip.Snapshot.from_arrays(layers, "bf16", np.arange(tokens), unseen.origin)
    if tokens > 30 * block:
        block = 64
    blob = kvzip.encode(snapshot, "predictive", profile, block_tokens=block, threads=1)
    assert_same(kvzip.decode(blob, profile, threads=1), snapshot)
    plain = kvzip.encode(snapshot, "channel", block_tokens=block, threads=1)
    assert len(blob) < 1.01 * len(plain) + 8 * 10 * max(1, tokens // block + 1) + 200
    assert len(blob) <= kvzip.max_encoded_size(snapshot, "predictive", block_tokens=block)


def test_no_file_is_longer_than_is_said_before():
    """The states stand in the first block that is predicted, which is hardly shorter than its
    numbers where these are few."""
    rng = np.random.default_rng(0)

    def few(tokens):
        k, v = rng.integers(0, 256, (2, 3, 2, tokens, 1), dtype=np.uint8)
        return kvzip.Snapshot.from_arrays(list(zip(k, v, strict=True)), "fp8_e4m3fn")

    learned = kvzip.Profile.fit([few(tokens) for tokens in (64, 130, 10, 300)])
    for tokens in [1, 2, 3] * 20:
        snapshot = few(tokens)
        memory = bytearray(kvzip.max_encoded_size(snapshot, "predictive"))
        blob = kvzip.encode(snapshot, "predictive", learned, out=memory)
        assert_same(kvzip.decode(blob, learned), snapshot)
        with kvzip.open(bytes(blob)) as reader:
            assert all(length <= 2 * tokens + 16 for length in reader.index.length)


def test_parts_decode_alone(profile, unseen):
    blob = kvzip.encode(unseen, "predictive", profile, block_tokens=64)
    with kvzip.open(blob, profile) as reader:
        for order in ([0, 1, 2, 3, 4], [4, 0, 2], [3, 3]):
            for i in order:
                assert np.array_equal(reader.layer(i).k, unseen.layers[i].k)
                assert np.array_equal(reader.layer(i).v, unseen.layers[i].v)
        cut = reader.tokens(70, 200)
        assert np.array_equal(cut.layers[4].v, unseen.layers[4].v[:, 70:200])
    assert kvzip.verify(blob, profile).ratio > 1


def counted(monkeypatch):
    """A list that grows by one with each block that is decoded from now on."""
    codec = type(kvzip.get_codec("predictive"))
    decode, calls = codec.decode, []
    monkeypatch.setattr(codec, "decode", lambda self, *a: (calls.append(1), decode(self, *a))[1])
    return calls


def test_layer_after_layer_decodes_each_block_once(profile, unseen, monkeypatch):
    calls = counted(monkeypatch)
    with kvzip.open(kvzip.encode(unseen, "predictive", profile), profile, threads=1) as reader:
        for i in range(len(reader)):
            reader.layer(i)
    assert len(calls) == 2 * len(unseen.layers)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_layers_in_turn_are_what_decode_gives_and_each_block_is_decoded_once(
    profile, unseen, monkeypatch, threads
):
    blob = kvzip.encode(unseen, "predictive", profile, block_tokens=64)
    requests = [([0, 1], (0, unseen.tokens)), ([2], (30, 130)), ([3, 4], (30, 130))]
    with kvzip.open(blob, profile) as reader:
        want = [reader.decode(layers=layers, tokens=span) for layers, span in requests]
        reader = kvzip.open(blob, profile, threads)
        calls = counted(monkeypatch)
        for found, wanted in zip(reader.in_turn(requests), want, strict=True):
            assert_same(found, wanted)
    blocks = -(-unseen.tokens // 64), 3  # of the first layers, and of positions 30 to 130
    assert len(calls) == 2 * (2 * blocks[0] + 3 * blocks[1])


def test_tokens_that_are_done_go_on_to_the_next_layers(profile, unseen, monkeypatch):
    """One block of the first layer does not come back before another is two layers further."""
    codec = type(kvzip.get_codec("predictive"))
    decode, further = codec.decode, threading.Event()
    waited = []

    def slow(self, data, out, context):
        if context.layer == 2 and context.start:
            further.set()
        if context.layer == 0 and not context.start and not waited:
            waited.append(further.wait(20))
        decode(self, data, out, context)

    blob = kvzip.encode(unseen, "predictive", profile, block_tokens=unseen.tokens // 2 + 1)
    monkeypatch.setattr(codec, "decode", slow)
    span = (0, unseen.tokens)
    with kvzip.open(blob, profile, threads=2) as reader:
        turns = reader.in_turn([([0, 1], span), ([2, 3], span)])
        assert_same_layers(next(turns), unseen, [0, 1])
        assert waited == [True]
        assert_same_layers(next(turns), unseen, [2, 3])
        assert next(turns, None) is None


def test_what_fails_in_turn_is_named_and_what_is_left_is_not_decoded(profile, unseen, monkeypatch):
    blob = bytearray(kvzip.encode(unseen, "predictive", profile, block_tokens=64))
    with kvzip.open(bytes(blob), profile) as reader:
        row = reader.index.rows[2, "v"][2]
        middle = reader.index.offset[row] + reader.index.length[row] // 2
        # What a token's last number reads shows in the next layer only, which goes on with the
        # coder's state: up to 32 words of a stream. These are 40.
        for at in range(middle, middle + 160):
            blob[at] ^= 0xFF
    span = (0, unseen.tokens)
    requests = [([i], span) for i in range(len(unseen.layers))]
    with kvzip.open(bytes(blob), profile, threads=2) as reader:
        turns = reader.in_turn(requests)
        for i in range(2):
            assert_same_layers(next(turns), unseen, [i])
        with pytest.raises(CorruptError, match="layer 2 v, tokens 64:128"):
            next(turns)
    calls = counted(monkeypatch)
    with kvzip.open(bytes(blob), profile, threads=2) as reader:
        turns = reader.in_turn(requests)
        next(turns)
        turns.close()
        time.sleep(0.2)
        assert len(calls) <= 2 * 2 * -(-unseen.tokens // 64)  # the first layer's and the next one's


def assert_same_layers(found, whole, layers):
    for i, layer in zip(layers, found.layers, strict=True):
        for mine, want in zip(layer, whole.layers[i], strict=True):
            assert np.array_equal(mine, want)


def test_the_same_bytes_from_every_path_and_any_threads(profile, unseen):
    from kvzip.codecs import _native

    before = _native.simd()
    blobs = set()
    try:
        for name in instructions():
            _native.set_simd(name)
            for threads in (1, 3):
                blob = kvzip.encode(unseen, "predictive", profile, threads, block_tokens=64)
                assert_same(kvzip.decode(blob, profile, threads), unseen)
                blobs.add(blob)
    finally:
        _native.set_simd(before)
    assert len(blobs) == 1


def test_ranges_of_too_many_tokens_are_not_predicted(profile, unseen, monkeypatch):
    from kvzip.codecs.predictive import codec as predictive

    predicted = kvzip.encode(unseen, "predictive", profile)
    monkeypatch.setattr(predictive, "MOST_TOKENS", unseen.tokens - 1)
    blob = kvzip.encode(unseen, "predictive", profile)
    assert len(blob) > len(predicted)
    assert_same(kvzip.decode(blob, profile), unseen)
    with pytest.raises(CorruptError, match="nothing predicts"):
        kvzip.decode(predicted, profile)
    monkeypatch.undo()
    model, form = predictive.native_model(profile), dtypes.get("bf16")
    none = np.zeros(0, np.int32)
    for rows, count in ((1, predictive.MOST_TOKENS + 1), (1 << 40, 1 << 40)):
        with pytest.raises(ValueError, match="too many tokens"):  # before there is memory for them
            _native.PredictiveChain(model, rows, count, 0, form.exponent_bits, 7, none)


def test_batches_and_strides(llama, profile):
    rng = np.random.default_rng(3)
    snapshot = prefill(llama, rng.integers(0, 100, (2, 90), np.uint32))
    blob = kvzip.encode(snapshot, "predictive", profile)
    assert_same(kvzip.decode(blob, profile), snapshot)
    lying = [
        tuple(np.ascontiguousarray(p.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for p in layer)
        for layer in snapshot.layers
    ]
    other = kvzip.Snapshot.from_arrays(lying, "bf16", snapshot.token_ids, snapshot.origin)
    assert kvzip.decode(kvzip.encode(other, "predictive", profile), profile).layout == other.layout
    out = [tuple(np.zeros_like(p) for p in layer) for layer in lying]
    kvzip.decode(blob, profile, out=out)
    assert np.array_equal(out[3][1], snapshot.layers[3].v)


def test_sliding_windows_and_full_histories():
    loaded = tiny(
        "Gemma3Text",
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"] * 2,
        num_hidden_layers=6,
    )
    learned = kvzip.Profile.fit(documents(loaded, 6, full_history=True))
    for how in ({"full_history": True}, {}):
        snapshot = documents(loaded, 1, seed=4, **how)[0]
        for block in (32, 64, 1024):
            blob = kvzip.encode(snapshot, "predictive", learned, block_tokens=block)
            assert_same(kvzip.decode(blob, learned), snapshot)


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "Qwen3"},
        {
            "kind": "Llama",
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
        {"kind": "GPT2", "n_embd": 32, "n_head": 4, "n_layer": 3},
        {
            "kind": "Phi",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ],
    ids=lambda c: c["kind"] + ("-linear" if "factor" in str(c) and c["kind"] == "Llama" else ""),
)
def test_models_it_was_never_tried_on(config):
    loaded = tiny(**config)
    learned = kvzip.Profile.fit(documents(loaded, 4, tokens=80))
    snapshot = documents(loaded, 1, tokens=80, seed=9)[0]
    assert_same(kvzip.decode(kvzip.encode(snapshot, "predictive", learned), learned), snapshot)


def test_wrong_profiles_are_named(profile, unseen, tmp_path, llama):
    with pytest.raises(ProfileError, match="needs a profile"):
        kvzip.encode(unseen, "predictive")
    blob = kvzip.encode(unseen, "predictive", profile)
    with pytest.raises(ProfileError, match="none was given"):
        kvzip.decode(blob)
    other = kvzip.Profile.fit(documents(llama, 2, seed=7))
    with pytest.raises(ProfileError, match=f"{profile.id}.*; the one given is {other.id}"):
        kvzip.decode(blob, other)
    smaller = make_snapshot(random_bits, 1, "bf16", layers=2, heads=3, tokens=20, dim=8)
    with pytest.raises(ProfileError, match="another model"):
        kvzip.encode(smaller, "predictive", profile)
    with pytest.raises(ProfileError, match="different models"):
        kvzip.Profile.fit([unseen, smaller])
    with pytest.raises(ProfileError, match="at least one"):
        kvzip.Profile.fit([])
    profile.save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "b").write_bytes(whole[: len(whole) // 2])
    unseen.save(tmp_path / "c")
    (tmp_path / "d").write_text("no profile")
    for name in "bcd":
        with pytest.raises(ProfileError):
            kvzip.Profile.load(tmp_path / name)


@pytest.mark.parametrize(
    "inputs",
    [[4], [9], [-1], [2**63], [0.5], ["0"], [None], [[0]], "01", 1, None, {}, [0, 0, 0, 0]],
)
def test_inputs_that_make_no_sense(profile, unseen, inputs):
    """What predicts a layer is a list of earlier layers, as many as its weights are for."""
    layers = list(profile.description["layers"])
    layers[4] = layers[4] | {"inputs": inputs}
    about = {n: d for n, d in profile.description.items() if n != "packed"} | {"layers": layers}
    hostile = kvzip.Profile(profile.tensors, about)
    with pytest.raises(ProfileError, match="makes no sense"):
        kvzip.encode(unseen, "predictive", hostile)


@pytest.mark.parametrize("ids", [[], [[1, 2, 3]], 7, [1, 2, 1]])
def test_known_tokens_that_make_no_sense(profile, unseen, ids):
    """Which tokens tables know is a list of ids; were one there twice, its place would be one that
    numpy's sorting settles, otherwise on another processor."""
    about = {n: d for n, d in profile.description.items() if n != "packed"}
    tensors = profile.tensors | {"token_ids": np.array(ids, np.uint32)}
    with pytest.raises(ProfileError, match="token_ids"):
        kvzip.encode(unseen, "predictive", kvzip.Profile(tensors, about))


@pytest.mark.parametrize("kind", [0, 2, 3])
def test_a_block_of_a_shape_that_the_profile_lacks(profile, kind):
    """However it claims to be stored: raw, by `channel`, or coded."""
    numbers = random_bits(np.random.default_rng(3), "bf16", (1, 3, 20, 6))
    context = Context(dtypes.get("bf16"), 0, "k", 0, kvzip.Origin(), profile=profile)
    plain = bytes(16) * (2 if kind == 2 else 0) + numbers.tobytes()
    block = memoryview(kind.to_bytes(1, "little") + bytes(15) + plain)
    with pytest.raises(CorruptError):
        get_codec("predictive").decode(block, np.empty_like(numbers), context)


@pytest.fixture(scope="module")
def short(llama, profile):
    snapshot = documents(llama, 1, tokens=40, seed=8)[0]
    return snapshot, kvzip.encode(snapshot, "predictive", profile, threads=1)


@given(data=st.data())
def test_hostile_blocks_never_give_wrong_numbers(profile, short, data):
    snapshot, blob = short[0], bytearray(short[1])
    header, entries, ids = (int.from_bytes(blob[i : i + 4], "little") for i in (12, 16, 20))
    first = 40 + header + ids + 48 * entries
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(first, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = kvzip.decode(reseal(blob), profile, threads=1)
    except KVZipError:
        return
    assert_same(decoded, snapshot)


@given(data=st.data())
def test_hostile_profiles_do_no_harm(profile, unseen, data):
    """A profile's numbers decide the ratio, not whether memory is safe or the round trip exact."""
    tensors = {name: array.copy() for name, array in profile.tensors.items()}
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        flat = tensors[name].reshape(-1)
        if flat.size:
            info = np.iinfo(flat.dtype)
            flat[data.draw(st.integers(0, flat.size - 1))] = data.draw(
                st.integers(int(info.min), int(info.max))
            )
    hostile = kvzip.Profile(tensors, profile.description)
    try:
        blob = kvzip.encode(unseen, "predictive", hostile, threads=1)
    except ProfileError:
        return
    assert_same(kvzip.decode(blob, hostile, threads=1), unseen)


def test_the_file_is_as_small_as_its_model_says(profile, unseen):
    """Whole file against the ideal code length of its own intervals."""
    from kvzip import dtypes
    from kvzip.codecs.predictive.codec import native_model, new_chain

    ids = unseen.token_ids[np.newaxis]
    form = dtypes.get("bf16")
    chain = new_chain(native_model(profile), profile.tensors, 1, unseen.tokens, 0, form, ids)
    ideal = 0.0
    for i, layer in enumerate(unseen.layers):
        for p, part in enumerate(layer):
            ideal += chain.model(i, p, np.array(part)[np.newaxis]) / 8
            chain.keep()
    spent = sum(map(len, chain.encode()))
    # A token has a state of 8 bytes, which holds some of its bits, and a part counts its words.
    assert (
        ideal
        <= spent
        < 1.001 * ideal
        + 8 * unseen.tokens
        + 2 * len(unseen.layers) * (2 * (unseen.tokens // 32 + 2) + 16)
    )


def test_another_process_reads_it(profile, unseen, tmp_path):
    """Nothing but the two files goes from writer to reader."""
    profile.save(tmp_path / "p")
    (tmp_path / "a.kvz").write_bytes(kvzip.encode(unseen, "predictive", profile))
    unseen.save(tmp_path / "s")
    kvzip_command = os.path.join(os.path.dirname(sys.executable), "kvzip")  # noqa: PTH118, PTH120
    command = [kvzip_command, "verify", "a.kvz", "--against", "s", "--profile", "p"]
    done = subprocess.run(command, cwd=tmp_path, env={"KVZIP_SIMD": "scalar"}, capture_output=True)
    assert done.returncode == 0, done.stderr
