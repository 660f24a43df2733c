"""`kvzip advise`: for one model, length, link and price base, whether to prefill or to load, raw or
with which codec; by how much, and how sure; and what a store has room for.

The choice is :func:`kvzip.choice.cost.best`, the one that ``codec="auto"`` makes. How sure: every
figure that the choice rests on is off by a factor that depends on where it comes from (the spreads
below: a model, named in the advice); the choice is made again for many draws of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from kvzip import dtypes
from kvzip.choice.cost import (
    By,
    CodecFigures,
    Option,
    PrefillModel,
    Situation,
    Split,
    best,
    break_even_bandwidth,
    break_even_egress,
    device_cost,
    fit_prefill,
    load_cost,
    load_seconds,
    number,
    options,
    pipeline_fill,
    split_seconds,
    token_cost,
)
from kvzip.errors import KVZipError
from kvzip.eval.money.breakeven import Use, own_cache_usd, storage_of
from kvzip.eval.money.families import document_bytes, prefill_of, scaled
from kvzip.eval.money.prices import (
    PrefillTimes,
    Price,
    PriceBase,
    PriceBook,
    Shape,
    default_prices,
)
from kvzip.eval.money.profiles import ProfileCost, figures_of
from kvzip.eval.money.ratios import ratio_basis, same_model, slowdown_of
from kvzip.eval.money.room import Room, room
from kvzip.eval.quantities import confidence, dollars, duration, rate, significant
from kvzip.eval.results.inputs import Inputs
from kvzip.eval.traffic.trace import Trace

DRAWS = 1000
_WORTH_TELLING = 0.95
"""The share of the best way below which another one is told of."""
SPREAD = {
    "measured": 0.05,
    "measured, another length": 0.15,
    "modelled": 0.35,
    "ratio, this model": 0.01,
    "ratio, another model": 0.1,
    "ratio by a profile, another model": 0.2,
    "decoder, this machine": 0.1,
    "decoder, another machine": 0.5,
    "decoder, a target": 0.7,
    "link": 0.15,
}
"""Standard deviation of the logarithm of a figure, by where it comes from. Assumptions."""


class Choice(msgspec.Struct, frozen=True):
    """The best option by seconds or by dollars."""

    by: By
    best: str
    """"prefill", or a codec's name; "raw" loads a file of bytes as they are, and checks them."""
    value: float
    prefill: float
    raw: float | None
    """By loading raw bytes; None where raw is not among the codecs."""
    unchecked: float
    """By loading raw bytes that nobody decodes or checks, as a plain copy does, at best."""
    times_prefill: float
    """prefill / value; 1 where prefill is best."""
    sure: float
    """Share of draws of the inputs in which the same option is best, by Laplace's rule of
    succession: what was so in all of them is not certain."""
    side_sure: float
    """The same of the verdict between loading, with whichever codec, and prefill."""
    turns: str
    """Where the verdict between loading and prefill turns."""


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with one document: the best option in time and in dollars, what a store has room
    for, all options, and what the figures rest on. Times are in seconds, sizes in bytes, bandwidth
    in bits per second."""

    model: str
    dtype: str
    tokens: int
    raw_bytes: float
    bandwidth: float
    price_base: str
    seconds: Choice
    dollars: Choice
    own_cache_usd: float | None
    """A read from the provider's own cache in place of the prefill; None without its price."""
    split: Split
    """Computing the first layers while loading the others with the fastest codec."""
    room: Room
    """What a store keeps with each codec."""
    profiles: list[ProfileCost]
    """What codecs that need one have beside the document."""
    options: list[Option]
    targets: list[str]
    """Codecs whose decoder's rate is a target, which nobody has measured."""
    basis: list[str]
    """Where each figure comes from."""

    def lines(self) -> list[str]:
        """Four lines: time, money, room, profiles among it, and what they rest on."""
        named = (self.seconds.best, self.dollars.best, self.room.kept[-1].codec)
        profiles = [f" {p.line()}" for p in self.profiles if p.codec in named]
        rests = "Rests on: " + "; ".join(self.basis) + "."
        return [_time_line(self), _money_line(self), self.room.line() + "".join(profiles), rests]


