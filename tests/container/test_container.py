from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    CODECS,
    assert_same,
    cache_like,
    make_snapshot,
    random_bits,
    reseal,
)

import kvzip
from kvzip import container
from kvzip.container import MAGIC, header_schema
from kvzip.container.index import RECORD
from kvzip.errors import (
    CorruptError,
    FormatError,
    KVZipError,
    ProfileError,
    UnsupportedError,
    UsageError,
)
from kvzip.snapshot import LayerLayout

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def small():
    """A file of a few kilobytes with every kind of section, and its snapshot."""
    snapshot = make_snapshot(cache_like, 11, "bf16", layers=1, heads=1, tokens=40, dim=4)
    return snapshot, kvzip.encode(snapshot, "channel", block_tokens=16)


@pytest.mark.parametrize(
    ("bound", "at", "what"), [("MAX_HEADER", 12, "header"), ("MAX_ENTRIES", 16, "index")]
)
def test_headers_and_indexes_have_a_largest_size(small, monkeypatch, bound, at, what):
    """Of readers, before they have the bytes, and of writers alike."""
    snapshot, blob = small
    size = struct.unpack_from("<I", blob, at)[0]
    for most in (size, size - 1):
        for module in (container.format, container.writer):
            if hasattr(module, bound):
                monkeypatch.setattr(module, bound, most)
        if most == size:
            kvzip.verify(blob)
            assert kvzip.encode(snapshot, "channel", block_tokens=16) == blob
            continue
        for first in (blob, blob[:40]):
            with pytest.raises(FormatError, match=f"{what} is out of bounds"):
                kvzip.open(first)
        with pytest.raises(UsageError):
            kvzip.encode(snapshot, "channel", block_tokens=16)


def with_header(blob: bytes, change) -> bytes:
    """The file with another header: `change` alters it as a dict in place, or gives other bytes.
    Lengths and offsets are mended."""
    length, count, ids = struct.unpack_from("<III", blob, 12)
    header = json.loads(blob[40 : 40 + length])
    new = change(header)
    new = new if isinstance(new, bytes) else json.dumps(header).encode()
    old_end, end = 40 + length + ids + 48 * count, 40 + len(new) + ids + 48 * count
    old_start, start = old_end + -old_end % 64, end + -end % 64
    preamble = bytearray(blob[:40])
    struct.pack_into("<I", preamble, 12, len(new))
    struct.pack_into("<Q", preamble, 24, len(blob) + start - old_start)
    index = bytearray(blob[40 + length + ids : old_end])
    for row in range(0, len(index), 48):
        (offset,) = struct.unpack_from("<Q", index, row + 16)
        struct.pack_into("<Q", index, row + 16, offset + start - old_start)
    middle = new + blob[40 + length : 40 + length + ids] + index
    return reseal(bytes(preamble) + middle + bytes(start - end) + blob[old_start:])


def with_records(blob: bytes, change) -> bytes:
    """The file with another index: `change` alters it as an array of records in place."""
    length, count, ids = struct.unpack_from("<III", blob, 12)
    at = 40 + length + ids
    records = np.frombuffer(blob, RECORD, count, at).copy()
    change(records)
    return reseal(blob[:at] + records.tobytes() + blob[at + records.nbytes :])


def test_resealing_is_what_the_writer_does(small):
    assert reseal(small[1]) == small[1]
    assert_same(kvzip.decode(with_header(small[1], lambda h: None)), small[0])


# --- damage ----------------------------------------------------------------------------------


def test_every_truncation_is_an_error(small):
    for length in range(len(small[1])):
        with pytest.raises((CorruptError, FormatError)):
            kvzip.decode(small[1][:length], threads=1)
    with pytest.raises(CorruptError, match="longer"):
        kvzip.decode(small[1] + b"\0", threads=1)


