"""A trace replayed in time: requests wait for blocks, links and GPUs. docs/fleet.md has the model;
every queue is first come, first served."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip.choice.cost import pipeline_fill
from kvzip.errors import extra_told
from kvzip.eval.results.traffic import Strategy
from kvzip.eval.traffic.finding import Found, prompt_tokens
from kvzip.eval.traffic.fleet import CodecUse, Fleet
from kvzip.eval.traffic.trace import Trace

_HALVINGS = 24
"""Of the tokens among which the place is looked for where computing and loading meet."""
PCIE, DECODER = "pcie", "decoder"
"""The stages of a load that are not the link of a tier."""


class Work(msgspec.Struct, frozen=True):
    """What each request of a trace has to do, before anything waits.

    `tokens`, `found`: int64, [requests], of the prompt, and of these in found blocks. `stages`:
    seconds in each stage of a load of all found blocks, float64, [requests], by its name.
    `latency`, `fill`: seconds of such a load that no stage is busy for. `decode`: seconds that it
    takes of a GPU. `raw_bytes`: that it decodes.
    """

    tokens: NDArray[np.int64]
    found: NDArray[np.int64]
    stages: dict[str, NDArray[np.float64]]
    latency: NDArray[np.float64]
    fill: NDArray[np.float64]
    decode: NDArray[np.float64]
    raw_bytes: NDArray[np.float64]

    def load_seconds(self) -> NDArray[np.float64]:
        """Seconds of each request's load where nothing waits, [requests]."""
        longest = np.max([np.zeros(len(self.found)), *self.stages.values()], axis=0)
        return self.latency + self.fill + longest


class Outcome(msgspec.Struct, frozen=True):
    """What happened. `ttft`: seconds to each request's first token, [requests]; `loaded`: the
    share of its found tokens that was loaded, [requests]. `busy`: seconds of each stage's servers
    together."""

    ttft: NDArray[np.float64]
    loaded: NDArray[np.float64]
    gpu_seconds: float
    busy: dict[str, float]
    seconds: float
    """From the first request to the last first token."""


def work(trace: Trace, found: Found, fleet: Fleet, codec: CodecUse) -> Work:
    """What the requests of a trace have to do on a fleet that finds these blocks."""
    tokens = prompt_tokens(trace)
    per_tier = found.tokens * fleet.bytes_per_token  # raw bytes, [requests, tiers]
    stages: dict[str, NDArray[np.float64]] = {}
    latency = np.zeros(trace.requests)
    crossing = np.zeros(trace.requests)
    decoded = np.zeros(trace.requests)
    for k, tier in enumerate(fleet.tiers):
        raw = per_tier[:, k]
        if tier.name == "gpu":
            continue
        ratio = codec.ratio if tier.encoded else 1.0
        if tier.bandwidth < np.inf:
            stages[tier.name] = np.asarray(raw / ratio * 8 / tier.bandwidth, np.float64)
        latency = np.maximum(latency, np.where(raw > 0, tier.latency, 0.0))
        crossing += raw / ratio if codec.decoder == "device" else raw
        decoded += raw if tier.encoded and codec.decoder != "none" else 0.0
    stages[PCIE] = crossing * 8 / fleet.pcie
    on_device = codec.decoder == "device"
    rate = codec.decode_rate * (1 if on_device else fleet.cores)
    if not on_device:
        stages[DECODER] = decoded / rate
    nothing = np.zeros(trace.requests)
    fill = nothing if on_device else decoded * pipeline_fill(1.0, fleet.layers, rate)
    decode = decoded / rate if on_device else nothing
    return Work(tokens, found.tokens.sum(axis=1), stages, latency, fill, decode, decoded)


def simulate(
    trace: Trace, found: Found, fleet: Fleet, codec: CodecUse, strategy: Strategy
) -> Outcome:
    """Replay a trace. Raises KVZipError where SimPy is not installed."""
    with extra_told("a replay needs SimPy", "eval"):
        import simpy
    replay = _Replay(simpy.Environment(), trace, found, fleet, codec, strategy)
    replay.run()
    return Outcome(
        replay.ttft,
        replay.loaded,
        replay.gpus.busy,
        {name: stage.busy for name, stage in replay.stages.items()},
        replay.environment.now,
    )


def _reused(todo: Work) -> NDArray[np.int64]:
    """Tokens that need not be computed: those found, but one token is always computed."""
    return np.minimum(todo.found, todo.tokens - 1)


class _Servers:
    """So many alike servers, and when each will be free."""

    def __init__(self, count: int):
        self._free = [0.0] * count
        self.busy = 0.0

    def next_start(self, now: float) -> float:
        """When somebody who comes now is served."""
        return max(self._free[0], now)

    def take(self, now: float, seconds: float) -> float:
        """Be served for so long, as soon as a server is free; when that ends."""
        end = self.next_start(now) + seconds
        heapq.heapreplace(self._free, end)
        self.busy += seconds
        return end


