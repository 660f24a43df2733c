"""How small documents become with a profile that was learned from other documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

import kvzip
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot


class HeldOut(msgspec.Struct, frozen=True):
    """One document, encoded with the profile."""

    file: str
    raw_bytes: int
    encoded_bytes: int
    ratio: float
    bits_per_value: float
    tokens: int


def held_out_sizes(
    paths: Sequence[Path], profile: Profile, progress: Callable[[int], None]
) -> list[HeldOut]:
    """Encode snapshots with a profile, by the codec that it is for. `progress` is called with 1
    after each."""
    found = []
    for path in paths:
        snapshot = Snapshot.load(path)
        size = len(kvzip.encode(snapshot, profile.codec, profile))
        raw, numbers = snapshot.raw_bytes, snapshot.layout.numbers
        found.append(
            HeldOut(str(path), raw, size, raw / size, 8 * size / max(numbers, 1), snapshot.tokens)
        )
        progress(1)
    return found
