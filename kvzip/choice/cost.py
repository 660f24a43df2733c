"""What loading a KV cache costs, and computing it again: in dollars, and in time to first token.

These are two questions with two answers, and nothing here adds one to the other. The formulas are
pure functions of plain numbers in SI units: bytes, seconds, bits per second, FLOP, dollars; a GB
is 10^9 bytes, a Mtok 10^6 tokens. The evaluation and ``codec="auto"`` use the same ones.

A number that cannot be (negative, not a number, a ratio of zero) raises KVZipError with its name:
nonsense never becomes a verdict. A threshold that does not exist is None, with the reason why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from kvzip.errors import KVZipError

GB = 1e9
MTOK = 1e6
HOUR = 3600.0
MONTH_HOURS = 730.0
"""Hours of a month of storage, as providers bill it: 8,760 / 12."""
TERA = 1e12


def number(name: str, value: float, *, zero: bool = True, infinite: bool = False) -> float:
    """`value`, or KVZipError that names it: below zero, not a number, or a zero or infinity that
    makes no sense there."""
    if math.isnan(value) or value < 0 or (value == 0 and not zero):
        raise KVZipError(
            f"{name} is {value}; it must be {'zero or more' if zero else 'above zero'}"
        )
    if math.isinf(value) and not infinite:
        raise KVZipError(f"{name} is infinite")
    return value


class Threshold(msgspec.Struct, frozen=True):
    """Where a verdict turns: a value, or None and the reason why it never turns."""

    value: float | None
    reason: str = ""


# --- prefill ---------------------------------------------------------------------------------


class PrefillModel(msgspec.Struct, frozen=True):
    """Seconds of a prefill of L tokens: ``a * L + b * L**2``.

    Products with the weights grow with L, attention with L^2. A model: it is trusted at the
    lengths it was fitted to and is an estimate elsewhere.
    """

    a: float
    """Seconds per token."""
    b: float
    """Seconds per token squared."""

    def seconds(self, tokens: float) -> float:
        """Prefill time of so many tokens."""
        return float(self.each(number("tokens", tokens, zero=False)))

    def each(self, tokens: Any) -> Any:
        """Seconds of prefills of so many tokens, for one number of them or an array; of none, 0."""
        return self.a * tokens + self.b * tokens * tokens


class PrefillFit(msgspec.Struct, frozen=True):
    """A model of the prefill's time beside the points it was fitted to."""

    model: PrefillModel
    points: tuple[tuple[float, float], ...]
    """(tokens, seconds) as measured."""
    errors: tuple[float, ...]
    """(model - measured) / measured, for each point. Two points and two coefficients leave none:
    only a third length tells whether the model holds."""

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max(map(abs, self.errors))


def fit_prefill(points: Iterable[Sequence[float]]) -> PrefillFit:
    """The model through measured points (tokens, seconds), and how far it misses each.

    One length gives a straight line through zero, two the exact parabola, more the least squares
    of the relative error. Neither coefficient may be below zero, or long prompts would take
    negative time: where noise asks for that, it is set to zero and the other one fitted alone.
    Raises KVZipError for no points or points that are not above zero.
    """
    pairs = tuple(
        (number("tokens", n, zero=False), number("seconds", s, zero=False)) for n, s in points
    )
    if not pairs:
        raise KVZipError("a prefill model needs at least one measured point")
    model = _least_squares(pairs)
    return PrefillFit(model, pairs, tuple(model.seconds(n) / s - 1 for n, s in pairs))


def _least_squares(pairs: Sequence[tuple[float, float]]) -> PrefillModel:
    length, seconds = np.array(pairs, dtype=float).T
    # s = a L + b L^2, every row divided by its s: residuals are relative errors.
    columns = np.stack([length, length**2]) / seconds
    if len(set(length)) > 1:
        (a, b), *_ = np.linalg.lstsq(columns.T, np.ones(len(pairs)), rcond=None)
        if a >= 0 and b >= 0:
            return PrefillModel(float(a), float(b))
        alone = 0 if b < 0 else 1
    else:
        alone = 0
    only = float(columns[alone].sum() / (columns[alone] ** 2).sum())
    return PrefillModel(*((only, 0.0) if alone == 0 else (0.0, only)))


