"""Sealed files: read in ranges, an error for every change, nothing of them in sight."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import cache_like, examples

import kvzip
from kvzip.container.sealed import (
    CHUNK,
    HEADER,
    TAG,
    Sealed,
    Sealing,
    SealingSink,
    seal,
    sealed_size,
)
from kvzip.container.source import Memory
from kvzip.errors import CorruptError, FormatError, KVZipError, SealError, UsageError

pytest.importorskip("cryptography")
KEY, OTHER = bytes(range(32)), bytes(32)
SIZES = st.sampled_from([0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 77])


def noise(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


def opened(data, key=KEY, place=""):
    return Sealed(Memory(data), key, place)


def everything(data, key=KEY, place=""):
    source = opened(data, key, place)
    return bytes(source.read(0, source.size))


@pytest.fixture(scope="module")
def snapshot():
    rng = np.random.default_rng(1)
    pairs = [(cache_like(rng, "bf16", (2, 900, 64)),) * 2 for _ in range(3)]
    origin = kvzip.Origin(model="secret/model", text="a secret name", revision="r")
    return kvzip.Snapshot.from_arrays(pairs, "bf16", np.arange(900), origin)


@given(size=SIZES, cuts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=5))
def test_any_range_is_what_it_was(size, cuts):
    data = noise(size)
    sealed = seal(data, KEY)
    assert len(sealed) == sealed_size(size) == HEADER + size + TAG * max(-(-size // CHUNK), 1)
    source = opened(sealed)
    assert source.size == size and bytes(source.read(0, size)) == data
    for a, b in cuts:
        begin, end = sorted((int(a * size), int(b * size)))
        assert bytes(source.read(begin, end - begin)) == data[begin:end]


@given(size=SIZES, pieces=st.lists(st.integers(1, 2 * CHUNK), max_size=6))
@examples(40)
def test_bytes_may_come_in_any_pieces(size, pieces):
    data, parts, at = noise(size), [], 0
    sealing = Sealing(KEY)
    for piece in [*pieces, size]:
        parts += sealing.chunks(data[at : at + piece])
        at += len(data[at : at + piece])
    assert everything(b"".join([sealing.header, *parts, *sealing.end()])) == data


@given(
    start=st.integers(0, 3 * CHUNK), rest=st.integers(0, 3 * CHUNK), piece=st.integers(1, 99_999)
)
@examples(40)
def test_a_writer_may_leave_the_start_for_the_end(tmp_path_factory, start, rest, piece):
    """As a .kvz file is written: the index after the blocks."""
    data = noise(start + rest)
    path = tmp_path_factory.mktemp("sink") / "file"
    with path.open("wb") as file:
        sink = SealingSink(file, KEY)
        sink.seek(start)
        for at in range(start, len(data), piece):
            sink.write(data[at : at + piece])
        end = sink.tell()
        sink.seek(0)
        sink.write(data[:start])
        sink.seek(end)
        assert sink.close() == sealed_size(len(data))
    assert everything(path.read_bytes()) == data


@pytest.mark.parametrize("size", [0, 100, CHUNK + 40])
def test_every_flipped_bit_is_an_error(size):
    sealed = seal(noise(size), KEY)
    places = (
        range(len(sealed))
        if size < CHUNK
        else [*range(HEADER + 40), *range(HEADER + CHUNK, len(sealed))]
    )
    for at in places:
        damaged = bytearray(sealed)
        damaged[at] ^= 1 << at % 8
        with pytest.raises((CorruptError, FormatError)):
            everything(damaged)


@given(size=SIZES, length=st.floats(0, 1))
@example(size=CHUNK + 1, length=1.0)  # nothing but a tag is left of the last chunk
def test_every_cut_and_every_byte_more_is_an_error(size, length):
    sealed = seal(noise(size), KEY)
    with pytest.raises((CorruptError, FormatError)):
        everything(sealed[: int(length * (len(sealed) - 1))])
    with pytest.raises(CorruptError):
        everything(sealed + b"x" * (1 + int(length * 100)))


def test_a_file_cut_between_chunks_is_an_error():
    sealed = seal(noise(3 * CHUNK), KEY)
    for chunks in range(3):
        with pytest.raises(CorruptError):
            everything(sealed[: HEADER + chunks * (CHUNK + TAG)])


def test_chunks_cannot_be_swapped_nor_come_from_another_file():
    one, two = seal(noise(3 * CHUNK, 1), KEY), seal(noise(3 * CHUNK, 2), KEY)
    step = CHUNK + TAG
    chunks = [one[HEADER + i * step : HEADER + (i + 1) * step] for i in range(3)]
    head = one[:HEADER]
    for order in ((1, 0, 2), (0, 0, 2), (2, 1, 0), (0, 2, 1)):
        with pytest.raises(CorruptError):
            everything(head + b"".join(chunks[i] for i in order))
    with pytest.raises(CorruptError):
        everything(head + two[HEADER : HEADER + step] + b"".join(chunks[1:]))
    with pytest.raises((CorruptError, SealError)):
        everything(two[:HEADER] + b"".join(chunks))


def test_a_header_that_was_changed_by_somebody_without_the_key_is_an_error():
    """They can write its checksum anew."""
    from kvzip import checksum

    sealed = bytearray(seal(noise(100), kvzip.Key(KEY, "a")))
    for at in range(8, HEADER - 8):
        changed = bytearray(sealed)
        changed[at] ^= 1
        changed[HEADER - 8 : HEADER] = checksum.of_bytes(changed[: HEADER - 8]).to_bytes(
            8, "little"
        )
        with pytest.raises(KVZipError):
            everything(changed)


def test_the_same_bytes_are_sealed_differently_each_time():
    data = bytes(2 * CHUNK)
    one, two = seal(data, KEY), seal(data, KEY)
    step = CHUNK + TAG
    found = {blob[HEADER + i * step :][:64] for blob in (one, two) for i in range(2)}
    assert len(found) == 4


def test_a_file_is_good_at_its_place_only():
    sealed = seal(b"something", KEY, "a/b")
    assert everything(sealed, KEY, "a/b") == b"something"
    for place in ("", "a/c"):
        with pytest.raises(SealError):
            everything(sealed, KEY, place)


def test_nothing_is_in_sight(snapshot):
    plain, sealed = kvzip.encode(snapshot), kvzip.encode(snapshot, key=KEY)
    for words in (b"secret/model", b"a secret name", b"layout", b"channel", plain[:8]):
        assert words in plain and words not in sealed
    assert KEY not in sealed


def test_files_are_written_read_and_verified(snapshot, tmp_path):
    path = tmp_path / "doc.kvz"
    length = kvzip.write(path, snapshot, key=kvzip.Key(KEY, "2026"))
    assert length == path.stat().st_size
    assert kvzip.decode(path, key=KEY) == snapshot
    assert kvzip.verify(path, key={"2026": KEY}).header.origin.model == "secret/model"
    assert kvzip.info(path, key=lambda name: KEY).header.layout == snapshot.layout
    with path.open("rb") as file, kvzip.open(file, key=KEY) as reader:
        assert np.array_equal(reader.layer(1).k, snapshot.layers[1].k)
        assert reader.tokens(100, 200).tokens == 200
    with kvzip.open(path, key=KEY) as reader:
        pass
    with pytest.raises(UsageError, match="closed"):
        reader.layer(2)


def test_a_range_costs_its_own_chunks(snapshot):
    class Counting(Memory):
        read_bytes = 0

        def read(self, offset, length):
            self.read_bytes += length
            return super().read(offset, length)

    source = Counting(kvzip.encode(snapshot, "raw", key=KEY, block_tokens=64))
    with kvzip.open(source, key=KEY) as reader:
        opening = source.read_bytes
        reader.decode(layers=[1], tokens=(0, 64))
        assert opening < 3 * CHUNK
        assert source.read_bytes - opening < 5 * CHUNK < source.size


def test_the_wrong_key_is_said_to_be_wrong(snapshot, tmp_path):
    path = tmp_path / "doc.kvz"
    kvzip.write(path, snapshot, key=kvzip.Key(KEY, "mine"))
    for key, words in (
        (None, "sealed: give its key .*'mine'"),
        (OTHER, "not the one"),
        (kvzip.Key(OTHER, "mine"), "not the one"),
        (kvzip.Key(KEY, "yours"), "another key than 'yours'"),
        ({"yours": KEY}, "no key of the name"),
        (lambda name: None, "no key of the name"),
    ):
        with pytest.raises(SealError, match=words) as raised:
            kvzip.open(path, key=key)
        assert str(path) in str(raised.value)
        assert KEY.hex() not in str(raised.value)
    plain = tmp_path / "plain.kvz"
    kvzip.write(plain, snapshot)
    with pytest.raises(SealError, match="not sealed"):  # somebody may have put it there
        kvzip.open(plain, key=KEY)


class Pipe:
    """A file object that cannot seek, whose bytes have no end."""

    def __init__(self, first):
        self.left, self.given = first, 0

    def read(self, count):
        found, self.left = self.left[:count].ljust(count, b"x"), self.left[count:]
        self.given += count
        assert self.given < 100 << 20, "all of it is wanted"
        return found


def test_an_endless_pipe_of_another_key_is_not_waited_for():
    header = seal(b"", kvzip.Key(KEY, "mine"))[:HEADER]
    for key, words in ((None, "give its key .*'mine'"), (OTHER, "not the one")):
        with pytest.raises(SealError, match=words):
            kvzip.open(Pipe(header), key=key)
    with pytest.raises(CorruptError, match=r"header .* is damaged"):
        kvzip.open(Pipe(header[:8]), key=KEY)


def test_keys_that_make_no_sense():
    for key in (b"short", "x" * 32, 7, b"", bytes(33)):
        with pytest.raises(UsageError):
            seal(b"", key)
        with pytest.raises(UsageError):
            kvzip.open(b"", key=key)
    for name in (7, "x" * 41, "a\0b"):
        with pytest.raises(UsageError):
            kvzip.Key(KEY, name)
    for keys in ({}, lambda name: None):
        with pytest.raises(SealError):
            seal(b"", keys)
    assert repr(kvzip.Key(KEY, "a")) == "Key(name='a')"


def test_threads_may_read_at_once():
    data = noise(20 * CHUNK)
    source, wrong = opened(seal(data, KEY)), []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            begin, end = sorted(rng.integers(0, len(data), 2).tolist())
            if bytes(source.read(begin, end - begin)) != data[begin:end]:
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(source._kept) <= 32


class Counted(Memory):
    """Bytes that note what is read of them, and what is announced."""

    def __init__(self, data):
        super().__init__(data)
        self.reads, self.announced = [], []

    def read(self, offset, length):
        self.reads.append((offset, length))
        return super().read(offset, length)

    def announce(self, ranges):
        self.announced = list(ranges)


def test_chunks_that_follow_each_other_come_in_one_read():
    """A request for each would take a long time from a distant store."""
    data = noise(150 * CHUNK)
    counted = Counted(seal(data, KEY))
    source = Sealed(counted, KEY)
    counted.reads.clear()
    begin, length = 3 * CHUNK + 7, 140 * CHUNK
    assert bytes(source.read(begin, length)) == data[begin : begin + length]
    assert len(counted.reads) == 3  # of 4 MiB at most, or memory would be needed twice
    assert max(length for _, length in counted.reads) == 64 * (CHUNK + TAG)
    counted.reads.clear()
    next_one = 143 * CHUNK + 7  # whose first chunk was read
    assert bytes(source.read(next_one, 2 * CHUNK)) == data[next_one : next_one + 2 * CHUNK]
    assert counted.reads == [(HEADER + 144 * (CHUNK + TAG), 2 * (CHUNK + TAG))]


def test_chunks_that_were_announced_are_read_as_they_were():
    data = noise(9 * CHUNK)
    counted = Counted(seal(data, KEY))
    source = Sealed(counted, KEY)
    counted.reads.clear()
    source.announce([(10, 2 * CHUNK), (2 * CHUNK + 10, 3 * CHUNK)])
    assert bytes(source.read(10, 2 * CHUNK)) == data[10 : 2 * CHUNK + 10]
    assert bytes(source.read(2 * CHUNK + 10, 3 * CHUNK)) == data[2 * CHUNK + 10 : 5 * CHUNK + 10]
    assert counted.reads == counted.announced and len(counted.announced) == 6
    counted.reads.clear()
    assert bytes(source.read(0, 9 * CHUNK)) == data  # what comes again is announced no more
    assert len(counted.reads) < 9


def test_random_keys_work_as_well():
    key = os.urandom(32)
    assert everything(seal(b"x", key), key) == b"x"
