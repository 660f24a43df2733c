"""Bytes of general coders decoded by nvCOMP: a stand-in of the tests' own without a GPU, NVIDIA's
where it and a GPU are there. Files are trusted here but where a test says otherwise."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import random
import shutil
from pathlib import Path

import fake_nvcomp
import numpy as np
import pytest
import torch
import zstandard
from fake_nvcomp import FakeNvComp
from support import cache_like, make_snapshot, random_bits, reseal
from test_damage_on_device import outcome
from test_on_device import assert_layers

import kvzip
from kvzip.codecs.native.cuda import nvcomp
from kvzip.codecs.native.cuda.device import LeftToCPU, Memory, MemoryFullError
from kvzip.codecs.native.cuda.shim_device import ShimDevice
from kvzip.codecs.native.cuda.work import Full, Slot, Work
from kvzip.container import on_device
from kvzip.container.blocks import SMALL
from kvzip.testing.damage import first_stored, sealed_index

REAL = os.environ.get("KVZIP_TEST_DEVICE")
CODECS = ["lz4", "zstd", "planes", "planes:mode=bit,coder=lz4,order=token"]
"""By which nvCOMP can decode; planes of either mode have chunks at odd places."""


@pytest.fixture(scope="module")
def library(tmp_path_factory, compiled_once):
    """The stand-in, or nvCOMP on a real device."""
    if REAL:
        found, reason = nvcomp.installed()
        return found or pytest.skip(reason)
    if not shutil.which("g++"):
        pytest.skip("the stand-in needs a C++ compiler")
    return FakeNvComp(fake_nvcomp.compiled(tmp_path_factory.mktemp("nvcomp")))


@pytest.fixture(autouse=True)
def with_nvcomp(library, monkeypatch, device, shuffled):
    monkeypatch.setenv(nvcomp.ENVIRONMENT, nvcomp.TRUSTED)
    for one in (device, shuffled):
        monkeypatch.setitem(one.cache, "nvcomp", library)
    if not REAL:
        library.set()
        library.decoded.clear()


def repeats(rng, dtype, shape):
    """Numbers like a cache's, a few tokens again and again, of which coders copy more than they
    store."""
    *rows, tokens, dim = shape
    some = cache_like(rng, dtype, (*rows, 8, dim))
    return np.ascontiguousarray(np.tile(some, (tokens // 8 + 1, 1))[..., :tokens, :])


def small(codec):
    shape = {"layers": 1, "heads": 1, "tokens": 40, "dim": 16, "ids": False}
    snapshot = make_snapshot(repeats, 2, "bf16", **shape)
    return kvzip.encode(snapshot, codec, block_tokens=24, threads=1)


def stored_in(blob):
    """The bytes of each entry of a file."""
    with kvzip.open(blob) as reader:
        places = zip(reader.index.offset, reader.index.length, strict=True)
        return [blob[at : at + length] for at, length in places]


def stand_in(library):
    if REAL:
        pytest.skip("asks the stand-in what it was asked for")
    return library


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["fp8_e5m2", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("make", [repeats, random_bits])
def test_the_same_bits_as_by_the_cpu(device, library, codec, dtype, make):
    """Of every size of numbers, in ragged last blocks, batches, and ranges of tokens, some of which
    cut blocks."""
    for n, (batch, dim, tokens) in enumerate([(None, 16, 130), (2, 7, 50), (1, 65, 1), (2, 3, 0)]):
        shape = {"layers": 2, "heads": 2, "tokens": tokens, "dim": dim, "batch": batch}
        snapshot = make_snapshot(make, n, dtype, **shape)
        blob = kvzip.encode(snapshot, codec, block_tokens=48, threads=1)
        assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
        for span in ((0, tokens), (tokens // 3, tokens), (tokens // 2, tokens // 2 + tokens // 4)):
            found = kvzip.decode(blob, device=device, tokens=span)
            assert_layers(found, snapshot.layers, span)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [7, 16])
def test_into_pages_and_nowhere_else(device, shuffled, room, library, codec, size):
    snapshot = make_snapshot(repeats, 3, "bf16", layers=1, heads=2, tokens=100, dim=32)
    blob = kvzip.encode(snapshot, codec, block_tokens=48)
    for where in (device, shuffled):
        for span in ((0, 100), (20, 91)):
            count = -(-100 // size)
            table = np.random.default_rng(size).permutation(count + 3)[:count]
            flat, cache = room.tensor((2, count + 3, size, 2, 32), 2)
            expected = flat.clone()
            view = expected.as_strided(cache.shape, cache.stride(), cache.storage_offset())
            for part, target in zip(snapshot.layers[0], view, strict=True):
                for t in range(*span):
                    row = torch.from_numpy(part[:, t].view(np.int16)).to(target.device)
                    target[int(table[t // size]), t % size] = row
            out = [(cache[0], cache[1])]
            kvzip.decode(blob, device=where, out=out, pages=table, tokens=span)
            assert torch.equal(flat, expected)


@pytest.mark.parametrize("codec", CODECS)
def test_only_stored_bytes_cross_and_the_library_decodes_all(device, library, codec, monkeypatch):
    """Each chunk of each block once, with room for what it decodes to; copies, planes and checksums
    are kernels'."""
    stand_in(library)
    snapshot = make_snapshot(repeats, 1, "bf16", layers=2, heads=2, tokens=300, dim=32)
    blob = kvzip.encode(snapshot, codec, block_tokens=64)
    crossed = []
    upload = ShimDevice.upload
    monkeypatch.setattr(
        ShimDevice,
        "upload",
        lambda self, s, a, h, size: crossed.append(size) or upload(self, s, a, h, size),
    )
    assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
    # Beside the file: jobs. The CPU's way brings all numbers.
    assert sum(crossed) < len(blob) + 60_000 and len(blob) < snapshot.raw_bytes
    blocks = 2 * 2 * 5
    if codec in ("lz4", "zstd"):
        assert len(library.decoded) == blocks
        assert sum(room for *_, room in library.decoded) == snapshot.raw_bytes
        assert {chunk for _, chunk, _ in library.decoded} == {*stored_in(blob)} - {b""}
    else:
        assert 0 < len(library.decoded) <= blocks * 16