def prefill_flops(parameters: float, tokens: float, layers: int = 0, width: int = 0) -> float:
    """Operations of a prefill: ``2 * parameters * tokens + 2 * layers * width * tokens**2``.

    Two for each parameter and token; causal attention multiplies each query with half of the keys
    and values on average, `width` = query heads x head dimension (Kaplan et al. 2020, section 2.1).
    `layers` or `width` 0 leaves attention out. The input embedding is a lookup, so for a model
    with its own output matrix leave it out of `parameters`.
    """
    parameters = number("parameters", parameters, zero=False)
    tokens = number("tokens", tokens, zero=False)
    attention = number("layers", layers) * number("width", width)
    return 2 * parameters * tokens + 2 * attention * tokens * tokens


def prefill_at_peak(
    parameters: float, layers: int, width: int, flops_per_second: float
) -> PrefillModel:
    """The model of a device that does so many operations a second, from :func:`prefill_flops`."""
    speed = number("operations per second", flops_per_second, zero=False)
    once = prefill_flops(parameters, 1)
    both = prefill_flops(parameters, 1, layers, width)
    return PrefillModel(once / speed, (both - once) / speed)


# --- dollars ---------------------------------------------------------------------------------


def token_cost(tokens: float, usd_per_mtok: float) -> float:
    """Dollars of a prefill at a provider's price: ``tokens / 10^6 * price``."""
    return number("tokens", tokens) / MTOK * number("price of a million tokens", usd_per_mtok)


def device_cost(seconds: float, usd_per_hour: float) -> float:
    """Dollars of a device's time: ``seconds / 3600 * rent``."""
    return number("seconds", seconds) / HOUR * number("price of an hour", usd_per_hour)


def storage_share(usd_per_gb_month: float, hours: float, reads: float) -> float:
    """Dollars per GB that one read bears of storing it: ``price * hours / 730 / reads``.

    `reads`: how often a stored cache is loaded in the `hours` that it is kept.
    """
    month = number("storage price", usd_per_gb_month)
    kept = number("hours kept", hours)
    return month * kept / MONTH_HOURS / number("reads", reads, zero=False)


def load_cost(
    encoded_bytes: float, egress: float, decode_usd: float = 0.0, storage: float = 0.0
) -> float:
    """Dollars of one load: ``encoded GB * (egress price + storage) + the decoder's compute``.

    `egress` in dollars per GB; `storage` too, from :func:`storage_share`. Requests are not in it.
    """
    per_gb = number("egress price", egress) + number("storage per read", storage)
    moved = number("encoded bytes", encoded_bytes) / GB * per_gb
    return moved + number("decode cost", decode_usd)


def break_even_egress(
    prefill_usd: float,
    raw_bytes: float,
    ratio: float,
    decode_usd: float = 0.0,
    storage: float = 0.0,
) -> Threshold:
    """The egress price ($/GB) at which a load costs what the prefill costs:

    ``p* = (prefill - decode) * ratio / raw GB - storage``.

    Below it loading is cheaper. None where decoding, or storage, alone costs as much.
    """
    saved = number("prefill cost", prefill_usd) - number("decode cost", decode_usd)
    raw_gb = number("raw bytes", raw_bytes, zero=False) / GB
    ratio = number("ratio", ratio, zero=False)
    stored = number("storage per read", storage)
    if saved <= 0:
        return Threshold(None, "decoding alone costs as much as the prefill")
    if saved * ratio / raw_gb < stored:
        return Threshold(None, "decoding and storage alone cost as much as the prefill")
    return Threshold(saved * ratio / raw_gb - stored)


def break_even_ratio(
    prefill_usd: float,
    raw_bytes: float,
    egress: float,
    decode_usd: float = 0.0,
    storage: float = 0.0,
) -> Threshold:
    """The compression ratio at which a load costs what the prefill costs:

    ``ratio* = raw GB * (egress + storage) / (prefill - decode)``.

    Above it loading is cheaper; at 1 or less it is so without a codec. None as above.
    """
    saved = number("prefill cost", prefill_usd) - number("decode cost", decode_usd)
    raw_gb = number("raw bytes", raw_bytes, zero=False) / GB
    per_gb = number("egress price", egress) + number("storage per read", storage)
    if saved <= 0:
        return Threshold(None, "decoding alone costs as much as the prefill")
    return Threshold(raw_gb * per_gb / saved)


