"""What is timed over a link and apart from it, and how the times of an ended run are kept."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kvzip import checksum
from kvzip.errors import KVZipError
from kvzip.eval.links import processes
from kvzip.eval.links.network import ADDRESSES
from kvzip.eval.links.sources import Sources
from kvzip.eval.results import stored
from kvzip.eval.results.links import PREFILL
from kvzip.eval.results.provenance import machine, versions
from kvzip.snapshot import Snapshot

LinkKind = tuple[float, float]
"""A link's delay in seconds, one way, and its rate in Mb/s."""


class Times:
    """Seconds by way, what was timed, and the link; None stands for what was timed apart from any
    link."""

    def __init__(self) -> None:
        self.by_key: defaultdict[tuple[str, str, LinkKind | None], list[float]] = defaultdict(list)

    def add(self, way: str, what: str, seconds: float, link: LinkKind | None = None) -> None:
        self.by_key[way, what, link].append(seconds)

    def add_with_work(
        self, way: str, what: str, answer: Mapping[str, Any], link: LinkKind | None = None
    ) -> None:
        """Add the time in an answer and, as "... work", what it took of the processors, over all
        cores."""
        self.add(way, what, answer["seconds"], link)
        self.add(way, f"{what} work", answer["processor"] / machine().cores, link)

    def of(self, way: str, what: str, link: LinkKind | None = None) -> list[float]:
        return self.by_key[way, what, link]

    def median(self, way: str, what: str, link: LinkKind | None = None) -> float:
        return statistics.median(self.of(way, what, link))


def time_once(
    sources: Sources,
    reader: processes.End,
    link: LinkKind,
    elsewhere: Callable[[], float],
) -> Times:
    """Time everything once, over the link and apart from it: what else the machine does then falls
    on both alike.

    `elsewhere`: processor seconds that all but the reader have used. Raises KVZipError when what
    was loaded is not what was encoded.
    """
    times = Times()
    times.add(PREFILL, "load", reader.ask(do="prefill")["seconds"], link)
    times.add_with_work(PREFILL, "step", reader.ask(do="step"))
    for codec, path in sources.files.items():
        here = str(path.absolute())
        url = f"http://{ADDRESSES['server']}:{processes.PORT}/{path.name}"
        times.add(codec, "load", load_exactly(reader, codec, url)["seconds"], link)
        times.add(codec, "opening", load_exactly(reader, codec, here)["opening"])
        times.add_with_work(codec, "decoding", reader.ask(do="layers", source=here))
        before = elsewhere()
        transfer = reader.ask(do="transfer", source=url)
        transfer["processor"] += elsewhere() - before
        times.add_with_work(codec, "transfer", transfer, link)
        times.add(codec, "layers", reader.ask(do="layers", source=url)["seconds"], link)
    return times


def load_exactly(reader: processes.End, codec: str, source: str) -> dict[str, Any]:
    """The reader's answer to a load. Raises KVZipError when it is not what was encoded."""
    found = reader.ask(do="load", source=source)
    if not found["exact"]:
        raise KVZipError(f"{codec}: what was loaded is not the cache that was encoded")
    return found


class SoFar(msgspec.Struct):
    """What a run has measured up to now, as it is kept in a file until all is."""

    conditions: dict[str, Any] = {}
    """What must be the same for it to go on."""
    times: list[tuple[str, str, LinkKind | None, list[float]]] = []
    """Way, what was timed, link and seconds: once for each time that everything was measured."""

    @staticmethod
    def load(path: Path | None, sources: Sources, snapshot: Snapshot) -> SoFar:
        """What an earlier call left in a file, if it did. Raises KVZipError when that was measured
        under other conditions."""
        here = machine()
        wanted = {
            "model": f"{sources.model} {snapshot.origin.revision}",
            "machine": f"{here.cpu}, {here.cores} cores",
            "versions": versions(),
            "files": {c: checksum.of_bytes(p.read_bytes()) for c, p in sources.files.items()},
        }
        if path is None or not path.exists():
            return SoFar(wanted)
        found = stored.read_json(path, SoFar)
        for name, value in wanted.items():
            if found.conditions.get(name) != value:
                raise KVZipError(
                    f"{path} is what a run with another {name} measured before it was ended: "
                    "remove it, or give another folder"
                )
        return found

    def add(self, times: Times) -> None:
        self.times += [(*key, taken) for key, taken in times.by_key.items()]

    def all_times(self) -> Times:
        found = Times()
        for way, what, link, taken in self.times:
            found.by_key[way, what, link] += taken
        return found
