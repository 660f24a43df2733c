"""What one run of the benchmark found: the file that `kvzip bench --out` writes.

Plain values only, so that it goes to JSON and back unchanged. GB = 10^9 bytes of raw numbers.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import msgspec

from kvzip.errors import KVZipError

Kind = Literal["memcpy", "kvzip", "peer"]
Order = Literal["token", "channel"]
"""Which numbers lie side by side: those of a token, or those of a channel."""


class Machine(msgspec.Struct, frozen=True):
    cpu: str
    cores: int
    """That this process may use."""
    memory_gib: float
    cache_mib: float
    """The largest cache that a core sees."""
    simd: list[str]
    """The vector extensions that the processor offers, as the system names them."""


class SnapshotIdentity(msgspec.Struct, frozen=True, kw_only=True):
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


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One codec on one snapshot."""

    file: str
    """Of the snapshot."""
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
    """Of the fastest repeat, as is the next."""
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


class Missing(msgspec.Struct, frozen=True):
    """A peer that gave no row."""

    name: str
    reason: str
    file: str | None = None
    """The snapshot that it failed on; None: it could not be used at all."""


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 1
    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    """Of kvzip, Python, and every package that gave a row."""
    threads: int
    repeat: int
    snapshots: list[SnapshotIdentity]
    rows: list[Row]
    missing: list[Missing]

    @property
    def exact(self) -> bool:
        return all(row.exact for row in self.rows)


def load(path: str | os.PathLike[str]) -> BenchResult:
    """A stored result. Raises KVZipError when it is none, or a figure in it cannot be."""
    try:
        result = msgspec.json.decode(Path(path).read_bytes(), type=BenchResult)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise KVZipError(f"{path} is not a result of kvzip bench: {error}") from None
    if result.version != 1:
        raise KVZipError(f"{path} is a result of version {result.version}; this reads version 1")
    if not result.rows:
        raise KVZipError(f"{path} has no rows")
    known = {snapshot.file for snapshot in result.snapshots}
    for row in result.rows:
        for field in ("ratio", "encode_gbps", "decode_gbps"):
            value = getattr(row, field)
            if not (math.isfinite(value) and value > 0):
                raise KVZipError(f"{path}: {row.name}: {field} is {value}; it must be above zero")
        if row.file not in known:
            raise KVZipError(f"{path}: {row.name} is of {row.file}, which is none of the snapshots")
    return result
