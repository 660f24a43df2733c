"""Training documents: snapshots of one model, of which a few layers at a time are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.codec import get_codec
from kvzip.codecs.predictive.codec import check_format
from kvzip.errors import ProfileError, UnsupportedError
from kvzip.snapshot import Snapshot
from kvzip.statistics.documents import (
    SINK_TOKENS,
    Item,
    check_channels,
    check_kinds,
    check_tokens,
    difference,
    load,
)
from kvzip.statistics.rope import ChannelOrder, has_pairs_side_by_side, width

Floats = NDArray[np.float32]


class Documents:
    """Snapshots of one model, of which one layer at a time is looked at."""

    def __init__(self, items: Sequence[Item]):
        self.items = items
        self.first = load(items[0])
        check_channels(self.first)
        check_kinds(self.first)
        check_format(dtypes.get(self.first.dtype))
        channel = get_codec("channel")  # it stores the blocks that it stores better
        for i, name, part in self.first.layout.parts():
            if not channel.takes(part, self.first.layout.layers[i].kind, name):
                raise UnsupportedError(
                    f"codec 'predictive' takes no part that 'channel' does not take, as layer {i} "
                    f"{name}, which is {part.dtype} {list(part.shape)}"
                )
        layers = self.first.layout.layers
        self.widths = [width(s) for s in layers]
        self.padded_widths = [w + -w % 4 for w in self.widths]
        """How many inputs each layer is for those after it (spec.md)."""
        origin, dtype = self.first.origin, self.first.dtype
        self.side_by_side = has_pairs_side_by_side(self.first.layers, origin, dtype)
        """Whether RoPE turns the channels 2i and 2i + 1 of a head together."""
        self.orders = [ChannelOrder(s, origin, dtype, self.side_by_side) for s in layers]
        self.counts: list[int] = []
        """Of each document, how many tokens are learned from."""
        for item in items:
            snapshot = self._open(item)
            check_tokens(snapshot)
            held = min(s.stored for s in snapshot.layout.layers)
            rows = snapshot.layout.layers[0].part("k").block_shape[0]
            self.counts.append(rows * (held - _sinks(snapshot, held)))
        self.tokens = sum(self.counts)
        if not self.tokens:
            raise ProfileError("the snapshots hold no tokens to learn from")

    def __len__(self) -> int:
        return len(self.items)

    def _open(self, item: Item) -> Snapshot:
        """The document; raises ProfileError when it is of another model than the first."""
        snapshot = load(item)
        if found := difference(snapshot, self.first):
            raise ProfileError(found)
        return snapshot

    def read(
        self, layers: Sequence[int], which: Sequence[int], sinks: bool = False
    ) -> Iterator[tuple[int, list[Floats], NDArray[np.uint32] | None]]:
        """Read documents one after the other: the number of each, the values of some layers
        [tokens, width] for the tokens that all layers hold, and their ids. The first tokens are
        left out, or not (`sinks`)."""

        def one(i: int) -> tuple[int, list[Floats], NDArray[np.uint32] | None]:
            snapshot = self._open(self.items[i])
            held = min(s.stored for s in snapshot.layout.layers)
            keep = held if sinks else held - _sinks(snapshot, held)
            values = [
                self.orders[a].unturned(snapshot.layers[a], snapshot.layout.layers[a].stored - keep)
                for a in layers
            ]
            ids = snapshot.token_ids
            if ids is not None:
                enough = ids.shape[-1] >= keep
                ids = ids[..., ids.shape[-1] - keep :].reshape(-1) if enough else None
            return i, values, ids

        # The next document is read while one is worked on.
        with ThreadPoolExecutor(1) as ahead:
            coming: Future[tuple[int, list[Floats], NDArray[np.uint32] | None]] | None = None
            for i in which:
                now, coming = coming, ahead.submit(one, i)
                if now is not None:
                    yield now.result()
            if coming is not None:
                yield coming.result()

    def spread(self, wanted: int) -> list[int]:
        """Numbers of at most so many documents, evenly."""
        return sorted({int(i) for i in np.linspace(0, len(self) - 1, min(len(self), wanted))})


def _sinks(snapshot: Snapshot, held: int) -> int:
    """How many of the tokens that all layers hold are the first of the sequence."""
    return SINK_TOKENS if held > 4 * SINK_TOKENS and held == snapshot.tokens else 0


class Vocabulary:
    """The tokens seen, the most frequent first; their ids, and how often each was seen."""

    def __init__(self, documents: Documents):
        seen = [
            ids
            for _, _, ids in documents.read([], range(len(documents)), sinks=True)
            if ids is not None
        ]
        ids, counts = np.unique(
            np.concatenate(seen) if seen else np.zeros(0, np.uint32), return_counts=True
        )
        order = np.argsort(-counts, kind="stable")
        self.ids, self.counts = ids[order].astype(np.uint32), counts[order]
        self._sorted, self._place = ids, np.argsort(order)

    def keep(self, most: int) -> None:
        """Forget all but so many."""
        self.ids, self.counts = self.ids[:most], self.counts[:most]

    def rows(self, ids: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Places of tokens that were seen; from `len(self.ids)` on where they are forgotten."""
        return self._place[np.searchsorted(self._sorted, ids)]
