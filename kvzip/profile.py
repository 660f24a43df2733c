"""A profile: what is learned once per model, and shared by writer and reader.

On disk it is one safetensors file: integer tensors, and under the metadata key ``kvprofile`` what
they are. Tensors that Zstandard makes smaller stand in the file as bytes (U8), and there it says
what they are (``"packed": {"name": ["I8", [3, 4]]}``). A profile's identity is the SHA-256 of the
file; a .kvz file names the one it needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kvzip.byte_coders import Zstd
from kvzip.codec import get_codec
from kvzip.errors import CorruptError, FormatError, ProfileError, UsageError, told_as
from kvzip.files import replacing
from kvzip.options import callback, items, json_value, text
from kvzip.parsing import from_json
from kvzip.snapshot import Snapshot
from kvzip.tensors import KvzGivenError, TensorFile, check_header
from kvzip.version import newer

VERSION, SIDE_BY_SIDE = 1, 2
"""What a profile's description has as its version: 2 where `predictive` has pairs of keys that are
side by side, which readers of 1 alone do not know."""
_DTYPES = {
    f"{'I' if kind == 'i' else 'U'}{8 * size}": np.dtype(f"<{kind}{size}")
    for kind in "iu"
    for size in (1, 2, 4, 8)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_CODER = Zstd(level=1)  # matrices of weights: higher levels take no byte more off them
_WORTH = 1024
"""Bytes that packing must save on a tensor."""
_MOST = 64
"""Bytes of numbers, at most, for each byte of a packed tensor: a small file takes little memory."""


def _checked(name: str, given: Any) -> NDArray[Any]:
    """A tensor as it is stored: little-endian and without gaps."""
    with told_as(UsageError, f"tensor {name!r} is no array of integers"):
        found = np.asarray(given)
    if found.dtype.kind not in "iu" or name == "__metadata__":
        raise UsageError(f"tensor {name!r} holds {found.dtype}, and a profile's are integers")
    return found.astype(found.dtype.newbyteorder("<"), order="C", copy=False)


def _pack(
    tensors: Mapping[str, NDArray[Any]],
) -> tuple[dict[str, NDArray[Any]], dict[str, list[Any]]]:
    """Tensors as a file stores them, and what the file says of those that are packed."""
    stored, packed = {}, {}
    for name, tensor in tensors.items():
        stored[name] = tensor
        if tensor.nbytes > _WORTH:
            data = _CODER.encode(np.frombuffer(tensor.tobytes(), np.uint8))
            if tensor.nbytes / _MOST <= len(data) <= tensor.nbytes - _WORTH:
                stored[name] = np.frombuffer(data, np.uint8)
                packed[name] = [_NAMES[tensor.dtype], list(tensor.shape)]
    return stored, packed


def _unpacked(name: str, data: memoryview, kind: str, shape: Sequence[int]) -> NDArray[Any]:
    """A packed tensor. Raises ValueError, KeyError or TypeError where it is not what it should be,
    and CorruptError where its bytes are not."""
    dtype = _DTYPES[kind]
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{name} has a shape of {shape}")
    size = math.prod(shape) * dtype.itemsize
    if size > _MOST * len(data):
        raise ValueError(f"{name} is packed in {len(data):,} bytes and says that it has {size:,}")
    found = _CODER.decode(data, size).view(dtype).reshape(tuple(shape))
    found.flags.writeable = False
    return found


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
        if "packed" in about:
            raise UsageError("the profile's description has 'packed', which is for the file's use")
        stored, packed = _pack(whole)
        if about.setdefault("version", VERSION) not in (VERSION, SIDE_BY_SIDE):
            raise UsageError(f"the profile's description has the version {about['version']!r}")
        about["packed"] = packed
        # Under one key: of several, the library does not keep the order.
        note = json.dumps(about, sort_keys=True)
        with told_as(UsageError, "the profile's bytes are more than a file takes"):
            file = save(stored, {"kvprofile": note})
        self._adopt(file)

    def _adopt(self, file: bytes) -> None:
        """Take the bytes of a file. Tensors that are not packed are looked at where they lie."""
        start = 8 + int.from_bytes(file[:8], "little")
        check_header("the profile", file[8:start])
        header = from_json(file[8:start])
        description = from_json(header.pop("__metadata__")["kvprofile"])
        packed = description.pop("packed", {}) if isinstance(description, dict) else None
        if not isinstance(packed, dict) or not packed.keys() <= header.keys():
            raise ValueError("it names packed tensors that it does not have")
        self._file = file
        self.description: dict[str, Any] = description
        self.tensors: dict[str, NDArray[Any]] = {}
        for name, entry in sorted(header.items()):
            begin, end = (start + at for at in entry["data_offsets"])
            if name in packed:
                found = _unpacked(name, memoryview(file)[begin:end], *packed[name])
            else:
                dtype = _DTYPES[entry["dtype"]]
                found = np.frombuffer(file, dtype, (end - begin) // dtype.itemsize, begin)
                found = found.reshape(entry["shape"])
            self.tensors[name] = found
        self.made: dict[str, Any] = {}
        """What codecs have built from the tensors, by codec; a cache."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as the file's bytes; what codecs have built of it is built anew."""
        return Profile._of_bytes, (self._file,)

    @classmethod
    def _of_bytes(cls, file: bytes) -> Profile:
        profile = cls.__new__(cls)
        profile._adopt(file)
        return profile

    @cached_property
    def id(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self._file).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self._file)

    @property
    def unpacked_bytes(self) -> int:
        """Bytes of the tensors in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

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
        return cls.of_file(path)

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], opened: IO[bytes] | None = None) -> Profile:
        """Read a profile as :meth:`load` does, from a file that is `opened`; errors call it by
        `path`."""
        try:
            file = TensorFile(path, file=opened)  # that it is one, and every tensor lies within it
            if "kvprofile" not in file.metadata:
                kind = "snapshot" if "kvzip" in file.metadata else "safetensors file"
                raise ProfileError(f"{path} is a {kind}, and no profile: kvzip fit makes one")
            for name, entry in file.entries.items():
                if not file.has(name, entry.dtype, entry.shape, _DTYPES[entry.dtype].itemsize):
                    raise ProfileError(f"{path} is not a whole profile: {name} has another size")
            profile = cls._of_bytes(file.whole())
        except UsageError:
            raise
        except KvzGivenError:
            words = f"{path} is a .kvz file, and no profile: kvzip fit makes one"
            raise ProfileError(words) from None
        except (CorruptError, FormatError, LookupError, TypeError, ValueError) as error:
            raise ProfileError(f"{path} is not a whole profile: {error}") from None
        description = profile.description
        found = description.get("version") if isinstance(description, dict) else None
        if type(found) is not int or found not in (VERSION, SIDE_BY_SIDE):
            if type(found) is int and found > SIDE_BY_SIDE:
                raise ProfileError(newer(f"{path} is a profile of version {found}"))
            raise ProfileError(f"{path} is not a profile of version {VERSION} or {SIDE_BY_SIDE}")
        return profile

    @property
    def file(self) -> bytes:
        """The bytes of the file."""
        return self._file

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
        ProfileError when the snapshots are not of one model, UsageError for a setting that there is
        not or that is of the wrong kind, UnsupportedError for a codec that learns nothing.
        """
        callback("progress", progress)
        given = items("snapshots", snapshots, "snapshots, or their paths")
        if isinstance(snapshots, (str, bytes)):
            raise UsageError(f"snapshots is {snapshots!r}: it must be a list of paths")
        found: Profile = get_codec(codec).fit(given, progress, **settings)
        return found


def check_profile(given: Any) -> None:
    """Raise ProfileError if what a caller gave as a profile is neither one nor None."""
    if given is not None and not isinstance(given, Profile):
        kind = type(given).__name__
        raise ProfileError(f"a {kind} is no Profile: Profile.load reads one from a file")