def test_what_nvcomp_does_not_take_the_cpu_decodes(device, library, monkeypatch):
    """Chunks above its largest, at other addresses than it wants, and frames unlike ours."""
    stand_in(library)
    snapshot = make_snapshot(repeats, 1, "bf16", layers=1, heads=2, tokens=100, dim=32)
    for codec, coder in (("lz4", "lz4"), ("zstd", "zstd"), ("planes", "zstd")):
        blob = kvzip.encode(snapshot, codec, block_tokens=48)
        form = nvcomp.FORMS[coder]
        largest = max(len(blob), 2 * 48 * 32 * 2)
        for most, some in ((largest, True), (10, False)):
            library.decoded.clear()
            decoder = library.decoder(coder)
            monkeypatch.setattr(decoder, "_form", form._replace(most=most))
            assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
            assert bool(library.decoded) == some
        monkeypatch.setattr(decoder, "_form", form)
    # One block, whose second plane begins at an odd place. Other than planes all are at 64s.
    blob = kvzip.encode(snapshot, "planes", block_tokens=100)
    library.set(alignment=64)
    assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
    for codec, all_of in (("lz4", 6), ("zstd", 6)):
        library.decoded.clear()
        blob = kvzip.encode(snapshot, codec, block_tokens=48)
        assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
        assert len(library.decoded) == all_of


@pytest.mark.parametrize("wanted", [0, 3, 512])
@pytest.mark.parametrize("what", ["input", "output", "temp"])
def test_places_that_it_is_not_given(device, library, monkeypatch, what, wanted):
    """Chunks lie where they lie, all else at multiples of 256: for other wishes the CPU decodes."""
    stand_in(library)
    decoder = library.decoder("lz4")
    ask = decoder._alignments

    def asked(options, found):
        status = ask(options, found)
        setattr(found._obj, what, wanted)
        return status

    monkeypatch.setattr(decoder, "_alignments", asked)
    snapshot = make_snapshot(repeats, 1, "bf16", layers=1, heads=2, tokens=100, dim=32)
    blob = kvzip.encode(snapshot, "lz4", block_tokens=48)
    assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
    assert what == "input" or not library.decoded