def advise(
    *,
    shape: Shape,
    model: str,
    tokens: int,
    dtype: str,
    bandwidth: float,
    base: PriceBase,
    inputs: Inputs,
    latency: float = 0.0,
    compute: Price | None = None,
    codecs: Sequence[str] | None = None,
    use: Use | None = None,
    threads: int = 1,
    store_bytes: float = 1e12,
    trace: Trace | None = None,
    book: PriceBook | None = None,
    on_device: bool = False,
    inside: str = "",
) -> Advice:
    """What to do with one document of that model.

    The prefill's time is measured where `inputs` are of that model, else modelled on `compute`, a
    device's peak (default: that of the price base). `codecs`: those to look at, all of `inputs` by
    default. `store_bytes`: of the store whose room is asked about; `trace`: requests that it
    serves. `book`: the price book that `base` is of. `on_device`: a GPU decodes, at the book's
    rates, those codecs that have one. `inside`: what the link does not leave, a machine or a data
    centre; its bytes then have no egress price. Raises KVZipError for figures that cannot be, or
    when the prefill's time is not known.
    """
    use = use or Use()
    if inside:
        free = msgspec.structs.replace(base.egress, value=0.0, range=None)
        base = msgspec.structs.replace(base, egress=free)
    number("tokens", tokens, zero=False)
    raw_bytes = document_bytes(shape, tokens, dtypes.get(dtype).itemsize)
    own = same_model(shape, inputs)
    model_of, how, spread = prefill_model(
        shape, inputs if own else None, compute, base, tokens, book
    )
    prefill = model_of.seconds(tokens)
    on_gpu = book.decoder if book is not None and on_device else {}
    slow = {c: slowdown_of(c, shape, inputs) for c in {row.codec for row in inputs.rows}}
    known = figures_of(shape, inputs, dtype, tokens)
    figures = _figures(known, dtype, codecs, threads, on_gpu, shape)
    prefill_usd, priced = _prefill_usd(shape, tokens, prefill, base, book)
    situation = Situation(
        raw_bytes=raw_bytes,
        layers=shape.layers,
        bandwidth=bandwidth,
        latency=latency,
        prefill_seconds=prefill,
        prefill_usd=prefill_usd,
        egress=base.egress.value,
        storage=storage_of(base, use),
        device_usd_per_hour=base.device.value * shape.gpus,
    )
    found = options(situation, figures)
    draws = _draws(situation, figures, base, spread, own, on_gpu)
    token_bytes = shape.numbers_per_token * dtypes.get(dtype).itemsize
    return Advice(
        model=model,
        dtype=dtype,
        tokens=tokens,
        raw_bytes=raw_bytes,
        bandwidth=bandwidth,
        price_base=base.title,
        seconds=_choice("seconds", situation, figures, found, draws),
        dollars=_choice("dollars", situation, figures, found, draws),
        own_cache_usd=own_cache_usd(base, prefill_usd),
        split=_split(situation, figures, found, prefill),
        room=room(store_bytes, raw_bytes, token_bytes, figures, trace),
        profiles=[
            _profile_cost(f, situation, shape.gpus, f.name in on_gpu)
            for f in figures
            if f.profile_bytes
        ],
        options=found,
        targets=[f.name for f in figures if f.name in on_gpu and on_gpu[f.name].basis == "target"],
        basis=[
            how,
            ratio_basis(inputs.model, model, own),
            *_decoding_basis(inputs, figures, threads, slow, on_gpu),
            _latency_basis(latency),
            f"prices of {base.name}: "
            + (f"no egress inside a {inside}" if inside else f"egress ${base.egress.value:g}/GB")
            + f", {priced}",
        ],
    )


def _profile_cost(
    figures: CodecFigures, situation: Situation, gpus: int, on_device: bool
) -> ProfileCost:
    """What bringing a codec's profile takes, once; each of `gpus` that decodes has its own."""
    size, bandwidth, latency = figures.profile_bytes, situation.bandwidth, situation.latency
    return ProfileCost(
        figures.name,
        size,
        copies=gpus if on_device else 1,
        on_device=on_device,
        seconds=load_seconds(size, 1.0, bandwidth, latency=latency),
        dollars=load_cost(size, situation.egress),
    )


def _decoding_basis(
    inputs: Inputs,
    figures: Sequence[CodecFigures],
    threads: int,
    slow: Mapping[str, float],
    on_gpu: Mapping[str, Price],
) -> list[str]:
    """What is known of decoders' speeds, and what is assumed."""
    measured = f"decoders measured on {inputs.machine.cpu}, {inputs.threads} thread"
    if threads != 1:
        measured += f", taken {threads} times as fast on {threads}"
    slower = [
        f"{f.name} taken {slow[f.name]:.1f} times as long to decode in a model as wide: a model"
        for f in figures
        if f.name not in on_gpu and slow[f.name] != 1
    ]
    return [measured, *slower, *_decoders(on_gpu, figures)]


