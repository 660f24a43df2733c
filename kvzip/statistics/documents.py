"""Documents that something is learned from: snapshots of one model, in memory or in files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from kvzip.errors import ProfileError, UnsupportedError, UsageError
from kvzip.layout import KV
from kvzip.snapshot import Snapshot

Item = Snapshot | str | os.PathLike[str]
"""A document, or the path of its file."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done and how much there is."""

SINK_TOKENS = 4
"""The first tokens of a sequence, whose values are unlike all others (attention sinks: Xiao et al.
2023, arXiv 2309.17453); nothing is learned from them."""

_T = TypeVar("_T")


def hold_out(documents: Sequence[_T], count: int) -> tuple[list[_T], list[_T]]:
    """Split documents into those to learn from and `count` others, spread evenly over all; each in
    the order that is given. `count` must be 0 or more, and less than there are."""
    held_out = {int((i + 0.5) * len(documents) / count) for i in range(count)}
    return (
        [document for i, document in enumerate(documents) if i not in held_out],
        [documents[i] for i in sorted(held_out)],
    )


def check_apart(learned: Sequence[Item], measured: Sequence[Item]) -> None:
    """Raise UsageError where what is measured on has the tokens of what is learned from: by that
    every figure would be better than it is."""
    wanted = {found: item for item in measured if (found := fingerprint(load(item)))}
    for item in learned if wanted else ():
        if (found := fingerprint(load(item))) in wanted:
            raise UsageError(
                f"{_named(wanted[found])} has the same tokens as {_named(item)}, which is learned "
                "from: measure on other documents"
            )


def fingerprint(snapshot: Snapshot) -> bytes:
    """What tells one document from another: its token ids, or a part of its numbers."""
    if snapshot.token_ids is not None:
        return snapshot.token_ids.tobytes()
    for i, name, part in snapshot.layout.parts():
        if part.numbers:
            return np.ascontiguousarray(snapshot.layers[i].block(name)[:, :, -64:]).tobytes()
    return b""


def _named(item: Item) -> str:
    return item.origin.text or "a document" if isinstance(item, Snapshot) else str(item)


def load(item: Item) -> Snapshot:
    """The document, opened if it is in a file."""
    return item if isinstance(item, Snapshot) else Snapshot.load(item)


def difference(snapshot: Snapshot, first: Snapshot) -> str:
    """In what a document differs from the first so that both are not of one model, in words; ""
    where it does not."""
    a, b = first.origin.model, snapshot.origin.model
    if a != b:
        return f"the snapshots are of different models: {a or 'unnamed'} and {b or 'unnamed'}"
    if snapshot.dtype != first.dtype:
        return f"the snapshots differ in dtype: {first.dtype} and {snapshot.dtype}"
    counts = len(first.layers), len(snapshot.layers)
    if counts[0] != counts[1]:
        return f"the snapshots differ in layers: {counts[0]} and {counts[1]}"
    for i, (one, other) in enumerate(zip(first.layout.layers, snapshot.layout.layers, strict=True)):
        named = ", ".join(one.parts), ", ".join(other.parts)
        if named[0] != named[1]:
            return f"the snapshots differ in the parts of layer {i}: {named[0]} and {named[1]}"
        for name, part in one.parts.items():
            own = other.parts[name]
            if part.dtype != own.dtype:
                what = f"{part.dtype} and {own.dtype}"
                return f"the snapshots differ in the dtype of layer {i}'s {name}: {what}"
            shapes = [f"{p.size('h')} heads of {p.size('d')}" for p in (part, own)]
            if shapes[0] != shapes[1]:
                return f"the snapshots differ in layer {i}'s {name}: {' and '.join(shapes)}"
    return ""


def check_channels(snapshot: Snapshot) -> None:
    """Raise ProfileError for a document that has no layers, or no channels in them: nothing can be
    learned from it."""
    if not any(part.line_numbers for _, _, part in snapshot.layout.parts()):
        count = len(snapshot.layers)
        raise ProfileError(f"the snapshot has {count} layers and no channels: it holds no numbers")


def check_held(snapshot: Snapshot) -> None:
    """Raise ProfileError for a document without channels, or with a layer for tokens that holds
    none."""
    check_channels(snapshot)
    if any(part.tokens == 0 for _, _, part in snapshot.layout.parts()):
        raise ProfileError("the snapshots hold no tokens to learn from: every layer must have some")


def check_kinds(snapshot: Snapshot) -> None:
    """Raise UnsupportedError for a document with layers that are not keys and values of its tokens:
    from them nothing is predicted."""
    for i, layer in enumerate(snapshot.layout.layers):
        if tuple(layer.parts) != KV or not layer.counts_tokens:
            raise UnsupportedError(
                f"layer {i} is of kind {layer.kind}, with {', '.join(layer.parts) or 'no parts'}: "
                "only layers of keys and values predict each other; --codec channel learns of all"
            )


def check_tokens(snapshot: Snapshot) -> None:
    """Raise ProfileError for a document of which no token is held by every layer: nothing can be
    predicted from one layer to the next."""
    check_held(snapshot)
    check_kinds(snapshot)


def inputs_of(layer: int) -> list[int]:
    """The layers that predict `layer` where none are chosen: the first and the two before it."""
    return sorted({0, layer - 1, layer - 2} & set(range(layer)))
