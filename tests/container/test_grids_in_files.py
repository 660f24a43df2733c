"""Parts on a grid: stored narrow, and back to the same bits, whatever is asked for and damaged."""

from __future__ import annotations

import contextlib
import itertools
import struct
import time

import msgspec
import numpy as np
import pytest
from command import run, run_json
from grids.reference import widened
from grids.test_grids import cases, made
from hypothesis import given
from hypothesis import strategies as st
from support import CODECS, cache_like, random_bits, reseal

import kvzip
from kvzip import Layer, LayerLayout, PartLayout, Snapshot, dtypes
from kvzip.codec import Context
from kvzip.container.format import Codecs, Header, OnGrid
from kvzip.container.grids import GridCodec
from kvzip.errors import CorruptError, KVZipError, UnsupportedError, UsageError
from kvzip.grids import Grid
from kvzip.layout import StoredLayout


def e4m3(shape, seed=0, kind="fp32", group=(1, 64)):
    return made("bf16", "fp8_e4m3fn", kind, group, shape, "once", "normal", seed)


def small():
    """Two layers of keys on a grid, but for 20 channels and a few numbers, and values on none."""
    rng = np.random.default_rng(1)
    layers = []
    for i in range(2):
        k = np.concatenate((e4m3((2, 100, 64), i), cache_like(rng, "bf16", (2, 100, 20))), -1)
        k[0, 10:90:16, 3] ^= 1
        layers.append((k, cache_like(rng, "bf16", (2, 100, 84))))
    return Snapshot.from_arrays(layers, "bf16", np.arange(100))


def on_grids(blob):
    return {key: g.grid for g in kvzip.info(blob).header.grids for key in g.parts}


@pytest.mark.parametrize("tokens", [96, 200, 2100])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_groups_along_tokens(group, tokens):
    """They are found whether they are longer or shorter than the places where a grid is tried."""
    k = e4m3((tokens, 130), group=(group, 1))[np.newaxis]
    blob = kvzip.encode(Snapshot.from_arrays([(k, k)], "bf16"), "raw")
    assert set(on_grids(blob)) == {(0, "k"), (0, "v")}
    assert np.array_equal(kvzip.decode(blob).layers[0].k, k)