def break_even_reads(prefill_usd: float, load_usd: float, once_usd: float = 0.0) -> Threshold:
    """How many reads pay back what a cache costs before the first:

    ``reads* = once / (prefill - load)``.

    `once_usd`: the first prefill, encoding, upload, and storage for as long as it is kept
    (`load_usd` then bears none). None where a load costs as much as a prefill.
    """
    saved = number("prefill cost", prefill_usd) - number("load cost", load_usd)
    once = number("cost before the first read", once_usd)
    if saved <= 0:
        return Threshold(None, "a load costs as much as the prefill")
    return Threshold(once / saved)


# --- time to first token ---------------------------------------------------------------------


def load_seconds(
    raw_bytes: float,
    ratio: float,
    bandwidth: float,
    *,
    decode_rate: float = math.inf,
    upload_rate: float = math.inf,
    latency: float = 0.0,
    fill: float = 0.0,
) -> float:
    """Time to first token by loading, with transfer, decode and upload overlapped layer by layer:

    ``latency + fill + max(raw / ratio * 8 / bandwidth, raw / decode rate, raw / upload rate)``.

    `bandwidth` in bits per second; the rates in raw bytes per second, infinite where there is no
    such stage; `latency` in seconds, for the round trip and the first step; `fill` in seconds,
    what the overlap cannot hide: the last piece is still to be decoded when its last byte has come
    (:func:`pipeline_fill`).
    """
    raw = number("raw bytes", raw_bytes, zero=False)
    ratio = number("ratio", ratio, zero=False)
    link = raw / ratio * 8 / number("bandwidth", bandwidth, zero=False, infinite=True)
    return _fixed(latency, fill) + max(link, _slowest_stage(raw, decode_rate, upload_rate))


def pipeline_fill(raw_bytes: float, layers: int, decode_rate: float) -> float:
    """Seconds of decoding the last layer: ``raw / layers / decode rate``."""
    raw = number("raw bytes", raw_bytes, zero=False)
    rate = number("decode rate", decode_rate, zero=False, infinite=True)
    return raw / number("layers", layers, zero=False) / rate


def goodput(bandwidth: float, mtu: int = 1500) -> float:
    """Bits per second of content that TCP carries over Ethernet of so many nominal bits per second:
    ``bandwidth * (mtu - 52) / (mtu + 14)``.

    Of a packet 20 bytes are IP's header, 32 TCP's with timestamps (RFC 7323), and 14 of Ethernet
    come before it. Preamble and gap (20 bytes), which a real wire has too, are not counted.
    """
    bandwidth = number("bandwidth", bandwidth, zero=False, infinite=True)
    return bandwidth * (number("mtu", mtu) - 52) / (mtu + 14)


def first_bytes_seconds(
    round_trip: float, bandwidth: float, *, round_trips: float = 3.0, connections: int = 4
) -> float:
    """Seconds that a link's length costs a load: ``round_trip * (round_trips + log2(w + 1) - 1)``
    with ``w = bandwidth * round_trip / 8 / (connections * 14600)``, or no less than the first part.

    `round_trips` pass before the first byte of the first layer: to connect, to read the header and
    the index, and to ask for the layer. Then TCP's slow start: it sends 10 segments of 1,460 bytes
    on each connection (RFC 6928) and twice as many in each round trip, until the link is full;
    what it sends until then would have taken one round trip (Cardwell, Savage and Anderson,
    "Modeling TCP Latency", 2000, section 4, without loss). `round_trip` in seconds, `bandwidth` in
    bits per second.
    """
    trip = number("round trip", round_trip)
    rate = number("bandwidth", bandwidth, zero=False)
    lanes = number("connections", connections, zero=False)
    full = math.log2(rate * trip / 8 / (lanes * 14600) + 1)
    return trip * (number("round trips", round_trips) + max(0.0, full - 1))


