"""JSON and TOML from elsewhere: no text, however deep or odd, is more than an error of ours."""

from __future__ import annotations

import ast
import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from command import run
from support import make_snapshot, random_bits

import kvzip
from kvzip.errors import CorruptError, FormatError, KVZipError
from kvzip.eval.claims.claims import parse as parse_claims
from kvzip.eval.money.fleet import changed
from kvzip.eval.money.fleet_presets import presets
from kvzip.eval.money.prices import load_prices
from kvzip.eval.results.inputs import Inputs
from kvzip.eval.results.stored import load, read_json
from kvzip.eval.sweep.grid import read_config
from kvzip.eval.traffic.trace import read_trace
from kvzip.parsing import DEPTH, _depth, from_json, from_toml
from kvzip.store import Store

ROOT = Path(kvzip.__file__).resolve().parents[1]


def nested(depth, form="["):
    """JSON of lists, or of objects, that many levels deep."""
    if form == "[":
        return "[" * depth + "]" * depth
    return '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)


DEEP = {
    "lists": nested(100_000),
    "objects": nested(100_000, "{"),
    "lists without an end": "[" * 100_000,
    "objects without an end": '{"a":' * 100_000,
    "lists where a person still would": nested(DEPTH + 1),
    "an object's unknown field": '{"kind":"kvzip.inputs","version":1,"x":' + nested(50_000) + "}",
}
DEEP_TOML = {
    "lists": "a = " + nested(20_000),
    "tables": "a = " + "{b=" * 20_000 + "1" + "}" * 20_000,
    "dots": "a." * 5_000 + "b = 1",
    "a table's name": "[" + "a." * 5_000 + "b]",
    "a codec": "[grid]\ncodec = [" + nested(900) + "]",
    "a number of digits": "a = 1" + "0" * 5_000,
    "points": "[[points]]\ncodec = " + "{b=" * 200 + "1" + "}" * 200,
}


# --- the two readers ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["[", "{"])
def test_values_nest_as_deep_as_is_said_and_no_deeper(form):
    assert from_json(nested(DEPTH, form)) == json.loads(nested(DEPTH, form))
    with pytest.raises(FormatError, match="deep"):
        from_json(nested(DEPTH + 1, form))
    lists = "a = " + nested(DEPTH - 1)
    assert from_toml(lists) == {"a": json.loads(nested(DEPTH - 1))}
    with pytest.raises(FormatError, match="deep"):
        from_toml("a = " + nested(DEPTH))


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("form", [object, list[int], dict[str, msgspec.Raw], kvzip.Origin])
def test_no_text_is_too_deep_for_the_reader(text, form):
    with pytest.raises((FormatError, CorruptError)):
        from_json(text.encode(), form if form is not object else dict)


def test_other_files_are_told_as_no_json():
    """Whatever brackets are in them."""
    for begun in (b"\x89KVZ\r\n", b"@" + bytes(7), b"text ", b'"quoted" ', b"1 "):
        with pytest.raises(CorruptError, match=r"malformed|invalid"):
            from_json(begun + b"[" * (DEPTH + 1))
    with pytest.raises(FormatError, match="deep"):
        from_json(b" \t\r\n" + b"[" * (DEPTH + 1))


def test_who_reads_far_down_a_stack_has_an_error_of_ours_too():
    def down(left):
        return down(left - 1) if left else from_json(nested(DEPTH))

    frames, frame = 0, sys._getframe()
    while frame is not None:
        frames, frame = frames + 1, frame.f_back
    left = sys.getrecursionlimit() - frames - 40
    with pytest.raises(KVZipError, match="deep"):
        down(left)


def test_brackets_in_strings_do_not_count():
    rng = random.Random(0)

    def made(depth):
        text = "".join(rng.choice('[]{}"\\a\n€') for _ in range(rng.randrange(6)))
        kind = rng.random()
        if depth == 0 or kind < 0.2:
            return rng.choice([text, 1, None, True, 1.5])
        if kind < 0.6:
            return [made(depth - 1) for _ in range(rng.randrange(4))]
        return {f"{text}{i}": made(depth - 1) for i in range(rng.randrange(4))}

    def levels(value):
        if not isinstance(value, (dict, list)):
            return 0
        return 1 + max(map(levels, value.values() if isinstance(value, dict) else value), default=0)

    for _ in range(500):
        value = made(8)
        for options in {}, {"ensure_ascii": False}, {"indent": 1}:
            assert _depth(json.dumps(value, **options).encode()) == levels(value)
    wide = ['[{"' * 1_000_000, [[]]]
    assert _depth(json.dumps(wide).encode()) == 3
    assert from_json(json.dumps(wide)) == wide


@pytest.mark.parametrize(
    "text", [b"", b"[", b"nul", b"\xff", b'"\xff"', b'"\\ud800', b"[1]x", b"{]", b"NaN", b"[a.b]"]
)
def test_what_is_no_json(text):
    for form in (Any, dict):
        with pytest.raises(CorruptError):
            from_json(text, form)


