"""Layers of every kind, and parts of every format, shape and axes, through snapshots and files."""

from __future__ import annotations

import contextlib
import itertools
import time

import numpy as np
import pytest
from command import run, run_json
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CODECS, random_bits, reseal

import kvzip
from kvzip import KVZipError, Layer, LayerLayout, PartLayout, Snapshot, dtypes
from kvzip.errors import UnsupportedError, UsageError
from kvzip.layout import KV, Layout, StoredLayout

TOKENS = 40


def layer_of(rng, parts, *more, **fields):
    """A layer of random bits."""
    bits = {name: random_bits(rng, part.dtype, part.shape) for name, part in parts.items()}
    return Layer(bits, LayerLayout(parts, *more, **fields))


def every_kind(batch=None, seed=0):
    """A layer of each kind, as today's models have them."""
    rng = np.random.default_rng(seed)
    front, b = ((), "") if batch is None else ((batch,), "b")

    def part(dtype, axes, *shape):
        return PartLayout(dtype, (*front, *shape), b + axes)

    def kv(tokens, dtype="bf16"):
        return {name: part(dtype, "htd", 2, tokens, 6) for name in "kv"}

    state = {"conv": part("bf16", "dr", 10, 3), "recurrent": part("fp32", "hrd", 2, 4, 5)}
    scales = {f"{name}_scale": PartLayout("fp32", (), "") for name in "kv"}
    layers = [
        layer_of(rng, kv(TOKENS), TOKENS),
        layer_of(rng, kv(9), TOKENS, "sliding", 9),
        layer_of(
            rng,
            {"latent": part("bf16", "td", TOKENS, 12), "k_rope": part("bf16", "td", TOKENS, 4)},
            TOKENS,
            "latent",
            rope=0,
        ),
        layer_of(rng, state, TOKENS - 1, "state", state_length=TOKENS - 1),
        layer_of(rng, kv(TOKENS) | state, TOKENS, state_length=TOKENS - 1),
        layer_of(rng, kv(TOKENS, "fp8_e4m3fn") | scales, TOKENS),
        layer_of(rng, {}, TOKENS),
        layer_of(rng, kv(13), 13, "cross"),
    ]
    ids = rng.integers(0, 1000, (*front, TOKENS))
    return Snapshot(layers, "bf16", ids, kvzip.Origin("test/kinds", rope=({"theta": 1.0},)))


@st.composite
def parts(draw, tokens, batch):
    """A part of any format and axes, with the tokens of its layer or without."""
    dtype = draw(st.sampled_from(dtypes.NAMES))
    letters = draw(st.permutations(sorted(draw(st.sets(st.sampled_from("htrd"))))))
    axes = ("" if batch is None else "b") + "".join(
        letter for letter in letters if not (letter == "r" and "t" in letters)
    )
    sizes = {letter: draw(st.integers(0, 3)) for letter in "hrd"} | {"t": tokens, "b": batch}
    return PartLayout(dtype, tuple(sizes[letter] for letter in axes), axes)


@st.composite
def layers(draw, tokens, batch):
    held = draw(st.integers(0, tokens))
    names = draw(st.lists(st.sampled_from(["k", "v", "conv", "x_1"]), unique=True))
    found = {name: draw(parts(held, batch)) for name in names}
    timed = any("t" in part.axes for part in found.values())
    timeless = any("t" not in part.axes for part in found.values())
    kind = draw(st.sampled_from(["full", "latent", "cross"])) if timed or not found else "state"
    length = None
    if timeless and (kind == "state" or draw(st.booleans())):
        length = tokens if kind == "state" else draw(st.integers(0, tokens))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    return layer_of(rng, found, tokens, kind, state_length=length)


@st.composite
def snapshots(draw):
    batch, tokens = draw(st.sampled_from([None, 1, 2])), draw(st.integers(0, 20))
    held = draw(st.lists(layers(tokens, batch), max_size=3))
    formats = {part.dtype for layer in held for part in layer.layout.parts.values()}
    return Snapshot(held, draw(st.sampled_from(sorted(formats) or ["bf16"])))