def _latency_basis(latency: float) -> str:
    """What a load takes beside its bytes: a token is left to compute, for which all weights are
    read, and no formula here knows how fast."""
    if latency:
        return f"{duration(latency)} before a load's first byte and for the model's step after it"
    return "no time before a load's first byte, nor for the model's step after it (--latency)"


def _figures(
    known: Sequence[CodecFigures],
    dtype: str,
    codecs: Sequence[str] | None,
    threads: int,
    on_gpu: Mapping[str, Price],
    shape: Shape,
) -> list[CodecFigures]:
    """What is known of these codecs, decoding on so many threads, or on the model's GPUs, those
    that have a rate there. Raises KVZipError when nothing is."""
    many = number("threads", threads, zero=False)
    figures = []
    for f in known:
        rate = f.decode_rate * many
        if f.name in on_gpu:
            rate = on_gpu[f.name].value * 1e9 * shape.gpus
        if codecs is None or f.name in codecs:
            figures.append(msgspec.structs.replace(f, decode_rate=rate))
    if not figures:
        there = ", ".join(f.name for f in known)
        raise KVZipError(f"none of these codecs was measured on {dtype}; there are: {there}")
    return figures


def _decoders(on_gpu: Mapping[str, Price], figures: Sequence[CodecFigures]) -> list[str]:
    """What the rates of decoders on a GPU rest on."""
    words = [
        f"{f.name} a {'target' if on_gpu[f.name].basis == 'target' else 'measured rate'}"
        for f in figures
        if f.name in on_gpu
    ]
    return [f"decoders on the GPU: {', '.join(words)}"] if words else []


def _split(
    s: Situation, figures: Sequence[CodecFigures], found: Sequence[Option], prefill: float
) -> Split:
    """The first layers computed while the codec that loads fastest loads the others."""
    quickest = min(found[1:], key=lambda option: option.seconds or math.inf)
    load = quickest.seconds or 0.0
    rate = next(f.decode_rate for f in figures if f.name == quickest.name)
    fixed = s.latency + pipeline_fill(s.raw_bytes, s.layers, rate)
    return split_seconds(load, prefill, s.layers, fixed=min(fixed, load))


def prefill_model(
    shape: Shape,
    inputs: Inputs | None,
    compute: Price | None,
    base: PriceBase,
    tokens: float | None = None,
    book: PriceBook | None = None,
) -> tuple[PrefillModel, str, float]:
    """The prefill's time by its length, where it comes from, and its spread.

    It is measured where `inputs` are given and `compute` is not; else modelled on `compute`, a
    device's peak (default: that of the price base), or fitted to what the price base has. `tokens`:
    the length that is asked about, if it is one; `book`: where peaks of other devices stand, by
    which a rate that was seen of the model is scaled. Raises KVZipError where nothing is known.
    """
    peak = compute or base.compute
    if inputs is not None and compute is None:
        fit = inputs.prefill
        lengths = [n for n, _ in fit.points]
        inside = tokens is not None and min(lengths) <= tokens <= max(lengths)
        kind = "measured" if inside else "measured, another length"
        words = f"prefill fitted to {len(lengths)} lengths measured on {inputs.machine.cpu}"
        if not inside:
            words += f", {min(lengths):,.0f} to {max(lengths):,.0f} tokens: beyond, an estimate"
        return fit.model, words, max(SPREAD[kind], fit.worst)
    if peak is not None:
        model, words = prefill_of(shape, peak, book)
        return model, words, SPREAD["modelled"]
    if base.prefill is not None:
        return _fitted_to(base.prefill, shape, book or default_prices())
    raise KVZipError(
        f"the prefill's time is not known: preset {base.name} has no device to model it on; name "
        "one that has (--prices h100-rented), for kvzip advise a device (--device h100), or "
        "measured inputs of the model (kvzip eval inputs)"
    )


def _fitted_to(
    times: PrefillTimes, shape: Shape, book: PriceBook
) -> tuple[PrefillModel, str, float]:
    """A price base's own prefill times, for the model that they are of, or another."""
    fitted = fit_prefill(times.points).model
    words = f"prefill fitted to {times.model} on {times.device}"
    known = book.model[times.shape] if times.shape else None
    if known is None or known == shape:
        return fitted, words, SPREAD["measured, another length" if known else "modelled"]
    if not known.square_layers:
        raise KVZipError(f"{words}: its attention cannot be scaled to another model's")
    return scaled(fitted, known, shape), f"{words}, by operations: a model", SPREAD["modelled"]


