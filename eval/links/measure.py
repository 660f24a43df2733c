"""Time to first token over a real link of limited rate, beside what `kvzip.choice.cost` predicts.

Two namespaces, a web server in one, the model in the other (`network.py`, `processes.py`). What the
prediction is made of is measured in the same run, apart from any load: the prefill, the model's
first step, each codec's decoding, and what the transfer of the bytes costs the processor. The link
itself goes into it by its nominal rate and delay.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec

from kvzip.choice import cost
from kvzip.errors import UsageError
from kvzip.eval.links import processes, timing
from kvzip.eval.links.network import ADDRESSES, Link
from kvzip.eval.links.prediction import crossovers, predict
from kvzip.eval.links.sources import Sources
from kvzip.eval.links.timing import SoFar, Times
from kvzip.eval.results import stored
from kvzip.eval.results.links import (
    PREFILL,
    CodecCosts,
    Crossover,
    Links,
    Point,
    PredictionInputs,
    TransferCost,
)
from kvzip.eval.results.provenance import PACKAGES, made_by
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot

_LONG = 30.0
"""Seconds of one link after which nothing is repeated."""

Progress = Callable[[str, int, int], None]


def checked(sweeps: Mapping[float, Sequence[float]]) -> dict[float, list[float]]:
    """Delays and rates as they are measured. Raises KVZipError for what is none."""
    found = {
        cost.number("delay", delay): sorted(cost.number("rate", m, zero=False) for m in rates)
        for delay, rates in sweeps.items()
    }
    if not any(found.values()):
        raise UsageError("links need at least one rate")
    return found


def measure(
    sources: Sources,
    sweeps: Mapping[float, Sequence[float]],
    *,
    repeat: int = 3,
    command: str = "kvzip eval links",
    progress: Progress = lambda what, done, total: None,
    keep: Path | None = None,
) -> Links:
    """Time every way over links of each delay (seconds, one way) and each of its rates (Mb/s),
    `repeat` times, the ways taking turns; fewer times where that takes more than half a minute, on
    slow links, whose times hardly vary. `keep`: a folder for what is measured until all is, so that
    the same call goes on where an earlier one was ended.

    Raises NoLinkError where the system has no such links, UsageError when there is nothing to
    measure, and KVZipError where something that was loaded differs from what was encoded.
    """
    sweeps, repeat = checked(sweeps), integer("repeat", repeat, 1, 10_000)
    snapshot = Snapshot.load(sources.snapshot)
    before = os.getloadavg()[0]
    file = None if keep is None else keep / "so-far.json"
    so_far = SoFar.load(file, sources, snapshot)
    control = _time_all(sources, sweeps, repeat, so_far, file, progress)
    times = so_far.all_times()
    if file is not None:
        file.unlink(missing_ok=True)
    inputs = _prediction_inputs(sources, snapshot, times)
    points = [
        _point(inputs, way, rate, delay, times)
        for delay, rates in sweeps.items()
        for rate in rates
        for way in (PREFILL, *sources.files)
    ]
    return Links(
        **made_by(command, (*PACKAGES, "obstore", "aiohttp")),
        model=sources.model,
        revision=snapshot.origin.revision,
        dtype=snapshot.dtype,
        text=snapshot.origin.text,
        tokens=snapshot.tokens,
        profile="" if sources.profile is None else Profile.load(sources.profile).id,
        server="aiohttp, static files over HTTP/1.1",
        congestion_control=control,
        repeat=repeat,
        load_average=(before, os.getloadavg()[0]),
        inputs=inputs,
        points=points,
        crossovers=_crossovers(inputs, sweeps, points),
        exact=True,
    )


def _time_all(
    sources: Sources,
    sweeps: Mapping[float, Sequence[float]],
    repeat: int,
    so_far: SoFar,
    file: Path | None,
    progress: Progress,
) -> str:
    """Add to `so_far` what is missing in it, and keep it in `file` meanwhile. The congestion
    control that the links had."""
    total, done = repeat * sum(map(len, sweeps.values())), 0
    for delay, rates in sweeps.items():
        with Link(delay) as link, _ends(link, sources) as (server, reader):
            elsewhere = partial(_used_elsewhere, link, server)
            for rate in rates:
                link.shape(rate * 1e6)
                began = time.monotonic()
                repeated = len(so_far.all_times().of(PREFILL, "load", (delay, rate)))
                for again in range(repeated, repeat):
                    progress("over links", done + again, total)
                    so_far.add(timing.time_once(sources, reader, (delay, rate), elsewhere))
                    if file is not None:
                        stored.save(so_far, file)
                    if time.monotonic() - began > _LONG:
                        break
                done += repeat
            progress("over links", done, total)
            control = link.congestion_control
    return control


@contextmanager
def _ends(link: Link, sources: Sources) -> Iterator[tuple[processes.End, processes.End]]:
    """The server and the reader of a link, both up."""
    snapshot = Snapshot.load(sources.snapshot)
    folder = next(iter(sources.files.values())).parent.absolute()
    serve = processes.serving(folder, ADDRESSES["server"])
    read = processes.reading(
        sources.model, snapshot.dtype, sources.snapshot.absolute(), sources.profile
    )
    with (
        processes.End(link.command("server", serve)) as server,
        processes.End(link.command("client", read)) as reader,
    ):
        server.answer()
        reader.answer()
        yield server, reader


def _used_elsewhere(link: Link, server: processes.End) -> float:
    """Processor seconds that all but the reader have used: the server, and the wire if there is
    one."""
    carried = 0.0 if link.wire is None else processes.processor_seconds(link.wire)
    return server.processor_seconds() + carried


# --- from times to a result ----------------------------------------------------------------------


def _prediction_inputs(sources: Sources, snapshot: Snapshot, times: Times) -> PredictionInputs:
    from kvzip.load.loaders import TOGETHER

    prefills = [
        seconds
        for (way, _, link), taken in times.by_key.items()
        if way == PREFILL and link is not None
        for seconds in taken
    ]
    return PredictionInputs(
        snapshot.raw_bytes,
        len(snapshot.layers),
        statistics.median(prefills),
        times.median(PREFILL, "step"),
        times.median(PREFILL, "step work"),
        TOGETHER,
        [
            _codec_costs(codec, path.stat().st_size, snapshot.raw_bytes, times)
            for codec, path in sources.files.items()
        ],
    )


def _codec_costs(codec: str, size: int, raw_bytes: int, times: Times) -> CodecCosts:
    return CodecCosts(
        codec,
        size,
        raw_bytes / size,
        times.median(codec, "opening"),
        times.median(codec, "decoding"),
        times.median(codec, "decoding work"),
        [
            TransferCost(link[1], link[0], statistics.median(taken))
            for (way, what, link), taken in times.by_key.items()
            if link is not None and (way, what) == (codec, "transfer work")
        ],
    )


def _point(inputs: PredictionInputs, way: str, mbps: float, delay: float, times: Times) -> Point:
    link = delay, mbps
    measured = tuple(times.of(way, "load", link))
    predicted = predict(inputs, way, mbps, delay)
    found = Point(way, mbps, delay, statistics.median(measured), measured, predicted)
    if way == PREFILL:
        return found
    transfer, layers = (times.median(way, what, link) for what in ("transfer", "layers"))
    overlap = layers / max(transfer, inputs.costs(way).decoding)
    return msgspec.structs.replace(found, transfer=transfer, layers=layers, overlap=overlap)


def _crossovers(
    inputs: PredictionInputs, sweeps: Mapping[float, Sequence[float]], points: Sequence[Point]
) -> list[Crossover]:
    """The crossovers of each sweep."""
    seconds = {(p.delay, p.way, p.mbps): p.seconds for p in points}
    found = []
    for delay, rates in sweeps.items():

        def clock(way: str, rate: float, delay: float = delay) -> float:
            return seconds[delay, way, rate]

        found += crossovers(inputs, rates, delay, clock)
    return found
