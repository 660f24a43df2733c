"""The benchmark: what it stores is true, peers cannot break it, and a page shows all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support import cache_like, make_snapshot, random_bits

import kvzip
from kvzip import dtypes
from kvzip.benchmarks import run
from kvzip.benchmarks.peer import Peer
from kvzip.cli import main, measures
from kvzip.eval.report import bench as draw
from kvzip.eval.report.text import gbps
from kvzip.eval.results.bench import BenchResult
from kvzip.eval.results.stored import load


class Copy(Peer):
    """A peer that can be told to go wrong."""

    name, setting, package, order = "copy", "none", "numpy", "channel"

    def encode(self, numbers):
        return numbers.tobytes()

    def decode(self, data, shape):
        return data


class Wrong(Copy):
    name = "wrong"

    def decode(self, data, shape):
        return data[:-1] + bytes([data[-1] ^ 1])


class Short(Copy):
    name = "short"

    def decode(self, data, shape):
        return data[:-2]


class Panic(BaseException):
    """As Rust's panics come to Python: no Exception."""


class Failing(Copy):
    name = "failing"

    def encode(self, numbers):
        raise Panic("out of luck\nand more")


@pytest.fixture
def paths(tmp_path):
    """One snapshot of numbers like a cache's, one of random bits with unlike shapes."""
    rng = np.random.default_rng(1)
    make_snapshot(cache_like, 1, "bf16", heads=2, tokens=400, dim=32).save(tmp_path / "a.st")
    shapes = [((2, 50, 8), (2, 50, 24)), ((1, 3, 64), (1, 3, 64)), ((1, 0, 4), (1, 0, 4))]
    parts = [tuple(random_bits(rng, "bf16", s) for s in pair) for pair in shapes]
    kvzip.Snapshot.from_arrays(parts, "bf16").save(tmp_path / "b.st")
    return [tmp_path / "a.st", tmp_path / "b.st"]


@pytest.fixture
def peers(monkeypatch):
    """Replace all peers by these classes."""
    return lambda *classes: monkeypatch.setattr(run, "_import_peers", lambda: (list(classes), []))


def measure(paths, codecs=("raw", "channel"), **settings):
    settings = {"repeat": 2} | settings
    return run.run(paths, [kvzip.get_codec(c) for c in codecs], **settings)


def test_a_profile_is_its_own_codecs(paths):
    """`channel` takes the tables of a profile of its own, and no other's."""
    snapshot = kvzip.Snapshot.load(paths[0])
    profile = kvzip.Profile.fit([snapshot], codec="channel")
    own, learned = (
        next(row for row in measure(paths[:1], profile=p).rows if row.name == "channel")
        for p in (None, profile)
    )
    assert learned.exact and own.exact
    assert own.encoded_bytes == len(kvzip.encode(snapshot, "channel"))
    assert learned.encoded_bytes == len(kvzip.encode(snapshot, "channel", profile))
    assert learned.encoded_bytes != own.encoded_bytes


def call(capsys, *arguments):
    """Exit code, stdout and stderr of `kvzip bench`."""
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *map(str, arguments)])
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    return exit_.value.code, out.out, out.err


def test_figures_follow_from_each_other_and_survive_storage(tmp_path, paths, capsys):
    stored = tmp_path / "results.json"
    code, out, _ = call(capsys, *paths, "--codecs", "raw,channel", "--out", stored, "--json")
    assert code == 0
    found = load(stored, BenchResult)
    assert found == msgspec.json.decode(out, type=BenchResult)
    assert found.command.startswith("kvzip")
    assert found.machine.cpu and found.versions["kvzip"] == kvzip.__version__
    assert [row.name for row in found.rows] == ["memcpy", "raw", "channel"] * 2
    for path, identity in zip(paths, found.snapshots, strict=True):
        snapshot = kvzip.Snapshot.load(path)
        assert (identity.dtype, identity.tokens) == ("bf16", snapshot.tokens)
        rows = {row.name: row for row in found.rows if row.file == str(path)}
        for name in ("raw", "channel"):
            assert rows[name].encoded_bytes == len(kvzip.encode(snapshot, name))
        for row in rows.values():
            assert row.exact
            assert row.ratio == pytest.approx(snapshot.raw_bytes / row.encoded_bytes)
            assert row.bits_per_value == pytest.approx(16 / row.ratio)
            assert row.encode_gbps >= row.encode_median_gbps > 0
            assert row.decode_gbps >= row.decode_median_gbps > 0
            share = row.decode_gbps / row.decode_of_memcpy
            assert row.encode_gbps / row.encode_of_memcpy == pytest.approx(share)
        assert max(rows["memcpy"].encode_of_memcpy, rows["memcpy"].decode_of_memcpy) == 1


