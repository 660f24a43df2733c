"""What a writer accepts comes back equal, and what could not come back is refused when it is made.

Options and fields are drawn from values that make sense and from many that do not; nothing here
says which are which. A writer may refuse with a KVZipError, and then nothing was written; whatever
it takes must be read again, equal in every field.
"""

from __future__ import annotations

import enum
import json
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import make_snapshot, random_bits

import kvzip
from kvzip import LayerLayout, Layout, Origin, Snapshot
from kvzip.codecs import _native
from kvzip.errors import FormatError, KVZipError, UnsupportedError, UsageError
from kvzip.store import Store

sizes = st.integers(0, 3)
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(), max_size=3),  # lone surrogates, too
    st.binary(max_size=3),
    st.sampled_from([np.int64(5), np.float32(0.5), np.float64("nan"), np.bool_(True), 1j, object]),
)
anything = st.recursive(
    odd,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.tuples(inner),
        st.dictionaries(odd.filter(lambda key: key is not object), inner, max_size=2),
    ),
    max_leaves=4,
)


def sometimes(usual, chance=8):
    """Mostly what makes sense."""
    return st.integers(0, chance).flatmap(lambda n: usual if n else anything)


words = st.text(max_size=5)
origins = st.fixed_dictionaries(
    {},
    optional={
        "model": sometimes(words),
        "revision": sometimes(words),
        "architecture": sometimes(words),
        "text": sometimes(words),
        "rope": sometimes(st.lists(st.dictionaries(words, anything, max_size=2), max_size=2)),
        "software": sometimes(st.dictionaries(words, sometimes(words), max_size=2)),
    },
)
dtypes_ = st.sampled_from(["bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2", "torch.bfloat16"])