@pytest.mark.parametrize(
    "options",
    [{"write_content_size": False}, {"write_checksum": True}, {"write_content_size": True}],
)
def test_frames_that_are_not_as_ours(device, library, monkeypatch, options):
    """Others may write them: without their size, or with a checksum."""
    stand_in(library)
    snapshot = make_snapshot(repeats, 1, "bf16", layers=1, heads=2, tokens=100, dim=32)
    from kvzip import byte_coders

    def encode(self, data):
        parameters = zstandard.ZstdCompressionParameters.from_level(3, **options)
        return zstandard.ZstdCompressor(compression_params=parameters).compress(data.data)

    with monkeypatch.context() as patch:
        patch.setattr(byte_coders.Zstd, "encode", encode)
        blob = kvzip.encode(snapshot, "zstd", block_tokens=48, threads=1)
    assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
    assert bool(library.decoded) == (options == {"write_content_size": True})


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.drawn(2)
def test_changed_bytes_are_told_as_by_the_cpu(device, library, codec):
    """Any byte of what is stored. nvCOMP sees no chunk whose checksum is not true."""
    blob = small(codec)
    draw = random.Random(1)
    with kvzip.open(blob) as reader:
        first = reader.index.offset[0]
    for at in range(first, len(blob), 1 if not REAL else 40):
        bad = bytearray(blob)
        bad[at] ^= 1 << draw.randrange(8)
        assert outcome(bytes(bad), device=device) == outcome(bytes(bad)), f"byte {at}"
    if not REAL and codec in ("lz4", "zstd"):
        assert {chunk for _, chunk, _ in library.decoded} <= {*stored_in(blob)}
    for end in draw.sample(range(first, len(blob)), 20):
        assert outcome(blob[:end], device=device) == outcome(blob[:end])


