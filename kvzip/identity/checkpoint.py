"""The fingerprint of a checkpoint: of all bytes of its weight files and of its configuration.

It is the same for a folder however its path is written, for a copy of it, for a hub id and for the
folder that it was downloaded to. Nothing of it is sampled. Reading takes as long as SHA-256 does,
once: digests are kept in the user's cache folder (:mod:`kvzip.identity.digests`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from kvzip.errors import KVZipError, UsageError
from kvzip.files import name_of
from kvzip.identity.digests import sha256_of_files

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
"""Engines take the weights of the first kind that is there in a folder."""
_OF_TRAINING = ("training_args.bin", "optimizer.bin", "scheduler.bin")
_CONFIGS = (
    "*.index.json",  # which file each tensor is taken from
    "config.json",
    "adapter_config.json",
    "hf_quant_config.json",
    "params.json",
    "quant_config.json",
    "quantize_config.json",
    "*.py",  # a model's own code
)
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")


def checkpoint_fingerprint(
    ref: str | os.PathLike[str], commit: str | None = None, *, every: bool = False
) -> str:
    """``sha256:...`` of a checkpoint.

    `ref`: a folder with weights and their configuration, a ``.gguf`` file (of which the fingerprint
    is the SHA-256 itself), or a hub id whose files were downloaded; `commit`: which of its
    revisions (default: "main"). `every`: weights of every kind in the folder count, for engines
    that were told to load others than they would take.

    Raises KVZipError when there is nothing to read.
    """
    path = _at_home(ref)
    if path.is_file():
        return _of_file(path)
    folder = checkpoint_folder(ref, commit)
    if folder is None:
        raise KVZipError(f"there are no weights at {os.fspath(ref)!r} on this machine")
    weights = weight_files(folder, every=every)
    if not weights:
        raise KVZipError(f"the folder {folder} holds no weights")
    configs = sorted({found for pattern in _CONFIGS for found in folder.glob(pattern)})
    files = sorted({*weights, *configs}, key=lambda file: file.name)
    parts = [[f.name, digest] for f, digest in zip(files, sha256_of_files(files), strict=True)]
    return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _at_home(ref: str | os.PathLike[str]) -> Path:
    """A path in which ``~`` is a home folder. Raises UsageError for what is no path."""
    path = Path(name_of(ref))
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path}: {error}") from None


def checkpoint_folder(ref: str | os.PathLike[str], commit: str | None = None) -> Path | None:
    """The folder of a checkpoint: itself, or where the hub's files were downloaded to."""
    path = _at_home(ref)
    if path.is_dir():
        return path
    name = os.fspath(ref)
    if path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=commit)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def weight_files(folder: Path, *, every: bool = False) -> list[Path]:
    """The files of weights in a folder: of the kind that engines take, or of every kind."""
    found: list[Path] = []
    for pattern in _WEIGHTS:
        found += (file for file in folder.glob(pattern) if file.name not in _OF_TRAINING)
        if found and not every:
            break
    return sorted(found)


def changed(fingerprint: str, told: Mapping[str, object]) -> str:
    """The fingerprint of weights that an engine was told to change: to quantise them, to put an
    adapter on them, to take others while it runs. What is None, False or empty was not told."""
    what = {key: str(value) for key, value in sorted(told.items()) if value}
    if not what:
        return fingerprint
    return f"{fingerprint}+{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"


def _of_file(path: Path) -> str:
    shard = _SHARD.fullmatch(path.name)
    if shard is None:
        return "sha256:" + sha256_of_files([path])[0]
    files = sorted(path.parent.glob(f"{_literal(shard[1])}-*-of-{shard[2]}.gguf"))
    return "sha256:" + hashlib.sha256("".join(sha256_of_files(files)).encode()).hexdigest()


def _literal(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)
