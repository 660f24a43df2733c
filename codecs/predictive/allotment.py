"""How many regions each layer of a profile has: what its bytes and the documents' tokens allow."""

from __future__ import annotations

from collections.abc import Sequence

from kvzip.codecs.predictive.documents import Documents, Vocabulary
from kvzip.codecs.predictive.input_layers import most_inputs
from kvzip.codecs.predictive.integers import ANGLES
from kvzip.codecs.predictive.token_tables import TABLE_ROWS

MOST_REGIONS = 64
PACKED_WEIGHTS, PACKED_WITHIN, PACKED_TABLE = 0.86, 0.44, 0.88
"""What is left of matrices' bytes in the file, where they are packed: a little more than was
measured (0.84, 0.40 and 0.86 on SmolLM2-135M, 0.82, 0.27 and 0.85 on Gemma-3-270m)."""


def region_bytes(documents: Documents, layer: int, table: bool) -> int:
    """What one more region of a layer takes in the profile's file, at most: which layers predict it
    is not known yet."""
    n, pairs = documents.widths[layer], len(documents.orders[layer].pairs)
    up, inputs = documents.padded_widths[layer], most_inputs(documents, layer)
    matrices = int(up * (PACKED_WEIGHTS * inputs + PACKED_WITHIN * up))
    return matrices + 12 * n + (1 + table) * 4 * (n + 3 * ANGLES * pairs)


def allot(
    documents: Documents,
    regions: int | Sequence[int] | str,
    max_bytes: int,
    vocabulary: Vocabulary | None,
) -> list[int]:
    """Regions of each layer: what is given, or what bytes and tokens allow."""
    widths = documents.widths
    if isinstance(regions, int):
        return [1] + [regions] * (len(widths) - 1)
    if not isinstance(regions, str):
        return list(regions)
    layers = range(len(widths))
    tables = {0, *TABLE_ROWS} if vocabulary is not None and len(vocabulary.ids) else set()
    counts, each = [1] * len(widths), [region_bytes(documents, i, i in tables) for i in layers]
    # What is not of a region, names and all.
    left = max_bytes - sum(each) - sum(4096 + 24 * w for w in widths)
    if vocabulary is not None:
        rows = len(vocabulary.ids)
        numbers = 2 * rows * widths[0] + sum(
            min(most, rows) * widths[i] for i, most in TABLE_ROWS.items() if i < len(widths)
        )
        left -= int(PACKED_TABLE * numbers) + 4 * rows
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