@given(
    case=cases,
    codec=st.sampled_from(CODECS),
    block_tokens=st.sampled_from([7, 16, 33, 1000]),
    first=st.integers(0, 40),
    cut=st.tuples(st.integers(0, 80), st.integers(0, 80)),
)
def test_any_grid_by_any_codec(case, codec, block_tokens, first, cut):
    rng = np.random.default_rng(case["seed"])
    k = made(**case)
    if k.ndim == 2:
        k = k[np.newaxis]
    wide, tokens = case["wide"], k.shape[-2]
    layers = []
    for held in (tokens, tokens // 2):
        bits = np.asfortranarray(k[..., :held, :])
        v = cache_like(rng, wide, bits.shape)
        layout = LayerLayout.of_kv(
            bits.shape, v.shape, wide, first + tokens, "sliding", window=held + 1
        )
        layers.append(Layer.of_kv(bits, v, layout))
    snapshot = Snapshot(layers, wide)
    blob = kvzip.encode(snapshot, codec, block_tokens=block_tokens)
    plain = kvzip.encode(snapshot, codec, block_tokens=block_tokens, grids=False)
    assert not on_grids(plain)
    assert set(on_grids(blob)) <= {(0, "k"), (1, "k")}
    if codec == "raw":
        assert (0, "k") in on_grids(blob)
    for shapes in (snapshot, snapshot.layout):
        assert len(blob) <= kvzip.max_encoded_size(shapes, codec, block_tokens=block_tokens)
    kvzip.verify(blob)
    begin, end = sorted(min(x, first + tokens) for x in cut)
    with kvzip.open(blob) as reader, kvzip.open(plain) as other:
        assert reader.decode() == snapshot
        assert reader.layer(1).k.tolist() == k[..., : tokens // 2, :].tolist()
        assert reader.tokens(begin, end) == other.tokens(begin, end)
        requests = [([1, 0], (begin, end)), ([0], (0, end))]
        assert list(reader.in_turn(requests)) == list(other.in_turn(requests))
        assert reader.info.raw_bytes == other.info.raw_bytes == snapshot.raw_bytes
        out = [
            tuple(np.zeros(a.shape[::-1], a.dtype).transpose() for a in layer)
            for layer in snapshot.layers
        ]
        reader.decode(out)
        assert all(np.array_equal(a, b) for a, b in zip(out[0], snapshot.layers[0], strict=True))


@pytest.mark.parametrize("kind, ratio", [("e8m0", 2.35), ("fp32", 2.3)])
def test_channel_on_a_rounded_cache(kind, ratio):
    import torch

    rng, layers = np.random.default_rng(0), []
    for _ in range(2):
        x = torch.from_numpy(cache_like(rng, "bf16", (4, 1024, 128)).view(np.int16))
        x = x.view(torch.bfloat16).float().reshape(4, 1024, 2, 64)
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
        if kind == "e8m0":
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        bits = (codes.float() * scale).to(torch.bfloat16).view(torch.int16).numpy()
        layers.append((bits.view(np.uint16).reshape(4, 1024, 128),) * 2)
    snapshot = Snapshot.from_arrays(layers, "bf16")
    blob = kvzip.encode(snapshot, "channel")
    # Powers of two for rows may be powers of two for columns, too.
    assert kind == "e8m0" or {str(grid) for grid in on_grids(blob).values()} == {
        "fp8_e4m3fn x fp32 for 1 x 64"
    }
    assert len(kvzip.info(blob).header.grids) == 1
    assert kvzip.info(blob).ratio >= ratio
    assert kvzip.decode(blob) == snapshot


@pytest.mark.parametrize("codec", CODECS)
def test_states_of_fp32_that_hold_half(codec):
    rng = np.random.default_rng(5)
    state = cache_like(rng, "bf16", (2, 4, 32, 24)).astype(np.uint32) << 16
    conv = cache_like(rng, "fp32", (2, 300, 4))
    parts = {
        "recurrent": PartLayout("fp32", state.shape, "bhrd"),
        "conv": PartLayout("fp32", conv.shape, "bdr"),
    }
    layout = LayerLayout(parts, 40, "state", state_length=40)
    snapshot = Snapshot([Layer({"recurrent": state, "conv": conv}, layout)], "fp32")
    blob = kvzip.encode(snapshot, codec)
    assert kvzip.decode(blob) == snapshot
    assert set(on_grids(blob)) <= {(0, "recurrent")}
    if codec in ("raw", "channel"):
        assert on_grids(blob)[0, "recurrent"].narrow == "bf16"


def test_what_leaves_the_grid_is_stored_as_it_is():
    """A block that the sample said nothing of."""
    bits = e4m3((1, 4096, 64))
    bits[:, 700:900] = cache_like(np.random.default_rng(0), "bf16", (1, 200, 64))
    snapshot = Snapshot.from_arrays([(bits, bits)], "bf16")
    blob = kvzip.encode(snapshot, "raw", block_tokens=64)
    assert on_grids(blob)
    assert kvzip.decode(blob) == snapshot
    assert kvzip.info(blob).ratio > 1.7


def nearly_int8(shape, share):
    """Multiples of a step for each 64 channels, of which this share is off by a bit."""
    rng = np.random.default_rng(0)
    steps = np.repeat(np.exp(rng.normal(size=(*shape[:-1], shape[-1] // 64))), 64, -1)
    wide = (rng.integers(-127, 128, shape) * steps).astype(np.float32).view(np.uint32)
    bits = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)
    bits[rng.random(shape) < share] += 1
    return bits


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.drawn(2)
def test_a_part_that_is_unlike_its_sample_is_stored_without_the_grid(codec, seen, monkeypatch):
    """It is seen in other places, or else when all is narrow: then the tables say so, any tokens
    are read, and the file is hardly larger."""
    bits = random_bits(np.random.default_rng(0), "bf16", (8, 2048, 64))
    on = e4m3(bits.shape)
    for row, token in (0, 0), (3, 512), (7, 1536), (4, 800):
        bits[row, token : token + 512] = on[row, token : token + 512]
    if not seen:
        monkeypatch.setattr("kvzip.container.grids._is_elsewhere", lambda *_: True)
    snapshot = Snapshot.from_arrays([(bits, bits)] * 2, "bf16")
    blob = kvzip.encode(snapshot, codec, block_tokens=300)
    plain = kvzip.encode(snapshot, codec, block_tokens=300, grids=False)
    if codec == "raw":
        assert bool(on_grids(blob)) == (not seen)
    assert len(blob) <= 1.01 * len(plain)
    assert kvzip.decode(blob) == snapshot
    assert kvzip.decode(blob, tokens=(250, 1300)) == kvzip.decode(plain, tokens=(250, 1300))
    kvzip.verify(blob)


def test_info_tells_what_is_stored_and_not_what_was_found(tmp_path, capsys, monkeypatch):
    """Of two parts that their sample says are on a grid, one is."""
    monkeypatch.setattr("kvzip.container.grids._is_elsewhere", lambda *_: True)
    v = e4m3((8, 2048, 64))
    k = random_bits(np.random.default_rng(0), "bf16", v.shape)
    for row, token in (0, 0), (3, 512), (7, 1536), (4, 800):
        k[row, token : token + 512] = v[row, token : token + 512]
    path = tmp_path / "s.kvz"
    path.write_bytes(kvzip.encode(Snapshot.from_arrays([(k, v)], "bf16"), "planes"))
    parts = {part.part: part for part in kvzip.info(path).parts}
    grid = "fp8_e4m3fn x fp32 for 1 x 64"
    assert (parts["k"].grid, parts["k"].unused_grid) == (None, grid)
    assert (parts["v"].grid, parts["v"].unused_grid) == (grid, None)
    out = " ".join(run(capsys, "info", path)[1].split())
    assert f"v of 1 full layers is on a grid: {grid}" in out
    assert f"k of 1 full layers is partly on a grid, {grid}, and stored without it" in out


def test_exceptions_do_not_make_the_search_long():
    """As long as a grid of the same kind without exceptions takes, give or take."""

    def seconds(share):
        bits = nearly_int8((4, 1024, 128), share)
        snapshot = Snapshot.from_arrays([(bits, bits)], "bf16")
        times = []
        for _ in range(3):
            begin = time.process_time()
            blob = kvzip.encode(snapshot, "raw", threads=1)
            times.append(time.process_time() - begin)
        assert kvzip.decode(blob) == snapshot
        return min(times)

    assert seconds(0.02) < 8 * seconds(0)


def test_what_is_no_grid_costs_nothing():
    rng = np.random.default_rng(0)
    snapshot = Snapshot.from_arrays([(cache_like(rng, "bf16", (2, 300, 64)),) * 2], "bf16")
    assert kvzip.encode(snapshot) == kvzip.encode(snapshot, grids=False)
    with pytest.raises(UsageError, match="grids"):
        kvzip.encode(snapshot, grids="no")


def test_a_snapshot_in_a_file_gives_the_same_file(tmp_path):
    snapshot = small()
    snapshot.save(tmp_path / "s.safetensors")
    for mmap in (False, True):
        loaded = Snapshot.load(tmp_path / "s.safetensors", mmap=mmap)
        assert kvzip.encode(loaded, threads=1) == kvzip.encode(snapshot)


@pytest.mark.parametrize("codec", ["raw", "channel"])
def test_a_block_read_by_its_description(codec):
    """docs/format.md, followed step by step; only the codecs inside are ours."""
    snapshot = small()
    blob = kvzip.encode(snapshot, codec, block_tokens=48)
    grid = on_grids(blob)[0, "k"]
    assert grid.channels == (0, 64)
    codes_codec, own = (kvzip.get_codec(codec) for _ in range(2))
    origin, found = kvzip.Origin(), []
    with kvzip.open(blob) as reader:
        tables_row, *rows = reader.index.rows[0, "k"]

        def entry(row):
            return memoryview(blob)[reader.index.offset[row] :][: reader.index.length[row]]

        def context(dtype, tables=None):
            return Context(dtypes.get(dtype), 0, "k", 0, origin, tables=tables)

        data = entry(tables_row)
        length = struct.unpack_from("<Q", data)[0]
        tables = codes_codec.load_tables(
            data[8 : 8 + length], (1, 2, 100, 64), context(grid.narrow)
        )
        beside = own.load_tables(data[8 + length :], (1, 2, 100, 20), context("bf16"))
        for row in rows:
            data, tokens = entry(row), reader.index.tokens[row]
            kind, scale = data[:2]
            assert kind == 1 and scale == 3
            *lengths, count = struct.unpack_from("<4Q", data, 2)
            ends = list(itertools.accumulate((34, *lengths, 4 * count, 2 * count)))
            coded, coded_scales, coded_rest, at, exceptions = (
                data[a:b] for a, b in itertools.pairwise(ends)
            )
            assert ends[-1] == len(data)
            codes = np.empty((1, 2, tokens, 64), np.uint8)
            codes_codec.decode(coded, codes, context(grid.narrow, tables))
            scales = np.empty((1, 2, tokens, 1), np.uint32)
            kvzip.get_codec("planes").decode(coded_scales, scales, context("fp32"))
            rest = np.empty((1, 2, tokens, 20), np.uint16)
            own.decode(coded_rest, rest, context("bf16", beside))
            scales = scales.view(np.float32).astype(float)
            numbers = widened(codes, grid.narrow, scales, grid.group, "bf16", grid.rounding)
            turned = np.ascontiguousarray(numbers.transpose(2, 0, 1, 3))
            turned.reshape(-1)[np.frombuffer(at, "<u4")] = np.frombuffer(exceptions, "<u2")
            found.append(np.concatenate((turned.transpose(1, 2, 0, 3), rest), -1))
    assert np.array_equal(np.concatenate(found, 2)[0], snapshot.layers[0].k)


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "planes", "channel"])
@pytest.mark.drawn(2)
def test_every_truncation_and_bit_flip_is_an_error(codec):
    blob = kvzip.encode(small(), codec, block_tokens=64)
    assert on_grids(blob)
    for size in range(0, len(blob), 211):
        with pytest.raises(KVZipError):
            kvzip.decode(blob[:size])
    with kvzip.open(blob) as reader:
        index = reader.index
        values = {
            at
            for row, (_, part) in enumerate(index.key)
            if part == "v"
            for at in range(index.offset[row], index.offset[row] + index.length[row])
        }
    flipped = bytearray(blob)
    # Of ordinary parts other tests tell.
    for at in sorted(set(range(0, len(blob), 53)) - values):
        flipped[at] ^= 1 << at % 8
        with pytest.raises(KVZipError):
            kvzip.decode(bytes(flipped))
        flipped[at] ^= 1 << at % 8


@given(data=st.data(), codec=st.sampled_from(CODECS))
def test_hostile_entries_never_give_wrong_numbers(data, codec):
    """Damage behind true checksums: the decoder itself meets it."""
    snapshot = small()
    blob = bytearray(kvzip.encode(snapshot, codec, block_tokens=64, threads=1))
    with kvzip.open(bytes(blob)) as reader:
        offsets, lengths = reader.index.offset, reader.index.length
        rows = [*reader.index.rows[0, "k"], *reader.index.rows[1, "k"]]
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.sampled_from(rows))
        within = st.one_of(
            st.integers(0, min(lengths[row], 42) - 1), st.integers(0, lengths[row] - 1)
        )
        blob[offsets[row] + data.draw(within)] = data.draw(st.integers(0, 255))
    try:
        decoded = kvzip.decode(reseal(blob), threads=1)
    except KVZipError:
        return
    assert decoded == snapshot


@given(
    data=st.binary(max_size=300),
    narrow=st.sampled_from(["fp8_e4m3fn", "int4", "bf16"]),
    group=st.tuples(st.sampled_from([1, 3, 50]), st.sampled_from([1, 7, 8])),
)
def test_any_bytes_for_a_block(data, narrow, group):
    wide, scale = ("fp32", None) if narrow == "bf16" else ("bf16", "fp32")
    raw = kvzip.get_codec("raw")
    codec = GridCodec(Grid(wide, narrow, (0, 8), scale, group), raw, raw)
    context = Context(dtypes.get(wide), 0, "k", 5, kvzip.Origin(), None, None)
    tables = codec.load_tables(memoryview(bytes(8)), (1, 2, 50, 8), context)
    out = np.empty((1, 2, 6, 8), dtypes.get(wide).uint)
    context = msgspec.structs.replace(context, start=9, tables=tables)
    for more in (data, b"\1\3" + data, b"\1\0" + struct.pack("<4Q", 96, 0, 0, 0) + data[:96]):
        with contextlib.suppress(CorruptError, UnsupportedError):
            codec.decode(memoryview(more), out, context)
    with pytest.raises(CorruptError):
        codec.load_tables(memoryview(b"\1" + bytes(7)), (1, 2, 50, 8), context)


GRID = Grid("bf16", "fp8_e4m3fn", (0, 64), "fp32", (1, 64))


@pytest.mark.parametrize(
    "grid, parts",
    [
        (GRID, [(0, "k"), (0, "k")]),
        (GRID, [(9, "k")]),
        (GRID, [(0, "x")]),
        (msgspec.structs.replace(GRID, wide="fp32"), [(0, "k")]),
        (msgspec.structs.replace(GRID, narrow="bf16"), [(0, "k")]),
        (msgspec.structs.replace(GRID, scale=None), [(0, "k")]),
        (msgspec.structs.replace(GRID, channels=(0, 85)), [(0, "k")]),
        (msgspec.structs.replace(GRID, channels=(4, 4)), [(0, "k")]),
        (msgspec.structs.replace(GRID, channels=(-1, 64)), [(0, "k")]),
        (msgspec.structs.replace(GRID, group=(0, 64)), [(0, "k")]),
        (msgspec.structs.replace(GRID, group=(1, 2**63)), [(0, "k")]),
        (msgspec.structs.replace(GRID, group=(101, 1)), [(0, "k")]),
        (msgspec.structs.replace(GRID, narrow="bf16", scale=None), [(0, "k")]),
    ],
)
def test_grids_that_cannot_be(grid, parts):
    header = Header(
        StoredLayout.of(small().layout), kvzip.Origin(), {"id": "raw"}, 16, "test",
        grids=(OnGrid(grid, {"id": "raw"}, tuple(parts)),),
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"does not take|two codecs"):
        Codecs.of_header(header)


def test_a_header_that_lies_about_a_grid_is_an_error():
    blob = kvzip.encode(small(), "raw", block_tokens=64)
    for old, new in (
        (b'"channels":[0,64]', b'"channels":[0,84]'),
        (b'"channels":[0,64]', b'"channels":[1,65]'),
        (b'"group":[1,64]', b'"group":[1,32]'),
        (b'"group":[1,64]', b'"group":[2,64]'),
        (b'"fp8_e4m3fn"', b'"fp16"      '),
    ):
        assert blob.count(old) == 1
        with pytest.raises(KVZipError):
            kvzip.decode(reseal(blob.replace(old, new)))


# --- who is told -----------------------------------------------------------------------------


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small().save("s.safetensors")
    for more, expected in ((), 1), (("--no-grids",), 0):
        code, _ = run_json(capsys, "encode", "s.safetensors", "-o", "s.kvz", *more)
        assert code == 0
        code, found = run_json(capsys, "info", "s.kvz")
        assert code == 0
        told = [(p["part"], p["codec"], p["layers"]) for p in found["parts"] if p["grid"]]
        assert told == [("k", "channel", 2)][:expected]
        assert {p["grid"] for p in found["parts"]} <= {None, "fp8_e4m3fn x fp32 for 1 x 64"}
        assert run(capsys, "info", "s.kvz")[0] == 0
    assert found["raw_bytes"] == small().raw_bytes
