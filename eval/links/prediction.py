"""Time to first token over a link as `kvzip.choice.cost` predicts it, and where one way of having
the cache becomes faster than another. Nothing here measures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from kvzip.choice import cost
from kvzip.eval.results.links import PREFILL, Crossover, PredictionInputs


def predict(inputs: PredictionInputs, way: str, mbps: float, delay: float) -> float:
    """Seconds to the first token over a link, from :mod:`kvzip.choice.cost`.

    Decoding, the model's first step and the transfer of bytes share the processors: what they take
    of them together makes one stage beside the link, no faster than decoding or the step alone. Of
    it, what the last layers ask for, those that a model gets at once, cannot be hidden.
    """
    if way == PREFILL:
        return inputs.prefill
    codec = inputs.costs(way)
    raw = inputs.raw_bytes
    work = codec.decoding_work + inputs.step_work + codec.transfer_work(mbps, delay)
    rate = raw / max(work, codec.decoding, inputs.step)
    bandwidth = cost.goodput(mbps * 1e6)
    return cost.load_seconds(
        raw,
        codec.ratio,
        bandwidth,
        decode_rate=rate,
        latency=codec.opening + cost.first_bytes_seconds(2 * delay, bandwidth),
        fill=cost.pipeline_fill(raw, math.ceil(inputs.layers / inputs.together), rate),
    )


def crossovers(
    inputs: PredictionInputs,
    mbps: Sequence[float],
    delay: float,
    measured: Callable[[str, float], float],
) -> list[Crossover]:
    """Where the order of any two ways changes: by the formula at any bandwidth; by the clock on
    straight lines between the measured bandwidths, in the logarithms of time and bandwidth.

    `mbps`: the measured rates, the slowest first; `measured`: seconds of a way at one of them.
    """
    most_first = sorted(inputs.codecs, key=lambda codec: -codec.ratio)
    found = []
    for below, above in itertools.combinations([PREFILL, *(c.codec for c in most_first)], 2):
        formula = _crossing(lambda w, m: predict(inputs, w, m, delay), below, above, _fine(mbps))
        clock = _crossing(measured, below, above, mbps)
        if formula is not None or clock is not None:
            found.append(Crossover(delay, below, above, formula, clock))
    return found


def _fine(mbps: Sequence[float]) -> list[float]:
    """A thousand steps, even in the logarithm, from the first rate to the last."""
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