def test_every_bit_flip_is_an_error(small):
    blob = bytearray(small[1])
    for i in range(len(blob)):
        for bit in range(8):
            blob[i] ^= 1 << bit
            with pytest.raises(KVZipError):
                kvzip.decode(bytes(blob), threads=1)
            blob[i] ^= 1 << bit


@given(data=st.data())
def test_hostile_headers_and_indexes(small, data):
    blob = bytearray(small[1])
    header, count, ids = struct.unpack_from("<III", blob, 12)
    end = 40 + header + ids + 48 * count
    end += -end % 64
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = kvzip.decode(reseal(blob), threads=1)
    except KVZipError:
        return
    # The header gives parts their names, so they may be others; the numbers may not.
    assert all(
        np.array_equal(x, y)
        for a, b in zip(decoded.layers, small[0].layers, strict=False)
        for x, y in zip(a.parts.values(), b.parts.values(), strict=False)
    )


def layer_of(header):
    return header["layout"]["distinct"][0]


def part_of(header, **fields):
    """Change what is said of the first layer's keys."""
    layer_of(header)["parts"]["k"].update(**fields)


def test_a_file_of_zeros_that_takes_no_room_takes_no_memory(tmp_path):
    """An index of 2^32 - 1 entries lies in 200 GB of which a disk keeps nothing."""
    entries, path = 2**32 - 1, tmp_path / "a.kvz"
    size = -(-(40 + 64 + 48 * entries) // 64) * 64
    with path.open("wb") as file:
        file.write(struct.pack("<8sHHIIIQQ", MAGIC, 1, 0, 64, entries, 0, size, 0))
        file.truncate(size)
    with pytest.raises(FormatError, match="index is out of bounds"):
        kvzip.open(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: part_of(h, shape=[1, 2**30, 4]),
        lambda h: layer_of(h).update(
            parts={"k": {"dtype": "bf16", "shape": [1, 2**30, 4], "axes": "htd"}},
            cumulative_length=2**30,
        ),
        lambda h: layer_of(h).update(
            parts={"s": {"dtype": "bf16", "shape": [1, 2**30, 4], "axes": "hrd"}}
        ),
        lambda h: part_of(h, shape=[2**30, 40, 4]),
        lambda h: part_of(h, shape=[-1, 40, 4]),
        lambda h: part_of(h, shape=[1, 40]),
        lambda h: part_of(h, shape=[1, 40, 4, 4, 4]),
        lambda h: part_of(h, axes="hrd"),
        lambda h: part_of(h, axes="hhd"),
        lambda h: part_of(h, dtype="int4"),
        lambda h: part_of(h, dtype="fp64"),
        lambda h: layer_of(h).update(parts={}),
        lambda h: layer_of(h).update(parts={str(i): {} for i in range(100)}),
        lambda h: layer_of(h).update(cumulative_length=2**40),
        lambda h: layer_of(h).update(kind="sideways"),
        lambda h: h["layout"].update(layers=[0] * 1000),
        lambda h: h["layout"].update(layers=[0] * 70_000),
        lambda h: h["layout"].update(layers=[]),
        lambda h: h["layout"].update(layers=[1, 0]),
        lambda h: h["layout"].update(distinct=[layer_of(h)] * 2, layers=[0, 1]),
        lambda h: h["layout"].update(dtype="int4"),
        lambda h: h.update(block_tokens=0),
        lambda h: h.update(block_tokens=-1),
        lambda h: h.update(block_tokens=2**31),
        lambda h: h.update(codec={"id": "nobody's"}),
        lambda h: h.update(codec={"id": "zstd", "level": "high"}),
        lambda h: h.update(codec={}),
        lambda h: h.update(token_ids=False),
        lambda h: h.update(token_ids="yes"),
        lambda h: h.update(surprise=1),
        lambda h: h.pop("codec"),
    ],
)
def test_headers_that_lie_are_refused_before_memory_is_taken(small, change):
    import tracemalloc

    blob = with_header(small[1], change)
    tracemalloc.start()
    with pytest.raises((FormatError, CorruptError, UnsupportedError)):
        kvzip.decode(blob, threads=1)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_codec_that_does_not_take_the_numbers():
    blob = kvzip.encode(make_snapshot(random_bits, 1, "fp64"), "raw")
    with pytest.raises(FormatError, match="codec 'channel' does not take"):
        kvzip.open(with_header(blob, lambda h: h.update(codec={"id": "channel"})))