def _prefill_usd(
    shape: Shape, tokens: int, seconds: float, base: PriceBase, book: PriceBook | None
) -> tuple[float, str]:
    """Dollars of the prefill at the price base, and what they are: a list price by the token; or
    the time of the base's own device, modelled where it is not the one whose time is known."""
    if base.api_input is not None:
        words = f"${base.api_input.value:g} per million tokens"
        return token_cost(tokens, base.api_input.value), words
    words = f"${base.device.value:g} an hour of {base.device_name}"
    if base.compute is not None:
        model, how, _ = prefill_model(shape, None, base.compute, base, book=book)
        seconds = model.seconds(tokens)
        words += f", its {how}"
    return device_cost(seconds, base.device.value * shape.gpus), words


def _draws(
    s: Situation,
    figures: Sequence[CodecFigures],
    base: PriceBase,
    prefill: float,
    own: bool,
    on_gpu: Mapping[str, Price],
) -> list[list[Option]]:
    """The options again and again, every input off by its spread; the same draws each time."""
    rng = np.random.default_rng(0)

    def off(spread: float) -> Any:
        return np.exp(spread * rng.standard_normal(DRAWS))

    def ratio_from(f: CodecFigures) -> str:
        if own:
            return "ratio, this model"
        return "ratio by a profile, another model" if f.profile_bytes else "ratio, another model"

    def decoder_from(f: CodecFigures) -> str:
        if f.name in on_gpu:  # a rate of the price book, whatever the inputs are of
            target = on_gpu[f.name].basis == "target"
            return "decoder, a target" if target else "decoder, another machine"
        return "decoder, this machine" if own else "decoder, another machine"

    seconds, link = off(prefill), off(SPREAD["link"])
    # Codecs of one library on one machine are off together.
    deviation, speed = rng.standard_normal(DRAWS), rng.standard_normal(DRAWS)
    gains = [np.exp(SPREAD[ratio_from(f)] * deviation) for f in figures]
    rates = [np.exp(SPREAD[decoder_from(f)] * speed) for f in figures]
    egress, rent = off(_price_spread(base.egress)), off(_price_spread(base.device))
    if base.api_input:
        prefill_usd = off(_price_spread(base.api_input))
    elif base.compute:  # modelled there, even where its time is measured here
        prefill_usd = off(max(SPREAD["modelled"], prefill)) * rent
    else:
        prefill_usd = seconds * rent
    found = []
    for i in range(DRAWS):
        drawn = msgspec.structs.replace(
            s,
            bandwidth=s.bandwidth * link[i],
            prefill_seconds=(s.prefill_seconds or 0.0) * seconds[i],
            prefill_usd=(s.prefill_usd or 0.0) * prefill_usd[i],
            egress=s.egress * egress[i],
            device_usd_per_hour=s.device_usd_per_hour * rent[i],
        )
        # raw stays raw: only what a codec gains is uncertain.
        codecs = [
            CodecFigures(f.name, 1 + (f.ratio - 1) * gain[i], f.decode_rate * rate[i])
            for f, gain, rate in zip(figures, gains, rates, strict=True)
        ]
        found.append(options(drawn, codecs))
    return found


def _price_spread(price: Price | None) -> float:
    """A price's spread: its range is taken as two deviations to each side."""
    if price is None or price.range is None or price.range[0] <= 0:
        return 0.0
    return math.log(price.range[1] / price.range[0]) / 4


def _choice(
    by: By,
    s: Situation,
    figures: Sequence[CodecFigures],
    found: Sequence[Option],
    draws: Sequence[Sequence[Option]],
) -> Choice:
    chosen = best(found, by)
    value, prefill = (float(getattr(o, by)) for o in (chosen, found[0]))
    raw = next((float(getattr(o, by)) for o in found if o.name == "raw"), None)
    drawn = [best(options_of_draw, by).name for options_of_draw in draws]
    same = sum(name == chosen.name for name in drawn)
    same_side = sum((name == found[0].name) == (chosen.name == found[0].name) for name in drawn)
    return Choice(
        by,
        chosen.name,
        value,
        prefill,
        raw,
        _unchecked(by, s),
        prefill / value if value > 0 else 1.0,
        (same + 1) / (len(draws) + 2),
        (same_side + 1) / (len(draws) + 2),
        _turns(by, chosen.name, s, figures),
    )


def _unchecked(by: By, s: Situation) -> float:
    """What raw bytes take or cost that need no decoder."""
    if by == "dollars":
        return load_cost(s.raw_bytes, s.egress, 0.0, s.storage)
    return load_seconds(s.raw_bytes, 1.0, s.bandwidth, upload_rate=s.upload_rate, latency=s.latency)


