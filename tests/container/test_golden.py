"""Files stay readable: what released versions wrote is read to the numbers that it was made of.

A file in `tests/golden` is never changed. A new version of the format gets a new folder; a new
codec, dtype or kind of block new files in the newest one (`python tests/golden_files.py`).
"""

from __future__ import annotations

import json
import shutil

import golden_files
import pytest
from golden_files import MANIFEST, NOW

import kvzip
from kvzip.codecs import _native
from kvzip.layout import KINDS
from kvzip.selftest import instructions

FOLDERS = sorted(golden_files.FOLDER.glob("v*"))
FILES = [
    (folder / name, line)
    for folder in FOLDERS
    for name, line in golden_files.manifest(folder).items()
]
TODAY = [path for path, _ in FILES if path.parent == NOW and path.suffix != ".kvzpage"]


@pytest.fixture(params=instructions())
def simd(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield
    _native.set_simd(before)


def test_golden_folders_of_all_versions_are_there():
    assert [folder.name for folder in FOLDERS] == ["v1"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_golden_files_are_those_of_their_manifest(folder):
    assert golden_files.wrong_in(folder) == []


@pytest.mark.parametrize(
    "path, line", FILES, ids=[f"{path.parent.name}-{path.name}" for path, _ in FILES]
)
def test_golden_files_stay_readable(simd, path, line):
    if path.name.startswith("sealed"):
        pytest.importorskip("cryptography")
    assert golden_files.numbers_in(path, line.get("profile")) == line["numbers"]


@pytest.mark.parametrize(
    "path",
    [path for path in TODAY if path.suffix != ".kvprofile"],
    ids=lambda path: path.name,
)
def test_golden_numbers_are_those_that_were_written(path):
    line = golden_files.manifest(NOW)[path.name]
    assert golden_files.numbers_of(golden_files.written(path.name)) == line["numbers"]


def test_golden_files_that_are_changed_missing_or_not_listed_are_told(tmp_path):
    folder = tmp_path / "v1"
    shutil.copytree(NOW, folder)
    assert golden_files.wrong_in(folder) == []
    changed = bytearray((folder / "raw-bf16.kvz").read_bytes())
    changed[-100] ^= 1
    (folder / "raw-bf16.kvz").write_bytes(changed)
    (folder / "channel.kvprofile").write_bytes(b"not listed")
    (folder / "predictive.kvprofile").unlink()
    wrong = ["channel.kvprofile", "predictive.kvprofile", "raw-bf16.kvz"]
    assert golden_files.wrong_in(folder) == wrong


def test_golden_files_that_are_missing_are_written_and_no_others(tmp_path):
    """Written anew, .kvz files hold the same numbers; their bytes may be others."""
    folder = tmp_path / "v1"
    shutil.copytree(NOW, folder)
    removed = [path for path in folder.glob("*.kvz") if not path.name.startswith("sealed")]
    for path in removed:
        path.unlink()
    lines = golden_files.manifest(folder)
    for path in removed:
        del lines[path.name]
    (folder / MANIFEST).write_text(json.dumps(lines))
    kept = {name: golden_files.sha256(folder / name) for name in lines}
    assert {path.name for path in golden_files.write_missing(folder)} == {p.name for p in removed}
    assert kept == {name: golden_files.sha256(folder / name) for name in kept}
    old, new = golden_files.manifest(NOW), golden_files.manifest(folder)
    assert {name: line["numbers"] for name, line in old.items()} == {
        name: line["numbers"] for name, line in new.items()
    }
    assert golden_files.write_missing(folder) == []


# --- what there are golden files of --------------------------------------------------------------


def test_there_is_a_golden_file_of_each_codec_and_dtype():
    there = {path.name for path in NOW.iterdir()}
    assert {name for name, _, _ in golden_files.files()} <= there
    for codec in kvzip.codec_names():
        if kvzip.get_codec(codec).needs_profile:
            assert f"{codec}.kvprofile" in there


def kinds_of(codec: str) -> set[int]:
    """The first bytes of the blocks of a codec in today's files; of a part that is stored without
    its grid, -1."""
    found = set()
    for name, line in golden_files.manifest(NOW).items():
        if not name.endswith(".kvz") or name.startswith("sealed"):
            continue
        profile = line.get("profile")
        known = profile and kvzip.Profile.load(NOW / profile)
        with kvzip.open(NOW / name, known) as reader:
            for key, (tables, *rows) in reader.index.rows.items():
                owner = reader._blocks.codecs[key]
                if owner.codec_id != codec:
                    continue
                if codec == "grid" and owner.is_unused(reader._blocks.stored(tables)):
                    found.add(-1)
                else:
                    found |= {int(reader._blocks.stored(row)[0]) for row in rows}
    return found


def test_there_is_a_golden_block_of_each_kind():
    assert kinds_of("channel") == {0, 2, 3}
    assert kinds_of("predictive") == {0, 2, 3, 4}
    assert kinds_of("grid") == {-1, 0, 1}


def test_there_is_a_golden_block_of_each_rounding_before_rope():
    for rounding, name in enumerate(("", "-2", "-3", "-4", "-5", "-6"), 1):
        with kvzip.open(NOW / f"channel-before-rope{name}-bf16.kvz") as reader:
            _, *rows = reader.index.rows[0, "k"]
            heads = {bytes(reader._blocks.stored(row)[:2]) for row in rows}
        assert heads == {bytes([3, rounding]), bytes(2)}  # the last block has few tokens


def test_there_is_a_golden_layer_of_each_kind():
    layers = golden_files.every_kind().layers
    assert {layer.layout.kind for layer in layers} == set(KINDS)
    info = kvzip.info(NOW / "every-kind-bf16.kvz")
    assert {part.codec for part in info.parts} == {"channel", "planes"}


def test_golden_tables_are_in_files_and_in_profiles():
    for name, length in (("channel-by-profile-bf16.kvz", 0), ("channel-bf16.kvz", None)):
        line = golden_files.manifest(NOW)[name]
        known = line.get("profile") and kvzip.Profile.load(NOW / line["profile"])
        with kvzip.open(NOW / name, known) as reader:
            found = {reader.index.length[rows.start] for rows in reader.index.rows.values()}
        assert found == {0} if length == 0 else min(found) > 1
