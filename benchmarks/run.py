"""kvzip's codecs beside memcpy and the peers, on the same snapshots, in one process.

All take turns: each repeat runs every competitor once, so that a slow spell of the machine hits
all of them. A first, untimed turn warms up and proves that every byte comes back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvzip import dtypes
from kvzip.benchmarks.peer import Peer, Shape
from kvzip.codec import Codec
from kvzip.dtypes import Bits, DType
from kvzip.errors import KVZipError
from kvzip.eval.results.bench import (
    BenchResult,
    BenchRow,
    Kind,
    MissingPeer,
    Order,
    SnapshotIdentity,
)
from kvzip.eval.results.provenance import made_by
from kvzip.eval.speed.bench import (
    WholeFile,
    buffers,
    in_memory,
    memory_for,
    room,
    seconds,
)
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot, sha256_raw
from kvzip.workers import thread_count

PEER_NAMES = (
    "zstd",
    "lz4",
    "blosc2",
    "pcodec",
    "openzl",
    "zipnn",
    "bigsmall",
    "constriction",
)
"""The files under peers/."""

_PACKAGES = ("kvzip", "numpy", "zstandard", "lz4")

# --- competitors -----------------------------------------------------------------------------


class _Competitor(Protocol):
    """Something that encodes a whole snapshot and decodes it again; so does a `WholeFile`."""

    @property
    def encoded_bytes(self) -> int: ...
    def encode(self) -> None: ...
    def decode(self) -> None: ...
    def exact(self) -> bool:
        """Decode what was encoded last: does every bit come back?"""
        ...

    def forget(self) -> None:
        """Drop what was encoded: not all competitors' results fit into memory at a time."""


class _Units:
    """One part of a layer each, layer by layer, as rows of numbers without gaps."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._parts = [
            layer.block(name)
            for layer in snapshot.layers
            for name, part in layer.layout.parts.items()
            if part.numbers
        ]
        self._made: dict[Order, list[Bits]] = {}

    def __getitem__(self, order: Order) -> list[Bits]:
        if order not in self._made:
            self._made[order] = [_rows(part, order) for part in self._parts]
        return self._made[order]


def _rows(part: Bits, order: Order) -> Bits:
    """A block as [heads x tokens, dim], or [heads x dim, tokens]; a batch counts as more heads."""
    lying = part if order == "token" else np.moveaxis(part, -1, -2)
    return np.ascontiguousarray(lying).reshape(-1, lying.shape[-1])


class _Workers:
    """Threads that share work by taking every n-th piece; one worker needs no thread."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def __call__(self, work: Callable[[int], None]) -> None:
        """Run `work(0)` to `work(count - 1)` at the same time."""
        if self._pool is None:
            work(0)
        else:
            list(self._pool.map(work, range(self.count)))


class _Memcpy:
    """From memory into memory that has been written before."""

    def __init__(self, units: list[Bits], workers: _Workers) -> None:
        self._from, self._workers = units, workers
        self._to = [room(unit) for unit in units]
        self.encoded_bytes = sum(unit.nbytes for unit in units)

    def encode(self) -> None:
        def work(n: int) -> None:
            step = self._workers.count
            for source, target in zip(self._from[n::step], self._to[n::step], strict=True):
                np.copyto(target, source)

        self._workers(work)

    decode = encode

    def exact(self) -> bool:
        return all(map(np.array_equal, self._from, self._to))

    def forget(self) -> None:
        pass


class _Blocks:
    """A peer on units, without header, index or checksums of ours."""

    def __init__(self, peer: type[Peer], form: DType, units: list[Bits], workers: _Workers) -> None:
        self._units, self._workers = units, workers
        self._peers = [peer(form) for _ in range(workers.count)]
        self._data: list[Any] = [b""] * len(units)

    @property
    def encoded_bytes(self) -> int:
        return sum(map(len, self._data))

    def encode(self) -> None:
        def work(n: int) -> None:
            for i in range(n, len(self._units), self._workers.count):
                self._data[i] = self._peers[n].encode(self._units[i])

        self._workers(work)

    def decode(self) -> None:
        # What comes back is dropped at once, so the allocator gives the same memory again:
        # kept, it would cost page faults, half of the speed of the fastest peers.
        def work(n: int) -> None:
            for i in range(n, len(self._units), self._workers.count):
                self._peers[n].decode(self._data[i], _shape(self._units[i]))

        self._workers(work)

    def exact(self) -> bool:
        return all(
            np.array_equal(
                np.frombuffer(self._peers[0].decode(data, _shape(unit)), np.uint8),
                unit.view(np.uint8).reshape(-1),
            )
            for data, unit in zip(self._data, self._units, strict=True)
        )

    def forget(self) -> None:
        self._data = [b""] * len(self._units)


def _shape(unit: Bits) -> Shape:
    rows, columns = unit.shape
    return rows, columns