@pytest.mark.parametrize("size", [0, 1, 39, 41, 79, 81, 200, 2**16])
def test_token_ids_of_another_number(small, size):
    """A file has 40, of 2 bytes here; of 1, 3 and 4 there could be as many."""
    header, count, ids = struct.unpack_from("<III", small[1], 12)
    assert ids == 80
    start = 40 + header
    blob = small[1][:start] + bytes(size) + small[1][start + ids :]
    moved = -(-(start + size + 48 * count) // 64) * 64 - -(-(start + ids + 48 * count) // 64) * 64
    index = np.frombuffer(blob, RECORD, count, start + size).copy()
    index["offset"] += np.uint64(moved & 2**64 - 1)
    before = blob[:start] + bytes(size) + index.tobytes()
    first = index["offset"][0]
    blob = bytearray(before + bytes(int(first) - len(before)) + small[1][int(first) - moved :])
    struct.pack_into("<I", blob, 20, size)
    struct.pack_into("<Q", blob, 24, len(blob))
    with pytest.raises(FormatError, match="do not fit the number of tokens"):
        kvzip.open(reseal(bytes(blob)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [[2**24, 40, 4], [1, 2**28, 4]])
def test_a_block_that_claims_more_than_its_bytes_can_hold(codec, shape):
    """A layout that makes sense, with as many entries as it must have: 4 GiB, or more, in a few
    hundred bytes."""
    import tracemalloc

    snapshot = make_snapshot(cache_like, 11, "bf16", 1, 1, 40, 4, ids=False)

    def change(header):
        for part in layer_of(header)["parts"].values():
            part["shape"] = shape
        layer_of(header)["cumulative_length"] = shape[1]
        header["block_tokens"] = shape[1]

    def longer(records):
        records["tokens"][records["tokens"] > 0] = shape[1]

    blob = with_records(with_header(kvzip.encode(snapshot, codec), change), longer)
    tracemalloc.start()
    with pytest.raises(KVZipError, match=r"claims more than|does not take"):
        kvzip.decode(blob, threads=1)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def out_of_order(records):
    records[[0, 1]] = records[[1, 0]]


def no_tables(records):
    records["length"][0] = 0


def overlapping(records):
    records["offset"][2] = records["offset"][1]


def further_than_the_file(records):
    records["length"][-1] = 2**64 - 1


def not_at_a_multiple(records):
    records["offset"][1:] += 16


def longer_than_there_is(records):
    records["length"][-1] += 64


@pytest.mark.parametrize(
    "change",
    [
        out_of_order,
        no_tables,
        overlapping,
        further_than_the_file,
        not_at_a_multiple,
        longer_than_there_is,
    ],
)
def test_indexes_that_are_not_the_layouts(small, change):
    with pytest.raises(FormatError, match=r"of the index is not|do not follow each other"):
        kvzip.open(with_records(small[1], change))


@pytest.mark.parametrize("header", [b"\xff" * 500, b"[" * 100_000, b'{"layout":' * 1000])
def test_headers_that_are_no_json(small, header):
    with pytest.raises(FormatError, match="makes no sense"):
        kvzip.open(with_header(small[1], lambda _: header))


def test_a_zstd_frame_that_claims_4_gib(small):
    blob = bytearray(kvzip.encode(small[0], "zstd", block_tokens=16))
    at = kvzip.open(bytes(blob)).index.offset[1]
    # A single segment whose content has so many bytes.
    blob[at : at + 10] = bytes.fromhex("28b52ffda0f0ffffff00")
    with pytest.raises(CorruptError):
        kvzip.decode(reseal(bytes(blob)))


def test_entries_lie_at_multiples_of_64_with_zeros_between(small):
    blob = small[1]
    with kvzip.open(blob) as reader:
        index = reader.index
        gaps = [
            at
            for row in range(len(index))
            for at in range(index.offset[row] + index.length[row], sum(index.span(row)))
        ]
    assert len(blob) % 64 == 0
    assert all(offset % 64 == 0 for offset in index.offset)
    length, count, ids = struct.unpack_from("<III", blob, 12)
    before = range(40 + length + ids + 48 * count, index.offset[0])
    assert len(gaps) > 100
    assert len(before)
    for at in [*gaps, *before]:
        damaged = bytearray(blob)
        assert damaged[at] == 0
        damaged[at] = 1
        for check in (kvzip.decode, kvzip.verify, lambda b: kvzip.open(b).check_stored()):
            with pytest.raises((CorruptError, FormatError), match="are not zeros"):
                check(reseal(damaged))


def test_foreign_files_are_named():
    for foreign in (b"", b"PK\3\4 a zip file" * 10, b"\x89KV", np.zeros(1000, np.uint8)):
        with pytest.raises((FormatError, CorruptError), match=r"not a \.kvz|cut short"):
            kvzip.open(foreign)
    other = bytearray(kvzip.encode(make_snapshot(random_bits, 1, "fp16"), "raw"))
    other[8] = 9
    with pytest.raises(FormatError, match="version 9"):
        kvzip.open(bytes(other))


# --- parts -----------------------------------------------------------------------------------


class CountingSource:
    """A source that notes which ranges were read."""

    def __init__(self, data):
        self.data, self.size, self.ranges = memoryview(data), len(data), []

    def read(self, offset, length):
        self.ranges.append((offset, length))
        return self.data[offset : offset + length]


def test_parts_are_the_whole_cut(codec):
    snapshot = make_snapshot(cache_like, 13, "bf16", layers=3, tokens=200)
    with kvzip.open(kvzip.encode(snapshot, codec, block_tokens=64)) as reader:
        assert np.array_equal(reader.layer(-1).v, snapshot.layers[2].v)
        for start, stop in [(0, 200), (0, 1), (63, 65), (64, 128), (130, 200), (70, 70)]:
            cut = reader.tokens(start, stop)
            for a, b in zip(cut.layers, snapshot.layers, strict=True):
                assert np.array_equal(a.k, b.k[:, start:stop])
                assert np.array_equal(a.v, b.v[:, start:stop])
            assert cut.layout.layers[0].first == start
        for wrong in [(-1, 5), (5, 4), (0, 201)]:
            with pytest.raises(ValueError, match="not within"):
                reader.tokens(*wrong)
        with pytest.raises(ValueError, match="no layer 3"):
            reader.layer(3)


def test_only_what_is_asked_for_is_read():
    snapshot = make_snapshot(random_bits, 14, "bf16", layers=8, heads=4, tokens=2048, dim=64)
    source = CountingSource(kvzip.encode(snapshot, "raw", block_tokens=256))
    reader = kvzip.open(source)
    source.ranges.clear()
    reader.layer(3)
    assert sum(n for _, n in source.ranges) == snapshot.raw_bytes // 8
    source.ranges.clear()
    reader.tokens(0, 256)
    assert sum(n for _, n in source.ranges) == snapshot.raw_bytes // 8


def test_sliding_layers_keep_their_positions(codec):
    rng = np.random.default_rng(15)
    full, late = random_bits(rng, "bf16", (2, 100, 8)), random_bits(rng, "bf16", (2, 32, 8))
    layers = [
        kvzip.Layer.of_kv(
            late, late, LayerLayout.of_kv(late.shape, late.shape, "bf16", 100, "sliding", 32)
        ),
        kvzip.Layer.of_kv(full, full, LayerLayout.of_kv(full.shape, full.shape, "bf16", 100)),
    ]
    snapshot = kvzip.Snapshot(layers, "bf16", np.arange(100))
    with kvzip.open(kvzip.encode(snapshot, codec, block_tokens=20)) as reader:
        assert_same(reader.decode(), snapshot)
        cut = reader.tokens(60, 90)
        assert np.array_equal(cut.layers[0].k, late[:, :22])
        assert np.array_equal(cut.layers[1].k, full[:, 60:90])
        assert (cut.layers[0].layout.first, cut.layers[0].layout.cumulative_length) == (68, 90)


def test_out_is_filled_and_checked():
    snapshot = make_snapshot(random_bits, 16, "bf16", layers=1)
    blob = kvzip.encode(snapshot)
    k, v = np.zeros_like(snapshot.layers[0].k), np.zeros_like(snapshot.layers[0].v)
    kvzip.decode(blob, out=[(k, v)])
    assert np.array_equal(k, snapshot.layers[0].k)
    with pytest.raises(ValueError, match="writable"):
        kvzip.decode(blob, out=[(k[:, :-1], v)])
    with pytest.raises(ValueError, match="1 layers, not"):
        kvzip.decode(blob, layers=[0, 0], out=[(k, v)])
    k.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        kvzip.decode(blob, out=[(k, v)])


# --- the file --------------------------------------------------------------------------------


def test_files_buffers_and_sources(tmp_path, small):
    snapshot, blob = small
    kvzip.write(tmp_path / "a.kvz", snapshot, "channel", block_tokens=16)
    assert (tmp_path / "a.kvz").read_bytes() == blob
    with (tmp_path / "a.kvz").open("rb") as file:
        sources = [
            tmp_path / "a.kvz",
            str(tmp_path / "a.kvz"),
            file,
            bytearray(blob),
            memoryview(blob),
        ]
        for source in [*sources, np.frombuffer(blob, np.uint8), CountingSource(blob)]:
            assert_same(kvzip.decode(source), snapshot)
    assert kvzip.verify(tmp_path / "a.kvz") == kvzip.info(blob)


def test_a_failed_write_leaves_nothing(tmp_path):
    class Failing(type(kvzip.get_codec("raw"))):
        def encode(self, block, context):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        kvzip.write(tmp_path / "a.kvz", make_snapshot(random_bits, 1, "bf16"), Failing())
    assert list(tmp_path.iterdir()) == []


def test_token_ids_can_be_withheld(small):
    import hashlib

    snapshot, blob = small
    assert np.array_equal(kvzip.decode(blob).token_ids, snapshot.token_ids)
    reader = kvzip.open(kvzip.encode(snapshot, "raw", store_token_ids=False))
    assert reader.decode().token_ids is None
    digest = hashlib.sha256(snapshot.token_ids.astype("<u4").tobytes()).hexdigest()
    assert reader.header.token_ids_sha256 == digest


def test_another_profile_is_named(small):
    one, other = (kvzip.Profile({"a": np.arange(n)}, {"codec": "raw"}) for n in (2, 3))
    blob = kvzip.encode(small[0], "raw", profile=one)
    assert_same(kvzip.decode(blob, profile=one), small[0])
    with pytest.raises(ProfileError, match="none was given"):
        kvzip.decode(blob)
    with pytest.raises(ProfileError, match=f"{one.id}.*; the one given is {other.id}"):
        kvzip.decode(blob, profile=other)
    for wrong in ("m.kvprofile", {}, 5):
        with pytest.raises(ProfileError, match=r"no Profile: Profile\.load"):
            kvzip.encode(small[0], "raw", profile=wrong)
        with pytest.raises(ProfileError, match=r"no Profile: Profile\.load"):
            kvzip.decode(blob, profile=wrong)


def test_the_schema_in_the_docs_is_the_header():
    stored = json.loads((HERE.parent / "docs" / "header.schema.json").read_text())
    assert stored == header_schema(), "docs/header.schema.json: write header_schema() anew"
