"""Quantities in words for people: a unit that fits, a few significant digits, no exponents."""

from __future__ import annotations

import math


def significant(value: float, digits: int = 3) -> str:
    """A number rounded to so many significant digits, with commas between thousands."""
    if not math.isfinite(value):
        return "unlimited" if value > 0 else "unknown"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    text = f"{rounded:,.{max(places, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def rate(bits_per_second: float) -> str:
    """A link's rate, in the largest unit of which it has at least one."""
    return _in_units(
        bits_per_second,
        ((1e12, "Tb/s"), (1e9, "Gb/s"), (1e6, "Mb/s"), (1e3, "kb/s"), (1.0, "b/s")),
        4,
    )


def speed(gigabytes_per_second: float) -> str:
    """How fast a codec is, in GB/s, or a smaller unit where that would be next to nothing."""
    units = ((0.1, "GB/s"), (1e-3, "MB/s"), (1e-6, "kB/s"))
    return _in_units(gigabytes_per_second, units, 3, {"GB/s": 1.0})


def duration(seconds: float) -> str:
    """A time, from microseconds to days."""
    return _in_units(
        seconds,
        ((172800, "days"), (7200, "h"), (120, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")),
        3,
        {"days": 86400, "h": 3600, "min": 60},
    )


def clock_text(seconds: float) -> str:
    """Minutes and seconds, as 3:07."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def dollars(usd: float) -> str:
    """A sum of money."""
    return f"-${significant(-usd)}" if usd < 0 else f"${significant(usd)}"


def confidence(share: float) -> str:
    """How sure a verdict is that rests on models of what is uncertain: never wholly."""
    if share > 0.99:
        return "more than 99 %"
    return "less than 1 %" if share < 0.01 else f"{share:.0%}".replace("%", " %")


def _in_units(
    value: float,
    units: tuple[tuple[float, str], ...],
    digits: int,
    sizes: dict[str, float] | None = None,
) -> str:
    """`value` in the first unit whose threshold it reaches, rounded as it is shown: 1 Gb/s, not
    1,000 Mb/s. `sizes`: of units that are used from more or less than one of them on."""
    for threshold, name in units:
        size = (sizes or {}).get(name, threshold)
        if abs(float(f"{value / size:.{digits - 1}e}")) >= threshold / size:
            break
    return f"{significant(value / size, digits)} {name}"