@given(
    snapshot=snapshots(), codec=st.sampled_from(CODECS), block_tokens=st.sampled_from([1, 7, 64])
)
def test_whatever_a_layer_keeps_comes_back(snapshot, codec, block_tokens):
    blob = kvzip.encode(snapshot, codec, block_tokens=block_tokens)
    assert len(blob) <= kvzip.max_encoded_size(snapshot, codec, block_tokens=block_tokens)
    assert kvzip.decode(blob) == snapshot
    with kvzip.open(blob) as reader:
        assert reader.info.raw_bytes == sum(a.nbytes for layer in snapshot.layers for a in layer)
        for i, layer in enumerate(snapshot.layers):
            found = reader.layer(i)
            assert found.layout == layer.layout
            assert all((found.part(n) == bits).all() for n, bits in layer.parts.items())


@pytest.mark.parametrize("batch", [None, 3])
def test_every_kind_through_a_file_and_a_snapshot(codec, batch, tmp_path):
    snapshot = every_kind(batch)
    kvzip.write(tmp_path / "a.kvz", snapshot, codec, block_tokens=16)
    assert kvzip.decode(tmp_path / "a.kvz") == snapshot
    kvzip.verify(tmp_path / "a.kvz")
    snapshot.save(tmp_path / "a.safetensors")
    loaded = Snapshot.load(tmp_path / "a.safetensors")
    assert loaded == snapshot
    assert kvzip.encode(loaded, codec, block_tokens=16) == (tmp_path / "a.kvz").read_bytes()


def test_what_the_layer_says_of_itself():
    layers = every_kind().layers
    assert [layer.kind for layer in layers[2:6]] == ["latent", "state", "full", "full"]
    assert list(layers[3].parts) == ["conv", "recurrent"]
    assert layers[3].layout.parts["recurrent"].dtype == "fp32"
    assert layers[0].parts["k"] is layers[0].k
    for wrong in (lambda: layers[3].k, lambda: layers[0].part("conv"), lambda: layers[2].v):
        with pytest.raises(UsageError, match="has no part"):
            wrong()
    with pytest.raises(KeyError):
        layers[0].parts["conv"]


@pytest.mark.parametrize("batch", [None, 2])
def test_ranges_of_tokens(codec, batch):
    snapshot = every_kind(batch)
    with kvzip.open(kvzip.encode(snapshot, codec, block_tokens=16)) as reader:
        # At the length that all states are good at: all of them; and what attention holds.
        found = reader.decode(tokens=(5, TOKENS - 1))
        assert found.tokens == TOKENS - 1
        for layer, whole in zip(found.layers, snapshot.layers, strict=True):
            for name, bits in layer.parts.items():
                part, wanted = layer.layout.parts[name], whole.part(name)
                if "t" in part.axes and layer.kind != "cross":
                    first = max(5, whole.layout.first) - whole.layout.first
                    at = [slice(None)] * wanted.ndim
                    at[part.axes.index("t")] = slice(first, wanted.shape[part.axes.index("t")] - 1)
                    wanted = wanted[tuple(at)]
                assert np.array_equal(bits, wanted), (layer.kind, name)
        for stop in (0, 17):
            with pytest.raises(UnsupportedError, match=r"layer 3: .*state after 39 tokens"):
                reader.decode(tokens=(0, stop))
        reader.decode(layers=[0, 1, 2, 5, 6, 7], tokens=(0, 17))