class _Replay:
    """One replay: its clock, its queues, and what has happened so far."""

    def __init__(
        self,
        environment: Any,
        trace: Trace,
        found: Found,
        fleet: Fleet,
        codec: CodecUse,
        strategy: Strategy,
    ):
        self.environment = environment
        self.arrivals = trace.seconds.tolist()
        self.strategy = strategy
        self.waits = found.waits
        todo = work(trace, found, fleet, codec)
        self.prefill = fleet.prefill
        whole = fleet.prefill.each(todo.tokens)
        reused = _reused(todo)
        self.whole = whole.tolist()
        self.rest = (whole - fleet.prefill.each(reused)).tolist()
        self.reused = reused.tolist()
        self.decode = todo.decode.tolist()
        self.latency, self.fill = todo.latency.tolist(), todo.fill.tolist()
        self.seconds = {name: s.tolist() for name, s in todo.stages.items()}
        servers = {tier.name: tier.links for tier in fleet.tiers}
        self.stages = {name: _Servers(servers.get(name, fleet.gpus)) for name in todo.stages}
        self.gpus = _Servers(fleet.gpus)
        self.ttft = np.zeros(trace.requests)
        self.loaded = np.zeros(trace.requests)
        self.done = [environment.event() for _ in range(trace.requests)]

    def run(self) -> None:
        self.environment.process(self._arrive())
        self.environment.run()

    def _arrive(self) -> Iterator[Any]:
        for i, time in enumerate(self.arrivals):
            if time > self.environment.now:
                yield self.environment.timeout(time - self.environment.now)
            self.environment.process(self._request(i))

    def _request(self, i: int) -> Iterator[Any]:
        """One request, from its arrival to its first token."""
        stored = self.strategy != "recompute" and self.reused[i] > 0
        if stored:
            for earlier in self.waits[i]:
                if not self.done[earlier].processed:
                    yield self.done[earlier]
        now = self.environment.now
        if not stored or (self.strategy == "choose" and not self._loads(i, now)):
            end = self.gpus.take(now, self.whole[i])
        else:
            meanwhile = self._computed_meanwhile(i, now) if self.strategy == "overlap" else 0.0
            self.loaded[i] = 1 - meanwhile
            ready = self._load(i, now, 1 - meanwhile)
            if meanwhile > 0:  # the GPU is held from the moment at which it begins
                begins = self.gpus.next_start(now)
                ready = max(ready, begins + self._compute(i, meanwhile))
                end = self.gpus.take(
                    now, ready - begins + self.decode[i] * (1 - meanwhile) + self.rest[i]
                )
            else:
                yield self.environment.timeout(ready - now)
                now = self.environment.now
                end = self.gpus.take(now, self.decode[i] + self.rest[i])
        yield self.environment.timeout(end - self.environment.now)
        self.ttft[i] = end - self.arrivals[i]
        self.done[i].succeed()

    def _loads(self, i: int, now: float) -> bool:
        """Whether loading is expected to be done before a GPU that computes all."""
        ready = self._load_end(i, now, 1.0)
        load = self.gpus.next_start(ready) + self.decode[i] + self.rest[i]
        return load < self.gpus.next_start(now) + self.whole[i]

    def _load_end(self, i: int, now: float, share: float) -> float:
        """When a load of that share would be done, if it came now."""
        last = now
        for name, stage in self.stages.items():
            seconds = self.seconds[name][i] * share
            if seconds > 0:
                last = max(last, stage.next_start(now) + seconds)
        return last + self.latency[i] + self.fill[i] * share

    def _load(self, i: int, now: float, share: float) -> float:
        """Queue at every stage for a load of that share; when it is done."""
        end = self._load_end(i, now, share)
        for name, stage in self.stages.items():
            seconds = self.seconds[name][i] * share
            if seconds > 0:
                stage.take(now, seconds)
        return end

    def _compute(self, i: int, share: float) -> float:
        """Seconds in which a GPU computes the first of the found tokens, that share of them."""
        return float(self.prefill.each(share * self.reused[i]))

    def _computed_meanwhile(self, i: int, now: float) -> float:
        """The share of found tokens that a GPU computes until it meets the load of the others."""
        begins = self.gpus.next_start(now)

        def waits(share: float) -> bool:
            """Whether the GPU, with that share computed, would wait for the load."""
            return begins + self._compute(i, share) < self._load_end(i, now, 1 - share)

        if not waits(0.0):
            return 0.0
        return _last_where(waits)


def _last_where(holds: Callable[[float], bool]) -> float:
    """The end of the part of 0 to 1, from 0 on, where something holds."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high
