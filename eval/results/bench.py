"""What `kvzip bench` finds: kvzip's codecs beside memcpy and other compressors.

Plain values only, so that it goes to JSON and back unchanged. GB = 10^9 bytes of raw numbers.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result, above_zero

Kind = Literal["memcpy", "kvzip", "peer"]
Order = Literal["token", "channel"]
"""Which numbers lie side by side: those of a token, or those of a channel."""


class SnapshotIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """The snapshot that was measured; its figures are of all layers together."""

    file: str
    model: str
    revision: str
    text: str
    """Name of the text and the range of its tokens."""
    dtype: str
    tokens: int
    layers: int
    numbers: int
    raw_bytes: int
    sha256_raw: str


class BenchRow(msgspec.Struct, frozen=True, kw_only=True):
    """One codec on one snapshot."""

    file: str
    """The snapshot's."""
    kind: Kind
    """A row of kvzip is a whole file with header, index and checksums; a peer's is bare blocks."""
    name: str
    setting: str
    """The settings in the peer's own words; for kvzip, what :func:`kvzip.get_codec` takes."""
    order: Order
    """How the numbers lay in what the codec was given."""
    encoded_bytes: int
    ratio: float
    bits_per_value: float
    encode_gbps: float
    """The fastest repeat counts, here and in the next."""
    decode_gbps: float
    encode_median_gbps: float
    decode_median_gbps: float
    encode_of_memcpy: float
    """The fastest repeat over the fastest memcpy of the same run; so is the next."""
    decode_of_memcpy: float
    exact: bool
    """Every byte came back as it was."""

    @property
    def title(self) -> str:
        """The name with ours told apart from those of peers."""
        return f"kvzip {self.name}" if self.kind == "kvzip" else self.name


class MissingPeer(msgspec.Struct, frozen=True):
    """A peer that gave no row."""

    name: str
    reason: str
    file: str | None = None
    """The snapshot that it failed on; None: it could not be used at all."""


class BenchResult(Result, frozen=True, kw_only=True, tag="bench"):
    """One run of the benchmark. `versions` names every package that gave a row."""

    writer = "kvzip bench"

    threads: int
    repeat: int
    snapshots: list[SnapshotIdentity]
    rows: list[BenchRow]
    missing: list[MissingPeer]

    @property
    def exact(self) -> bool:
        return all(row.exact for row in self.rows)

    def by_snapshot(self) -> list[tuple[SnapshotIdentity, list[BenchRow]]]:
        """Each snapshot that has rows, with them, the greatest ratio first."""
        found = []
        for snapshot in self.snapshots:
            rows = [row for row in self.rows if row.file == snapshot.file]
            if rows:
                found.append((snapshot, sorted(rows, key=lambda row: -row.ratio)))
        return found

    def check(self) -> None:
        if not self.rows:
            raise KVZipError("there is no row in it")
        known = {snapshot.file for snapshot in self.snapshots}
        for row in self.rows:
            for field in ("ratio", "encode_gbps", "decode_gbps"):
                above_zero(f"{row.title}: {field}", getattr(row, field))
            if row.file not in known:
                raise KVZipError(f"{row.title} is of {row.file}, which is none of the snapshots")
