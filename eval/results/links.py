"""What `kvzip eval links` finds: times to first token over links of limited rate, and what the
formulas of :mod:`kvzip.choice.cost` make of costs that were measured apart from any load."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result, above_zero, not_below_zero

PREFILL = "prefill"
"""The way that brings no bytes; all others are codecs."""


class TransferCost(msgspec.Struct, frozen=True):
    """What bringing a file over one link takes of the processors, without decoding it."""

    mbps: float
    delay: float
    """Seconds, one way."""
    seconds: float
    """What both ends and the wire take together, over all cores; median. The slower the link, the
    fewer bytes come each time that somebody is woken for them."""


class CodecCosts(msgspec.Struct, frozen=True):
    """What one codec takes by itself: medians, in seconds."""

    codec: str
    encoded_bytes: int
    ratio: float
    opening: float
    """From the call to a cache of which nothing is decoded yet, from a local file."""
    decoding: float
    """All layers out of a local file, as a model gets them."""
    decoding_work: float
    """What `decoding` takes of the processors, over all cores."""
    transfers: list[TransferCost]

    def transfer_work(self, mbps: float, delay: float) -> float:
        """What bringing its bytes takes of the processors: between the rates that were measured, on
        straight lines over the logarithm of the rate."""
        here = sorted((math.log(t.mbps), t.seconds) for t in self.transfers if t.delay == delay)
        rates, seconds = zip(*here, strict=True)
        return float(np.interp(math.log(mbps), rates, seconds))


class PredictionInputs(msgspec.Struct, frozen=True):
    """What a prediction is made of, besides the link's nominal rate and delay. None of it was
    measured in a load."""

    raw_bytes: int
    layers: int
    prefill: float
    """Seconds, median."""
    step: float
    """Seconds to the first token from the cache in memory, not encoded; median."""
    step_work: float
    """What that takes of the processors, over all cores."""
    together: int
    """Layers that a model gets at once (:mod:`kvzip.load.loaders`)."""
    codecs: list[CodecCosts]

    def costs(self, codec: str) -> CodecCosts:
        """The costs of the codec that has this name."""
        return next(found for found in self.codecs if found.codec == codec)


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


class Crossover(msgspec.Struct, frozen=True):
    """The bandwidth where one way becomes faster than another, in Mb/s; None: nowhere within the
    sweep."""

    delay: float
    below: str
    """The way that is faster on slower links."""
    above: str
    """The way that is faster on faster links."""
    predicted: float | None
    measured: float | None


class Links(Result, frozen=True, kw_only=True, tag="links"):
    """What one run measured; the file that `kvzip eval links -o` writes."""

    writer = "kvzip eval links"

    version: int = 2
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
    inputs: PredictionInputs
    points: list[Point]
    crossovers: list[Crossover]
    exact: bool
    """Every load gave the cache's bytes and its first token."""

    @property
    def worst_error(self) -> float:
        return max(abs(point.error) for point in self.points)

    @property
    def worst_overlap(self) -> float:
        return max(p.overlap for p in self.points if p.overlap is not None)

    def check(self) -> None:
        if not self.inputs.codecs or all(point.overlap is None for point in self.points):
            raise KVZipError("there is no measured link in it")
        found = self.inputs
        for name in ("raw_bytes", "layers", "prefill", "step", "together"):
            above_zero(f"inputs: {name}", getattr(found, name))
        not_below_zero("inputs: step_work", found.step_work)
        for codec in found.codecs:
            _check_costs(codec)
        delays = {c.codec: {t.delay for t in c.transfers} for c in found.codecs}
        for point in self.points:
            what = f"{point.way} at {point.mbps:g} Mb/s"
            for name in ("mbps", "seconds", "predicted"):
                above_zero(f"{what}: {name}", getattr(point, name))
            for seconds in point.times:
                above_zero(f"{what}: times", seconds)
            if point.way != PREFILL and point.delay not in delays.get(point.way, ()):
                raise KVZipError(f"{what}: no transfer of {point.delay:g} s delay was measured")


def _check_costs(costs: CodecCosts) -> None:
    """Raise KVZipError that names the cost of a codec that cannot be."""
    for name in ("encoded_bytes", "ratio", "decoding"):
        above_zero(f"{costs.codec}: {name}", getattr(costs, name))
    for name in ("opening", "decoding_work"):
        not_below_zero(f"{costs.codec}: {name}", getattr(costs, name))
    for transfer in costs.transfers:
        above_zero(f"{costs.codec}: mbps of a transfer", transfer.mbps)
        not_below_zero(f"{costs.codec}: delay of a transfer", transfer.delay)
        not_below_zero(f"{costs.codec}: seconds of a transfer", transfer.seconds)
