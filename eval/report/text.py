"""Figures as text, as the pages show them: money with cents, as a price list has it, and times in
seconds or milliseconds, since rows are compared. `report.js` writes times and rates of its panel
alike, and a test holds both together. `kvzip.eval.quantities` has the words of a terminal."""

from __future__ import annotations


def number(value: float, digits: int = 2) -> str:
    """A plain number with so many decimals and commas between thousands."""
    return f"{value:,.{digits}f}"


def short(value: float) -> str:
    """At least three significant digits, all that are before the point, without an exponent and
    without trailing zeros."""
    text = f"{value:,.{max(0, 2 - _power(value, 3))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _power(value: float, digits: int) -> int:
    """The power of ten of a number's first digit, once it is rounded to so many: of 9.996 that is
    10.0's. That of the number itself would give a digit too many, or a unit too small."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def scientific(value: float, digits: int = 1) -> str:
    """A number as a factor and a power of ten: 4.8 × 10⁻⁷."""
    if value == 0:
        return "0"
    factor, power = f"{value:.{digits}e}".split("e")
    return f"{factor} × 10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def usd(value: float) -> str:
    """Dollars: cents from a dollar on, three significant digits down to a tenth of a cent, two
    below, and a power of ten where even they would hide behind zeros."""
    if _power(value, 3) >= 0:
        return f"${value:,.2f}".removesuffix(".00")
    if _power(value, 2) < -6:
        return "$" + scientific(value)
    digits = 3 if value >= 1e-3 else 2
    text = f"{value:.{digits - 1 - _power(value, digits)}f}".rstrip("0")
    return f"${text}0" if len(text) == 3 else f"${text}"


def size(value: float) -> str:
    """Bytes in the decimal unit that fits: 47.2 MB."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if _power(value, 3) >= power:
            return f"{short(value / 10**power)} {unit}"
    return f"{value:,.0f} bytes"


def gbps(value: float) -> str:
    """GB a second in a column of such: two decimals, of what is slow two significant digits."""
    return f"{value:.{max(2, 1 - _power(value, 2))}f}"


def seconds(value: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{short(value)} s" if _power(value, 3) >= 0 else f"{short(value * 1e3)} ms"


def bit_rate(value: float) -> str:
    """Bits per second in the unit that fits: 63.1 Mb/s."""
    for unit, power in (("Tb/s", 12), ("Gb/s", 9), ("Mb/s", 6), ("kb/s", 3)):
        if _power(value, 3) >= power:
            return f"{short(value / 10**power)} {unit}"
    return f"{short(value)} b/s"
