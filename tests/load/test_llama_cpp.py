"""llama.cpp's saved sessions, read as snapshots and restored byte for byte.

Two files are real: SmolLM2-135M (values transposed) and Gemma 3 270M (a cache with windows, values
of q8_0) after a prompt of a few tokens, written by a server of October 2026 (sequence version 4). A
small writer makes the other layouts.
"""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from command import run_json
from hypothesis import given
from hypothesis import strategies as st
from support import cache_like

import kvzip
from kvzip.errors import CorruptError, FormatError, KVZipError, UsageError
from kvzip.load import llama_cpp, llama_slot

REAL = [Path(__file__).parent / "slots" / f"{name}.bin" for name in ("smollm2", "gemma3")]
F32, F16, Q8_0 = 0, 1, 8


def u32(*numbers):
    return struct.pack(f"<{len(numbers)}I", *numbers)


def cells(positions, sequences=1, extra=b""):
    """What is kept of each cell: position, sequences, whatever the version has, their numbers."""
    return b"".join(
        struct.pack("<iI", p, sequences) + extra + u32(*range(sequences)) for p in positions
    )


def rows(kind, numbers):
    """A tensor as llama.cpp writes it: its type, bytes of a row, the rows."""
    return u32(kind) + struct.pack("<Q", numbers.nbytes // len(numbers)) + numbers.tobytes()


def columns(kind, numbers):
    """A transposed tensor: its type, bytes of a number, width, number after number of each."""
    return u32(kind, numbers.itemsize, numbers.shape[1]) + numbers.T.tobytes()


def numbers(seed, count, width, kind=F16):
    rng = np.random.default_rng(seed)
    if kind == Q8_0:
        return rng.integers(0, 256, (count, width // 32 * 34)).astype(np.uint8)
    return cache_like(rng, {F16: "fp16", F32: "fp32"}[kind], (1, count, width))[0]


def attention(positions, layers=2, width=64, transposed=False, rotation=b"", values=True, **more):
    """A cache of keys and values: one stream that is empty, and one."""
    kind, n = more.pop("kind", F16), len(positions)
    data = u32(2, 0, n) + cells(positions, **more) + u32(int(transposed), layers) + rotation
    data += b"".join(rows(kind, numbers(i, n, width, kind)) for i in range(layers))
    if values:
        write = columns if transposed else rows
        data += b"".join(write(kind, numbers(99 + i, n, width, kind)) for i in range(layers))
    return data


def recurrent(position, layers=3, width=40):
    """A memory of states: one cell."""
    states = b"".join(rows(F32, numbers(i, 1, width, F32)) for i in range(2 * layers))
    return u32(1) + struct.pack("<iI", position, 0) + u32(0, layers) + states


def slot(*parts, ids=range(5, 25), version=2):
    return b"qsgg" + u32(version, len(ids)) + u32(*(i % 2**32 for i in ids)) + b"".join(parts)


def session(*parts, ids=range(20), version=9, outputs=True):
    """A whole context: the architecture, and what versions up to 9 have of outputs."""
    data = b"nsgg" + u32(version, len(ids), *ids) + u32(5) + b"llama"
    if outputs:
        data += u32(2, 0, 1) + struct.pack("<Q", 40_000) + bytes(160_000) + struct.pack("<Q", 0)
    return data + b"".join(parts)


def round_trip(tmp_path, data, codec="channel"):
    """The snapshot in a file, and what is in the file that it is restored to from a .kvz file."""
    snapshot = llama_cpp.load_slot(data)
    target = tmp_path / "back.bin"
    blob = kvzip.encode(snapshot, codec)
    length = llama_cpp.save_slot(kvzip.decode(blob), target)
    found = target.read_bytes()
    assert length == len(found)
    return snapshot, found, blob


N = range(20)
LAYOUTS = {
    "version 2": slot(attention(N)),
    "version 4, rotated": slot(attention(N, rotation=u32(0, 64)), version=4),
    "transposed": slot(attention(N, transposed=True)),
    "positions in two dimensions": slot(attention(N, extra=bytes(8))),
    "positions and tokens": slot(attention(N, extra=bytes(12), rotation=u32(0, 0))),
    "latents": slot(attention(N, values=False)),
    "quantised": slot(attention(N, kind=Q8_0)),
    "windows": slot(attention(N), attention(range(9, 20), layers=4)),
    "hybrid": slot(attention(N, layers=1), recurrent(19)),
    "states": slot(recurrent(19)),
    "session": session(attention(N)),
    "session without outputs": session(attention(N), outputs=False, version=11),
    "several sequences": session(attention(N, sequences=3)),
    "unlike sequences": session(
        u32(1, 2) + cells([0], 0) + cells([1], 2) + u32(0, 1)
        + rows(F16, numbers(1, 2, 8)) + rows(F16, numbers(2, 2, 8))
    ),
    "a server's tokens": slot(attention(N), ids=[-1, 1, 20, *range(20), 0], version=4),
    "more behind it": slot(attention(N), b"checkpoints" + u32(1, 17), attention(range(3, 15))),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_and_restored(tmp_path, name):
    data = LAYOUTS[name]
    snapshot, found, _ = round_trip(tmp_path, data)
    assert found == data
    assert kvzip.load.llama_cpp.is_of_slot(snapshot)
    # Next to nothing is left of the file beside what is known as numbers.
    rest = snapshot.layers[-1].layout.parts[llama_cpp.REST].numbers
    outputs = 160_000 if name in ("session", "several sequences", "unlike sequences") else 0
    assert rest - outputs < 1300 and len(snapshot.layers) > 1


def test_numbers_are_where_they_belong(tmp_path):
    for transposed in (False, True):
        data = slot(attention(N, transposed=transposed), ids=range(5, 25))
        snapshot = llama_cpp.load_slot(data)
        assert [layer.kind for layer in snapshot.layers] == ["full", "full", "state"]
        assert snapshot.tokens == 20 and list(snapshot.token_ids) == list(range(5, 25))
        for i in range(2):
            assert np.array_equal(snapshot.layers[i].k[0], numbers(i, 20, 64))
            assert np.array_equal(snapshot.layers[i].v[0], numbers(99 + i, 20, 64))


def test_a_window_is_not_taken_for_all_tokens():
    snapshot = llama_cpp.load_slot(LAYOUTS["windows"])
    kinds = [layer.kind for layer in snapshot.layers]
    assert kinds == ["full"] * 2 + ["state"] * 5
    assert llama_cpp.load_slot(slot(attention(N[::-1]))).layers[0].kind == "state"


def test_an_architecture_is_kept():
    assert llama_cpp.load_slot(LAYOUTS["session"]).origin.architecture == "llama"


@pytest.mark.parametrize("codec", ["channel", "planes", "zstd", "raw"])
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_files_are_understood_and_restored(tmp_path, path, codec):
    data = path.read_bytes()
    snapshot, found, blob = round_trip(tmp_path, path, codec)
    assert found == data
    rest = snapshot.layers[-1].layout.parts[llama_cpp.REST].numbers
    assert rest < 0.04 * len(data)
    # Gemma's server has put a checkpoint of the 15 layers with windows behind.
    layers = {"smollm2": 30, "gemma3": 18 + 15}[path.stem]
    assert len(snapshot.layers) == layers + 1 and snapshot.token_ids is not None
    assert all(set(layer.layout.parts) == {"k", "v"} for layer in snapshot.layers[:-1])
    assert len(blob) < 1.06 * len(data)  # a file of 12 tokens is too short to shrink


@given(
    base=st.sampled_from(sorted(LAYOUTS)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4),
    cut=st.floats(0, 1),
)
def test_whatever_the_bytes_are_they_come_back(tmp_path_factory, base, edits, cut):
    """Damaged, of another version, cut short: what is not understood is carried."""
    data = bytearray(LAYOUTS[base])
    for where, new in edits:
        at = 4 + int(where * (len(data) - 4))
        data[at : at + len(new)] = new
    data = bytes(data[: 4 + round(cut * (len(data) - 4))])
    tmp_path = tmp_path_factory.mktemp("any")
    if len(data) < 8:
        with pytest.raises(FormatError):
            llama_cpp.load_slot(data)
        return
    assert round_trip(tmp_path, data)[1] == data


@given(st.binary(max_size=3000))
def test_bytes_at_random_behind_a_magic_come_back(tmp_path_factory, tail):
    data = b"qsgg" + u32(7) + tail
    assert round_trip(tmp_path_factory.mktemp("any"), data)[1] == data


def test_bytes_that_read_like_very_much_are_carried(tmp_path, monkeypatch):
    """Each place of it reads like the beginning of very many cells, of cells of very many
    sequences, of very many layers; many small parts; positions that no prompt has."""
    monkeypatch.setattr(llama_slot, "_MOST_CELLS", 1 << 18)
    monkeypatch.setattr(llama_slot, "_MOST_TENSORS", 100)
    looked = taken = 0
    spend, take = llama_slot._Cursor.spend, llama_slot._Cursor.take

    def counted(cursor, count):
        nonlocal looked
        spend(cursor, count)
        looked += count

    def counted_bytes(cursor, length):
        nonlocal taken
        taken += length
        return take(cursor, length)

    monkeypatch.setattr(llama_slot._Cursor, "spend", counted)
    monkeypatch.setattr(llama_slot._Cursor, "take", counted_bytes)
    small = u32(1, 1) + cells([0]) + u32(0, 1) + rows(F16, np.zeros((1, 1), np.uint16)) * 2
    for data in (
        slot(u32(1, 10_000) * 20_000),
        slot(u32(1, 15_000) + u32(1, 1, 1) * 15_000 + u32(9) * 15_000),
        slot(u32(1, 20_000) + u32(7, 0) * 20_000),
        slot(u32(1, 64) + (u32(0, 4095) + u32(0) * 4095) * 64 + u32(9)),
        slot((u32(1, 1) + cells([0]) + u32(0, 4096)) * 300 + small[24:40] * 4095),
        slot(small * 2_000),
        slot(attention([2**31 - 1, 5])),
        slot(attention([-5, -1])),
    ):
        looked = taken = 0
        snapshot, found, _ = round_trip(tmp_path, data, "raw")
        assert found == data and looked <= 1 << 18 and len(snapshot.layers) <= 51
        assert taken <= 5 << 18


def test_what_is_no_session_is_refused(tmp_path):
    for data in (b"", b"qsg", b"GGUF" + bytes(100), b"qsgg"):
        with pytest.raises(FormatError):
            llama_cpp.load_slot(data)
    plain = kvzip.Snapshot.from_arrays([(numbers(1, 4, 8)[None],) * 2], "fp16")
    with pytest.raises(UsageError, match="no saved session"):
        llama_cpp.save_slot(plain, tmp_path / "x.bin")
    assert not (tmp_path / "x.bin").exists()


def test_a_part_of_a_session_is_not_written_as_one(tmp_path):
    whole = llama_cpp.load_slot(LAYOUTS["version 2"])
    part = kvzip.Snapshot(whole.layers[1:], "fp16", whole.token_ids)
    with pytest.raises(UsageError, match="not whole"):
        llama_cpp.save_slot(part, tmp_path / "x.bin")


@given(places=st.lists(st.integers(0, 2**64 - 1), min_size=8, max_size=8))
def test_hostile_places_are_an_error_or_bytes_of_the_same_length(tmp_path_factory, places):
    """Whoever makes the file can say anything of where tensors lie."""
    data = LAYOUTS["version 2"]
    snapshot = llama_cpp.load_slot(data)
    last = snapshot.layers[-1]
    last.held()[llama_cpp.PLACES] = np.array(places, "<u8").view(np.uint8)
    target = tmp_path_factory.mktemp("any") / "x.bin"
    with pytest.raises(CorruptError):
        llama_cpp.save_slot(snapshot, target)
    assert not target.exists()


def test_the_command_line_knows_a_session_by_its_magic(tmp_path, capsys):
    source, kvz, back = REAL[0], tmp_path / "slot.kvz", tmp_path / "back.bin"
    run_json(capsys, "encode", str(source), "-o", str(kvz))
    code, verdict = run_json(capsys, "verify", str(kvz), "--against", str(source))
    assert code == 0 and verdict["files"][0]["same"]
    run_json(capsys, "decode", str(kvz), "-o", str(back))
    assert back.read_bytes() == source.read_bytes()
    # As a snapshot it can be looked at by all other commands, and still becomes a session again.
    plain, again = tmp_path / "slot.safetensors", tmp_path / "again.kvz"
    run_json(capsys, "decode", str(kvz), "-o", str(plain))
    run_json(capsys, "encode", str(plain), "-o", str(again))
    run_json(capsys, "decode", str(again), "-o", str(back))
    assert back.read_bytes() == source.read_bytes()


def test_a_saved_session_is_not_overwritten_by_another_command(tmp_path, capsys):
    kept = tmp_path / "kept.bin"
    kept.write_bytes(REAL[0].read_bytes())
    with pytest.raises(SystemExit) as ended:
        from kvzip.cli import main

        main(["encode", str(REAL[1]), "-o", str(kept), "--json"])
    assert ended.value.code == 2
    assert "saved session" in json.loads(capsys.readouterr().out)["error"]
    assert kept.read_bytes() == REAL[0].read_bytes()


def test_a_session_that_is_saved_anew_meanwhile_is_an_error(tmp_path):
    """A server writes into the same file; part of one session and part of the other is none."""
    path = tmp_path / "slot.bin"
    path.write_bytes(LAYOUTS["version 2"])
    snapshot = llama_cpp.load_slot(path)
    time.sleep(0.01)  # a file's time has steps
    path.write_bytes(bytes(byte ^ 1 for byte in LAYOUTS["version 2"]))
    with pytest.raises(CorruptError, match=f"^{re.escape(str(path))} was changed while it was"):
        _ = snapshot.layers[0].k
    with pytest.raises(CorruptError, match="was changed"):
        kvzip.encode(snapshot)


def test_layers_are_read_when_they_are_used(tmp_path):
    path = tmp_path / "slot.bin"
    path.write_bytes(LAYOUTS["version 2"])
    snapshot = llama_cpp.load_slot(path)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(KVZipError):
        _ = snapshot.layers[0].k