@st.composite
def snapshots(draw):
    """A snapshot, or a KVZipError where it is refused."""
    dtype = draw(dtypes_)
    uint = kvzip.dtypes.get(dtype).uint
    batch = draw(st.sampled_from([None, None, 1, 2, 0]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    tokens, layers = draw(sizes), []
    for _ in range(draw(st.integers(0, 3))):
        front = (*(() if batch is None else (batch,)), draw(sizes))
        held = draw(sometimes(st.just(tokens), 6).filter(lambda n: type(n) is int and 0 <= n < 9))
        shapes = [(*front, held, draw(sizes)) for _ in "kv"]
        k, v = (rng.integers(0, np.iinfo(uint).max, s, uint, endpoint=True) for s in shapes)
        if draw(st.booleans()):
            k = np.asfortranarray(k)
        kind, window = draw(st.sampled_from([("full", None), ("sliding", 4), ("linear", 8)]))
        number = draw(st.sampled_from([int, np.int32, float]))
        layout = LayerLayout.of_kv(
            draw(st.sampled_from([k.shape, list(k.shape), np.array(k.shape)])),
            v.shape,
            dtype,
            draw(sometimes(st.just(number(tokens)))),
            kind,
            draw(sometimes(st.just(window))),
            draw(sometimes(st.just(None))),
        )
        plain = draw(st.sampled_from([np.asarray, np.asarray, np.ma.array]))
        layers.append(kvzip.Layer.of_kv(plain(k), v, layout))
    count = draw(st.sampled_from([tokens, tokens, tokens, tokens + 1, 0]))
    shape = draw(st.sampled_from([(count,), (batch or 1, count), (count, 1)]))
    ids = rng.integers(*draw(st.sampled_from([(0, 9), (0, 2**32), (-5, 9), (2**32, 2**40)])), shape)
    ids = ids.astype(draw(st.sampled_from(["i8", "u8", "u4", "i4", ">i8", "f8", "?"])))
    ids = draw(st.sampled_from([ids, ids, ids.tolist(), None]))
    return Snapshot(layers, dtype, ids, Origin(**draw(origins)))


def accepted(data, strategy):
    """What the strategy draws, or None when that was refused: with an error of the library."""
    try:
        return data.draw(strategy)
    except KVZipError:
        return None


def assert_equal(got, snapshot):
    assert got == snapshot
    assert got.origin == snapshot.origin
    for a, b in zip(got.layers, snapshot.layers, strict=True):
        assert a.k.dtype == b.k.dtype


relaxed = settings(suppress_health_check=list(HealthCheck))


@given(data=st.data())
@relaxed
def test_what_is_encoded_comes_back(tmp_path_factory, data):
    snapshot = accepted(data, snapshots())
    if snapshot is None:
        return
    how = data.draw(
        st.fixed_dictionaries(
            {
                "codec": st.sampled_from(
                    ["raw", "zstd", "lz4:level=3", "planes", "channel", {"id": "zstd", "level": 9}]
                ),
                "block_tokens": sometimes(st.sampled_from([None, 1, 2, 64, np.int64(2), True])),
                "threads": sometimes(st.sampled_from([1, 0, np.int8(2)])),
                "store_token_ids": sometimes(st.booleans()),
            }
        )
    )
    try:
        blob = kvzip.encode(snapshot, **how)
    except KVZipError:
        return
    got = kvzip.decode(blob)
    if not how["store_token_ids"]:
        assert got.token_ids is None
        snapshot = Snapshot(snapshot.layers, snapshot.dtype, None, snapshot.origin)
    assert_equal(got, snapshot)
    assert len(blob) <= kvzip.max_encoded_size(
        snapshot, how["codec"], block_tokens=how["block_tokens"]
    )


@given(data=st.data())
@relaxed
def test_what_is_saved_comes_back(tmp_path_factory, data):
    snapshot = accepted(data, snapshots())
    if snapshot is None:
        return
    path = tmp_path_factory.mktemp("x") / "s.safetensors"
    late = st.dictionaries(odd, sometimes(words), max_size=1)
    snapshot.origin.software.update(data.draw(st.one_of(st.just({}), late)))
    for rope in snapshot.origin.rope:
        rope.update(data.draw(st.dictionaries(odd, anything, max_size=1)))
    try:
        snapshot.save(path)
    except UsageError:
        assert not path.exists()
        with pytest.raises(UsageError):
            kvzip.encode(snapshot, "raw", threads=1)
        return
    assert_equal(Snapshot.load(path), snapshot)
    assert_equal(Snapshot.load(path, mmap=True), snapshot)
    kvzip.write(path.with_suffix(".kvz"), Snapshot.load(path), "raw", threads=1)
    assert_equal(kvzip.decode(path.with_suffix(".kvz")), snapshot)
    again = path.with_name("again")
    Snapshot.load(path).save(again)
    assert again.read_bytes() == path.read_bytes()


@given(data=st.data())
@relaxed
def test_what_is_put_comes_back(tmp_path_factory, data):
    snapshot = accepted(data, snapshots())
    if snapshot is None:
        return
    store = Store(tmp_path_factory.mktemp("x"), block_tokens=1)
    try:
        entry = store.put(snapshot, codec="raw", threads=1)
    except KVZipError:
        assert store.documents() == []
        return
    with store.open(entry.key) as reader:
        assert_equal(reader.decode(), snapshot)
    origin = snapshot.origin
    found = store.find(
        snapshot.token_ids, model=origin.model, revision=origin.revision, dtype=snapshot.dtype
    )
    if snapshot.layout.lacking(snapshot.tokens) is None:
        with found:
            assert_equal(found.snapshot(), snapshot)


@given(data=st.data())
@relaxed
def test_profiles_that_are_saved_come_back(tmp_path_factory, data):
    numbers = st.sampled_from(["i1", "u2", "<i4", ">i4", "u8", "f4", "?", "U2"])
    shapes = st.lists(sizes, max_size=3).map(tuple)
    arrays = st.builds(lambda kind, shape: np.ones(shape, kind), numbers, shapes)
    keys = st.one_of(words, words, words, odd.filter(lambda key: key is not object))
    tensors = data.draw(st.dictionaries(keys, sometimes(arrays), max_size=2))
    about = data.draw(sometimes(st.dictionaries(words, anything, max_size=2)))
    try:
        profile = kvzip.Profile(tensors, about)
    except KVZipError:
        return
    path = tmp_path_factory.mktemp("x") / "p.kvprofile"
    profile.save(path)
    got = kvzip.Profile.load(path)
    assert got.id == profile.id
    assert got.description == profile.description
    assert got.description.keys() == about.keys() | {"version"}
    assert {*got.tensors} == {*tensors}
    for name, tensor in tensors.items():
        assert got.tensors[name].shape == np.shape(tensor)
        assert np.array_equal(got.tensors[name], tensor)


# --- where it is refused -----------------------------------------------------------------------

K = np.zeros((2, 7, 16), np.float16)


@pytest.mark.parametrize(
    "ids",
    [
        np.arange(6),
        np.arange(8),
        np.arange(14),
        -np.arange(7),
        np.arange(7) + 2**32,
        np.arange(7) / 2,
        np.arange(7.0),
        np.arange(7) > 3,
        np.zeros((2, 7), int),
        np.zeros((7, 1), int),
        ["a"] * 7,
        [1] * 6 + [2**70],
        object(),
    ],
)
def test_token_ids_that_do_not_fit(ids):
    with pytest.raises(UsageError, match="token_ids"):
        Snapshot.from_arrays([(K, K)], token_ids=ids)


def test_token_ids_of_any_integer_kind():
    wanted = Snapshot.from_arrays([(K, K)], token_ids=range(7))
    for ids in ([*range(7)], np.arange(7, dtype=">i8"), np.arange(7, dtype=np.uint8)[None]):
        assert Snapshot.from_arrays([(K, K)], token_ids=ids) == wanted
    top = Snapshot.from_arrays([(K, K)], token_ids=[2**32 - 1] * 7)
    assert kvzip.decode(kvzip.encode(top)) == top


def test_snapshots_are_equal_by_bits_layout_and_ids():
    rng = np.random.default_rng(0)
    bits = random_bits(rng, "bf16", (2, 7, 4))
    a = Snapshot.from_arrays([(bits, bits)], "bf16", range(7), Origin(model="a"))
    b = Snapshot.from_arrays([(bits.copy(), np.asfortranarray(bits))], "bf16", range(7))
    assert a == b
    assert a != "a snapshot"
    nan = np.full((2, 7, 4), 0x7FC1, np.uint16)  # equal bits, whatever the numbers
    assert Snapshot.from_arrays([(nan, nan)], "bf16") == Snapshot.from_arrays([(nan, nan)], "bf16")
    other = bits.copy()
    other[1, 6, 3] ^= 1
    for different in (
        Snapshot.from_arrays([(bits, other)], "bf16", range(7)),
        Snapshot.from_arrays([(bits, bits)], "fp16", range(7)),
        Snapshot.from_arrays([(bits, bits)], "bf16", range(1, 8)),
        Snapshot.from_arrays([(bits, bits)], "bf16"),
        Snapshot.from_arrays([(bits, bits)] * 2, "bf16", range(7)),
        Snapshot.from_arrays([(bits[None], bits[None])], "bf16", range(7)),
    ):
        assert a != different
    with pytest.raises(TypeError):
        hash(a)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": None},
        {"revision": 3},
        {"architecture": b"x"},
        {"text": "\udcff"},
        {"software": {"cuda": 12.8}},
        {"software": {1: "x"}},
        {"software": "torch"},
        {"rope": "theta"},
        {"rope": ({"theta": float("nan")},)},
        {"rope": ({"theta": 2**70},)},
        {"rope": ({"theta": {1, 2}},)},
        {"rope": ({3: 4},)},
        {"rope": [1]},
    ],
)
def test_origins_that_no_file_holds(fields):
    with pytest.raises(UsageError):
        Origin(**fields)


