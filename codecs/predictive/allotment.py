"""What a profile of so many bytes is made of: how many regions each layer has, how many tokens have
rows in its tables, and how coarse its weights are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvzip.codecs.predictive.documents import Documents, Vocabulary
from kvzip.codecs.predictive.input_layers import most_inputs
from kvzip.codecs.predictive.integers import ANGLES
from kvzip.codecs.predictive.token_tables import TABLE_ROWS
from kvzip.errors import UsageError

MOST_REGIONS = 64
ROUNDING = 0.015
"""Bits a number that coarse weights may cost where there is room: what they save is worth more,
spent on more regions (docs/research.md)."""
MOST_ROUNDING = 0.5
WEIGHT_BITS = 6.25
"""Bits of a packed weight at `ROUNDING`; a little more than was measured (6.22 on SmolLM2-135M,
5.96 on Gemma-3-270m)."""
PACKED_WITHIN, PACKED_TABLE, PACKED_PAIRS = 0.44, 0.9, 0.31
"""What is left of the bytes in the file of matrices, of tables of tokens and of what is known of
pairs by their angle, where they are packed: a little more than was measured (0.42, 0.90 and 0.29 on
SmolLM2-135M, 0.30, 0.85 and 0.30 on Gemma-3-270m)."""
COMMON, OF_LAYER = 11_000, 1_350
"""Bytes of what is once in a file, most of it the tables of sines and densities, and of the names
of a layer's tensors in the header; a little more than was counted (layer_tensors)."""
KNOWN_TOKEN_BITS = 12.0
"""What tables save of a token that they know, as bits of one layer's number: about 9 in the first
layer and 3 in the second, as measured on SmolLM2."""


class Allotment(NamedTuple):
    """What a profile is made of."""

    regions: list[int]
    """Of each layer."""
    rows: int
    """How many tokens tables know."""
    rounding: float
    """Bits a number that coarse weights may cost; see regression.py."""


def weight_bits(rounding: float) -> float:
    """Bits of a packed weight. Steps twice as wide take a bit less, and add four times the
    variance: of that the cost is the logarithm (`round_weights`)."""
    return WEIGHT_BITS - math.log2((4**rounding - 1) / (4**ROUNDING - 1)) / 2


def _rounding(fewer: float) -> float:
    """What coarse weights cost that take so many bits fewer than at `ROUNDING`."""
    return math.log2(1 + (4**ROUNDING - 1) * 4**fewer) / 2


def region_bytes(documents: Documents, layer: int, table: bool, rounding: float = ROUNDING) -> int:
    """What one more region of a layer takes in the profile's file, at most: which layers predict it
    is not known yet."""
    n, pairs = documents.widths[layer], len(documents.orders[layer].pairs)
    up, inputs = documents.padded_widths[layer], most_inputs(documents, layer)
    matrices = int(up * (weight_bits(rounding) / 8 * inputs + PACKED_WITHIN * up))
    each = n + int(PACKED_PAIRS * 3 * ANGLES * pairs)
    return matrices + 12 * n + (1 + table) * 4 * each


def allot(
    documents: Documents,
    regions: int | Sequence[int] | str,
    max_bytes: int,
    vocabulary: Vocabulary | None,
) -> Allotment:
    """Regions as they are given, or as many as bytes and tokens allow.

    Where not even one a layer has room, tables know fewer tokens and weights are coarser, by what
    either costs. Raises UsageError for fewer bytes than :func:`least_bytes`.
    """
    widths = documents.widths
    tokens = 0 if vocabulary is None else len(vocabulary.ids)
    least = [1] * len(widths)
    if isinstance(regions, int):
        return Allotment([1] + [regions] * (len(widths) - 1), tokens, ROUNDING)
    if not isinstance(regions, str):
        return Allotment(list(regions), tokens, ROUNDING)
    check_bytes(documents, max_bytes)
    left = max_bytes - file_bytes(documents, least, tokens, ROUNDING)
    if left < 0:
        return _small(documents, max_bytes, vocabulary)
    return Allotment(_more(documents, left, tokens > 0), tokens, ROUNDING)