class Profiled(kvzip.Codec):
    """Needs a profile and says so."""

    codec_id = "profiled"
    needs_profile = True

    def encode(self, block, context):
        assert context.profile.description["kind"] == "of the bench"
        return block.tobytes()

    def decode(self, data, out, context):
        assert context.profile.description["kind"] == "of the bench"
        out[...] = np.frombuffer(data, out.dtype).reshape(out.shape)

    def max_encoded_size(self, raw_bytes):
        return raw_bytes

    def max_decoded_size(self, encoded_bytes, dtype):
        return encoded_bytes


def test_a_profile_goes_to_the_codecs_that_need_one(tmp_path, paths, capsys, monkeypatch):
    monkeypatch.setitem(kvzip.codec._registered, "profiled", Profiled)
    profile = tmp_path / "a.kvprofile"
    kvzip.Profile({"some": np.zeros(3, np.uint8)}, {"kind": "of the bench"}).save(profile)
    arguments = [paths[0], "--codecs", "raw,profiled", "--repeat", 1, "--json"]
    code, out, _ = call(capsys, *arguments, "--profile", profile)
    assert code == 0
    found = msgspec.json.decode(out, type=BenchResult)
    assert [row.name for row in found.rows] == ["memcpy", "raw", "profiled"]
    assert found.exact
    # What needs no profile is measured without: its file would name one.
    sizes = {row.name: row.encoded_bytes for row in found.rows}
    assert sizes["raw"] == len(kvzip.encode(kvzip.Snapshot.load(paths[0]), "raw"))
    code, _, err = call(capsys, *arguments)
    assert code == 2 and "profile" in err


@pytest.mark.parametrize("module", run.PEER_NAMES)
def test_peers_are_exact_and_leave_their_input_alone(module, dtype, monkeypatch):
    monkeypatch.setattr(run, "PEER_NAMES", (module,))
    found, missing = run._import_peers()
    if missing:
        pytest.skip(missing[0].reason)
    for peer in found:
        try:
            made = peer(dtypes.get(dtype))
        except kvzip.UnsupportedError:
            continue
        rng = np.random.default_rng(2)
        for maker in (cache_like, random_bits):
            numbers = run._rows(maker(rng, dtype, (2, 300, 16)), peer.order)
            before = numbers.copy()
            data = made.encode(numbers)
            back = np.frombuffer(made.decode(data, numbers.shape), numbers.dtype)
            assert np.array_equal(back, before.reshape(-1)), peer.name
            assert np.array_equal(numbers, before), peer.name


@pytest.mark.parametrize("threads", [1, 3])
def test_a_run_with_what_is_installed(paths, threads):
    found = measure(paths[:1], ["channel"], peers=True, threads=threads, repeat=1)
    assert found.exact
    assert (found.threads, found.repeat) == (threads, 1)
    titles = [row.title for row in found.rows]
    assert titles[:2] == ["memcpy", "kvzip channel"]
    assert {"zstd -3", "zstd -19", "lz4"} <= set(titles)
    assert len(set(titles)) == len(titles)
    assert all(row.encoded_bytes > 0 for row in found.rows)
    assert not [m for m in found.missing if m.file is not None]


def test_a_peer_that_is_not_there_is_named(paths, monkeypatch, capsys):
    monkeypatch.setattr(run, "PEER_NAMES", ("lz4", "nothing_of_the_kind"))
    code, out, _ = call(capsys, paths[0], "--peers", "--codecs", "raw", "--repeat", 1)
    assert code == 0
    assert "lz4" in out
    assert "missing: nothing_of_the_kind: ModuleNotFoundError" in out


def test_a_peer_that_fails_is_named_and_the_others_go_on(paths, peers):
    peers(Failing, Copy)
    found = measure(paths, peers=True)
    assert [(m.name, m.reason) for m in found.missing] == [("failing", "Panic: out of luck")] * 2
    assert [m.file for m in found.missing] == list(map(str, paths))
    assert [row.name for row in found.rows] == ["memcpy", "raw", "channel", "copy"] * 2


@pytest.mark.parametrize("peer", [Wrong, Short])
def test_a_wrong_round_trip_is_told_and_fails(paths, peers, capsys, peer):
    peers(Copy, peer)
    code, out, err = call(capsys, *paths, "--peers", "--codecs", "raw", "--repeat", 1)
    assert code == 1
    assert "NO" in out
    assert "did not give back" in err
    code, out, _ = call(capsys, paths[0], "--peers", "--repeat", 1, "--json")
    assert code == 1
    found = msgspec.json.decode(out, type=BenchResult)
    assert {row.name for row in found.rows if not row.exact} == {peer.name}