def test_an_origin_is_what_a_file_gives_back():
    origin = Origin(rope=[{"f": (np.float32(0.5), 1, True, None), "n": np.int64(3)}])
    assert origin.rope == ({"f": [0.5, 1, True, None], "n": 3},)
    assert msgspec.json.decode(msgspec.json.encode(origin), type=Origin) == origin


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "linear", "window": 8},
        {"kind": "full", "window": 8},
        {"kind": "sliding"},
        {"window": 0, "kind": "sliding"},
        {"window": 2**63, "kind": "sliding"},
        {"rope": -1},
        {"rope": True},
        {"cumulative_length": 6},
        {"cumulative_length": 7.0},
        {"cumulative_length": 2**31},
        {"k": (2, 7)},
        {"k": (2, 8, 16)},
        {"k": (2, -7, 16)},
        {"k": 7},
        {"k": (1, 2, 7, 16)},
    ],
)
def test_layouts_that_make_no_sense(fields):
    usual = {"k": (2, 7, 16), "v": (2, 7, 16), "dtype": "bf16", "cumulative_length": 7}
    with pytest.raises(UsageError):
        LayerLayout.of_kv(**usual | fields)


def test_layers_of_one_cache_are_of_one_batch():
    one, two = (LayerLayout.of_kv((n, 2, 7, 4), (n, 2, 7, 4), "bf16", 7) for n in (1, 2))
    with pytest.raises(UsageError, match="one batch"):
        Layout("bf16", (one, two))
    with pytest.raises(UsageError, match="LayerLayout"):
        Layout("bf16", ("layer",))