def file_bytes(documents: Documents, regions: Sequence[int], rows: int, rounding: float) -> int:
    """The file of a profile, about."""
    widths = documents.widths
    table = 2 * rows * widths[0] + sum(
        min(most, rows) * widths[i] for i, most in TABLE_ROWS.items() if i < len(widths)
    )
    fixed = fixed_bytes(documents) + int(PACKED_TABLE * table) + 4 * rows
    tables = _tables(rows > 0)
    return fixed + sum(
        count * region_bytes(documents, i, i in tables, rounding) for i, count in enumerate(regions)
    )


def fixed_bytes(documents: Documents) -> int:
    """What neither regions nor tokens change."""
    return COMMON + sum(OF_LAYER + 15 * width for width in documents.widths)


def check_bytes(documents: Documents, max_bytes: int) -> None:
    """Raise UsageError for fewer bytes than :func:`least_bytes`."""
    if max_bytes < (fewest := least_bytes(documents)):
        raise UsageError(
            f"max_bytes is {max_bytes:,}: even with one predictor a layer and the coarsest weights "
            f"a profile of this model takes up to about {fewest:,}. Allow so many, or do not limit "
            "it"
        )


def least_bytes(documents: Documents) -> int:
    """The file of the smallest profile, about: it has one region a layer, and knows no tokens. How
    well weights pack shows only when they are learned: SmolLM2-135M's file took 0.90 of this where
    4,096 tokens were learned from, 0.94 where 16,384 were."""
    return file_bytes(documents, [1] * len(documents.widths), 0, MOST_ROUNDING)


def _tables(known: bool) -> set[int]:
    """The layers that have tables."""
    return {0, *TABLE_ROWS} if known else set()


def _small(documents: Documents, max_bytes: int, vocabulary: Vocabulary | None) -> Allotment:
    """One region a layer; so many rows and such weights that both together cost least."""
    layers = len(documents.widths)
    counts = np.zeros(0) if vocabulary is None else vocabulary.counts
    total = max(counts.sum(), 1)
    weights = sum(documents.padded_widths[i] * most_inputs(documents, i) for i in range(layers))
    ways = []
    for step in range(33):
        rows = int(len(counts) * (step / 32) ** 2)
        free = max_bytes - file_bytes(documents, [1] * layers, rows, ROUNDING)
        fewer = max(-8 * free / max(weights, 1), 0.0)  # bits of each weight
        # Beyond so many it is the most in any case, and the power would be too great a number.
        rounding = min(_rounding(min(fewer, WEIGHT_BITS)), MOST_ROUNDING)
        lost = rounding + KNOWN_TOKEN_BITS / layers * float(counts[rows:].sum() / total)
        over = free < 0 and rounding == MOST_ROUNDING
        ways.append((over, rows if over else lost, rows, rounding))
    _, _, rows, rounding = min(ways)
    return Allotment([1] * layers, rows, rounding)


def _more(documents: Documents, left: int, known: bool) -> list[int]:
    """Regions of each layer for the bytes that one for each leaves."""
    widths, tables = documents.widths, _tables(known)
    layers = range(len(widths))
    counts, each = [1] * len(widths), [region_bytes(documents, i, i in tables) for i in layers]
    most = [documents.tokens // max(8 * most_inputs(documents, i), 8000) for i in layers]
    most = [min(m, MOST_REGIONS) if m >= 4 and i else 1 for i, m in enumerate(most)]
    while True:
        # Each doubling gains about as much as the one before, more in early layers.
        gains = [
            (_worth(i, len(widths)) / counts[i] / each[i], i)
            for i in range(len(widths))
            if counts[i] < most[i] and each[i] <= left
        ]
        if not gains:
            return counts
        _, best = max(gains)
        counts[best] += 1
        left -= each[best]


def _worth(layer: int, layers: int) -> float:
    """What twice the regions gain, against the last layer: about twice as much in the first ones,
    as measured on SmolLM2 (docs/research.md)."""
    return 1 + 1.2 * (1 - layer / max(layers - 1, 1)) ** 2
