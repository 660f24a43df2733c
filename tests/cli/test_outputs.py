"""What a command writes, under whatever name, and how wide what it says is."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest
from command import run
from support import make_snapshot, random_bits

import kvzip
from kvzip.cli.terminal import counted
from kvzip.store import Store

pytestmark = pytest.mark.first

KVZIP = f"{sys.executable} -m kvzip"


def shell(line, folder, **environ):
    done = subprocess.run(
        ["bash", "-c", line.replace("kvzip ", f"{KVZIP} ")],
        cwd=folder, env=os.environ | environ, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    snapshot = make_snapshot(random_bits, 1, "bf16")
    snapshot.save(folder / "s.safetensors")
    kvzip.write(folder / "x.kvz", snapshot)
    Store(folder / "store", block_tokens=8).put(snapshot)
    (folder / "link").symlink_to("/dev/stdout")
    return folder


@pytest.mark.parametrize(
    ("output", "more", "to"),
    [
        ("-", "", "> out"),
        ("-", "--json", "| cat > out"),
        ("/dev/stdout", "--json", "> out"),
        ("/dev/stdout", "", "| cat > out"),
        ("/dev/fd/1", "", "> out"),
        ("/proc/self/fd/1", "--json", "| cat > out"),
        ("link", "", "> out"),
        ("link", "--json", "| cat > out"),
        ("out", "--json", "> out"),
        ("./out", "", "> out"),
    ],
)
@pytest.mark.drawn(2)
def test_a_file_that_goes_where_words_go_is_whole(folder, output, more, to):
    code, out, err = shell(f"kvzip encode s.safetensors -o {output} {more} {to}", folder)
    assert (code, out) == (0, b"")
    assert kvzip.decode(folder / "out") == kvzip.Snapshot.load(folder / "s.safetensors")
    if more:
        assert json.loads(err)["encoded_bytes"] == (folder / "out").stat().st_size
    else:
        assert "ratio" in err
    get = f"kvzip get --store store --like s.safetensors --output={output} {more}"
    if output in ("-", "link"):  # it writes in the same way
        assert shell(f"{get} {to}", folder)[0] == 0
        kvzip.verify(folder / "out")


def test_a_file_elsewhere_leaves_stdout_to_words(folder):
    for output in ("y.kvz", "/dev/null"):
        code, out, _ = shell(f"kvzip encode s.safetensors -o {output} --json", folder)
        assert code == 0 and json.loads(out)["raw_bytes"]
    code, out, err = shell("kvzip encode s.safetensors -o /dev/null --json > /dev/null", folder)
    assert (code, out, err) == (0, b"", "")


@pytest.mark.parametrize(
    "command",
    [
        "encode s.safetensors -o new/",
        "encode s.safetensors --output=new/",
        "encode s.safetensors -o store/",
        "decode x.kvz -o new.safetensors/",
        "get --store store --like s.safetensors -o new.kvz/",
        "fit s.safetensors -o new/",
    ],
)
def test_a_folder_is_no_file_to_write(folder, command, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    code, out, _ = run(capsys, *command.split(), "--json")
    assert code == 2 and json.loads(out)["kind"] in ("usage", "system")
    assert not list(folder.glob("new*"))


@pytest.mark.parametrize(
    "command",
    [
        "encode {}/s.safetensors -o new",
        "decode {}/x.kvz -o new",
        "fit {}/s.safetensors -o new",
        "put {}/s.safetensors --store new",
        "ls --store new",
        "get --store {}/store --like {}/s.safetensors -o new",
        "bench {}/s.safetensors --out new",
        "capture --model none --text pydoc -o new",
        "demo --out new",
    ],
)
def test_that_the_current_folder_is_gone_is_told(folder, tmp_path, command, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, out, _ = run(capsys, *command.replace("{}", str(folder)).split(), "--json")
    assert code == 2 and json.loads(out)["kind"] == "system"
    assert json.loads(out)["error"] == "new: the current folder is not there any more"


IN_TURN = """
import sys
from kvzip.cli import main
for command in sys.argv[1:]:
    try:
        main(command.split())
    except SystemExit as ended:
        print(command, ended.code, flush=True)
"""


def test_whatever_the_columns_all_is_said(folder):
    commands = ["info x.kvz", "ls --store store", "info none"]

    def said(commands, columns=None):
        environ = dict(os.environ) if columns is None else os.environ | {"COLUMNS": columns}
        done = subprocess.run(
            [sys.executable, "-c", IN_TURN, *commands],
            cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout, done.stderr

    usual = said(commands)
    assert [line for line in usual[0].splitlines() if line[:-2] in commands] == [
        "info x.kvz 0", "ls --store store 0", "info none 2",
    ]  # fmt: skip
    for columns in ("0", "5", "-3"):
        assert said(commands, columns) == usual
        # This one says how long it took.
        out, err = said(["encode s.safetensors -o y.kvz"], columns)
        assert out.endswith("encode s.safetensors -o y.kvz 0\n") and "ratio" in out + err


def test_help_is_whole_on_a_narrow_terminal(folder):
    for command in ("", "encode", "eval", "eval fleet"):
        shown = {
            columns: subprocess.run(
                [*KVZIP.split(), *command.split(), "--help"],
                cwd=folder, env=os.environ | {"COLUMNS": columns},
                capture_output=True, text=True, timeout=60, check=True,
            ).stdout
            for columns in ("1", "5", "40")
        }  # fmt: skip
        assert "Commands" in shown["40"] or "Parameters" in shown["40"]
        assert shown["1"] == shown["5"] == shown["40"]


@pytest.mark.parametrize("columns", ["0", "5", "60"])
def test_a_narrow_terminal_shows_whole_words(folder, columns):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*KVZIP.split(), "info", "x.kvz"], cwd=folder, stdout=follower, stderr=follower,
        env=os.environ | {"COLUMNS": columns, "TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    said = b""
    try:
        while piece := os.read(leader, 1 << 16):
            said += piece
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0
    assert b"block_tokens" in said and b"test/model" in said


def test_one_of_a_thing_is_one():
    said = [counted(count, "document") for count in (0, 1, 2, 12345)]
    assert said == ["0 documents", "1 document", "2 documents", "12,345 documents"]


def test_what_is_to_be_shown_can_be_read_by_whom_the_umask_lets(folder):
    lines = [
        "umask 022",
        "kvzip entropy s.safetensors --out shown",
        "kvzip bench s.safetensors --codecs raw --repeat 1 -o shown/bench.json",
        "kvzip encode s.safetensors -o shown/x.kvz",
        "kvzip decode x.kvz -o shown/y.safetensors",
    ]
    code, _, err = shell(" && ".join(lines), folder)
    assert code == 0, err
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder / "shown").iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {"x.kvz", "y.safetensors"}
    assert len(modes) >= 5 and set(modes.values()) == {0o600, 0o644}
