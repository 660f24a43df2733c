"""Figures as text, as the pages show them: money with cents, as a price list has it, and times in
seconds or milliseconds, since rows are compared. `report.js` writes times and rates of its panel
alike, and a test holds both together. `kvzip.eval.quantities` has the words of a terminal."""

from __future__ import annotations

import math


def number(value: float, digits: int = 2) -> str:
    """A plain number with so many decimals and commas between thousands."""
    return f"{value:,.{digits}f}"


def short(value: float) -> str:
    """Three significant digits without an exponent and without trailing zeros."""
    if value == 0:
        return "0"
    text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scientific(value: float, digits: int = 1) -> str:
    """A number as a factor and a power of ten: 4.8 × 10⁻⁷."""
    if value == 0:
        return "0"
    factor, power = f"{value:.{digits}e}".split("e")
    return f"{factor} × 10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def usd(value: float) -> str:
    """Dollars: cents from a dollar on, three significant digits down to a tenth of a cent, two
    below, and a power of ten where even they would hide behind zeros."""
    if value == 0:
        return "$0"
    if value >= 1:
        return f"${value:,.2f}".removesuffix(".00")
    if value < 0.999e-6:
        return "$" + scientific(value)
    power = math.floor(math.log10(value))
    text = f"{value:.{(2 if value >= 1e-3 else 1) - power}f}".rstrip("0")
    return f"${text}0" if len(text) == 3 else f"${text}"


def size(value: float) -> str:
    """Bytes in the decimal unit that fits: 47.2 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{short(value / factor)} {unit}"
    return f"{value:,.0f} bytes"


def gbps(value: float) -> str:
    """GB a second in a column of such: two decimals, of what is slow two significant digits."""
    if value >= 0.0995 or value == 0:
        return f"{value:.2f}"
    return f"{value:.{1 - math.floor(math.log10(value))}f}"


def seconds(value: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{short(value)} s" if value >= 1 else f"{short(value * 1e3)} ms"


def bit_rate(value: float) -> str:
    """Bits per second in the unit that fits: 63.1 Mb/s."""
    for unit, factor in (("Tb/s", 1e12), ("Gb/s", 1e9), ("Mb/s", 1e6), ("kb/s", 1e3)):
        if value >= factor * 0.9999:
            return f"{short(value / factor)} {unit}"
    return f"{short(value)} b/s"
