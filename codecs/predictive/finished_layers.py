"""A folder that keeps the finished layers of a fit, to go on where it was ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.errors import CorruptError, FormatError, ProfileError
from kvzip.files import replacing
from kvzip.parsing import from_json
from kvzip.reading import contents
from kvzip.snapshot import Snapshot, sha256_raw
from kvzip.statistics.documents import Item, Progress, load


class FinishedLayers:
    """A folder with the finished layers of one fit."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], items: Sequence[Item], tell: Progress
    ):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        documents = []
        for n, item in enumerate(items):
            documents.append(_fingerprint(load(item)))
            tell("documents read", n + 1, len(items))
        wanted = dict(settings) | {"documents": documents}
        note = folder / "fit.json"
        if note.exists():
            try:
                found = from_json(contents(note), dict[str, Any])
            except (CorruptError, FormatError):
                raise ProfileError(f"{note} is damaged: give another folder") from None
            for name in sorted(set(found) | set(wanted)):
                if found.get(name) != wanted.get(name):
                    what = (
                        "other documents"
                        if name == "documents"
                        else f"{name}={found.get(name)!r}, not {wanted.get(name)!r}"
                    )
                    raise ProfileError(
                        f"{folder} holds a fit with {what}: give the same or another folder"
                    )
        else:
            with replacing(note) as file:
                file.write(json.dumps(wanted).encode())

    def _path(self, layer: int) -> Path:
        """The file of a finished layer."""
        return self.folder / f"layer-{layer:03}.safetensors"

    def layer(self, layer: int) -> dict[str, NDArray[Any]] | None:
        """A finished layer, or None."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if not self._path(layer).exists():
            return None
        try:
            found: dict[str, NDArray[Any]] = load_file(self._path(layer))
            return found
        except (SafetensorError, OSError):
            return None  # it is made again

    def keep(self, layer: int, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Keep a finished layer."""
        from safetensors.numpy import save

        with replacing(self._path(layer)) as file:
            file.write(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))


def _fingerprint(snapshot: Snapshot) -> str:
    """All that layers are learned from: layout, RoPE, token ids and every number. The first layers'
    alone are the same for a model of which only later ones were trained on."""
    digest = hashlib.sha256(repr((snapshot.layout, snapshot.origin.rope)).encode())
    if snapshot.token_ids is not None:
        digest.update(snapshot.token_ids.data)
    digest.update(sha256_raw(snapshot).encode())
    return digest.hexdigest()[:16]
