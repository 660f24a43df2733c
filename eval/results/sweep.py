"""What a sweep stores: a row for each measurement, in Parquet files."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec


class SweepRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the rows of all kinds of sweeps have: which point it is, how it went, and where."""

    kind: ClassVar[str]
    """What the metadata of each file says under "kind"."""
    version: ClassVar[int] = 1
    """And under "version"; a file of rows that says nothing is of version 1."""

    id: str
    codec: str
    model: str
    dtype: str
    status: Literal["ok", "failed"]
    """A row that failed has no figures, only a reason."""
    reason: str | None = None
    date: str
    """When it was finished, UTC."""
    seconds: float
    """That the whole measurement took, getting what it is made on included."""
    cpu: str
    cores: int
    memory_gib: float
    process: str
    """Host and process id."""
    versions: str
    """JSON: of kvzip, Python and the packages that take part."""


class Row(SweepRow, frozen=True, kw_only=True):
    """A codec on a cache: the point, what was found, and what it was found with."""

    kind: ClassVar[str] = "sweep"

    text: str
    tokens: int
    document: int
    profile: str | None
    threads: int
    repeat: int
    raw_bytes: int | None = None
    encoded_bytes: int | None = None
    ratio: float | None = None
    bits_per_value: float | None = None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    encode_gbps: float | None = None
    decode_gbps: float | None = None


class TrafficRow(SweepRow, frozen=True, kw_only=True):
    """A trace replayed with one codec and one strategy: figures as those of
    :class:`kvzip.eval.results.traffic.FleetRow`, tiers together."""

    kind: ClassVar[str] = "traffic-sweep"

    trace: str
    spread: bool
    strategy: str
    policy: str
    decode: str
    prices: str
    tiers: str
    capacity_blocks: float | None
    gpus: int
    ratio: float | None
    hit_rate: float | None = None
    loaded_share: float | None = None
    ttft_mean: float | None = None
    ttft_p50: float | None = None
    ttft_p99: float | None = None
    gpu_seconds: float | None = None
    gpu_use: float | None = None
    decode_core_seconds: float | None = None
    encode_core_seconds: float | None = None
    pcie_bytes: float | None = None
    read_bytes: float | None = None
    written_bytes: float | None = None
    gpu_usd: float | None = None
    store_usd: float | None = None
    usd: float | None = None


FORMS: dict[str, type[SweepRow]] = {form.kind: form for form in (Row, TrafficRow)}
"""The rows of each kind of sweep, by what their files say."""