def test_what_was_replaced_since_is_looked_at_again(tmp_path):
    """A snapshot's fields may be set: the writer looks before it writes."""

    def spoil(do):
        made = make_snapshot(random_bits, 1, "bf16")
        origin = Origin(rope=({"theta": 1.0},), software={"torch": "2"})
        snapshot = Snapshot(made.layers, "bf16", made.token_ids, origin)
        do(snapshot)
        return snapshot

    def other_bits(s):
        s.layers[0].k = s.layers[0].k[:1]

    for do in (
        other_bits,
        lambda s: setattr(s, "token_ids", s.token_ids[1:]),
        lambda s: setattr(s, "origin", "my/model"),
        lambda s: s.layers.pop(),
        lambda s: setattr(s.layers[1], "v", [1]),
        lambda s: setattr(s.layers[1], "v", s.layers[1].v.astype(np.int16)),
        lambda s: setattr(s, "layers", None),
        lambda s: setattr(s, "layers", [None] * len(s.layers)),
        lambda s: setattr(s, "layout", None),
        lambda s: setattr(s, "layout", "bf16"),
        lambda s: s.origin.software.update(z=3),
        lambda s: s.origin.software.update(z="\ud800"),
        lambda s: s.origin.software.update({3: "z"}),
        lambda s: s.origin.rope[0].update(theta=float("nan")),
        lambda s: s.origin.rope[0].update(theta={1, 2}),
        lambda s: s.origin.rope[0].update(theta=(1, 2)),
        lambda s: s.origin.rope[0].update(theta=2**70),
        lambda s: s.origin.rope[0].update(theta=object()),
        lambda s: s.origin.rope[0].update(theta=s.origin.rope),
        lambda s: s.origin.rope[0].update({3: "z"}),
    ):
        with pytest.raises(UsageError):
            kvzip.write(tmp_path / "a.kvz", spoil(do))
        with pytest.raises(UsageError):
            spoil(do).save(tmp_path / "a.safetensors")
        for codec in ("channel", "auto"):
            with pytest.raises(UsageError):
                kvzip.encode(spoil(do), codec)
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_any_class_are_taken_as_plain_ones():
    """A subclass may copy, compare or slice otherwise: np.ma writes what is masked as it likes."""

    class Mine(np.ndarray):
        def __getitem__(self, key):
            raise AssertionError

    bits = random_bits(np.random.default_rng(0), "bf16", (2, 7, 4))
    wanted = Snapshot.from_arrays([(bits, bits)], "bf16")
    for other in (bits.view(Mine), np.ma.array(bits), np.ma.array(bits, mask=bits > 9)):
        layer = kvzip.Layer.of_kv(other, other, wanted.layout.layers[0])
        for codec in ("raw", "planes", "channel"):
            assert kvzip.decode(kvzip.encode(Snapshot([layer], "bf16"), codec)) == wanted
        assert Snapshot.from_arrays([(other, other)], "bf16") == wanted


