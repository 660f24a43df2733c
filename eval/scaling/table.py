"""A result's points as CSV, for whoever draws or compares them."""

from __future__ import annotations

import csv
import io
import statistics

from kvzip.eval.results.scaling import ScalingResult

COLUMNS = (
    "model",
    "dtype",
    "cache_width",
    "layers",
    "parameters",
    "codec",
    "train_tokens",
    "profile_bytes",
    "profile_share",
    "regions",
    "text",
    "raw_bytes",
    "encoded_bytes",
    "bits_per_value",
    "ratio",
)


def as_csv(result: ScalingResult) -> str:
    """A header, then for each point a line for each kind of text and one for all.

    `cache_width` is (K+V) over the hidden size, `profile_share` the profile's bytes over those of
    the model's matrices in bf16, `regions` the mean over layers, empty where it is not known.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for model in result.models:
        shape = model.shape
        width = f"{shape.cache_width:.4f}"
        of = (shape.name, model.dtype, width, shape.layers, int(shape.parameters))
        for point in model.points:
            share = f"{point.profile_bytes / shape.matrix_bytes:.5f}"
            regions = f"{statistics.fmean(point.regions):.2f}" if point.regions else ""
            learned = (point.codec, point.train_tokens, point.profile_bytes, share, regions)
            sizes = [(k.kind, k.numbers, k.raw_bytes, k.encoded_bytes) for k in point.kinds]
            sizes.append(("all", point.numbers, point.raw_bytes, point.encoded_bytes))
            for kind, numbers, raw, encoded in sizes:
                figures = (f"{8 * encoded / numbers:.4f}", f"{raw / encoded:.4f}")
                lines.writerow((*of, *learned, kind, raw, encoded, *figures))
    return text.getvalue()
