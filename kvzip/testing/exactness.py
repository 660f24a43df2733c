"""Whether a cache comes back bit for bit, whatever it is a cache of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from kvzip import api
from kvzip.codec import codec_names, get_codec
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot


class Exactness(msgspec.Struct, frozen=True):
    """A cache that came back: by which codec, from how many bytes."""

    codec: str
    raw_bytes: int
    encoded_bytes: int

    @property
    def ratio(self) -> float:
        """How many bytes of the cache a byte of the file stands for."""
        return self.raw_bytes / self.encoded_bytes if self.encoded_bytes else 1.0


def assert_same(a: Snapshot, b: Snapshot) -> None:
    """Fail, and name layer, part and the first number, unless two snapshots have the same layout
    and bits; token ids are not looked at."""
    assert a.layout == b.layout, "the layouts differ"
    for i, (x, y) in enumerate(zip(a.layers, b.layers, strict=True)):
        for name in x.layout.parts:
            one, other = x.once(name), y.once(name)
            if not np.array_equal(one, other):
                at = tuple(int(axis) for axis in np.argwhere(one != other)[0])
                raise AssertionError(
                    f"layer {i} {name} differs: at {at} the bits are {int(one[at]):#x} and "
                    f"{int(other[at]):#x}"
                )


def assert_bit_exact(
    cache: Any,
    codecs: str | Sequence[str] | None = None,
    profile: Profile | str | os.PathLike[str] | None = None,
    token_ids: Any = None,
    model: Any = None,
    dtype: str | None = None,
) -> list[Exactness]:
    """Encode and decode a cache with each codec; fail unless all of it comes back bit for bit.

    `cache`: a Snapshot, the path of a snapshot file, a sequence of (K, V) arrays, one pair a layer,
    or a `Cache` of transformers, for which `token_ids` and `model` are as for
    :meth:`kvzip.Snapshot.from_cache`. `dtype`: what arrays of integers hold the bits of
    (:func:`kvzip.dtypes.as_bits`). `codecs`: names; None: all that are installed, of which those
    that need a profile (`predictive`) are left out where it is not the one given. `profile`: a
    Profile, or the path of one's file. Raises AssertionError, and KVZipError for what is no cache
    or no profile.
    """
    snapshot = _snapshot(cache, token_ids, model, dtype)
    if isinstance(profile, str | os.PathLike):
        profile = Profile.load(profile)
    if codecs is None:
        each = map(get_codec, codec_names())
        usable = [c for c in each if not c.needs_profile or (profile and c.uses(profile))]
        wanted = [codec.codec_id for codec in usable]
    else:
        wanted = [codecs] if isinstance(codecs, str) else list(codecs)
    found = []
    for codec in wanted:
        blob = api.encode(snapshot, codec, profile)
        decoded = api.decode(blob, profile)
        assert_same(snapshot, decoded)
        assert decoded == snapshot, "the token ids differ"
        found.append(Exactness(codec, snapshot.raw_bytes, len(blob)))
    return found


def _snapshot(cache: Any, token_ids: Any, model: Any, dtype: str | None) -> Snapshot:
    if isinstance(cache, Snapshot):
        return cache
    if isinstance(cache, str | os.PathLike):
        return Snapshot.load(cache)
    if isinstance(cache, Sequence):
        return Snapshot.from_arrays(cache, dtype, token_ids=token_ids)
    return Snapshot.from_cache(cache, token_ids, model)