def test_the_page_has_every_row_and_what_is_missing(tmp_path, paths, peers, capsys):
    peers(Copy, Wrong, Failing)
    stored = tmp_path / "results.json"
    call(capsys, *paths, "--peers", "--repeat", 1, "--out", stored)
    code, out, _ = call(capsys, "--draw", stored)
    assert code == 0
    page = (tmp_path / "results.html").read_text()
    assert out.replace("\n", "").strip() == str(tmp_path / "results.html")
    found = load(stored, BenchResult)
    lines = re.findall(r"<tr class=.*?</tr>", page)
    assert len(lines) == len(found.rows)
    for row in found.rows:
        numbers = (row.ratio, row.bits_per_value)
        wanted = [f">{row.title}<", f">{numbers[0]:.3f}<", f">{numbers[1]:.2f}<"]
        wanted += [f">{gbps(row.encode_gbps)}<", f">{gbps(row.decode_gbps)}<"]
        wanted += [">yes<" if row.exact else ">NO<"]
        assert any(all(w in line for w in wanted) for line in lines), row.title
        assert f'data-point="{row.title}"' in page
    for identity in found.snapshots:
        assert identity.sha256_raw in page
    assert "failing on" in page and "out of luck" in page
    assert draw.page(found) == page


@pytest.mark.parametrize("stored", ["benchmarks", "benchmarks-avx2"])
def test_the_documented_run_is_the_stored_one(stored):
    docs = Path(__file__).parents[2] / "docs"
    tables = draw.markdown(load(docs / f"{stored}.json", BenchResult))
    assert tables.strip() in (docs / "benchmarks.md").read_text()


def test_slow_codecs_have_a_speed_and_pages_say_of_what(paths, capsys):
    found = measure(paths[:1], ["raw"], repeat=1)
    row = found.rows[-1]
    slow = {"encode_gbps": 0.0052, "encode_median_gbps": 0.0048, "decode_gbps": 0.000031}
    result = msgspec.structs.replace(found, rows=[msgspec.structs.replace(row, **slow)])
    assert "0.0052 (0.0048)" in draw.markdown(result) and "0.000031" in draw.markdown(result)
    page = draw.page(result)
    assert ">0.0052<" in page and ">0.000031<" in page and ">0.00<" not in page
    identity = found.snapshots[0]
    about = f"{identity.model}, {identity.tokens} tokens, {identity.dtype}"
    assert f"<title>kvzip bench: {about}</title>" in page
    measures._show_bench(result)
    said = capsys.readouterr().out
    assert "5.2 MB/s" in said and "31 kB/s" in said
    assert f"{identity.tokens} tokens" in said.partition("\n")[0] and "1 thread" in said


def test_names_in_the_page_are_text(paths):
    found = measure(paths[:1], ["raw"], repeat=1)
    identity = msgspec.structs.replace(found.snapshots[0], model="<script>alert(1)</script>")
    page = draw.page(msgspec.structs.replace(found, snapshots=[identity], command="<b>"))
    assert "<script>" not in page and "<b>" not in page


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["{doc}", "--repeat", 0],
        ["{doc}", "--repeat", "many"],
        ["{doc}", "--threads", -1],
        ["{doc}", "--codecs", "nothing"],
        ["{doc}", "--codecs", ""],
        ["{doc}", "--draw", "{doc}"],
        ["{doc}", "--out", "{folder}/none/results.json"],
        ["--draw", "{doc}"],
        ["--draw", "{folder}/none.json"],
        ["{folder}/none.safetensors"],
    ],
)
def test_wrong_use_is_exit_code_2(tmp_path, paths, capsys, arguments):
    filled = [str(a).format(doc=paths[0], folder=tmp_path) for a in arguments]
    code, _, err = call(capsys, *filled)
    assert code == 2
    assert "kvzip:" in err


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"version": 2},
        {"machine": None},
        {"snapshots": []},
    ],
)
def test_a_stored_result_that_cannot_be_is_refused(tmp_path, paths, change):
    found = msgspec.to_builtins(measure(paths[:1], ["raw"], repeat=1))
    (tmp_path / "r.json").write_text(json.dumps(found | change))
    with pytest.raises(kvzip.KVZipError):
        load(tmp_path / "r.json", BenchResult)
    found["rows"][0]["ratio"] = 0
    (tmp_path / "r.json").write_text(json.dumps(found))
    with pytest.raises(kvzip.KVZipError, match="ratio"):
        load(tmp_path / "r.json", BenchResult)


def test_a_snapshot_without_numbers_is_refused(tmp_path):
    empty = np.zeros((1, 0, 4), np.uint16)
    kvzip.Snapshot.from_arrays([(empty, empty)], "bf16").save(tmp_path / "e.st")
    with pytest.raises(kvzip.KVZipError, match="no numbers"):
        measure([tmp_path / "e.st"])