def test_out_takes_parts_by_name_or_in_order(codec):
    snapshot = every_kind()
    blob = kvzip.encode(snapshot, codec, block_tokens=16)
    by_name = [{n: np.zeros_like(a) for n, a in layer.parts.items()} for layer in snapshot.layers]
    found = kvzip.decode(blob, out=by_name)
    assert found == snapshot
    assert found.layers[3].part("conv") is by_name[3]["conv"]
    in_order = [[np.zeros_like(a) for a in layer] for layer in snapshot.layers]
    assert kvzip.decode(blob, out=in_order) == snapshot
    in_order[3] = in_order[3][:1]
    with pytest.raises(UsageError, match="layer 3 has 1 arrays, not those of conv, recurrent"):
        kvzip.decode(blob, out=in_order)
    by_name[3]["k"] = by_name[3].pop("conv")
    with pytest.raises(UsageError, match="its parts are"):
        kvzip.decode(blob, out=by_name)


@pytest.mark.parametrize("codec", ["raw", "planes", "channel"])
def test_every_truncation_and_bit_flip_is_an_error(codec):
    blob = kvzip.encode(every_kind(), codec, block_tokens=16)
    for size in range(0, len(blob), 61):
        with pytest.raises(KVZipError):
            kvzip.decode(blob[:size])
    flipped = bytearray(blob)
    for at in itertools.chain(range(0, 4000, 37), range(4000, len(blob), 23)):
        flipped[at] ^= 1 << at % 8
        with pytest.raises(KVZipError):
            kvzip.decode(bytes(flipped))
        flipped[at] ^= 1 << at % 8


FEW = 20


def few(dtype="bf16", tokens=FEW):
    return {name: PartLayout(dtype, (2, tokens, 6), "htd") for name in KV}


def scaled(*shape, axes=""):
    """fp8 with scales: of all numbers, or of each token."""
    return few("fp8_e4m3fn") | {f"{n}_scale": PartLayout("fp32", shape, axes) for n in KV}


STATE = {"conv": PartLayout("bf16", (10, 3), "dr"), "matrix": PartLayout("fp32", (2, 4, 5), "hrd")}
LATENT = {"latent": PartLayout("bf16", (FEW, 12), "td"), "rope": PartLayout("bf16", (FEW, 4), "td")}
SMALL = {
    "sliding": [(few(tokens=7), FEW, {"kind": "sliding", "window": 7}), (few(), FEW, {})],
    "latent": [(LATENT, FEW, {"kind": "latent"})],
    "state": [(STATE, FEW, {"kind": "state", "state_length": FEW}), (few(), FEW, {})],
    "cross": [(few(), FEW, {}), (few(tokens=5), 5, {"kind": "cross"})],
    "a scale": [(scaled(), FEW, {})],
    "scales": [(scaled(2, FEW, axes="ht"), FEW, {})],
    "on a grid": [({name: PartLayout("fp32", (1, FEW, 64), "htd") for name in KV}, FEW, {})],
    **{dtype: [(few(dtype), FEW, {})] for dtype in dtypes.NAMES},
}
"""Layers of files of 1 to 15 KB: their parts, lengths, and other fields."""


@pytest.mark.long
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", SMALL)
def test_each_cut_and_each_flipped_bit_of_a_small_file_is_an_error(tmp_path, name, codec):
    rng = np.random.default_rng(3)
    layers = [layer_of(rng, parts, length, **more) for parts, length, more in SMALL[name]]
    if name == "on a grid":
        for layer in layers:
            layer.k, layer.v = (bits & 0xFFFF0000 for bits in layer)
    usual = layers[0].layout.parts["k"].dtype if "k" in layers[0].layout.parts else "bf16"
    blob = kvzip.encode(Snapshot(layers, usual, range(FEW)), codec, block_tokens=16)
    # Zeros of the lower half cost `planes` nothing, so that a grid would save it nothing.
    on_grid = name == "on a grid" and codec != "planes"
    assert bool(kvzip.info(blob).header.grids) == on_grid
    for size in range(len(blob)):
        with pytest.raises(KVZipError):
            kvzip.decode(blob[:size], threads=1)
    flipped, path = bytearray(blob), tmp_path / "a.kvz"
    for place in range(8 * len(blob)):
        at, bit = place // 8, 1 << place % 8
        flipped[at] ^= bit
        with pytest.raises(KVZipError):
            kvzip.decode(bytes(flipped), threads=1)
        if place % 9 == 0:  # each bit of a byte in turn
            path.write_bytes(flipped)
            with pytest.raises(KVZipError):
                kvzip.decode(path, threads=1)
            with pytest.raises(KVZipError):
                kvzip.verify(bytes(flipped), threads=1)
            with pytest.raises(KVZipError), kvzip.open(bytes(flipped)) as reader:
                for i in range(len(reader)):
                    reader.layer(i)
        flipped[at] ^= bit