@pytest.mark.parametrize("codec", CODECS)
def test_no_damage_of_long_blocks_reaches_the_library(device, library, codec):
    """Whose checksums nobody else looks at, as long as their numbers are right."""
    shape = {"layers": 1, "heads": 2, "tokens": 700, "dim": 32, "ids": False}
    snapshot = make_snapshot(cache_like, 2, "bf16", **shape)
    blob = kvzip.encode(snapshot, codec, threads=1)
    assert max(map(len, stored_in(blob))) > SMALL
    assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
    good = set(library.decoded) if not REAL else set()
    draw = random.Random(1)
    for at in draw.sample(range(len(blob) // 8, len(blob)), 40):
        bad = bytearray(blob)
        bad[at] ^= 1 << draw.randrange(8)
        assert outcome(bytes(bad), device=device) == outcome(bytes(bad)), f"byte {at}"
    assert REAL or (good and set(library.decoded) == good)


@pytest.mark.parametrize("codec", ["lz4", "planes:coder=lz4", "zstd", "planes"])
def test_damage_whose_checksums_are_true_is_told_by_the_library(device, library, codec):
    """By its status of the chunk, or by the checksum of the numbers."""
    if REAL and "lz4" not in codec:
        pytest.skip("what nvCOMP does then is not defined")
    blob = small(codec)
    draw = random.Random(1)
    with kvzip.open(blob) as reader:
        places = range(reader.index.offset[0], len(blob))
    told = 0
    for at in draw.sample(places, 200):
        bad = bytearray(blob)
        bad[at] ^= 1 << draw.randrange(8)
        bad = reseal(bytes(bad))
        expected, found = outcome(bad), outcome(bad, device=device)
        # NVIDIA's may bear what the CPU's does not, as long as all numbers are right.
        assert found == expected or (REAL and found is None), f"byte {at}"
        told += expected is not None
    assert told > 50


def test_sizes_that_lie_are_told(device, library):
    """Blocks of fewer numbers than there are and of more, which are as long and good in
    themselves."""

    def zeros(tokens):
        part = np.zeros((1, tokens, 16), np.uint16)
        return kvzip.Snapshot.from_arrays([(part, part)], "bf16")

    for codec, others in {"lz4": (36, 38), "zstd": (36, 38, 74)}.items():
        if REAL and codec == "zstd":
            continue  # what nvCOMP does then is not defined
        blob = kvzip.encode(zeros(37), codec)
        for tokens in others:
            other = kvzip.encode(zeros(tokens), codec)
            (row, good), *_ = ((n, data) for n, data in enumerate(stored_in(blob)) if data)
            lies = stored_in(other)[row]
            assert len(lies) == len(good) and lies != good
            bad = reseal(blob.replace(good, lies))
            expected = outcome(bad)
            assert expected is not None and expected[0] is kvzip.CorruptError
            assert outcome(bad, device=device) == expected
            assert REAL or codec == "zstd" or lies in {stored for _, stored, _ in library.decoded}


def test_statuses_and_sizes_of_the_library_are_believed_one_by_one(device, library, monkeypatch):
    """A status alone, a size alone and no status condemn the block, even where all numbers are
    right."""
    stand_in(library)
    snapshot = make_snapshot(repeats, 1, "bf16", layers=2, heads=1, tokens=100, dim=16)
    blob = kvzip.encode(snapshot, "lz4", block_tokens=32)
    right = fake_nvcomp.get_coder
    for change in (lambda room: -1, lambda room: room - 1, lambda room: -2):
        calls = []

        def decode(lz4, source, length, target, room, change=change, calls=calls):
            stored = nvcomp.bytes_at(source, length)
            nvcomp.bytes_at(target, room)[:] = right("lz4", 1).decode(stored, room).data
            calls.append(room)
            return change(room) if len(calls) == 7 else room

        kept = fake_nvcomp._Decode(decode)
        library.fake.fake_decoder(kept)
        try:
            with pytest.raises(kvzip.KVZipError, match="the device decodes entry 8 of the index"):
                kvzip.decode(blob, device=device)
        finally:
            library.fake.fake_decoder(library._kept)
    assert_layers(kvzip.decode(blob, device=device), snapshot.layers)


def test_a_wrong_checksum_of_good_bytes_is_as_on_the_cpu(device, library):
    """Which looks at those of small entries alone."""
    snapshot = make_snapshot(random_bits, 1, "bf16", layers=1, heads=2, tokens=300, dim=64)
    for codec, tokens in (("lz4", 300), ("lz4", 10)):
        good = reseal(kvzip.encode(snapshot, codec, block_tokens=tokens))
        with kvzip.open(good) as reader:
            lengths = list(reader.index.length)
        start = first_stored(good) - 48 * len(lengths)
        row = next(r for r, length in enumerate(lengths) if length)
        assert (lengths[row] > SMALL) == (tokens == 300)
        bad = bytearray(good)
        bad[start + 48 * row + 32] ^= 1
        bad = sealed_index(bad)
        assert (outcome(bad) is None) == (tokens == 300)
        assert outcome(bad, device=device) == outcome(bad)


# --- when it is used ---------------------------------------------------------------------------


def test_zstandard_is_decoded_by_the_cpu_unless_files_are_trusted(device, library, monkeypatch):
    snapshot = make_snapshot(repeats, 1, "bf16", layers=1, heads=2, tokens=100, dim=32)
    stand_in(library)
    for chosen, used in (("", {"lz4"}), ("trusted", {"lz4", "zstd"}), ("off", set())):
        monkeypatch.setenv(nvcomp.ENVIRONMENT, chosen)
        library.decoded.clear()
        for codec in CODECS:
            blob = kvzip.encode(snapshot, codec, block_tokens=48)
            assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
        assert {name for name, *_ in library.decoded} == used
    monkeypatch.setenv(nvcomp.ENVIRONMENT, "yes")
    with pytest.raises(kvzip.UsageError, match=r'KVZIP_NVCOMP is "off" or "trusted"'):
        kvzip.decode(blob, device=device)


@pytest.mark.parametrize("codec", ["lz4", "zstd", "planes"])
def test_without_the_library_the_cpu_decodes(device, codec, monkeypatch):
    monkeypatch.delitem(device.cache, "nvcomp")
    monkeypatch.setattr(nvcomp, "installed", lambda: (None, "none"))
    snapshot = make_snapshot(repeats, 1, "bf16", layers=2, heads=2, tokens=100, dim=32)
    blob = kvzip.encode(snapshot, codec, block_tokens=48)
    assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
    assert kvzip.get_codec(codec).decodes_on(device) == (codec == "planes")
    assert not kvzip.get_codec("planes").needs_sound_bytes(device)


@pytest.mark.parametrize("piece", [1, 4000, 1 << 24])
def test_a_library_that_fails_leaves_all_to_the_cpu(device, library, monkeypatch, caplog, piece):
    """Whenever it does; progress is told once of each byte."""
    stand_in(library)
    monkeypatch.setattr(on_device, "PIECE", piece)
    snapshot = make_snapshot(repeats, 1, "bf16", layers=4, heads=2, tokens=100, dim=32)
    blob = kvzip.encode(snapshot, "lz4", block_tokens=32)
    caplog.set_level(logging.DEBUG, "kvzip.gpu")
    for after in (0, 1, 3):
        told = []

        def progress(size, after=after, told=told):
            told.append(size)
            library.set(status=1000 if len(told) >= after else 0)

        library.set(status=0 if after else 1000)
        caplog.clear()
        with kvzip.open(blob) as reader:
            found = reader.decode(device=device, progress=progress)
        assert_layers(found, snapshot.layers)
        assert sum(told) == snapshot.raw_bytes
        if not after or piece < 1 << 24:
            assert "nvCOMP 6.0.0 says: not well" in caplog.text


def test_a_status_without_a_name(library, monkeypatch):
    monkeypatch.setattr(library._library, "nvcompGetStatusString", lambda status: None)
    with pytest.raises(nvcomp.LeftToCPU, match="status 77"):
        library.succeeded(77)


def test_what_was_begun_is_done_before_the_cpu_begins(library):
    """Of all streams: what is still under way would write to the same places later."""
    done = []

    class Streams(ShimDevice):
        streams = iter(range(1, 9))

        def stream(self):
            return next(self.streams)

        def record(self, stream):
            return stream

        def synchronize(self, event):
            done.append(event)

        def upload(self, *what):
            done.append("upload")
            super().upload(*what)

    where = Streams()
    where.cache["nvcomp"] = stand_in(library)
    library.set(status=1000)
    snapshot = make_snapshot(repeats, 1, "bf16", layers=1, heads=2, tokens=100, dim=32)
    assert_layers(kvzip.decode(kvzip.encode(snapshot, "lz4"), device=where), snapshot.layers)
    first, second, *_ = (n for n, what in enumerate(done) if what == "upload")
    assert {1, 2, 3} <= {*done[first:second]}


def test_where_memory_is_full_the_cpu_decodes(device, library, monkeypatch):
    """What is decoded beside takes more of it than what is stored."""
    stand_in(library)
    snapshot = make_snapshot(repeats, 1, "bf16", layers=2, heads=2, tokens=500, dim=64)
    blob = kvzip.encode(snapshot, "lz4", block_tokens=64)
    kvzip.decode(blob, device=device)
    kind, allocate, asked = type(device), type(device).allocate, []

    def full(self, size):
        asked.append(size)
        if size > snapshot.raw_bytes // 2:
            raise MemoryFullError("no memory left")
        return allocate(self, size)

    for slot in device.cache["slots"]:
        monkeypatch.setattr(slot, "scratch", device.allocate(0))
    monkeypatch.setattr(kind, "allocate", full)
    assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
    assert max(asked) > snapshot.raw_bytes // 2


def test_a_document_that_widens_goes_in_pieces(device, library, monkeypatch):
    """What a piece is decoded to has room beside: not of all numbers of a file of few bytes."""
    stand_in(library)
    monkeypatch.setattr(on_device, "FIRST", 1 << 15)
    monkeypatch.setattr(on_device, "PIECE", 1 << 15)
    snapshot = make_snapshot(repeats, 1, "bf16", layers=4, heads=2, tokens=2000, dim=32)
    blob = kvzip.encode(snapshot, "lz4", block_tokens=400)
    device.cache.pop("slots", None)
    assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
    assert len(library.decoded) == 40
    # A piece's numbers, what the stand-in takes for it, and twice as much, since it grows.
    most = 4 * (1 << 15)
    assert all(slot.scratch.size < 2 * 6 * most for slot in device.cache["slots"])
    assert snapshot.raw_bytes > 12 * most
    device.cache.pop("slots", None)


def test_another_version_is_left_alone(library):
    stand_in(library)
    path = Path(library.fake._name)
    for version, words in ((5300, "5.3.0"), (6100, "6.1.0"), (7000, "7.0.0")):
        library.set(version=version)
        with pytest.raises(LeftToCPU, match=f"nvCOMP is {words}, and kvzip knows 6.0"):
            nvcomp.NvComp(path)
    library.set(version=6003)
    assert nvcomp.NvComp(path).version == "6.0.3"


def test_where_the_library_is_looked_for(library, tmp_path, monkeypatch):
    """In NVIDIA's package; one that is broken, or is another, is told and left alone."""
    path = Path(stand_in(library).fake._name)
    folder = tmp_path / "lib64"
    folder.mkdir()
    kept = folder / "libnvcomp.so.6"
    spec = importlib.util.spec_from_loader("nvidia.libnvcomp", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(nvcomp, "find_spec", lambda name: spec)
    ask = nvcomp.installed.__wrapped__
    found, reason = ask()
    assert found is None and "pip install 'kvzip[nvcomp]'" in reason
    kept.write_bytes(b"no library")
    found, reason = ask()
    assert found is None and "libnvcomp.so.6" in reason
    kept.unlink()
    kept.symlink_to(ctypes.util.find_library("c") or "libc.so.6")
    found, reason = ask()
    assert found is None and reason
    kept.unlink()
    kept.symlink_to(path)
    found, reason = ask()
    assert found is not None and not reason

    def nothing(name):
        raise ModuleNotFoundError("No module named 'nvidia'")

    monkeypatch.setattr(nvcomp, "find_spec", nothing)
    assert "not installed" in ask()[1]


# --- NVIDIA's own ------------------------------------------------------------------------------

STRUCTS = {
    "nvcompProperties_t": nvcomp.Properties,
    "nvcompAlignmentRequirements_t": nvcomp.Alignments,
    "nvcompBatchedZstdDecompressOpts_t": nvcomp.ZstdOptions,
    "nvcompBatchedLZ4DecompressOpts_t": nvcomp.LZ4Options,
}


def laid_out(library, name, kind):
    """Sizes and places as a compiler has them, and as ctypes has."""
    places = [getattr(kind, field).offset for field, *_ in kind._fields_]
    expected = [ctypes.sizeof(kind), *places]
    found = (ctypes.c_size_t * len(expected)).in_dll(library, f"layout_{name}")
    return list(found), expected


def test_structs_are_as_the_stand_in_has_them(library):
    for name, kind in STRUCTS.items():
        found, expected = laid_out(stand_in(library).fake, name, kind)
        assert found == expected, name


def test_nvidias_library_and_headers(tmp_path):
    """Its functions are there, its structs and numbers are ours, and the stand-in has its very
    declarations, or it would not compile beside them. Needs no GPU."""
    spec = None
    if importlib.util.find_spec("nvidia"):
        spec = importlib.util.find_spec("nvidia.libnvcomp")
    if spec is None:
        pytest.skip("nvCOMP (kvzip[nvcomp]) is not installed")
    found, reason = nvcomp.installed()
    assert found is not None, reason
    for coder in nvcomp.FORMS:
        decoder = found.decoder(coder)
        aligned = nvcomp.Alignments()
        found.succeeded(decoder._alignments(decoder._options, ctypes.byref(aligned)))
        assert 256 % aligned.output == 256 % aligned.temp == 64 % aligned.input == 0
        needed = ctypes.c_size_t()
        arguments = 64, 1 << 20, decoder._options, ctypes.byref(needed), 64 << 20, None
        found.succeeded(decoder._temporary(*arguments))
        assert needed.value < 8 * (64 << 20)
    headers = Path(spec.submodule_search_locations[0]) / "include"
    if not (headers.is_dir() and shutil.which("g++")):
        pytest.skip("there are no headers, or no compiler")
    path = fake_nvcomp.compiled(tmp_path, "-DREAL_HEADERS", f"-I{headers}")
    real = ctypes.CDLL(str(path))
    for name, kind in STRUCTS.items():
        found, expected = laid_out(real, name, kind)
        assert found == expected, name
    version, *limits, backend, success = (ctypes.c_size_t * 5).in_dll(real, "real_limits")
    assert version in nvcomp._VERSIONS
    assert limits == [nvcomp.FORMS[coder].most for coder in ("lz4", "zstd")]
    assert (backend, success) == (nvcomp._CUDA, nvcomp._SUCCESS)


def test_scratch_memory_grows_by_little_where_it_is_large(device, monkeypatch):
    """It grows by doubling, but what a library asks for at once is not asked for twice."""
    asked = []

    def allocate(self, size):
        asked.append(size)
        return Memory(0, size, None)

    slot = Slot(device)
    monkeypatch.setattr(type(device), "allocate", allocate)
    for size, most in ((1 << 20, 2 << 20), (1 << 30, (1 << 30) + (64 << 20))):
        with pytest.raises(Full):
            Work(slot, 0, 0).scratch(size)
        assert asked.pop() == most and not asked
        Work(slot, 0, 0).scratch(size)
