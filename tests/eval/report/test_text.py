"""Figures as text, for pages: few digits, of numbers just below a power of ten, too."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvzip.eval.report.text import bit_rate, gbps, seconds, short, size, usd

figures = st.floats(1e-9, 1e14) | st.builds(
    lambda power, below: 10.0**power * (1 - 10.0**below), st.integers(-9, 14), st.floats(-5, -1)
)
"""Of any size, and those that rounding may give a digit more."""


def digits(number: str) -> int:
    """Significant digits, zeros at the end with them where they are decimals."""
    plain = number.replace(",", "")
    decimal = plain if "." in plain else plain.rstrip("0")
    return len(decimal.replace(".", "").lstrip("0"))


@given(figures)
def test_three_digits_are_short(value: float) -> None:
    text = short(value)
    assert re.fullmatch(r"[0-9,]+(\.[0-9]*[1-9])?", text)
    shown = float(text.replace(",", ""))
    assert math.isclose(shown, value, rel_tol=0.00501)
    assert digits(text) <= (3 if shown < 1000 else math.ceil(math.log10(shown + 1)))


@given(figures)
def test_a_column_of_speeds(value: float) -> None:
    """Two decimals; of what is less, two digits, neither more nor fewer."""
    text = gbps(value)
    assert math.isclose(float(text), value, rel_tol=0.0501, abs_tol=0.00501 if value > 0.09 else 0)
    decimals = len(text.partition(".")[2])
    assert decimals == 2 if float(text) >= 0.1 else digits(text) == 2


@given(figures)
def test_dollars(value: float) -> None:
    text = usd(value)
    if "×" in text:
        assert value < 1e-6 and re.fullmatch(r"\$[1-9]\.[0-9] × 10⁻[⁰¹²³⁴⁵⁶⁷⁸⁹]+", text)
        return
    assert re.fullmatch(r"\$[0-9,]+(\.[0-9]+)?", text)
    shown = float(text[1:].replace(",", ""))
    assert math.isclose(shown, value, rel_tol=0.051 if value < 1e-3 else 0.00501)
    if shown < 1:
        assert digits(text[1:]) <= 3
    else:
        assert len(text.partition(".")[2]) in (0, 2)


UNITS = {
    size: {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9},
    bit_rate: {"b/s": 1, "kb/s": 1e3, "Mb/s": 1e6, "Gb/s": 1e9, "Tb/s": 1e12},
    seconds: {"ms": 1e-3, "s": 1},
}


@pytest.mark.parametrize("in_words", UNITS)
@given(value=figures.filter(lambda v: v >= 1e-3))
def test_the_unit_fits(in_words: Callable[[float], str], value: float) -> None:
    number, unit = in_words(value).split(" ")
    shown, units = float(number.replace(",", "")), UNITS[in_words]
    assert shown < 1000 or unit == list(units)[-1]
    assert shown >= 1 or unit == next(iter(units))
    assert math.isclose(
        shown * units[unit], value, rel_tol=0.00501, abs_tol=0.501 * (unit == "bytes")
    )


def test_nothing() -> None:
    assert (short(0), usd(0), gbps(0), size(0)) == ("0", "$0", "0.00", "0 bytes")
    assert (seconds(0), bit_rate(0)) == ("0 s", "0 b/s")
