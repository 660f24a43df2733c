"""From one reader to a thousand million: what a fleet pays, moves and computes in each way of
having documents' caches.

Documents have a skewed popularity (Zipf), readers are spread evenly over regions, and a region's
cache nodes share the documents among them, each keeping what was read last (LRU). Small fleets are
simulated, event by event, with SimPy; large ones are a closed form; where both can be had they
agree (tests/eval/money/test_fleet.py). What comes out of either is a count of reads, writes and
misses, and :func:`bill` turns that into dollars, bytes and seconds. All of it is a model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip.choice.cost import (
    HOUR,
    MONTH_HOURS,
    CodecFigures,
    device_cost,
    load_cost,
    number,
)
from kvzip.errors import CorruptError, FormatError, KVZipError, extra_told
from kvzip.eval.traffic.eviction import Lru
from kvzip.parsing import from_toml
from kvzip.reading import contents

EXACT_RANKS = 1 << 12
"""Documents of the highest ranks that the closed form looks at one by one; the others in bins."""
_BINS = 512
SIMULATE_UP_TO = 20_000
"""Reads up to which :func:`count` simulates by itself."""
_MOST_EVENTS = 5_000_000
"""Reads and changes that can be simulated, and documents: each has a number in memory."""


class Fleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fleet to be billed: who reads which documents, the caches between, and what all costs."""

    readers: float
    reads_per_reader: float = 1.0
    hours: float = 24.0
    """In which the reads come, evenly."""
    documents: int = 1
    zipf: float = 1.0
    """The document of rank k is read in proportion to 1 / k^zipf; 0: all alike."""
    reads_per_write: float = math.inf
    """Reads of a document, all over the fleet, between two changes of it; a change makes its caches
    worthless."""
    regions: int = 1
    nodes_per_region: int = 1
    node_bytes: float = math.inf
    """What one node has room for, of encoded caches; 0: it keeps nothing, and every read is from
    the store."""
    node_bandwidth: float = math.inf
    """Bits per second of a node's link to the machines that compute."""

    raw_bytes: float
    """What one document's cache takes."""
    prefill_seconds: float
    """What one document takes on the device."""
    reuse_seconds: float = 0.0
    """What the device takes to go on from a loaded cache."""
    prefill_usd: float | None = None
    """A provider's price of one prefill; None: its seconds at the device's price."""
    cached_usd: float | None = None
    """A provider's price of one read from its cache: what readers are asked for, not a cost."""
    device_usd_per_hour: float
    egress: float
    """Dollars per GB from the publisher's store to another network."""
    internal: float = 0.0
    """Dollars per GB from the provider's store to its own regions."""
    storage: float = 0.0
    """Dollars per GB and month in the store."""
    node_storage: float = 0.0
    """The same in a node."""

    @property
    def reads(self) -> float:
        return self.readers * self.reads_per_reader

    def check(self) -> Fleet:
        """This fleet; KVZipError that names the first field that cannot be."""
        for name in ("readers", "reads_per_reader", "hours", "raw_bytes", "prefill_seconds"):
            number(name, getattr(self, name), zero=False)
        for name in ("reads_per_write", "node_bandwidth"):
            number(name, getattr(self, name), zero=False, infinite=True)
        number("node_bytes", self.node_bytes, infinite=True)
        for name in ("documents", "regions", "nodes_per_region"):
            if getattr(self, name) < 1:
                raise KVZipError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("zipf", "reuse_seconds", "egress", "internal", "storage", "node_storage"):
            number(name, getattr(self, name))
        number("device_usd_per_hour", self.device_usd_per_hour)
        for name in ("prefill_usd", "cached_usd"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name))
        return self

    def node_documents(self, ratio: float) -> float:
        """Caches that one node can keep."""
        if self.node_bytes == math.inf:
            return math.inf
        return math.floor(self.node_bytes * ratio / self.raw_bytes)


# --- how often ---------------------------------------------------------------------------------


class Counts(msgspec.Struct, frozen=True):
    """What happens in the fleet's hours."""

    method: Literal["simulation", "closed form"]
    reads: float
    writes: float
    """Versions of documents, the first included: each is one prefill and one upload."""
    hits: float
    """Reads that the region's node had the cache for."""
    link_use: float
    """Share of the time that a node's link is busy, mean over nodes."""
    wait_seconds: float | None
    """Mean time that a read waits for its node's link; None where the link cannot keep up."""

    @property
    def misses(self) -> float:
        return self.reads - self.hits

    @property
    def hit_rate(self) -> float:
        return self.hits / self.reads if self.reads else 0.0