@dataclass
class _Entry:
    """A competitor under the name of its row, and its seconds turn by turn."""

    kind: Kind
    name: str
    setting: str
    order: Order
    competitor: _Competitor
    exact: bool = False
    encoded_bytes: int = 0
    encode_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        self.competitor.encode()
        self.encoded_bytes, self.exact = self.competitor.encoded_bytes, self.competitor.exact()
        self.competitor.forget()

    def turn(self) -> None:
        self.encode_seconds.append(seconds(self.competitor.encode))
        self.decode_seconds.append(seconds(self.competitor.decode))
        self.competitor.forget()

    def row(self, snapshot: SnapshotIdentity, memcpy: float) -> BenchRow:
        """The row; `memcpy`: seconds of the fastest."""
        raw = snapshot.raw_bytes
        encode, decode = self.encode_seconds, self.decode_seconds
        return BenchRow(
            file=snapshot.file,
            kind=self.kind,
            name=self.name,
            setting=self.setting,
            order=self.order,
            encoded_bytes=self.encoded_bytes,
            ratio=raw / self.encoded_bytes,
            bits_per_value=8 * self.encoded_bytes / snapshot.numbers,
            encode_gbps=raw / min(encode) / 1e9,
            decode_gbps=raw / min(decode) / 1e9,
            encode_median_gbps=raw / statistics.median(encode) / 1e9,
            decode_median_gbps=raw / statistics.median(decode) / 1e9,
            encode_of_memcpy=memcpy / min(encode),
            decode_of_memcpy=memcpy / min(decode),
            exact=self.exact,
        )


# --- one run ---------------------------------------------------------------------------------


def run(
    paths: Sequence[Path],
    codecs: Sequence[Codec],
    *,
    peers: bool = False,
    profile: Profile | None = None,
    threads: int = 1,
    repeat: int = 5,
    command: str = "",
    progress: Callable[[int], object] = lambda n: None,
) -> BenchResult:
    """Measure `codecs`, and with `peers` all that can be imported, on each snapshot.

    `profile` is for the codecs that need one and for the one that it was learned for; the others
    run without. `threads`: 0 for all cores.
    `progress` is called once for each turn of a snapshot; there are `repeat` + 1. Raises
    UsageError for a setting that makes no sense, and what :meth:`Snapshot.load` raises.
    """
    repeat = integer("repeat", repeat, 1, 10_000)
    threads = thread_count(threads)
    found, missing = _import_peers() if peers else ([], [])
    workers = _Workers(threads)
    snapshots, rows = [], []
    for path in paths:
        snapshot = in_memory(Snapshot.load(path))
        identity = _identity(path, snapshot)
        entries, failed = _enter(snapshot, codecs, found, profile, workers)
        for turn in range(repeat + 1):
            # What comes right after the biggest of all can be hit by its clean-up: turns rotate.
            for entry in entries[turn % len(entries) :] + entries[: turn % len(entries)]:
                with _catching(entry.name, failed if entry.kind == "peer" else None):
                    entry.turn() if turn else entry.warm_up()
            entries = [e for e in entries if e.name not in failed]
            progress(1)
        memcpy = min(entries[0].encode_seconds + entries[0].decode_seconds)
        snapshots.append(identity)
        rows += [entry.row(identity, memcpy) for entry in entries]
        missing += [MissingPeer(name, reason, str(path)) for name, reason in failed.items()]
    return BenchResult(
        **made_by(command, [*_PACKAGES, *dict.fromkeys(peer.package for peer in found)]),
        threads=threads,
        repeat=repeat,
        snapshots=snapshots,
        rows=rows,
        missing=missing,
    )


def _import_peers() -> tuple[list[type[Peer]], list[MissingPeer]]:
    found: list[type[Peer]] = []
    failed: dict[str, str] = {}
    for name in PEER_NAMES:
        with _catching(name, failed):
            found += import_module(f"kvzip.benchmarks.peers.{name}").PEERS
    return found, [MissingPeer(name, reason) for name, reason in failed.items()]


@contextmanager
def _catching(name: str, failed: dict[str, str] | None) -> Iterator[None]:
    """Whatever a peer raises is noted as its reason; with None, nothing is caught."""
    try:
        yield
    except BaseException as error:  # a panic in Rust is no Exception
        if failed is None or isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]


def _enter(
    snapshot: Snapshot,
    codecs: Sequence[Codec],
    peers: Sequence[type[Peer]],
    profile: Profile | None,
    workers: _Workers,
) -> tuple[list[_Entry], dict[str, str]]:
    """All competitors on a snapshot, memcpy first, and the peers that will not have it."""
    units, out, form = _Units(snapshot), buffers(snapshot), dtypes.get(snapshot.dtype)
    memcpy = _Memcpy(units["token"], workers)
    entries = [_Entry("memcpy", "memcpy", "memory to memory", "token", memcpy)]
    memory = memory_for(snapshot, codecs)
    for codec in codecs:
        of_it = profile is not None and profile.codec == codec.codec_id
        needed = profile if codec.needs_profile or of_it else None
        file = WholeFile(snapshot, codec, workers.count, out, needed, memory)
        spec = codec.spec
        entries.append(_Entry("kvzip", spec, spec, "token", file))
    failed: dict[str, str] = {}
    for peer in peers:
        with _catching(peer.name, failed):
            blocks = _Blocks(peer, form, units[peer.order], workers)
            entries.append(_Entry("peer", peer.name, peer.setting, peer.order, blocks))
    return entries, failed


def _identity(path: Path, snapshot: Snapshot) -> SnapshotIdentity:
    if not snapshot.raw_bytes:
        raise KVZipError(f"{path} holds no numbers")
    return SnapshotIdentity(
        file=str(path),
        model=snapshot.origin.model,
        revision=snapshot.origin.revision,
        text=snapshot.origin.text,
        dtype=snapshot.dtype,
        tokens=snapshot.tokens,
        layers=len(snapshot.layers),
        numbers=snapshot.layout.numbers,
        raw_bytes=snapshot.raw_bytes,
        sha256_raw=sha256_raw(snapshot),
    )
