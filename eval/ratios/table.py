"""A result's layers as CSV, for whoever draws or compares them."""

from __future__ import annotations

import csv
import io

from kvzip.eval.results.ratios import RatiosResult

COLUMNS = (
    "model",
    "dtype",
    "codec",
    "text",
    "layer",
    "part",
    "numbers",
    "raw_bytes",
    "encoded_bytes",
    "bits_per_value",
    "ratio",
)


def as_csv(result: RatiosResult) -> str:
    """A header, then a line for each codec, kind of text, layer and part.

    Bytes are those of blocks and tables: of a file, header and index come on top. A part without
    numbers has neither bits nor a ratio.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for row in result.rows:
        for layer in row.layers:
            figures: tuple[str, ...] = ("", "")
            if layer.numbers and layer.encoded_bytes:
                bits = 8 * layer.encoded_bytes / layer.numbers
                figures = (f"{bits:.4f}", f"{layer.raw_bytes / layer.encoded_bytes:.4f}")
            sizes = (layer.numbers, layer.raw_bytes, layer.encoded_bytes)
            names = (result.model, result.dtype, row.codec, row.kind, layer.layer, layer.part)
            lines.writerow((*names, *sizes, *figures))
    return text.getvalue()
