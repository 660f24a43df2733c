"""Words and tables of a cache's parts, as pages, pictures and the terminal show them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from kvzip.entropy import FormatBits, Measure
from kvzip.layout import KV


def part_label(name: str) -> str:
    """What a part is called: K and V, and all others by their names."""
    return name.upper() if name in KV else name


def format_labels(parts: Sequence[FormatBits]) -> list[str]:
    """What each of a rung's parts is called: with its format, where they are not all of one."""
    several = len({part.dtype for part in parts}) > 1
    return [part_label(p.part) + (f" {p.dtype}" if several else "") for p in parts]


def by_dtype(planes: Sequence[Measure]) -> list[tuple[str, list[Measure]]]:
    """Fields of numbers, format by format."""
    return [(dtype, list(found)) for dtype, found in itertools.groupby(planes, lambda m: m.dtype)]


def unpredicted_line(unpredicted: Mapping[str, Sequence[int]]) -> str:
    """What a ladder does not predict, and in which layers, in one line."""
    said = "; ".join(f"{_layers(layers)}: {what}" for what, layers in unpredicted.items())
    return f"not predicted, and counted with a table for each channel: {said}"


def _layers(numbers: Sequence[int]) -> str:
    """Ascending numbers of layers, those that follow each other as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    said = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
    return f"{'layer' if len(numbers) == 1 else 'layers'} {said}"
