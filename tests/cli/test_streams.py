"""``-`` is stdin or stdout wherever a file is named, and stdout may fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from command import run
from support import cache_like, make_snapshot

import kvzip
from kvzip.cli.arguments import with_streams, writes_stdout

pytestmark = pytest.mark.first


@pytest.fixture
def folder(tmp_path):
    make_snapshot(cache_like, 1, "bf16", layers=2, tokens=300, dim=32).save(tmp_path / "s")
    kvzip.write(tmp_path / "x.kvz", kvzip.Snapshot.load(tmp_path / "s"))
    return tmp_path


def piped(folder, line):
    """Exit code, stdout and stderr of a line for a shell in which `kvzip` is the command."""
    command = f'kvzip() {{ {sys.executable} -m kvzip "$@"; }}; set -o pipefail; {line}'
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True)
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize("redirected", ["cat x.kvz | kvzip {}", "kvzip {} < x.kvz"])
@pytest.mark.drawn(2)
def test_a_file_from_stdin(folder, redirected):
    code, out, _ = piped(folder, redirected.format("info - --json"))
    assert code == 0 and json.loads(out)["tokens"] == 300
    code, out, _ = piped(folder, redirected.format("verify - --against s --json"))
    assert code == 0 and json.loads(out)["files"][0]["same"]
    code, out, _ = piped(folder, redirected.format("decode - -o back --json"))
    assert code == 0
    assert kvzip.encode(kvzip.Snapshot.load(folder / "back")) == (folder / "x.kvz").read_bytes()
    code, out, _ = piped(folder, redirected.format("put - --store t --block-tokens 64 --json"))
    assert code == 0 and json.loads(out)["documents"][0]["new"]
    code, out, _ = piped(folder, redirected.format("get --like - --store t -o - --json"))
    assert code == 0 and out == (folder / "x.kvz").read_bytes()


def test_files_from_several_pipes(folder):
    """Each can be read once only."""
    for command in (
        "verify {0} {0}",
        "verify {0} --against <(cat s)",
        "info {0}",
        "decode {0} -o -",
    ):
        code, out, err = piped(folder, "kvzip " + command.format("<(cat x.kvz)"))
        assert code == 0 and out, err
    code, out, _ = piped(folder, "kvzip verify <(cat x.kvz) <(head -c 500 x.kvz) --json")
    assert (code, json.loads(out)["kind"], len(json.loads(out)["files"])) == (1, "corrupt", 1)


def test_a_file_to_stdout_and_the_result_to_stderr(folder):
    for more in ("-o -", "--output -", "--output=-", "-o /dev/stdout"):
        code, out, err = piped(folder, f"kvzip encode s {more} --json")
        assert (code, out) == (0, (folder / "x.kvz").read_bytes())
        assert json.loads(err)["encoded_bytes"] == len(out)
    code, out, err = piped(folder, "kvzip encode s -o - | kvzip decode - -o - | sha256sum")
    assert code == 0 and "ratio" in err
    code, out, err = piped(folder, "kvzip encode none -o - --json")
    assert (code, out) == (2, b"")
    assert json.loads(err.splitlines()[-1])["kind"] == "system"


@pytest.mark.parametrize(
    "command", ["info x.kvz", "info x.kvz --json", "entropy s", "encode s -o -"]
)
@pytest.mark.drawn(2)
def test_a_stdout_that_takes_nothing(folder, command):
    code, _, err = piped(folder, f"kvzip {command} > /dev/full")
    assert code == 1
    assert "is full" in err and err.startswith("kvzip: ")
    code, _, err = piped(folder, f"set +o pipefail; kvzip {command} | true")
    assert code == 0
    assert "Exception" not in err
    if "-o -" not in command:
        code, _, err = piped(folder, f"kvzip {command} >&-")
        assert (code, err) == (1, "kvzip: standard output: it is closed\n")


@pytest.mark.parametrize("closed", ["2> /dev/full", "2>&-"])
@pytest.mark.drawn(2)
def test_a_stderr_that_takes_nothing_changes_no_result(folder, closed):
    code, out, _ = piped(folder, f"kvzip info none --json {closed}")
    assert (code, json.loads(out)["kind"]) == (2, "system")
    code, out, _ = piped(folder, f"kvzip info none {closed}")
    assert (code, out) == (2, b"")
    code, out, _ = piped(folder, f"kvzip info x.kvz --json {closed}")
    assert (code, json.loads(out)["tokens"]) == (0, 300)


def test_a_stdin_that_is_closed(folder):
    for command in ("verify - --json", "put s - --store t --json", "info /dev/stdin --json"):
        code, out, err = piped(folder, f"kvzip {command} <&-")
        assert (code, err) == (1, "kvzip: standard input: it is closed\n")
        assert json.loads(out)["kind"] == "system"
    assert piped(folder, "kvzip verify x.kvz <&-")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.drawn(2)
def test_ended_from_the_first_import_on(folder, number):
    """At any moment after Python itself is up: exit code 130, 143 or 129, and the JSON object."""
    # The command as its script runs it, which says when it begins. Whoever runs the tests may have
    # signals ignored (nohup, a shell's background), which is inherited.
    script = folder / "kvzip"
    script.write_text(
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "import kvzip.interruption\n"
        "os.write(2, b'begun\\n')\n"
        "from kvzip.cli import main\n"
        "main()\n"
    )
    for seconds in (0, 0.02, 0.1, 0.3, 0.8):
        for more in ([], ["--json"]) if seconds in (0, 0.8) else (["--json"],):
            process = subprocess.Popen(
                [sys.executable, script, "info", "/dev/stdin", *more],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            assert process.stderr.readline() == b"begun\n"
            time.sleep(seconds)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 128 + number, (seconds, err)
            assert err.startswith(b"kvzip: interrupted") and err.count(b"\n") == 1
            if more:
                found = json.loads(out)
                assert (found["kind"], found["exit"]) == ("interrupted", 128 + number)


def test_which_dash_is_what():
    assert with_streams(["decode", "-", "-o", "-"]) == ["decode", "/dev/stdin", "-o", "/dev/stdout"]
    assert with_streams(["x", "--out=-", "--like=-"]) == [
        "x", "--out=/dev/stdout", "--like=/dev/stdin",
    ]  # fmt: skip
    assert with_streams(["--docs", "-1", "a-b", "--a=b"]) == ["--docs", "-1", "a-b", "--a=b"]
    assert writes_stdout(["-o", "/dev/stdout"]) and writes_stdout(["--out=/dev/stdout"])
    assert not writes_stdout(["-o", "x"]) and not writes_stdout(["/dev/stdout"])


def test_a_file_from_elsewhere_does_not_steer_the_terminal(folder, capsys):
    known = kvzip.Snapshot.load(folder / "s")
    origin = msgspec.structs.replace(known.origin, model="\x1b]0;mine\x07\x1b[2J\u202e")
    named = kvzip.Snapshot(list(known.layers), known.dtype, known.token_ids, origin)
    kvzip.write(folder / "y.kvz", named)
    code, out, _ = run(capsys, "info", folder / "y.kvz")
    assert code == 0 and out.startswith(r"model          \x1b]0;mine\x07\x1b[2J\u202e")
    assert out.replace("\n", "").isprintable()


def test_names_are_text(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name in (
        "[bold]x",
        "[/a]",
        "[link=x]y",
        ":smile:",
        "a" * 200,
        "\x1b[31mred",
        "line\nbreak",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "x.kvz").read_bytes())
        shown = name.replace("\x1b", "\\x1b")
        assert run(capsys, "verify", name)[:2] == (0, f"{shown}: good\n")
        (folder / name).write_bytes(b"none")
        code, _, err = run(capsys, "decode", "x.kvz", "-o", f"none/{name}")
        assert code == 2 and err.count("\n") == 1
    not_text = bytes(folder) + b"/\xff.kvz"
    Path(not_text.decode(errors="surrogateescape")).write_bytes((folder / "x.kvz").read_bytes())
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "kvzip", "put", not_text, "--store", "t",
             "--block-tokens", "64", *more],
            cwd=folder, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0
        if more:
            assert (
                json.loads(done.stdout)["documents"][0]["file"].encode(errors="surrogateescape")
                == not_text
            )
