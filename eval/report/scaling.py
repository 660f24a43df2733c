"""The charts of how ratios grow: bits against training tokens, and against the profile's size."""

from __future__ import annotations

from collections.abc import Sequence

from kvzip.eval.report import svg
from kvzip.eval.report.pictures import standalone
from kvzip.eval.results.scaling import Extrapolation, ScaledModel, ScalingResult
from kvzip.eval.scaling.extrapolate import of_one_size

_SIZE = (760, 380)


def scaling_file(result: ScalingResult) -> str:
    """Both charts as one SVG file."""
    return standalone(
        [tokens_svg(result), profile_svg(result)],
        [
            "Bits against what was learned from: profiles of one size",
            "Bits against the profile's size: channel, then predictive, largest training set",
        ],
    )


def tokens_svg(result: ScalingResult) -> str:
    """Bits a number against training tokens, a line for each model with profiles of one size. Where
    the target was not measured, a band says where a further model lies in half of all cases."""
    curves = []
    for model, label, style in _named(result):
        alike = of_one_size(model)
        places = [(float(p.train_tokens), p.bits_per_value) for p in alike]
        curves.append(svg.Curve(label, label, style, places))
    marks = _marks(curves)
    if result.extrapolations:
        curves.append(_extrapolated(result.extrapolations, result.target.name))
    learned = [x for curve in curves for x, _ in curve.places]
    x = svg.log_axis(
        "tokens that were learned from",
        min(learned) / 1.2,
        max(learned) * 1.2,
        lambda tokens: f"{tokens:,.0f}",
    )
    title = "Bits a number against training tokens"
    return _drawn("scaling-tokens", title, x, curves, marks)


def profile_svg(result: ScalingResult) -> str:
    """Bits a number against the profile's bytes as a share of the model's matrices, a line for each
    model, learned from its largest training set: first `channel`, then `predictive`."""
    curves = []
    for model, label, style in _named(result):
        learned = [p for p in model.points if p.profile_bytes]
        most = max(p.train_tokens for p in learned)
        places = [
            (p.profile_bytes / model.shape.matrix_bytes, p.bits_per_value)
            for p in learned
            if p.train_tokens == most
        ]
        curves.append(svg.Curve(label, label, style, sorted(places)))
    shares = [x for curve in curves for x, _ in curve.places]
    x = svg.log_axis(
        "profile, as a share of the model's matrices in bf16",
        min(shares) / 1.3,
        max(shares) * 1.3,
        lambda share: f"{100 * share:g} %",
    )
    title = "Bits a number against the profile's size"
    return _drawn("scaling-profile", title, x, curves, _marks(curves))


def _named(result: ScalingResult) -> list[tuple[ScaledModel, str, str]]:
    """The models that have points of `predictive`, each with a name and a style of its own."""
    able, found = [m for m in result.models if of_one_size(m)], []
    for i, model in enumerate(able):
        name = model.shape.name.rpartition("/")[2].removeprefix("pkg:")
        label = f"{name}, {model.source}" if model.source else name
        found.append((model, label, f"s{(i + 1) % svg.COLOURS}"))
    return found


def _marks(curves: Sequence[svg.Curve]) -> list[svg.Point]:
    """A point for each measurement."""
    return [
        svg.Point(f"{curve.key}-{i}", "", curve.style, x, y, 4.0)
        for curve in curves
        for i, (x, y) in enumerate(curve.places)
    ]


def _extrapolated(found: Sequence[Extrapolation], target: str) -> svg.Curve:
    """The band of half of all cases around the mean. For a single number of tokens it is drawn
    a little to both sides."""
    wide = (0.92, 1.08) if len(found) == 1 else (1.0,)
    at = [(one.train_tokens * w, one) for one in found for w in wide]
    name = target.rpartition("/")[2]
    return svg.Curve(
        "extrapolation",
        f"{name}? not measured",
        "s0",
        [(x, one.mean) for x, one in at],
        [(x, *one.half) for x, one in at],
    )


def _drawn(
    name: str, title: str, x: svg.Axis, curves: Sequence[svg.Curve], marks: Sequence[svg.Point]
) -> str:
    bits = [b for curve in curves for _, b in curve.places]
    bits += [b for curve in curves for _, low, high in curve.band for b in (low, high)]
    step = 0.1 if max(bits) - min(bits) < 1.2 else 0.5
    low, high = int(min(bits) / step - 0.5), int(max(bits) / step + 1.5)
    ticks = [(i * step, f"{i * step:.1f}") for i in range(low, high + 1)]
    y = svg.Axis("bits a number, whole files", low * step, high * step, ticks, False)
    spoken = "; ".join(
        f"{curve.label}: " + ", ".join(f"{bits:.2f} at {x:.3g}" for x, bits in curve.places)
        for curve in curves
    )
    return svg.curves(name, title, spoken, x, y, curves, size=_SIZE, points=marks, right=190)