def torch_tensors():
    import torch

    half = torch.zeros(2, 7, 16, dtype=torch.float16)
    return {
        "meta": half.to("meta"),
        "sparse": half.to_sparse(),
        "negative": torch.zeros(2, 7, 16, dtype=torch.complex64).conj().imag,
        "complex": torch.zeros(2, 7, 16, dtype=torch.complex32),
        "bool": torch.zeros(2, 7, 16, dtype=torch.bool),
        "nested": torch.nested.nested_tensor([half, half]),
    }


@pytest.mark.parametrize(
    "layers",
    [None, 5, "ab", {"k": K}, {"ab": K}, [5], [None], [(K,)], [(K, K, K)], [([[1]], [[1]])]]
    + [[(x, x)] for x in (None, "k", {"k": K}, 5, np.int64(5), np.array(None), K.astype("S2"))],
)
@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_what_is_no_array(layers, dtype):
    with pytest.raises(KVZipError):
        Snapshot.from_arrays(layers, dtype)
    with pytest.raises(KVZipError):
        Snapshot(layers, "bf16")
    blob = kvzip.encode(Snapshot.from_arrays([(K, K)]), "raw")
    if layers is not None:
        with pytest.raises(KVZipError):
            kvzip.decode(blob, out=layers)


@pytest.mark.parametrize("kind", ["meta", "sparse", "negative", "complex", "bool", "nested"])
def test_tensors_without_plain_bits(kind):
    tensor = torch_tensors()[kind]
    blob = kvzip.encode(Snapshot.from_arrays([(K, K)]), "raw")
    for dtype in (None, "fp16", "fp32", "fp8_e5m2"):
        with pytest.raises(KVZipError):
            Snapshot.from_arrays([(tensor, tensor)], dtype)
    with pytest.raises(KVZipError):
        kvzip.decode(blob, out=[(tensor, tensor)])


@pytest.mark.parametrize("value", ["no", "", 2, 1, 0, None, np.ones(3), np.int64(1), [True]])
def test_what_is_true_or_false_is_a_bool(value):
    snapshot = Snapshot.from_arrays([(K, K)], token_ids=range(7))
    with pytest.raises(UsageError, match="store_token_ids"):
        kvzip.encode(snapshot, store_token_ids=value)


def test_numpys_bools_are_bools():
    snapshot = Snapshot.from_arrays([(K, K)], token_ids=range(7))
    assert kvzip.decode(kvzip.encode(snapshot, store_token_ids=np.True_)) == snapshot
    assert kvzip.decode(kvzip.encode(snapshot, store_token_ids=np.False_)).token_ids is None


def test_texts_of_numpy_are_texts(tmp_path):
    layout = LayerLayout.of_kv(K.shape, K.shape, "fp16", 7, np.str_("full"))
    assert type(layout.kind) is str
    snapshot = Snapshot([kvzip.Layer.of_kv(K.view("u2"), K.view("u2"), layout)], np.str_("fp16"))
    assert kvzip.decode(kvzip.encode(snapshot)) == snapshot
    snapshot.save(tmp_path / "s")
    assert Snapshot.load(tmp_path / "s") == snapshot


@pytest.mark.parametrize(
    "tensors", [None, 3, "ab", ["ab"], {"a": [[1], [1, 2]]}, {"a": {}}, {"a": object()}, {1: [1]}]
)
def test_what_is_no_profile_of_tensors(tensors):
    with pytest.raises(UsageError):
        kvzip.Profile(tensors, {})


@pytest.mark.parametrize("layers", [0, 1.5, "0", [None], [[0]], [True], [9]])
def test_layers_that_there_are_not(layers):
    blob = kvzip.encode(Snapshot.from_arrays([(K, K)]), "raw")
    with pytest.raises(UsageError):
        kvzip.decode(blob, layers=layers)