@settings(max_examples=60, deadline=None)
@given(data=st.data(), codec=st.sampled_from(CODECS), seed=st.integers(0, 2**32 - 1))
def test_bits_that_change_no_number_are_damage_too(data, codec, seed):
    """Where numbers are few and alike, coders have bits to spare; and whole rows are one value."""
    rng = np.random.default_rng(seed)
    form = dtypes.get(data.draw(st.sampled_from(dtypes.NAMES)))
    shape = data.draw(st.sampled_from([(1, 20, 16), (2, 30, 17), (3, 9, 64), (2, 1, 5)]))
    kinds = rng.integers(0, 256, (data.draw(st.integers(1, 4)), form.itemsize), dtype=np.uint8)
    numbers = kinds[rng.integers(0, len(kinds), shape)].view(form.uint)[..., 0]
    part = PartLayout(form.name, shape, "htd")
    layer = Layer({"k": numbers, "v": numbers}, LayerLayout({"k": part, "v": part}, shape[1]))
    snapshot = Snapshot([layer], "bf16")
    blob = bytearray(kvzip.encode(snapshot, codec, block_tokens=8, threads=1))
    assert kvzip.decode(bytes(blob), threads=1) == snapshot
    for at in rng.integers(0, len(blob), 100):
        bit = 1 << rng.integers(8)
        blob[at] ^= bit
        for read in kvzip.decode, kvzip.verify:
            with pytest.raises(KVZipError):
                read(bytes(blob), threads=1)
        blob[at] ^= bit


def test_bits_of_large_entries_that_change_no_number_are_damage_to_verify(monkeypatch):
    """Readers compare the stored checksum of small entries only (docs/format.md); here of none."""
    monkeypatch.setattr("kvzip.container.blocks.SMALL", 0)
    numbers = np.full((1, 20, 16), 0x3F80, np.uint16)
    snapshot, unchanged = Snapshot.from_arrays([(numbers, numbers)], "bf16"), 0
    for codec in CODECS:
        blob = bytearray(kvzip.encode(snapshot, codec, block_tokens=20, threads=1))
        for at in range(len(blob) * 2 // 3, len(blob)):
            bit = 1 << at % 8
            blob[at] ^= bit
            with contextlib.suppress(KVZipError):
                assert kvzip.decode(bytes(blob), threads=1) == snapshot
                unchanged += 1
            with pytest.raises(KVZipError):
                kvzip.verify(bytes(blob), threads=1)
            blob[at] ^= bit
    assert unchanged > 10


K = PartLayout("bf16", (2, 40, 6), "htd")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "other"}, "there is none of that kind"),
        ({"kind": "state"}, "part 'k' has an axis of tokens"),
        ({"kind": "state", "parts": {}}, "state_length is 39: it must be cumulative_length, 40"),
        ({"state_length": None, "kind": "state"}, "part 'k' has an axis of tokens"),
        ({"state_length": 41}, "state_length is 41: it must be from 0 to"),
        ({"state_length": -1}, "state_length is -1: it must be from 0 to"),
        ({"parts": {"k": K}, "state_length": 40}, "no part without an axis of tokens"),
        ({"parts": {"k k": K}, "state_length": None}, "a name is letters, digits and _"),
        ({"parts": {"k": ("bf16", (2, 40, 6), "htd")}}, "it must be a PartLayout"),
        ({"parts": [1], "state_length": None}, "must be a dict"),
        ({"parts": {"conv": PartLayout("bf16", (9, 3), "dr")}}, "none of its parts .conv. has an"),
        (
            {"parts": {"k": K, "v": K.cut(39)}, "state_length": None},
            "'v' holds 39 tokens and 'k' 4",
        ),
        ({"cumulative_length": 39}, "part 'k' holds 40 tokens, of cumulative_length=39"),
        ({"cumulative_length": -1}, "cumulative_length is -1: it must be from 0"),
        ({"cumulative_length": 2**31}, "cumulative_length is 2147483648: it must be from 0"),
        ({"window": 3}, "window is 3, and only layers of kind sliding and latent"),
        ({"kind": "sliding"}, "it must have a window="),
        ({"kind": "sliding", "window": 0}, "window is 0: it must be 1 or more"),
        ({"rope": -1}, "rope is -1: it must be an index"),
        (
            {"parts": {"k": K, "v": PartLayout("bf16", (3, 2, 40, 6), "bhtd")}},
            "part 'v' has a batch of 3 and 'k' no axis of the batch",
        ),
    ],
)
def test_layers_that_make_no_sense(fields, words):
    """Each rule has a sentence of its own."""
    usual = {
        "parts": {"k": K, "conv": PartLayout("bf16", (10, 3), "dr")},
        "cumulative_length": 40,
        "state_length": 39,
    }
    LayerLayout(**usual)
    if "v" in fields.get("parts", ()):
        fields = {"state_length": None} | fields
    with pytest.raises(UsageError, match=words):
        LayerLayout(**usual | fields)


