"""What is wrong with a command's arguments is said before it loads a model, which takes long."""

from __future__ import annotations

import importlib

import pytest
from command import run
from support import cache_like, make_snapshot

import kvzip
from kvzip import capture
from kvzip.cli.arguments import document_range
from kvzip.errors import KVZipError

LOADED = "the model is being loaded"
LOADERS = (
    "kvzip.models",
    "kvzip.eval.demo",
    "kvzip.eval.exactness.corpus",
    "kvzip.eval.frontier.copies",
    "kvzip.eval.frontier.run",
    "kvzip.eval.links.sources",
    "kvzip.eval.ratios.run",
    "kvzip.eval.scaling.run",
    "kvzip.eval.speed.inputs",
)
"""Modules that load models."""

TEXT = ["--text", "text"]
OWN = ["--kinds", "none", "--text", "own=text:other"]
BASES = {
    "capture": ["--model", "m", *TEXT, "-o", "out"],
    "demo": ["--out", "out", *TEXT, "--codecs", "planes,predictive"],
    "eval inputs": [*TEXT, "--codecs", "planes,predictive"],
    "eval exactness": ["doc.safetensors", "--codecs", "planes"],
    "eval links": [*TEXT, "--codecs", "planes,predictive"],
    "eval ratios": ["--model", "m", "--work", "out", *OWN],
    "eval scaling": ["--models", "m", "--work", "out", *OWN],
}
"""What each command is given beside what is wrong."""

WRONG = {
    "capture": [
        ("--tokens", "0", "--tokens is 0"),
        ("--tokens", "1", "--tokens is 1"),
        ("--docs", "3:1", "--docs '3:1'"),
        ("--docs", "-1:-1", "--docs '-1:-1'"),
        ("--docs", ":0", "--docs ':0'"),
        ("--text", "nofile.txt", "nofile.txt"),
        ("--text", "bytes", "bytes is not UTF-8"),
        ("--encoder-text", "nofile.txt", "nofile.txt"),
        ("--dtype", "int8", "not cast to int8"),
    ],
    "demo": [
        ("--tokens", "0", "tokens is 0"),
        ("--tokens", "1", "tokens is 1"),
        ("--train", "-1", "train is -1"),
        ("--train", "0", "--train"),
        ("--new-tokens", "0", "new_tokens is 0"),
        ("--threads", "-1", "threads (0: all cores) is -1"),
        ("--threads", "9999", "threads (0: all cores) is 9999"),
        ("--budget", "0", "budget is 0"),
        ("--budget", "nan", "budget is nan"),
        ("--text", "nofile.txt", "nofile.txt"),
    ],
    "eval inputs": [
        ("--threads", "-1", "threads (0: all cores) is -1"),
        ("--train", "0", "--train"),
        ("--repeat", "0", "repeat is 0"),
        ("--lengths", "1,16", "--lengths '1,16'"),
        ("--prefill-lengths", "0", "--prefill-lengths '0'"),
        ("--dtypes", "int8", "not cast to int8"),
        ("--profile-dtypes", "bf17", "bf17"),
        ("--text", "nofile.txt", "nofile.txt"),
    ],
    "eval exactness": [
        ("--continuations", "0", "continuations is 0"),
        ("--new-tokens", "0", "new_tokens is 0"),
        ("--profile", "none.kvprofile", "none.kvprofile"),
        ("none.safetensors", None, "none.safetensors"),
        ("other.safetensors", None, "not of the model and dtype"),
        ("without.safetensors", None, "without.safetensors has no token ids"),
    ],
    "eval links": [
        ("--tokens", "1", "tokens is 1"),
        ("--document", "-1", "document is -1"),
        ("--train", "0", "--train"),
        ("--repeat", "0", "repeat is 0"),
        ("--delay", "-1", "delay is -0.001"),
        ("--profile", "none.kvprofile", "none.kvprofile"),
        ("--text", "nofile.txt", "nofile.txt"),
        ("--page", "none.md", "none.md"),
        ("--page", "text", "<!-- links -->"),
    ],
    "eval ratios": [
        ("--tokens", "1", "tokens is 1"),
        ("--train", "0", "--train"),
        ("--test", "0", "test is 0"),
        ("--max-bytes", "-1", "max_bytes is -1"),
        ("--dtype", "int8", "not cast to int8"),
    ],
    "eval scaling": [
        ("--tokens", "1", "tokens is 1"),
        ("--test", "0", "--test"),
        ("--sizes", "200", "--sizes"),
        ("--dtype", "int8", "not cast to int8"),
    ],
}  # fmt: skip
"""Options, what is wrong, and what is said of it."""


@pytest.fixture
def loads(tmp_path, monkeypatch):
    """A folder with some files, where no model can be loaded, and links are taken for possible."""

    def load_model(*args, **kwargs):
        raise KVZipError(LOADED)

    # One that is imported only now must not take what stands in for the function.
    modules = [importlib.import_module(name) for name in LOADERS]
    for module in modules:
        monkeypatch.setattr(module, "load_model", load_model)
    monkeypatch.setattr("kvzip.eval.links.run.require_links", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("some words")
    (tmp_path / "other").write_text("other words")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, dtype in (("doc", "bf16"), ("other", "fp16")):
        make_snapshot(cache_like, 1, dtype).save(tmp_path / f"{name}.safetensors")
    whole = kvzip.Snapshot.load("doc.safetensors")
    bare = kvzip.Snapshot(list(whole.layers), whole.dtype, None, whole.origin)
    bare.save(tmp_path / "without.safetensors")


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("command", BASES)
def test_a_model_is_loaded_where_nothing_is_wrong(capsys, command):
    assert LOADED in run(capsys, *command.split(), *BASES[command])[2]


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize(
    ("command", "option", "value", "says"),
    [(command, *wrong) for command, table in WRONG.items() for wrong in table],
)
def test_no_model_is_loaded_where_something_is(capsys, command, option, value, says):
    given = list(BASES[command])
    if value is None:
        given.insert(1, option)
    elif option in given:
        given[given.index(option) + 1] = value
    else:
        given.append(f"{option}={value}")
    code, out, err = run(capsys, *command.split(), *given)
    assert (code, out) == (2, "")
    assert says in err and LOADED not in err


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"text": "nofile.txt"}, "nofile.txt"),
        ({"profile": "none.kvprofile"}, "none.kvprofile"),
        ({"dtype": "int8"}, "not cast to int8"),
        ({}, LOADED),
    ],
)
def test_a_point_of_a_sweep(tmp_path, fields, says):
    from kvzip.eval.sweep.measure import measure
    from kvzip.eval.sweep.points import Point

    row = measure(Point(codec="planes", **fields), str(tmp_path))
    assert row.status == "failed" and says in row.reason


def test_which_documents():
    numbers = list(range(5))
    for words, found in (("1", [1]), ("-1", [4]), ("-2", [3]), ("1:3", [1, 2]), (":-3", [0, 1]),
                         ("3:-1", [3]), ("-2:", [3, 4]), (":", numbers)):  # fmt: skip
        assert numbers[document_range(words)] == found


def test_a_text_is_read_once(tmp_path):
    path = tmp_path / "text"
    path.write_text("a bb ccc")
    text = capture.Text.read([str(path), str(path)])
    path.unlink()
    assert (text.name, text.content) == (f"{path}+{path}", "a bb ccc\n\na bb ccc")