def test_arrays_to_decode_into_lie_apart():
    rng = np.random.default_rng(0)
    snapshot = Snapshot.from_arrays([(random_bits(rng, "bf16", (2, 7, 4)),) * 2] * 2, "bf16")
    blob, shape = kvzip.encode(snapshot), (2, 7, 4)
    room = np.zeros(2 * 7 * 4 * 4 + 1, np.uint16)

    def view(offset, strides=(28, 4, 1)):
        return np.lib.stride_tricks.as_strided(room[offset:], shape, [2 * n for n in strides])

    apart = [view(56 * n) for n in range(4)]
    turned = [view(n, (112, 16, 4)) for n in (0, 1, 2, 3)]  # each in the others' gaps
    wide = [np.zeros(200, np.uint16) for _ in range(4)]
    odd = [np.lib.stride_tricks.as_strided(w, shape, [2, 26, 4]) for w in wide]  # no axis nests
    for good in (apart, turned, apart[::-1], [w[:56].reshape(shape, order="F") for w in wide]):
        assert kvzip.decode(blob, out=[good[:2], good[2:]]) == snapshot
    for bad in (
        [apart[0], *apart[:3]],
        [*apart[:3], view(167)],
        [*turned[:3], view(2)],
        [*apart[:3], view(168, (0, 4, 1))],
        [*apart[:3], view(168, (1, 4, 1))],
    ):
        with pytest.raises(UsageError, match="twice"):
            kvzip.decode(blob, out=[bad[:2], bad[2:]])
    assert kvzip.decode(blob, out=[odd[:2], odd[2:]]) == snapshot


@given(seed=st.integers(0, 2**32 - 1))
def test_arrays_that_share_memory_are_said_to_be_close(seed):
    rng, arrays = np.random.default_rng(seed), []
    memory = np.zeros(rng.integers(50, 400), np.uint16)
    for shape, steps in zip(rng.integers(0, 4, (4, 4)), rng.integers(-12, 13, (4, 4)), strict=True):
        reach = steps * np.maximum(shape - 1, 0)
        low, high = int(-reach[reach < 0].sum()), int(reach[reach > 0].sum())
        if low + high < memory.size:
            begin = low + int(rng.integers(memory.size - low - high))
            arrays.append(np.ndarray(shape, np.uint16, memory, 2 * begin, 2 * steps))
    groups = _native.close_to_each_other(arrays)
    group_of = {i: n for n, group in enumerate(groups) for i in group}
    for i, array in enumerate(arrays):
        strides = np.array(array.strides)
        places = [int(strides @ at) for at in np.ndindex(array.shape)]
        assert i in group_of or len({*places}) == len(places)
        for j in range(i):
            if np.shares_memory(array, arrays[j]):
                assert group_of[i] == group_of[j]


@pytest.mark.parametrize("codec", [{}, {"name": "zstd"}, {"codec": "zstd", "level": 3}])
def test_a_codec_is_named_under_id(codec):
    with pytest.raises(UnsupportedError, match='"id"'):
        kvzip.get_codec(codec)
    with pytest.raises(UnsupportedError, match='"id"'):
        kvzip.encode(Snapshot.from_arrays([(K, K)]), codec)


@pytest.mark.parametrize("wrong", ["my/model", None, 3, {"k": 1}])
def test_what_is_no_snapshot_or_profile(wrong):
    snapshot = make_snapshot(random_bits, 1, "bf16")
    with pytest.raises(UsageError):
        kvzip.encode(wrong)
    if wrong is not None:
        with pytest.raises(KVZipError, match="no Profile"):
            kvzip.encode(snapshot, profile=wrong)
        with pytest.raises(UsageError):
            Snapshot(snapshot.layers, "bf16", None, wrong)
    with pytest.raises(UsageError):
        Snapshot([wrong], "bf16")


def test_a_codec_that_no_reader_finds():
    class Mine(type(kvzip.get_codec("raw"))):
        codec_id = "mine-alone"

    with pytest.raises(KVZipError, match="mine-alone"):
        kvzip.encode(make_snapshot(random_bits, 1, "bf16"), Mine())