def break_even_bandwidth(
    prefill_seconds: float,
    raw_bytes: float,
    ratio: float,
    *,
    decode_rate: float = math.inf,
    upload_rate: float = math.inf,
    latency: float = 0.0,
    fill: float = 0.0,
) -> Threshold:
    """The bandwidth (bits per second) at which loading takes as long as the prefill:

    ``raw / ratio * 8 / (prefill - latency - fill)``, from :func:`load_seconds`.

    A faster link makes loading faster. None where no link does, because decoding, uploading, or
    latency and fill alone take as long as the prefill.
    """
    prefill = number("prefill seconds", prefill_seconds, zero=False)
    raw = number("raw bytes", raw_bytes, zero=False)
    ratio = number("ratio", ratio, zero=False)
    left = prefill - _fixed(latency, fill)
    slowest = _slowest_stage(raw, decode_rate, upload_rate)
    if left <= 0:
        return Threshold(None, "latency and pipeline fill alone take as long as the prefill")
    if slowest >= left:
        stage = "decoding" if decode_rate <= upload_rate else "uploading"
        return Threshold(None, f"{stage} alone takes as long as the prefill")
    return Threshold(raw / ratio * 8 / left)


def beats_raw_bandwidth(
    raw_bytes: float, ratio: float, decode_rate: float, fill: float = 0.0
) -> float | None:
    """The bandwidth (bits per second) up to which a load with a codec is sooner than one of raw
    bytes that need no decoding:

    ``raw * 8 / max(raw / decode rate + fill, fill * ratio / (ratio - 1))``, from
    :func:`load_seconds`: what is saved on the link must be worth the fill, too. None for a codec
    that saves nothing; infinite where it decodes in no time.
    """
    raw = number("raw bytes", raw_bytes, zero=False)
    rate = number("decode rate", decode_rate, zero=False, infinite=True)
    fill = number("fill", fill)
    if number("ratio", ratio, zero=False) <= 1:
        return None
    least = max(raw / rate + fill, fill * ratio / (ratio - 1))
    return raw * 8 / least if least > 0 else math.inf


def break_even_tokens(
    prefill: PrefillModel, seconds_per_token: float, fixed_seconds: float = 0.0
) -> Threshold:
    """The context length from which on loading is faster than the prefill.

    Loading takes ``fixed + k * L``, the prefill ``a * L + b * L**2``; they meet at the positive
    root of ``b L^2 + (a - k) L - fixed = 0``. `seconds_per_token` k: the slowest stage's seconds
    for a token's bytes. None where the prefill grows no faster than the load at any length.
    """
    k = number("seconds per token", seconds_per_token, zero=False)
    fixed = number("fixed seconds", fixed_seconds)
    a, b = number("a", prefill.a) - k, number("b", prefill.b)
    if b == 0:
        if a <= 0:
            return Threshold(None, "a token loads no faster than it is computed")
        return Threshold(fixed / a)
    # Of the two forms of the root, the one that does not cancel; nor may 4 b fixed underflow.
    root = math.hypot(a, 2 * math.sqrt(b) * math.sqrt(fixed))
    return Threshold(2 * fixed / (a + root) if a > 0 else (root - a) / (2 * b))


class Split(msgspec.Struct, frozen=True):
    """The first layers computed while the last ones are loaded."""

    seconds: float
    layers_computed: int


def split_seconds(load: float, prefill: float, layers: int, *, fixed: float = 0.0) -> Split:
    """Time to first token when the first j layers are computed while the others are loaded:

    ``max(j / n * prefill, fixed + (n - j) / n * (load - fixed))``, at the best j of 0..n.

    `load`: seconds of a whole load, `fixed` of them latency and fill. Both sides are straight lines
    in j, so the best j is one of the two whole numbers around where they meet,
    ``n * load / (load - fixed + prefill)``; with many layers and nothing fixed that is
    ``1 / T = 1 / T_load + 1 / T_prefill``, as Cake (arXiv 2410.03065) does along the tokens. A
    model: layers are taken to cost alike, and link and processor not to disturb each other.
    """
    load = number("load seconds", load, zero=False)
    prefill = number("prefill seconds", prefill, zero=False)
    fixed = number("fixed seconds", fixed)
    n = int(number("layers", layers, zero=False))
    if fixed > load:
        raise KVZipError(f"fixed seconds are {fixed}, more than the {load} of the whole load")

    def seconds(j: int) -> float:
        return max(j / n * prefill, fixed + (n - j) / n * (load - fixed) if j < n else 0.0)

    meet = min(n * load / (load - fixed + prefill), n)
    best = min({math.floor(meet), math.ceil(meet), n}, key=seconds)
    return Split(seconds(best), best)


