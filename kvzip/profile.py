"""A profile: what is learned once per model, and shared by writer and reader.

On disk it is one safetensors file: integer tensors, and under the metadata key ``kvprofile`` what
they are. Its identity is the SHA-256 of the file; a .kvz file names the one it needs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.errors import ProfileError
from kvzip.snapshot import Snapshot, replacing_file

VERSION = 1


class Profile:
    """Integer tensors by name, and a description as JSON values; never changed once made."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], description: Mapping[str, Any]):
        from safetensors.numpy import save

        self.tensors = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
        self.description = dict(description) | {"version": VERSION}
        note = json.dumps(self.description, sort_keys=True)
        self._file: bytes = save(self.tensors, {"kvprofile": note})
        self.made: dict[str, Any] = {}
        """What codecs have built from the tensors, by codec; a cache."""

    @cached_property
    def id(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self._file).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self._file)

    def __repr__(self) -> str:
        model = self.description.get("model") or "an unnamed model"
        return f"<Profile of {model}, {self.nbytes:,} bytes, {self.id[:12]}>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        with replacing_file(path) as file:
            file.write(self._file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile. Raises ProfileError when the file is none, or is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                note = (file.metadata() or {}).get("kvprofile")
                if note is None:
                    raise ValueError("it has no description of one")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            description = json.loads(note)
        except (SafetensorError, TypeError, ValueError) as error:
            raise ProfileError(f"{path} is not a whole profile: {error}") from None
        if not isinstance(description, dict) or description.get("version") != VERSION:
            raise ProfileError(f"{path} is not a profile of version {VERSION}")
        profile = cls(tensors, description)
        if profile._file != Path(path).read_bytes():
            raise ProfileError(f"{path} is not a profile as this library writes it")
        return profile

    @classmethod
    def fit(
        cls,
        snapshots: Iterable[Snapshot | str | os.PathLike[str]],
        progress: Callable[[str, int, int], None] | None = None,
        **settings: Any,
    ) -> Profile:
        """Learn a profile of one model from snapshots of its caches, or from their paths.

        One document is in memory at a time. `progress` is called with what is being done, how
        many documents are done and how many there are. `settings`: see
        :func:`kvzip.codecs.predictive.fit.fit`. Raises ProfileError when the snapshots are not of
        one model.
        """
        from kvzip.codecs.predictive.fit import fit

        return fit(list(snapshots), progress=progress, **settings)