def _turns(by: By, chosen: str, s: Situation, figures: Sequence[CodecFigures]) -> str:
    """Where the verdict between loading and prefill turns, with the codec for which it is first."""
    limits: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for f in figures:
        if by == "seconds":
            fill = pipeline_fill(s.raw_bytes, s.layers, f.decode_rate)
            found = break_even_bandwidth(
                s.prefill_seconds or 0.0,
                s.raw_bytes,
                f.ratio,
                decode_rate=f.decode_rate,
                upload_rate=s.upload_rate,
                latency=s.latency,
                fill=fill,
            )
        else:
            decode = device_cost(s.raw_bytes / f.decode_rate, s.device_usd_per_hour)
            found = break_even_egress(s.prefill_usd or 0.0, s.raw_bytes, f.ratio, decode, s.storage)
        if found.value is not None:
            limits[f.name] = found.value
        else:
            reasons[f.name] = found.reason
    if not limits:
        return f"it never turns: {_why_never(reasons)}"
    name = (min if by == "seconds" else max)(limits, key=lambda n: limits[n])
    loads = "loading wins" if chosen == "prefill" else "prefill wins"
    if by == "seconds":
        side = "above" if chosen == "prefill" else "below"
        return f"{loads} {side} {rate(limits[name])} ({name})"
    side = "below" if chosen == "prefill" else "above"
    return f"{loads} {side} {dollars(limits[name])}/GB of egress ({name})"


def _why_never(reasons: Mapping[str, str]) -> str:
    """The reason why no codec turns the verdict; where codecs have different ones, each with the
    names of those that it stops."""
    stopped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        stopped.setdefault(reason, []).append(name)
    if len(stopped) == 1:
        return next(iter(stopped))
    return "; ".join(f"{reason} ({', '.join(names)})" for reason, names in stopped.items())


def _time_line(a: Advice) -> str:
    c = a.seconds
    if c.best == "prefill":
        text = f"Time: prefill, {duration(c.value)} to the first token"
    else:
        text = (
            f"Time: load {_named(a, c.best)}, {duration(c.value)} to the first token against "
            f"{duration(c.prefill)} of prefill ({significant(c.times_prefill, 2)}x)"
        )
    if c.raw is not None and c.best != "raw":
        text += f", {duration(c.raw)} raw"
    text += _plainly(c, duration)
    if a.split.layers_computed > 0 and a.split.seconds < _WORTH_TELLING * c.value:
        text += f"; {duration(a.split.seconds)} with the first {a.split.layers_computed} layers "
        text += "computed meanwhile"
    return f"{text}. {_how_sure(c)}; {c.turns}."


def _money_line(a: Advice) -> str:
    c = a.dollars
    cheapest = min((o for o in a.options[1:]), key=lambda o: o.dollars or 0.0)
    if c.best == "prefill":
        least = dollars(cheapest.dollars or 0.0)
        text = f"Dollars: prefill, {dollars(c.value)} against {least} for the cheapest load "
        text += f"({cheapest.name})"
    else:
        text = (
            f"Dollars: load {_named(a, c.best)}, {dollars(c.value)} against {dollars(c.prefill)} "
        )
        text += f"of prefill ({significant(c.times_prefill, 2)}x)"
    text += _plainly(c, dollars)
    text += f"; prices: {a.price_base}. {_how_sure(c)}; {c.turns}."
    if a.own_cache_usd is not None:
        text += f" A read from the provider's own cache: {dollars(a.own_cache_usd)}"
        text += "." if a.own_cache_usd > c.value else ", which is less than any of these."
    return text


def _plainly(c: Choice, words: Callable[[float], str]) -> str:
    """What a copy of raw bytes takes that nobody checks, where that is less than the best of all by
    more than noise; it is another store's way, and turns the verdict where decoders are slow."""
    if c.unchecked >= _WORTH_TELLING * c.value:
        return ""
    return f", {words(c.unchecked)} by a copy of raw bytes that nobody checks, at best"


def _how_sure(c: Choice) -> str:
    """How sure it is that loading, or prefill, wins; and that no other load is better."""
    if c.best == "prefill":
        return f"That prefill wins is {confidence(c.side_sure)} sure"
    best = "raw bytes are" if c.best == "raw" else f"{c.best} is"
    return (
        f"That loading beats prefill is {confidence(c.side_sure)} sure, that {best} the best load "
        f"{confidence(c.sure)}"
    )


def _named(a: Advice, codec: str) -> str:
    words = "raw bytes" if codec == "raw" else f"with {codec}"
    return f"{words} (its decoder's rate is a target)" if codec in a.targets else words
