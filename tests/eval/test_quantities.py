"""Quantities for people: no exponents, a unit that fits, and a value that is the number's."""

from __future__ import annotations

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from kvzip.eval.quantities import confidence, dollars, duration, rate, significant, speed

UNITS = {
    "Tb/s": 1e12, "Gb/s": 1e9, "Mb/s": 1e6, "kb/s": 1e3, "b/s": 1,
    "days": 86400, "h": 3600, "min": 60, "s": 1, "ms": 1e-3, "µs": 1e-6,
    "GB/s": 1, "MB/s": 1e-3, "kB/s": 1e-6,
}  # fmt: skip


@given(st.floats(1e-9, 1e15), st.integers(1, 6))
def test_significant_digits(value, digits):
    text = significant(value, digits)
    assert re.fullmatch(r"[0-9,]+(\.[0-9]+)?", text)
    assert math.isclose(float(text.replace(",", "")), value, rel_tol=0.51 * 10 ** (1 - digits))
    assert significant(-value, digits) == "-" + text


figures = st.floats(1e-3, 1e15) | st.builds(
    lambda power, below: 10.0**power * (1 - 10.0**below), st.integers(-3, 15), st.floats(-6, -2)
)
"""Of any size, and just below powers of ten, where rounding gives a digit more."""


@given(figures)
def test_units_fit(value):
    for words in (rate(value), duration(value), speed(value)):
        number, unit = words.split(" ")
        assert re.fullmatch(r"[0-9,]+(\.[0-9]*[1-9])?", number)
        digits = number.replace(",", "").strip("0").replace(".", "").strip("0")
        assert len(digits) <= (4 if unit.endswith("b/s") else 3)
        shown = float(number.replace(",", ""))
        assert math.isclose(shown * UNITS[unit], value, rel_tol=0.00501)
        assert shown < 1000 or unit in ("Tb/s", "GB/s", "days")  # else there is a larger unit


def test_what_people_read():
    assert rate(9.99996e8) == "1 Gb/s" and rate(9.9994e8) == "999.9 Mb/s"
    assert duration(0.9996) == "1 s" and duration(119.9) == "2 min" and duration(86400) == "24 h"
    assert speed(0.0009996) == "1 MB/s" and speed(9.996) == "10 GB/s"
    assert rate(6.172e10) == "61.72 Gb/s"
    assert speed(2.637) == "2.64 GB/s" and speed(0.1) == "0.1 GB/s"
    assert speed(0.0187) == "18.7 MB/s" and speed(0.0000005) == "0.5 kB/s"
    assert rate(1e9) == "1 Gb/s" and rate(999) == "999 b/s"
    assert duration(0.0005) == "500 µs" and duration(90) == "90 s" and duration(7200) == "2 h"
    assert dollars(1.2e-5) == "$0.000012" and dollars(1234567) == "$1,230,000"
    assert significant(math.inf) == "unlimited" and significant(0.0) == "0"


@given(st.floats(0, 1))
def test_never_wholly_sure(share):
    assert confidence(share) not in ("100 %", "0 %")
