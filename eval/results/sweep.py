"""What a sweep stores: a row for each measurement, in Parquet files."""

from __future__ import annotations

from typing import Literal

import msgspec

KIND, VERSION = "sweep", 1
"""What the metadata of each file says under "kind" and "version"; a file of rows that says nothing
is of version 1."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement: the point, what was found, and what it was found with."""

    id: str
    codec: str
    model: str
    text: str
    tokens: int
    document: int
    dtype: str
    profile: str | None
    threads: int
    repeat: int
    status: Literal["ok", "failed"]
    """A row that failed has no figures, only a reason."""
    reason: str | None = None
    raw_bytes: int | None = None
    encoded_bytes: int | None = None
    ratio: float | None = None
    bits_per_value: float | None = None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    encode_gbps: float | None = None
    decode_gbps: float | None = None
    date: str
    """When it was finished, UTC."""
    seconds: float
    """That the whole measurement took, getting the cache included."""
    cpu: str
    cores: int
    memory_gib: float
    process: str
    """Host and process id."""
    versions: str
    """JSON: of kvzip, Python and the packages that take part."""
