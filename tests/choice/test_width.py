"""Speeds of a model of another width than the measured one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvzip
from kvzip.choice import auto
from kvzip.choice.width import slowdown

WIDTHS = st.integers(1, 10**5)
MEASURED = {
    # docs/speed-notes.md: nanoseconds to decode a number at 384, 1,024, 2,048 numbers of a layer.
    "avx512f": (10.7, 16.0, 26.5),
    "avx2": (27.6, 50.4, 89.4),
}


@pytest.mark.parametrize("simd", MEASURED)
def test_it_says_what_was_measured(simd):
    narrow, middle, wide = MEASURED[simd]
    assert slowdown("predictive", 1024, 384, [simd]) == pytest.approx(middle / narrow, rel=0.06)
    assert slowdown("predictive", 2048, 384, [simd]) == pytest.approx(wide / narrow, rel=0.06)


@given(numbers=WIDTHS, measured=WIDTHS, other=WIDTHS)
def test_it_is_a_ratio_that_grows_with_the_width(numbers, measured, other):
    def of(n, m):
        return slowdown("predictive", n, m, ["avx2"])

    assert of(numbers, numbers) == 1
    assert of(numbers, measured) * of(measured, other) == pytest.approx(of(numbers, other))
    assert (of(numbers, measured) > 1) == (numbers > measured)


@pytest.mark.parametrize("codec", ["raw", "zstd", "lz4", "planes", "channel"])
def test_a_codec_without_a_profile_takes_the_same_for_every_number(codec):
    assert slowdown(codec, 10**5, 1, ["avx2"]) == 1


def test_auto_takes_a_wide_model_for_slower():
    def rates(numbers):
        return {f.name: f.decode_rate for f in auto.measured_figures("bf16", numbers)}

    measured, narrow, wide = rates(None), rates(384), rates(2048)
    assert measured == narrow
    slower = wide.pop("predictive") / narrow.pop("predictive")
    assert wide == narrow
    assert 0.2 < slower < 0.6


def test_auto_counts_the_numbers_of_a_token_in_the_widest_layer():
    import numpy as np

    layers = [
        tuple(np.zeros((batch, heads, 7, dim), np.uint16) for _ in range(2))
        for batch, heads, dim in ((2, 2, 8), (2, 5, 16))
    ]
    layout = kvzip.Snapshot.from_arrays(layers, "bf16").layout
    assert auto._numbers(layout) == 2 * 5 * 16