@pytest.mark.parametrize("level", ["abc", 0, 23, 1.5, True, None, [3]])
def test_levels(level):
    with pytest.raises(KVZipError, match="level"):
        kvzip.get_codec({"id": "zstd", "level": level})
    with pytest.raises(KVZipError, match="level"):
        kvzip.get_codec("planes", coder="lz4", level=level)


def test_numpys_integers_are_integers():
    codec = kvzip.get_codec("zstd", level=np.int64(7))
    assert type(codec.get_config()["level"]) is int
    snapshot = make_snapshot(random_bits, 1, "bf16")
    blob = kvzip.encode(snapshot, codec, threads=np.int64(1), block_tokens=np.uint8(16))
    assert kvzip.decode(blob) == snapshot


def test_a_block_above_what_lz4_takes(monkeypatch):
    from kvzip import byte_coders as coders

    monkeypatch.setattr(coders.Lz4, "_most", 100)
    for spec in ("lz4", "planes:coder=lz4"):
        with pytest.raises(KVZipError, match="block_tokens"):
            kvzip.encode(make_snapshot(random_bits, 1, "bf16"), spec)


# --- versions ----------------------------------------------------------------------------------


def test_snapshots_of_another_version_are_named(tmp_path):
    make_snapshot(random_bits, 1, "bf16").save(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    for version, more in ((2, {}), (4, {"new": "field"}), (1, {}), ("1", {}), (None, {})):
        about = json.loads(header["__metadata__"]["kvzip"]) | {"version": version} | more
        head = json.dumps(header | {"__metadata__": {"kvzip": json.dumps(about)}}).encode()
        (tmp_path / "b").write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])
        with pytest.raises(FormatError, match="version"):
            Snapshot.load(tmp_path / "b")


def test_paths_are_kinds_of_paths(tmp_path):
    snapshot = make_snapshot(random_bits, 1, "bf16")
    for path in (tmp_path / "p", str(tmp_path / "s"), bytes(tmp_path / "b")):
        snapshot.save(path)
        assert Snapshot.load(path) == snapshot
    with pytest.raises(IsADirectoryError):
        Snapshot.load(tmp_path)
    assert Path(tmp_path / "b").stat().st_mode & 0o777 == 0o600


# --- words and numbers of classes of their own ---------------------------------------------------


class Word(str, enum.Enum):  # noqa: UP042 - whose str() is another
    MODEL = "org/model"
    BF16 = "bf16"
    SLIDING = "sliding"
    BIT = "planes:mode=bit"
    MODE = "bit"


class Loud(str):
    __slots__ = ()

    def __str__(self):
        return "something else"

    __repr__ = __format__ = __str__


class Number(enum.IntEnum):
    SEVEN = 7


class Odd(int):
    def __str__(self):
        return "something else"

    __repr__ = __str__

    def __int__(self):
        return 1


class Half(float):
    def __float__(self):
        return 1.0


@pytest.mark.parametrize("word", [Word.MODEL, Loud("org/model"), np.str_("org/model")])
def test_a_word_of_any_class_is_the_word(word, tmp_path):
    origin = Origin(
        word, word, word, ({"rope_type": word, "x": [Number.SEVEN]},), word, {word: word}
    )
    assert type(origin.model) is str
    name = "org/model"
    assert origin == Origin(name, name, name, ({"rope_type": name, "x": [7]},), name, {name: name})
    snapshot = make_snapshot(random_bits, 1, "bf16")
    snapshot.origin = origin
    blob = kvzip.encode(snapshot)
    assert kvzip.decode(blob).origin == origin
    assert b"Word" not in blob and b"something" not in blob
    snapshot.save(tmp_path / "a")
    assert Snapshot.load(tmp_path / "a") == snapshot
    entry = Store(tmp_path / "store", block_tokens=8).put(snapshot)
    with Store(tmp_path / "store").find(
        snapshot.token_ids, model="org/model", revision="org/model", dtype=Word.BF16
    ) as found:
        assert found.key == entry.key
    profile = kvzip.Profile({"a": np.zeros(3, int)}, {"codec": word, word: Number.SEVEN})
    assert profile.description["codec"] == "org/model" and profile.description["org/model"] == 7


