"""Loaders: keys and values of one layer after the other, decoded ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvzip import dtypes
from kvzip.codecs.native.cuda.device import Device, get_device
from kvzip.container import Reader
from kvzip.dtypes import Bits
from kvzip.errors import KVZipError, UnsupportedError
from kvzip.load.recovery import Recovery, Taken, naming, tell
from kvzip.snapshot import Snapshot
from kvzip.workers import Lock, Workers

if TYPE_CHECKING:
    from kvzip.container.on_device import DeviceSnapshot

TOGETHER = 4
"""Layers that are decoded in one call, and that a model gets at once. When a model is done with
what it has, its OpenMP threads go on spinning for milliseconds, on cores that the decoder needs; so
it is to wait seldom."""


_Run = tuple[list[int], tuple[int, int]]
"""Layers, and first and last position of them."""


class Loader:
    """Decodes layers of one source, a few when the first of them is taken, and the next few ahead.

    Copies of a cache share it: it keeps nothing but the layers that are decoded ahead.
    `spans`: first and last position of each layer. `held`: the position after the last that the
    cache keeps; what a layer has beyond is its witness.
    """

    def __init__(
        self,
        source: Reader | Snapshot,
        spans: Sequence[tuple[int, int]],
        held: int,
        device: torch.device | str | None,
        threads: int,
    ):
        self.source, self.spans, self.held, self.threads = source, spans, held, threads
        self.dtype = getattr(torch, dtypes.get(source.layout.dtype).torch)
        self.device = None if device is None else torch.device(device)
        self.decoder: Device | None = None
        """The `kvzip.codecs.native.cuda.device.Device` that decodes, where one can."""
        self.recovery: Recovery | None = None
        self._process, self._worker = os.getpid(), Workers(1, "kvzip-ahead")
        self._ahead: dict[int, Future[dict[int, Taken]]] = {}
        """By the first of the layers that are decoded together: those that were not taken yet."""
        self._lock = Lock()
        self._due: deque[_Run] = deque()
        """What the reader is to give next in turn, where blocks need those of other layers; nothing
        once that has failed. Else calls for a few layers each do as well."""
        if isinstance(source, Reader):
            source.read_ahead(spans)
            if not source.codec.independent:
                groups = range(0, len(spans), TOGETHER)
                self._due.extend(run for first in groups for run in self._runs(self._group(first)))
                self._turns = source.in_turn(list(self._due), threads)

    def __deepcopy__(self, memo: object) -> Loader:
        return self

    def take(self, i: int) -> Taken:
        """What layer i starts with. Raises KVZipError, if it cannot recover."""
        return self.load(i) if self.recovery is None else self.recovery.take(i, self.load)

    @property
    def recovers(self) -> bool:
        return self.recovery is not None

    def recover(self, i: int, error: KVZipError) -> Taken:
        """What layer i starts with, computed, because of that error."""
        assert self.recovery is not None, "asked of what does not recover"
        return self.recovery.layers(error)[i]

    def load(self, i: int) -> Taken:
        """What layer i starts with, without recovery. Raises KVZipError when it cannot be read."""
        first = i - i % TOGETHER
        if self._process != os.getpid():  # a fork takes along neither threads nor what they do
            self._process, self._ahead = os.getpid(), {}
            self._due.clear()
        with self._lock:
            for start in range(first, min(first + 2 * TOGETHER, len(self.spans)), TOGETHER):
                if start not in self._ahead:
                    self._ahead[start] = self._worker.submit(self._decode, self._group(start))
            mine = self._ahead[first]
        try:
            decoded = mine.result()
            with self._lock:
                taken = decoded.pop(i, None)
                if not decoded and self._ahead.get(first) is mine:
                    del self._ahead[first]
            # None: a copy of the cache has had it.
            return self._worker.submit(self._decode, [i]).result()[i] if taken is None else taken
        except Exception as error:
            with self._lock:  # who asks again has it read again
                if self._ahead.get(first) is mine:
                    del self._ahead[first]
            if isinstance(error, KVZipError):
                raise
            last = min(first + TOGETHER, len(self.spans)) - 1
            raise KVZipError(f"layers {first} to {last} cannot be read: {error}") from error

    def _group(self, first: int) -> range:
        """The layers that are decoded together with this first one."""
        return range(first, min(first + TOGETHER, len(self.spans)))

    def _runs(self, layers: Iterable[int]) -> Iterator[_Run]:
        for span, alike in groupby(layers, key=self.spans.__getitem__):  # most are alike
            yield list(alike), span

    def _decode(self, layers: Iterable[int]) -> dict[int, Taken]:
        found = {}
        for run, (start, stop) in self._runs(layers):
            if isinstance(self.source, Snapshot):
                whole = [self.source.layers[i] for i in run]
                pairs = [
                    [np.array(bits[..., start - first : stop - first, :]) for bits in layer]
                    for layer in whole
                    for first in [layer.layout.first]
                ]
            else:
                pairs = list(map(list, self._from_reader(self.source, run, (start, stop)).layers))
            for i, pair in zip(run, pairs, strict=True):
                held = self.spans[i][1] - start
                found[i] = self._taken(i, [bits[..., :held, :] for bits in pair])
        return found

    def _from_reader(
        self, reader: Reader, layers: list[int], span: tuple[int, int]
    ) -> Snapshot | DeviceSnapshot:
        if not self._due or self._due[0] != (layers, span):
            return reader.decode(None, layers, span, self.threads, device=self._decoder(reader))
        try:
            found = next(self._turns)
        except BaseException:
            self._due.clear()
            raise
        self._due.popleft()
        if not self._due:
            self._turns.close()
        return found

    def _decoder(self, reader: Reader) -> Device | None:
        """The GPU that the layers are for, if it can decode them itself."""
        if self.decoder is None and self.device is not None and self.device.type == "cuda":
            if not reader.codec.on_device:
                return None
            try:
                self.decoder = get_device(self.device)
            except UnsupportedError:  # without what that needs, the CPU decodes
                return None
        return self.decoder

    def _taken(self, i: int, pair: Sequence[Bits | torch.Tensor]) -> Taken:
        start, stop = self.spans[i]
        dtype = self.source.layout.dtype
        k, v = (
            (a if isinstance(a, torch.Tensor) else dtypes.as_tensor(a, dtype)).to(self.device)
            for a in pair
        )
        k, v = (k, v) if k.ndim == 4 else (k[None], v[None])
        kept = self.held - start
        witness = (k[:, :, kept:], v[:, :, kept:]) if stop > self.held else None
        return Taken(k[:, :, :kept], v[:, :, :kept], witness)


class Computed:
    """A row of a batch that has no document: the model computes what it starts with."""

    def __init__(self, recovery: Recovery, dtype: torch.dtype, device: torch.device):
        self.recovery, self.dtype, self.device = recovery, dtype, device

    def load(self, i: int) -> Taken:
        return self.recovery.layers()[i]


class BatchLoader:
    """Rows of a batch from loaders of their own (or None: a row of padding), the shorter ones
    padded with zeros at the left."""

    def __init__(
        self, rows: Sequence[Loader | Computed | None], count: int, windows: Sequence[int | None]
    ):
        self.rows, self.count, self.windows = rows, count, windows
        first = next(row for row in rows if row is not None)
        self.dtype, self._device = first.dtype, first.device

    def __deepcopy__(self, memo: object) -> BatchLoader:
        return self

    @property
    def device(self) -> torch.device | None:
        return self._device

    @device.setter
    def device(self, device: torch.device | None) -> None:
        self._device = device
        for row in self.rows:
            if row is not None:
                row.device = device

    def take(self, i: int) -> Taken:
        """As :meth:`Loader.take`."""
        taken: list[Taken | None] = []
        for n, row in enumerate(self.rows):
            if row is None:
                taken.append(None)
            elif row.recovery is None:
                taken.append(self._load(n, i))
            else:
                taken.append(row.recovery.take(i, partial(self._load, n)))
        return self._joined(i, taken)

    def _load(self, n: int, i: int) -> Taken:
        row = self.rows[n]
        assert row is not None
        with naming(n):
            return row.load(i)

    @property
    def recovers(self) -> bool:
        return all(row is None or row.recovery is not None for row in self.rows)

    def recover(self, i: int, error: KVZipError) -> Taken:
        """As :meth:`Loader.recover`, for all rows: the error does not say which one's it is."""
        recoveries = [None if row is None else row.recovery for row in self.rows]
        if not all(recovery is None or recovery.done for recovery in recoveries):
            tell(error)
        return self._joined(i, [None if r is None else r.layers()[i] for r in recoveries])

    def _joined(self, i: int, taken: Sequence[Taken | None]) -> Taken:
        """Layer i of the batch from those of its rows."""
        like = next(t for t in taken if t is not None)
        window = self.windows[i]
        width = self.count if window is None else min(self.count, window - 1)
        shapes = [(len(taken), t.shape[1], width, t.shape[3]) for t in like[:2]]
        keys, values = (like.keys.new_zeros(shape) for shape in shapes)
        witness = tuple(torch.full((n, heads, 1, dim), torch.nan) for n, heads, _, dim in shapes)
        known = False
        for row, found in enumerate(taken):
            if found is None:
                continue
            start = width - found.keys.shape[2]
            keys[row, :, start:], values[row, :, start:] = found.keys[0], found.values[0]
            if found.witness is not None:
                known = True
                for whole, mine in zip(witness, found.witness, strict=True):
                    whole[row] = mine[0].float()
        return Taken(keys, values, witness if known else None)