@pytest.mark.parametrize("text", [b"a", b"\xff", b'a = "\\ud800"', b"a = 1" + b"0" * 5_000])
def test_what_is_no_toml(text):
    with pytest.raises(CorruptError):
        from_toml(text)


def test_all_of_the_product_reads_with_these_two():
    """json.loads, msgspec.json.decode and tomllib are called in one file."""
    readers = {"loads", "load", "decode", "Decoder", "JSONDecoder"}
    found = []
    for room in ("kvzip", "eval", "codecs", "benchmarks"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in readers:
                    of = ast.unparse(node.value)
                    if of in ("json", "msgspec.json", "tomllib", "msgspec.toml", "msgspec.yaml"):
                        found.append(path.name)
                if isinstance(node, ast.ImportFrom) and node.module in ("json", "tomllib"):
                    found.append(path.name)
    assert set(found) == {"parsing.py"}


# --- who reads ----------------------------------------------------------------------------------


def commands(path):
    """Commands that are given a JSON file."""
    yield "eval", "paper", "--inputs", path
    yield "eval", "check", path
    yield "eval", "fleet", "--inputs", path
    yield "report", path
    yield "advise", "--tokens", 1000, "--link", "1Gb/s", "--inputs", path
    yield "get", "--store", path.parent / "store", "--ids", path, "--model", "m"


def test_commands_that_are_given_json(tmp_path, capsys):
    path = tmp_path / "deep.json"
    path.write_text(DEEP["lists"])
    Store(tmp_path / "store", block_tokens=16).put(make_snapshot(random_bits, 1, "bf16"))
    for command in commands(path):
        code, out, err = run(capsys, *command)
        assert code in (1, 2) and "deep.json" in (out + err).replace("\n", ""), command


def test_commands_that_are_given_toml(tmp_path, capsys):
    path = tmp_path / "deep.toml"
    path.write_text(DEEP_TOML["lists"])
    for command in (
        ("sweep", path, "-o", tmp_path / "rows"),
        ("eval", "prices", "--price-file", path),
        ("eval", "fleet", "--config", path),
    ):
        code, out, err = run(capsys, *command)
        assert code in (1, 2) and "deep.toml" in (out + err).replace("\n", ""), command


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_results_and_traces(tmp_path, text):
    path = tmp_path / "deep.json"
    path.write_text(text)
    for read in lambda p: load(p, Inputs), lambda p: read_json(p, dict), read_trace:
        with pytest.raises(KVZipError, match=r"deep\.json"):
            read(path)


@pytest.mark.parametrize("text", DEEP_TOML.values(), ids=DEEP_TOML)
def test_tables_that_people_write(tmp_path, text):
    path = tmp_path / "deep.toml"
    path.write_text(text)
    fleet = presets()["paper-80m"]
    for read in read_config, load_prices, lambda p: changed(fleet, p):
        with pytest.raises(KVZipError, match=r"deep\.toml"):
            read(path)
    with pytest.raises(KVZipError):
        parse_claims(text)


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_small_files_of_a_store(tmp_path, text):
    """They are written anew where they say nothing; a store's own settings must be a store's."""
    snapshot = make_snapshot(random_bits, 1, "bf16")
    Store(tmp_path, block_tokens=16).put(snapshot)
    [about] = tmp_path.rglob("about.json")
    about.write_text(text)
    again = Store(tmp_path)
    assert len(again.documents()) == 1
    assert again.find(snapshot.token_ids, model="other", revision="", dtype="bf16") is None
    again.put(snapshot, replace=True)
    assert "test/model" in about.read_text()
    (tmp_path / "store.json").write_text(text)
    settings = Store(tmp_path)
    try:
        settings.put(snapshot)
    except KVZipError as error:
        assert "is no store of ours" in str(error)


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_headers_of_files(tmp_path, text):
    whole = tmp_path / "file"

    def check(read, data):
        whole.write_bytes(data)
        with pytest.raises(KVZipError):
            read(whole)

    packed = text.encode()
    check(kvzip.Snapshot.load, struct.pack("<Q", len(packed)) + packed)
    check(kvzip.Profile.load, struct.pack("<Q", len(packed)) + packed)
    for key, read in ("kvzip", kvzip.Snapshot.load), ("kvprofile", kvzip.Profile.load):
        header = json.dumps({"__metadata__": {key: text}}).encode()
        check(read, struct.pack("<Q", len(header)) + header)


def test_what_profiles_may_say_can_be_read(tmp_path):
    """As deep as a description may be, and with every kind of value."""
    deep = json.loads(nested(62, "{"))
    about = {"codec": "channel", "deep": deep, "least": -(2**63), "most": 2**64 - 1, "x": 1e-300}
    profile = kvzip.Profile({"a": np.arange(3)}, about)
    profile.save(tmp_path / "p")
    assert kvzip.Profile.load(tmp_path / "p").description == profile.description
    assert profile.description["deep"] == deep and profile.description["most"] == 2**64 - 1