@pytest.mark.parametrize(
    ("shape", "axes", "words"),
    [
        ((2, 3), "h", "a letter for each size"),
        ((2, 3), "hh", "twice"),
        ((2, 3), "hx", "no axis 'x'"),
        ((2, 3), "tr", "not both"),
        ((2, 3), "hb", "comes first"),
        ((-1,), "d", "sizes are from 0"),
    ],
)
def test_parts_that_make_no_sense(shape, axes, words):
    with pytest.raises(UsageError, match="axes"):
        PartLayout("bf16", shape, axes)


def test_what_a_layer_holds_is_what_its_layout_says():
    layer = every_kind().layers[3]
    for held in ({}, {"conv": layer.part("conv")}, dict(layer.parts) | {"k": layer.part("conv")}):
        with pytest.raises(UsageError, match="has the parts"):
            Snapshot([Layer(held, layer.layout)], "bf16")


@given(data=st.data())
def test_a_header_that_lies_about_parts_is_an_error(data):
    """Whatever is said of other parts than those that are there, and sealed again."""
    blob = kvzip.encode(every_kind(), "raw", block_tokens=16)
    old = data.draw(
        st.sampled_from([b'"axes":"htd"', b'"fp32"', b'"state_length":39', b'"latent"'])
    )
    new = data.draw(st.sampled_from([b"t", b"0", b"9", b'"']))
    at = [i for i in range(len(blob)) if blob.startswith(old, i)]
    where = data.draw(st.sampled_from(at)) + data.draw(st.integers(0, len(old) - 1))
    lying = bytearray(blob)
    lying[where : where + 1] = new
    try:
        found = kvzip.decode(reseal(bytes(lying)))
    except KVZipError:
        return
    assert found.layout != every_kind().layout or lying == blob


def test_a_part_with_two_codecs_is_an_error():
    from kvzip.container.format import Codecs, Header, OtherCodec
    from kvzip.layout import StoredLayout

    layout = every_kind().layout
    for parts in ([(3, "conv"), (3, "conv")], [(99, "conv")], [(3, "k")]):
        header = Header(
            StoredLayout.of(layout), kvzip.Origin(), {"id": "raw"}, 16, "test",
            other_codecs=(OtherCodec({"id": "zstd"}, tuple(parts)),),
        )  # fmt: skip
        with pytest.raises(UsageError, match="two codecs"):
            Codecs.of_header(header)


