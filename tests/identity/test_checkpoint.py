"""A checkpoint's fingerprint is of its bytes, all of them, and of nothing else."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import kvzip
from kvzip.errors import KVZipError
from kvzip.identity import digests, is_fingerprint
from kvzip.identity.checkpoint import changed, checkpoint_fingerprint


def test_it_is_the_same_for_every_path_and_for_a_copy(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(folder)
    paths = [folder.name, f"./{folder.name}", folder, str(folder) + "/", "copy", "link"]
    [found] = {kvzip.fingerprint(path) for path in paths}
    assert is_fingerprint(found) and found.startswith("sha256:")


def test_every_byte_of_weights_and_config_counts(saved: Any) -> None:
    folder = saved(max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    seen = {kvzip.fingerprint(folder)}
    index = folder / "model.safetensors.index.json"
    files = [*folder.glob("*.safetensors"), index, folder / "config.json"]
    for file in files:
        whole = file.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            data = bytearray(whole)
            data[at] ^= 1
            file.write_bytes(data)
            seen.add(kvzip.fingerprint(folder))
        file.write_bytes(whole)
    assert len(seen) == 1 + 3 * len(files)
    assert kvzip.fingerprint(folder) in seen
    (folder / "adapter_config.json").write_text("{}")
    assert kvzip.fingerprint(folder) not in seen


def test_what_is_no_weight_does_not_count(saved: Any) -> None:
    folder = saved()
    before = kvzip.fingerprint(folder)
    for name in ("README.md", "tokenizer.json", "generation_config.json", "optimizer.pt"):
        (folder / name).write_bytes(b"{}")
    assert kvzip.fingerprint(folder) == before
    assert checkpoint_fingerprint(folder, every=True) != before  # a .pt may hold weights


def test_a_gguf_file_is_its_sha256(tmp_path: Path) -> None:
    import hashlib

    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + bytes(1000))
    assert kvzip.fingerprint(file) == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    parts = [tmp_path / f"big-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    before = kvzip.fingerprint(parts[0])
    parts[1].write_bytes(b"GGUG")
    assert kvzip.fingerprint(parts[0]) != before


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", "org/never-downloaded", ""):
        with pytest.raises(KVZipError, match="no weights"):
            kvzip.fingerprint(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_weights_that_are_no_file_are_an_error(make: Any, saved: Any) -> None:
    """Nobody waits for a pipe, or reads a device without an end."""
    weights = saved() / "model.safetensors"
    weights.unlink()
    make(weights)
    with pytest.raises(KVZipError, match=r"model\.safetensors is no regular file"):
        kvzip.fingerprint(weights.parent)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are opened to be read whole. What is known is known from disk only."""
    found: list[Path] = []
    opened = Path.open

    def noting(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".safetensors":
            found.append(path)
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", noting)
    return found


def settle(folder: Path) -> None:
    """Let the files be old enough that another change would show."""
    while any(not digests.Stamp.of(file).settled for file in folder.iterdir()):
        time.sleep(0.1)


def test_bytes_are_read_once_until_they_change(
    saved: Any, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED", 0.3)
    folder = saved()
    [file] = folder.glob("*.safetensors")
    settle(folder)
    first = kvzip.fingerprint(folder)
    assert len(reads) == 1
    digests._seen.clear()  # as in another process
    assert kvzip.fingerprint(folder) == first and len(reads) == 1
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    assert kvzip.fingerprint(folder) != first


def test_a_cache_folder_that_is_damaged_or_cannot_be_written(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED", 0.3)
    folder = saved()
    settle(folder)
    first = kvzip.fingerprint(folder)
    kept = list((tmp_path / "user-cache").rglob("*.json"))
    assert kept
    for file in kept:
        file.write_bytes(b"\xff{")
    digests._seen.clear()
    assert kvzip.fingerprint(folder) == first
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    digests._seen.clear()
    assert kvzip.fingerprint(folder) == first


def test_what_an_engine_was_told() -> None:
    base = "sha256:" + 64 * "0"
    told: list[dict[str, Any]] = [
        {"quantization": "fp8"},
        {"quantization": "awq"},
        {"adapter": "fp8"},
        {"quantization": "fp8", "adapter": "a"},
    ]
    found = {changed(base, each) for each in told}
    assert len(found) == 4 and all(map(is_fingerprint, found)) and base not in found
    assert changed(base, {"quantization": None, "adapter": ""}) == base
