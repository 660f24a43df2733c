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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import get_codec
from kvzip.errors import CorruptError, FormatError, ProfileError, UsageError, told_as
from kvzip.files import replacing
from kvzip.options import callback, json_value, text
from kvzip.snapshot import Snapshot
from kvzip.tensors import TensorFile, check_header

VERSION = 1
_DTYPES = {
    f"{'I' if kind == 'i' else 'U'}{8 * size}": np.dtype(f"<{kind}{size}")
    for kind in "iu"
    for size in (1, 2, 4, 8)
}


def _checked(name: str, given: Any) -> NDArray[Any]:
    """A tensor as it is stored: little-endian and without gaps."""
    with told_as(UsageError, f"tensor {name!r} is no array of integers"):
        found = np.asarray(given)
    if found.dtype.kind not in "iu" or name == "__metadata__":
        raise UsageError(f"tensor {name!r} holds {found.dtype}, and a profile's are integers")
    return found.astype(found.dtype.newbyteorder("<"), order="C", copy=False)


class Profile:
    """Integer tensors by name, and a description as JSON values; never changed once made.

    Raises UsageError for what a file cannot hold.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], description: Mapping[str, Any]):
        from safetensors.numpy import save

        given: Any = tensors
        if not isinstance(given, Mapping):
            kind = type(given).__name__
            raise UsageError(
                f"the profile's tensors are a {kind}: they must be a mapping of arrays"
            )
        for name in tensors:
            text("a tensor's name", name)
        whole = {name: _checked(name, tensors[name]) for name in sorted(tensors)}
        about = json_value("the profile's description", description)
        if not isinstance(about, dict):
            raise UsageError(f"the profile's description is {description!r}: it must be a dict")
        note = json.dumps(about | {"version": VERSION}, sort_keys=True)
        self._adopt(save(whole, {"kvprofile": note}))

    def _adopt(self, file: bytes) -> None:
        """Tensors are looked at where they lie in the file: a profile is in memory once."""
        start = 8 + int.from_bytes(file[:8], "little")
        check_header("the profile", file[8:start])
        header = json.loads(file[8:start])
        self._file = file
        self.description: dict[str, Any] = json.loads(header.pop("__metadata__")["kvprofile"])
        self.tensors: dict[str, NDArray[Any]] = {
            name: np.frombuffer(
                file,
                _DTYPES[found["dtype"]],
                (found["data_offsets"][1] - found["data_offsets"][0])
                // _DTYPES[found["dtype"]].itemsize,
                start + found["data_offsets"][0],
            ).reshape(found["shape"])
            for name, found in sorted(header.items())
        }
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
        with replacing(path) as file:
            file.write(self._file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile. Raises ProfileError when the file is none, is damaged, or is of another
        version, UsageError for what is no path, and the OSError of the path."""
        profile = cls.__new__(cls)
        try:
            file = TensorFile(path)  # that it is one, and every tensor lies within it
            if "kvprofile" not in file.metadata:
                kind = "snapshot" if "kvzip" in file.metadata else "safetensors file"
                raise ProfileError(f"{path} is a {kind}, and no profile: kvzip fit makes one")
            for name, entry in file.entries.items():
                if not file.has(name, entry.dtype, entry.shape, _DTYPES[entry.dtype].itemsize):
                    raise ProfileError(f"{path} is not a whole profile: {name} has another size")
            profile._adopt(file.whole())
        except UsageError:
            raise
        except (CorruptError, FormatError, KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"{path} is not a whole profile: {error}") from None
        description = profile.description
        if not isinstance(description, dict) or description.get("version") != VERSION:
            raise ProfileError(f"{path} is not a profile of version {VERSION}")
        return profile

    @property
    def codec(self) -> str:
        """Name of the codec that it was learned for."""
        return str(self.description.get("codec"))

    @classmethod
    def fit(
        cls,
        snapshots: Iterable[Snapshot | str | os.PathLike[str]],
        progress: Callable[[str, int, int], None] | None = None,
        codec: str = "predictive",
        **settings: Any,
    ) -> Profile:
        """Learn a profile of one model from snapshots of its caches, or from their paths.

        One document is in memory at a time. `progress` is called with what is being done, how
        many documents are done and how many there are. `codec`: what it is for, "predictive" or
        "channel", which takes tables from it instead of making them for each document.
        `settings`: see :func:`kvzip.codecs.predictive.fit.fit`; "channel" has none. Raises
        ProfileError when the snapshots are not of one model, UnsupportedError for a codec that
        learns nothing.
        """
        callback("progress", progress)
        found: Profile = get_codec(codec).fit(list(snapshots), progress, **settings)
        return found


def check_profile(given: Any) -> None:
    """Raise ProfileError if what a caller gave as a profile is neither one nor None."""
    if given is not None and not isinstance(given, Profile):
        kind = type(given).__name__
        raise ProfileError(f"a {kind} is no Profile: Profile.load reads one from a file")