def test_info_says_what_each_part_takes_up(codec, tmp_path, capsys):
    snapshot = every_kind()
    blob = kvzip.encode(snapshot, codec, block_tokens=16)
    found = kvzip.info(blob)
    assert sum(part.raw_bytes for part in found.parts) == found.raw_bytes == snapshot.raw_bytes
    assert sum(part.encoded_bytes for part in found.parts) < found.encoded_bytes
    conv = [part for part in found.parts if (part.kind, part.part) == ("state", "conv")]
    assert [(part.dtype, part.layers, part.raw_bytes) for part in conv] == [("bf16", 1, 60)]
    (tmp_path / "a.kvz").write_bytes(blob)
    code, printed, _ = run(capsys, "info", tmp_path / "a.kvz")
    assert code == 0
    for words in ("4 full", "latent", "k_rope", "state", "recurrent", "cross", "fp8_e4m3fn"):
        assert words in printed


def test_commands_take_snapshots_of_every_kind(tmp_path, capsys):
    for seed in range(2):
        every_kind(seed=seed).save(tmp_path / f"{seed}.safetensors")
    one, two = (tmp_path / f"{seed}.safetensors" for seed in range(2))
    code, rows = run_json(capsys, "bench", one, "--codecs", "zstd,channel", "--repeat", "1")
    assert code == 0
    assert all(row["exact"] for row in rows["rows"])
    profile = tmp_path / "c.kvprofile"
    assert run(capsys, "fit", one, two, "-o", profile, "--codec", "channel")[0] == 0
    encode = ("encode", one, "-o", tmp_path / "a.kvz", "--codec", "channel", "--profile", profile)
    assert run(capsys, *encode)[0] == 0
    verify = ("verify", tmp_path / "a.kvz", "--against", one, "--profile", profile)
    assert run(capsys, *verify)[0] == 0
    code, _, said = run(capsys, "fit", one, two, "-o", tmp_path / "p.kvprofile")
    assert code == 2
    assert "layer 2 is of kind latent" in said


def test_layers_without_parts_are_read_alone_from_a_batch():
    """Nothing tells of the rows of their ids then."""
    part = PartLayout("bf16", (2, 4, 5, 8), "bhtd")
    zeros = np.zeros(part.shape, np.uint16)
    layers = [
        Layer({"k": zeros, "v": zeros}, LayerLayout({"k": part, "v": part}, 5)),
        Layer({}, LayerLayout({}, 5)),
    ]
    made = kvzip.Snapshot(layers, "bf16", np.arange(10).reshape(2, 5))
    blob = kvzip.encode(made)
    assert kvzip.decode(blob) == made
    assert kvzip.open(blob).layer(1).layout == layers[1].layout
    assert kvzip.decode(blob, layers=[1]).token_ids is None
    assert np.array_equal(kvzip.decode(blob, layers=[0]).token_ids, made.token_ids)


def test_equal_layouts_are_equal_bytes():
    """Whether their words are one object or not."""
    part, zeros = PartLayout("bf16", (1, 5, 8), "htd"), np.zeros((1, 5, 8), np.uint16)
    blobs = set()
    for kind in ("full", "".join(["fu", "ll"]), np.str_("full")):
        layout = LayerLayout({"k": part, "v": part}, 5, kind=kind)
        blobs.add(kvzip.encode(kvzip.Snapshot([Layer({"k": zeros, "v": zeros}, layout)], "bf16")))
    assert len(blobs) == 1


def test_many_layers_that_are_all_unlike_are_told_apart_quickly():
    layers = tuple(LayerLayout({}, 5, "sliding", window) for window in range(1, 40_001))
    began = time.process_time()
    stored = StoredLayout.of(Layout("bf16", layers))
    assert stored.layout().layers == layers
    # 0.5 s here; minutes where each is compared with all others.
    assert time.process_time() - began < 10
    with pytest.raises(UsageError, match="distinct"):
        StoredLayout("bf16", (layers[0], layers[0]), (0, 1))