def _fixed(latency: float, fill: float) -> float:
    return number("latency", latency) + number("fill", fill)


def _slowest_stage(raw: float, decode_rate: float, upload_rate: float) -> float:
    decode = number("decode rate", decode_rate, zero=False, infinite=True)
    upload = number("upload rate", upload_rate, zero=False, infinite=True)
    return max(raw / decode, raw / upload)


# --- a choice --------------------------------------------------------------------------------


class CodecFigures(msgspec.Struct, frozen=True):
    """What was measured of one codec: the whole of what a choice needs to know of it."""

    name: str
    ratio: float
    decode_rate: float
    """Raw bytes per second."""
    profile_bytes: float = 0.0
    """Of the profile that it needs: in a store once for all documents of a model, and in the memory
    of whoever decodes."""
    encode_rate: float = math.inf
    """Raw bytes per second; infinite where encoding is not asked about."""


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """One cache to be had at one place, by computing or by loading."""

    raw_bytes: float
    layers: int
    bandwidth: float
    """Bits per second."""
    latency: float = 0.0
    upload_rate: float = math.inf
    """Raw bytes per second into the device's memory."""
    prefill_seconds: float | None = None
    """None: the cache cannot be computed here; only loads are compared."""
    prefill_usd: float | None = None
    egress: float = 0.0
    """Dollars per GB."""
    storage: float = 0.0
    """Dollars per GB and read (:func:`storage_share`)."""
    device_usd_per_hour: float = 0.0
    """What an hour of the device that decodes costs."""


class Option(msgspec.Struct, frozen=True):
    """One way to have the cache."""

    name: str
    """"prefill", or a codec's name; "raw" loads a file of bytes as they are, and checks them."""
    seconds: float | None
    """To the first token."""
    dollars: float | None


By = Literal["seconds", "dollars"]


def options(situation: Situation, codecs: Iterable[CodecFigures]) -> list[Option]:
    """Every way: the prefill where it is known, then a load with each codec, priced and timed.

    Raises KVZipError, naming the codec, for figures that cannot be, and when there is no way.
    """
    s = situation
    found = []
    if s.prefill_seconds is not None:
        number("prefill seconds", s.prefill_seconds, zero=False)
    if s.prefill_usd is not None:
        number("prefill cost", s.prefill_usd)
    if s.prefill_seconds is not None or s.prefill_usd is not None:
        found.append(Option("prefill", s.prefill_seconds, s.prefill_usd))
    for codec in codecs:
        ratio = number(f"{codec.name}: ratio", codec.ratio, zero=False)
        rate = number(f"{codec.name}: decode rate", codec.decode_rate, zero=False, infinite=True)
        seconds = load_seconds(
            s.raw_bytes,
            ratio,
            s.bandwidth,
            decode_rate=rate,
            upload_rate=s.upload_rate,
            latency=s.latency,
            fill=pipeline_fill(s.raw_bytes, s.layers, rate),
        )
        decode = device_cost(s.raw_bytes / rate, s.device_usd_per_hour)
        dollars = load_cost(s.raw_bytes / ratio, s.egress, decode, s.storage)
        found.append(Option(codec.name, seconds, dollars))
    if not found:
        raise KVZipError("there is nothing to choose from: no prefill and no codec")
    return found


def best(found: Sequence[Option], by: By) -> Option:
    """The option with the fewest `by`; of equals the first. Those without that figure are left
    out. Raises KVZipError when none has one."""
    able = [o for o in found if getattr(o, by) is not None]
    if not able:
        raise KVZipError(f"no option has {by}")
    return min(able, key=lambda option: float(getattr(option, by)))