def count(
    fleet: Fleet, ratio: float = 1.0, method: Literal["auto", "simulation", "closed form"] = "auto"
) -> Counts:
    """Reads, writes and hits of the fleet with caches of that ratio; "auto" simulates small
    fleets."""
    fleet.check()
    number("ratio", ratio, zero=False)
    if method == "auto":
        small = fleet.reads <= SIMULATE_UP_TO and fleet.documents <= _MOST_EVENTS
        method = "simulation" if small else "closed form"
    return simulate(fleet, ratio) if method == "simulation" else closed_form(fleet, ratio)


def popularity(documents: int, zipf: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """(share of all reads of one document, documents like it), by rank.

    The first EXACT_RANKS one by one, the others in bins of even width on a logarithmic scale, whose
    share is the integral of the law over the bin.
    """
    exact = np.arange(1, min(documents, EXACT_RANKS) + 1, dtype=float)
    weight, alike = exact**-zipf, np.ones_like(exact)
    if documents > EXACT_RANKS:
        edges = np.unique(np.round(np.geomspace(EXACT_RANKS, documents, _BINS + 1)))
        low, high = edges[:-1] + 0.5, edges[1:] + 0.5
        # The integral of x^-zipf, in a form that does not cancel where zipf is nearly 1.
        width = np.log(high / low)
        bent = np.expm1((1 - zipf) * width) / (1 - zipf) if zipf != 1 else width
        total = low ** (1 - zipf) * bent
        weight = np.concatenate([weight, total / (high - low)])
        alike = np.concatenate([alike, high - low])
    return weight / (weight * alike).sum(), alike


def closed_form(fleet: Fleet, ratio: float = 1.0) -> Counts:
    """Counts by Che's approximation (Che, Tung, Wang 2002), with changes and a cold start.

    In an LRU cache a document stays until as many others as fit have been read since: for the
    characteristic time T, the same for all. With reads at rate l and changes at rate m, both
    Poisson, and q = l + m, a read at time t hits if the document's last event was a read within
    min(T, t): probability ``l / q * (1 - exp(-q min(T, t)))``. T is where the documents that are in
    the cache, ``sum of l / q * (1 - exp(-q T))``, are as many as fit. Integrated over the hours H,
    with c = min(T, H): ``hits = l^2 / q * (c - (1 - exp(-q c)) / q + (H - c) * (1 - exp(-q c)))``.

    A link serves one read at a time, in the time that its bytes take: M/D/1, mean wait
    ``use * service / (2 * (1 - use))`` (Pollaczek-Khinchine).
    """
    fleet.check()
    share, alike = popularity(fleet.documents, fleet.zipf)
    share, alike = share[share > 0], alike[share > 0]  # a steep law's last ones round to nothing
    seconds = fleet.hours * HOUR
    reads = fleet.reads * share / fleet.regions / seconds  # of one document in one region
    changes = fleet.reads * share / fleet.reads_per_write / seconds
    both = reads + changes
    room = fleet.node_documents(ratio) * fleet.nodes_per_region
    time = _characteristic_time(reads, both, alike, room)
    c = min(time, seconds)
    stays = -np.expm1(-both * c)
    hits = reads**2 / both * (c - stays / both + (seconds - c) * stays)
    use, service = _link(fleet, ratio)
    wait = use * service / (2 * (1 - use)) if use < 1 else None
    return Counts(
        "closed form",
        fleet.reads,
        fleet.documents + fleet.reads / fleet.reads_per_write,
        float((hits * alike).sum() * fleet.regions),
        use,
        wait,
    )


def _characteristic_time(
    reads: NDArray[Any], both: NDArray[Any], alike: NDArray[Any], room: float
) -> float:
    """Seconds that a document stays without being read; infinite where all fit."""
    if room >= (reads / both * alike).sum():
        return math.inf
    if room < 1:
        return 0.0

    def held(time: float) -> float:
        return float((reads / both * -np.expm1(-both * time) * alike).sum())

    low, high = 0.0, 1.0 / float((reads * alike).sum())
    while held(high) < room:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if held(middle) < room else (low, middle)
    return high


def _link(fleet: Fleet, ratio: float) -> tuple[float, float]:
    """Share of the time that a node's link is busy, and seconds of one read on it."""
    service = fleet.raw_bytes / ratio * 8 / fleet.node_bandwidth
    rate = fleet.reads / (fleet.regions * fleet.nodes_per_region) / (fleet.hours * HOUR)
    return rate * service, service


class _Node(NamedTuple):
    """One cache node: its link, and the documents that it has."""

    link: Any
    documents: Lru


class _Events(NamedTuple):
    """The reads and changes of one run, in the order in which they come."""

    read_times: NDArray[np.float64]
    """Seconds from the beginning, [reads]."""
    read_of: NDArray[np.intp]
    """Which document each reads, by its rank."""
    regions: NDArray[np.int64]
    """Where each reads it."""
    change_times: NDArray[np.float64]
    """[changes]"""
    change_of: NDArray[np.intp]

    @classmethod
    def drawn(cls, fleet: Fleet, seed: int) -> _Events:
        """Those of a fleet, at random: as many reads as it has, evenly spread, which is a Poisson
        process that is known to have had them."""
        rng = np.random.default_rng(seed)
        weight = np.arange(1, fleet.documents + 1, dtype=float) ** -fleet.zipf
        below = np.cumsum(weight / weight.sum())
        reads = max(round(fleet.reads), 1)
        changes = rng.poisson(fleet.reads / fleet.reads_per_write)
        seconds = fleet.hours * HOUR
        read_times, change_times = (np.sort(rng.uniform(0, seconds, n)) for n in (reads, changes))
        read_of, change_of = (np.searchsorted(below, rng.random(n)) for n in (reads, changes))
        regions = rng.integers(fleet.regions, size=reads)
        return cls(read_times, read_of, regions, change_times, change_of)


def simulate(fleet: Fleet, ratio: float = 1.0, seed: int = 0) -> Counts:
    """Counts of one run of the fleet, read by read. Raises KVZipError for more than five million
    reads, or documents: their closed form is as good."""
    with extra_told("a simulation needs SimPy", "eval"):
        import simpy
    fleet.check()
    if fleet.reads * (1 + 1 / fleet.reads_per_write) > _MOST_EVENTS:
        raise KVZipError(
            f"{fleet.reads:,.0f} reads are too many to simulate (at most {_MOST_EVENTS:,}); use "
            "the closed form"
        )
    if fleet.documents > _MOST_EVENTS:
        raise KVZipError(
            f"{fleet.documents:,} documents are too many to simulate (at most {_MOST_EVENTS:,}); "
            "use the closed form"
        )
    events = _Events.drawn(fleet, seed)
    reads = len(events.read_times)
    environment = simpy.Environment()
    room = fleet.node_documents(ratio)
    _, service = _link(fleet, ratio)
    nodes = [
        [_Node(simpy.Resource(environment), Lru(room)) for _ in range(fleet.nodes_per_region)]
        for _ in range(fleet.regions)
    ]
    hits, waited = 0, 0.0

    def read(node: _Node, which: int) -> Iterator[Any]:
        nonlocal hits, waited
        hits += node.documents.touch(which)
        if service > 0:
            asked = environment.now
            with node.link.request() as turn:
                yield turn
                waited += environment.now - asked
                yield environment.timeout(service)

    def readers() -> Iterator[Any]:
        for time, region, which in zip(
            events.read_times, events.regions, events.read_of, strict=True
        ):
            yield environment.timeout(float(time) - environment.now)
            environment.process(read(nodes[region][which % fleet.nodes_per_region], int(which)))

    def writers() -> Iterator[Any]:
        for time, which in zip(events.change_times, events.change_of, strict=True):
            yield environment.timeout(float(time) - environment.now)
            for region in nodes:
                region[which % fleet.nodes_per_region].documents.forget(int(which))

    environment.process(readers())
    environment.process(writers())
    environment.run()
    links = fleet.regions * fleet.nodes_per_region
    return Counts(
        "simulation",
        reads,
        fleet.documents + len(events.change_times),
        hits,
        reads * service / links / (fleet.hours * HOUR),
        waited / reads,
    )


# --- what it costs -----------------------------------------------------------------------------

Way = Literal["prefill", "egress", "provider", "nodes-only"]
WAYS: dict[Way, str] = {
    "prefill": "every reader prefills",
    "egress": "the publisher's store sends caches to the readers' regions, and pays egress for it",
    "provider": "caches stay in the provider's network, beside its machines",
    "nodes-only": "the provider's nodes keep what fits; what they lack is prefilled again",
}


class Bill(msgspec.Struct, frozen=True):
    """One way of having the caches, with one codec, for all of the fleet's hours."""

    way: Way
    codec: str
    """"" for "prefill", where nothing is encoded."""
    dollars: float
    """Compute, bytes and storage."""
    compute_usd: float
    network_usd: float
    storage_usd: float
    device_seconds: float
    """What prefills and going on from caches take of the device."""
    decode_seconds: float
    encode_seconds: float
    """What decoding and encoding take of one thread; charged as the device's time, which waits for
    it."""
    store_bytes: float
    """From the store to regions: what misses."""
    node_bytes: float
    """From nodes to the machines that compute: every read."""
    hit_rate: float
    readers_pay_usd: float | None
    """At the provider's price of reading from its cache; None where there is none."""


def bill(fleet: Fleet, counts: Counts, way: Way, codec: CodecFigures | None = None) -> Bill:
    """Dollars, bytes and seconds of one way.

    A prefill costs its price, or its seconds on the device; every other second is the device's. A
    write is one prefill and one encoding, then the store keeps the newest version of each document
    for all hours, and the codec's profile, which each node fetches once. Nodes are paid for what
    they have room for, or, if that is less, for every document's cache in every region.
    Raises KVZipError for a way but "prefill" without a codec ("raw" is one).
    """
    once = (
        device_cost(fleet.prefill_seconds, fleet.device_usd_per_hour)
        if fleet.prefill_usd is None
        else fleet.prefill_usd
    )
    if way == "prefill":
        dollars = counts.reads * once
        seconds = counts.reads * fleet.prefill_seconds
        return Bill(
            "prefill", "", dollars, dollars, 0.0, 0.0, seconds, 0.0, 0.0, 0.0, 0.0, 0.0, None
        )
    if codec is None:
        raise KVZipError(f"way {way!r} needs a codec; raw is one")
    encoded = fleet.raw_bytes / number(f"{codec.name}: ratio", codec.ratio, zero=False)
    rate = number(f"{codec.name}: decode rate", codec.decode_rate, zero=False, infinite=True)
    encoder = number(f"{codec.name}: encode rate", codec.encode_rate, zero=False, infinite=True)
    decode = counts.reads * fleet.raw_bytes / rate
    reuse = counts.reads * fleet.reuse_seconds
    prefills = counts.misses if way == "nodes-only" else counts.writes
    encode = prefills * fleet.raw_bytes / encoder
    compute = prefills * once + device_cost(reuse + decode + encode, fleet.device_usd_per_hour)
    nodes = fleet.regions * fleet.nodes_per_region
    profiles = nodes * codec.profile_bytes
    from_store = 0.0 if way == "nodes-only" else counts.misses * encoded + profiles
    network = load_cost(from_store, fleet.egress if way == "egress" else fleet.internal)
    stored = 0.0 if way == "nodes-only" else fleet.documents * encoded + codec.profile_bytes
    months = fleet.hours / MONTH_HOURS
    in_nodes = min(nodes * fleet.node_bytes, fleet.regions * fleet.documents * encoded + profiles)
    storage = load_cost(stored, fleet.storage * months)
    storage += load_cost(in_nodes, fleet.node_storage * months)
    asked = None
    if way != "egress" and fleet.cached_usd is not None:
        asked = counts.reads * fleet.cached_usd
    return Bill(
        way,
        codec.name,
        compute + network + storage,
        compute,
        network,
        storage,
        prefills * fleet.prefill_seconds + reuse,
        decode,
        encode,
        from_store,
        counts.reads * encoded,
        counts.hit_rate,
        asked,
    )


def bills(fleet: Fleet, codecs: list[CodecFigures]) -> list[tuple[Counts, Bill]]:
    """Every way with every codec, cheapest first; a better ratio lets more documents fit, into what
    a codec's profile leaves of a node."""
    if not codecs:
        raise KVZipError("a fleet needs at least one codec; raw is one")
    counts = {}
    for codec in codecs:
        left = max(fleet.node_bytes - codec.profile_bytes, 0.0)
        counts[codec.name] = count(msgspec.structs.replace(fleet, node_bytes=left), codec.ratio)
    any_counts = counts[codecs[0].name]
    found = [(any_counts, bill(fleet, any_counts, "prefill"))]
    found += [
        (counts[codec.name], bill(fleet, counts[codec.name], way, codec))
        for way in WAYS
        if way != "prefill"
        for codec in codecs
    ]
    return sorted(found, key=lambda pair: pair[1].dollars)


def changed(fleet: Fleet, path: str | os.PathLike[str]) -> Fleet:
    """The fleet with the fields of a TOML file. Raises KVZipError that names file and field."""
    try:
        fields = from_toml(contents(path))
        # TOML's inf is a float; whole numbers stand for floats.
        return msgspec.convert({**msgspec.structs.asdict(fleet), **fields}, Fleet).check()
    except OSError as error:
        raise KVZipError(f"fleet {path}: {error.strerror or error}") from None
    except (msgspec.ValidationError, CorruptError, FormatError) as error:
        allowed = ", ".join(Fleet.__struct_fields__)
        raise KVZipError(f"fleet {path}: {error}; its fields are: {allowed}") from None
    except KVZipError as error:
        raise KVZipError(f"fleet {path}: {error}") from None
