"""What a header says of RoPE, which may be anything."""

from __future__ import annotations

import numpy as np
import pytest
from predictive_profiles import with_rope
from support import assert_same, cache_like

import kvzip
from kvzip.errors import FormatError
from kvzip.statistics.rope import frequencies

NO_MODELS = [
    {"inv_freq": 5},
    {"inv_freq": "x"},
    {"inv_freq": [None]},
    {"inv_freq": [[1.0, 0.1]]},
    {"inv_freq": [1.0, 1e300]},
    {"rope_theta": "x"},
    {"rope_theta": 0},
    {"rope_theta": -3},
    {"rope_type": "linear", "factor": 0},
    {"partial_rotary_factor": "all"},
]


def turned(parameters, seed=0):
    rng = np.random.default_rng(seed)
    layers = [tuple(cache_like(rng, "bf16", (1, 60, 8)) for _ in "kv") for _ in range(2)]
    return with_rope(layers, np.arange(60), kvzip.Origin(rope=(parameters,)))


@pytest.mark.parametrize("parameters", NO_MODELS)
def test_what_no_model_has_is_no_format(parameters):
    """For who learns from it; a codec keeps the cache all the same."""
    with pytest.raises(FormatError, match="rope"):
        frequencies(parameters, 8)
    with pytest.raises(FormatError, match="rope"):
        kvzip.Profile.fit([turned(parameters, seed) for seed in range(3)])
    found = turned(parameters)
    assert_same(kvzip.decode(kvzip.encode(found, "channel")), found)


def test_a_head_has_no_more_pairs_than_room_for_them():
    """However many a header speaks of, which memory would not hold."""
    usual = frequencies({"rope_theta": 10000.0}, 128)
    assert len(usual) == 64 and usual[0] == 1.0
    assert len(frequencies({"partial_rotary_factor": 1e12}, 128)) == 64
    assert len(frequencies({"partial_rotary_factor": 0.5}, 128)) == 32
    assert len(frequencies({"partial_rotary_factor": -1}, 128)) == 0