def test_numbers_and_codecs_of_any_class():
    snapshot = make_snapshot(random_bits, 1, "bf16")
    for seven in (Number.SEVEN, Odd(7), np.int8(7)):
        blob = kvzip.encode(snapshot, block_tokens=seven)
        assert kvzip.info(blob).header.block_tokens == 7
        assert kvzip.get_codec("zstd", level=seven).spec == "zstd:level=7"
        assert kvzip.decode(kvzip.encode(snapshot, {"id": "zstd", "level": seven})) == snapshot
    for codec in (Word.BIT, {"id": Loud("planes"), "mode": Word.MODE}):
        assert kvzip.get_codec(codec).spec == "planes:mode=bit"
    assert LayerLayout.of_kv((1, 7, 2), (1, 7, 2), Word.BF16, Odd(7), Word.SLIDING, Odd(7)) == (
        LayerLayout.of_kv((1, 7, 2), (1, 7, 2), "bf16", 7, "sliding", 7)
    )
    kept = kvzip.options.json_value("x", [Half(0.5), Odd(7), True, np.bool_(True)])
    assert kept == [0.5, 7, True, True]


def deep(levels, value=None):
    """`value` in so many lists and dicts, each within the next."""
    for level in range(levels):
        value = [value] if level % 2 else {"in": value}
    return value


def containers(value):
    """The lists and dicts in a value, itself among them."""
    if isinstance(value, (list, dict)):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


@example(value=[deep(63), (1, 2.5, "\u00e4")])
@example(value=[deep(64)])
@example(value={"\ud800": 1})
@example(value=[2**64 - 1, -(2**63)])
@example(value=[2**64])
@given(anything)
def test_json_values_are_copied_alike_by_compiled_code(value):
    found = _native.json_copy(value, 64)
    try:
        expected = kvzip.options._json_value("x", value, 0)
    except UsageError:
        assert found is NotImplemented
        return
    if found is NotImplemented:  # a number of numpy's, or a kind of its own
        return
    assert msgspec.json.encode(found) == msgspec.json.encode(expected)
    assert msgspec.json.decode(msgspec.json.encode(found)) == found
    held = {id(one) for one in containers(value)}
    assert not any(id(one) in held for one in containers(found))


class Boasts(kvzip.Codec):
    """A codec that makes less of a block than it says that it can read."""

    codec_id = "raw"

    def encode(self, block, context):
        return b"x"

    def decode(self, data, out, context):
        out[...] = 0

    def max_encoded_size(self, nbytes):
        return nbytes

    def max_decoded_size(self, length, form):
        return 10 * length


def test_what_no_reader_would_take_is_not_written(tmp_path):
    snapshot = make_snapshot(random_bits, 1, "bf16")
    for use in (
        lambda: kvzip.encode(snapshot, Boasts()),
        lambda: kvzip.write(tmp_path / "a", snapshot, Boasts()),
    ):
        with pytest.raises(UsageError, match="no reader would take"):
            use()
    assert not list(tmp_path.iterdir())


def test_descriptions_that_are_longer_than_readers_take(tmp_path):
    bits = np.zeros((1, 2, 8), np.uint16)
    origin = kvzip.Origin(model="x" * 100_000_000)
    snapshot = kvzip.Snapshot.from_arrays([(bits, bits)], "bf16", np.arange(2), origin)
    for use in (
        lambda: snapshot.save(tmp_path / "a"),
        lambda: kvzip.encode(snapshot),
        lambda: Store(tmp_path / "store", block_tokens=1).put(snapshot),
        lambda: kvzip.Profile({}, {"model": "x" * 100_000_000}),
    ):
        with pytest.raises(UsageError, match="bytes"):
            use()
    assert not list(tmp_path.iterdir())
    # What is just short enough is read.
    origin = kvzip.Origin(model="x" * 60_000_000)
    snapshot = kvzip.Snapshot.from_arrays([(bits, bits)], "bf16", np.arange(2), origin)
    snapshot.save(tmp_path / "a")
    assert kvzip.Snapshot.load(tmp_path / "a").origin == origin
