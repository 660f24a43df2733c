"""Loaders: the parts of one layer after the other, decoded ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from kvzip import dtypes
from kvzip.codecs.native.cuda.device import Device, get_device
from kvzip.container import Reader
from kvzip.errors import CancelledError, KVZipError, UnsupportedError
from kvzip.load.held import KEYS, TOKEN_PARTS, VALUES
from kvzip.load.recovery import Recovery, Taken, naming, tell
from kvzip.snapshot import Layer, Snapshot
from kvzip.workers import Lock, Workers

if TYPE_CHECKING:
    from kvzip.container.on_device import DeviceLayer, DeviceSnapshot

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
        """The format of keys and values."""
        self.device = None if device is None else torch.device(device)
        self.devices: Sequence[torch.device] | None = None
        """Where each layer's tensors go, where layers that are used before what is fed tells (those
        with states) are not all on one device."""
        self.decoder: Device | None = None
        """The `kvzip.codecs.native.cuda.device.Device` that decodes, where one can."""
        self.recovery: Recovery | None = None
        self._cancelled = False
        self._process, self._worker = os.getpid(), Workers(1, "kvzip-ahead")
        self._ahead: dict[int, Future[dict[int, Taken]]] = {}
        """By the first of the layers that are decoded together: those that were not taken yet."""
        self._lock = Lock()
        self._due: deque[_Run] = deque()
        """What the reader is to give next in turn, where blocks need those of other layers and the
        CPU decodes; nothing once that has failed. Else calls for a few layers each do as well."""
        if isinstance(source, Reader):
            source.read_ahead(spans)
            if not source.codec.independent:
                groups = range(0, len(spans), TOGETHER)
                self._due.extend(run for first in groups for run in self._runs(self._group(first)))
                self._turns = source.in_turn(list(self._due), threads)

    def __deepcopy__(self, memo: object) -> Loader:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as what it gives: the file, and the model that computes what is not there, stay
        where they are. Raises KVZipError when that cannot be read."""
        return Decoded, (self.dtype, self.device, [self.take(i) for i in range(len(self.spans))])

    def shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """The shape of each part that layer i will start with."""
        layout = self.source.layout.layers[i]
        found = {}
        for name, part in layout.parts.items():
            shape = part.shape if "b" in part.axes else (1, *part.shape)
            if "t" in part.axes and layout.counts_tokens:
                shape = (*shape[:-2], self.held - self.spans[i][0], shape[-1])
            if part.dtype == "bytes":  # of integers
                shape = shape[:-1]
            found[name] = shape
        return found

    def cancel(self) -> None:
        """Decode nothing more: who waits for a layer, or asks for one, gets a CancelledError.
        Returns when the thread that decodes ahead has ended."""
        with self._lock:
            self._cancelled = True
        if isinstance(self.source, Reader):
            self.source.cancel()
        self._worker.shutdown()
        if self._due:
            self._due.clear()
            self._turns.close()

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
            if self._cancelled:
                raise CancelledError("loading the cache was cancelled")
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
            if taken is None:  # a copy of the cache has had it
                taken = self._worker.submit(self._decode, [i]).result()[i]
            _used_here(taken)
            return taken
        except Exception as error:
            if self._cancelled:
                raise CancelledError("loading the cache was cancelled") from error
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
        for run, span in self._runs(layers):
            decoded: Sequence[Layer | DeviceLayer]
            if isinstance(self.source, Snapshot):
                decoded = [self.source.layers[i] for i in run]
            else:
                decoded = self._from_reader(self.source, run, span).layers
            for i, layer in zip(run, decoded, strict=True):
                found[i] = self._taken(i, layer)
        return found

    def _from_reader(
        self, reader: Reader, layers: list[int], span: tuple[int, int]
    ) -> Snapshot | DeviceSnapshot:
        decoder = self._decoder(reader)
        if decoder is not None or not self._due or self._due[0] != (layers, span):
            return reader.decode(None, layers, span, self.threads, device=decoder)
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
            if not reader.layout.plain:
                return None
            try:
                found = get_device(self.device)
            except UnsupportedError:  # without what that needs, the CPU decodes
                return None
            if reader.codec.decodes_on(found):
                self.decoder = found
        return self.decoder

    def _taken(self, i: int, layer: Layer | DeviceLayer) -> Taken:
        """What layer i starts with, of what was decoded of it, which may hold other tokens, too."""
        start, stop = self.spans[i]
        layout = layer.layout
        place = self.device if self.devices is None else self.devices[i]
        parts, next_token = {}, {}
        for name, part in layout.parts.items():
            if isinstance(layer, Layer):
                bits, at = layer.once(name), part.axes.find("t")
                if at >= 0 and layout.counts_tokens:
                    bits = bits[(slice(None),) * at + (slice(start - layout.first, None),)]
                # A copy: states are updated in place, and a snapshot's are its own.
                tensor = dtypes.as_tensor(np.array(bits), part.dtype).to(place)
            else:
                there = layer.k if name == "k" else layer.v
                tensor = there.to(place)
                if tensor.is_cuda and tensor.device != there.device:  # else it is there already
                    torch.cuda.current_stream(tensor.device).synchronize()
            if "b" not in part.axes and part.axes:
                tensor = tensor[None]
            if "t" in part.axes and layout.counts_tokens:
                kept = self.held - start
                if stop > self.held and name in KEYS + VALUES:
                    next_token[name] = tensor[..., kept : kept + 1, :]
                tensor = tensor[..., :kept, :]
            parts[name] = tensor
        witness = None
        if next_token:
            # DeepSeek V4 has no values but its keys.
            values = next((next_token[n] for n in VALUES if n in next_token), None)
            key = next(next_token[n] for n in KEYS if n in next_token)
            witness = (key, key if values is None else values)
        return Taken(parts, witness)


def _used_here(taken: Taken) -> None:
    """Have torch know that the stream of this thread uses tensors that another one made: else it
    would give their memory away again, to what is decoded next, before that stream is done."""
    for tensor in (*taken.parts.values(), *(taken.witness or ())):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Decoded:
    """What a loader gave of all layers, in another process or a file (pickle, `torch.save`)."""

    recovers = False

    def __init__(self, dtype: torch.dtype, device: torch.device | None, layers: list[Taken]):
        self.dtype, self.device, self._layers = dtype, device, layers

    def __deepcopy__(self, memo: object) -> Decoded:
        return self

    def shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """As :meth:`Loader.shapes`."""
        return shapes_of(self._layers[i])

    def take(self, i: int) -> Taken:
        """As :meth:`Loader.take`."""
        found = self._layers[i]  # a copy: states are updated in place
        return found._replace(parts={n: t.clone() for n, t in found.parts.items()})

    def recover(self, i: int, error: KVZipError) -> Taken:
        raise error


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

    def __reduce__(self) -> tuple[object, ...]:
        """As :meth:`Loader.__reduce__`."""
        layers = [self.take(i) for i in range(len(self.windows))]
        return Decoded, (self.dtype, self.device, layers)

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
        parts = {}
        for name, one in like.parts.items():
            shape = list(one.shape)
            shape[0] = len(taken)
            if name in TOKEN_PARTS:
                shape[-2] = width
            parts[name] = one.new_zeros(shape)
            for row, found in enumerate(taken):
                if found is None:
                    continue
                mine = found.parts[name][0]
                if name in TOKEN_PARTS:
                    parts[name][row][..., width - mine.shape[-2] :, :] = mine
                elif mine.shape == one.shape[1:]:
                    parts[name][row] = mine
                else:
                    raise UnsupportedError(
                        f"layer {i}: {name} is of another shape in each prompt of the batch, "
                        f"{list(mine.shape)} and {list(one.shape[1:])}: load each prompt by itself"
                    )
        return Taken(parts, self._witnesses(taken))

    def _witnesses(self, taken: Sequence[Taken | None]) -> tuple[torch.Tensor, ...] | None:
        """Those of all rows, NaN where a row has none."""
        known = next((t.witness for t in taken if t is not None and t.witness is not None), None)
        if known is None:
            return None
        wholes = tuple(torch.full((len(taken), *one.shape[1:]), torch.nan) for one in known)
        for row, found in enumerate(taken):
            if found is not None and found.witness is not None:
                for whole, mine in zip(wholes, found.witness, strict=True):
                    whole[row] = mine[0].float()
        return wholes

    def shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """As :meth:`Loader.shapes`."""
        found = next((row.shapes(i) for row in self.rows if isinstance(row, Loader)), None)
        if found is None:
            found = shapes_of(next(row.load(i) for row in self.rows if row is not None))
        return {name: (len(self.rows), *shape[1:]) for name, shape in found.items()}


AnyLoader: TypeAlias = Loader | BatchLoader | Decoded
"""What gives the layers of a cache what they start with."""


def shapes_of(taken: Taken) -> dict[str, tuple[int, ...]]:
    """The shape of each part, of integers as such and not as their bytes."""
    return {
        name: tuple(tensor.shape[: -1 if tensor.dtype == torch.uint8 else None])
        for name, tensor in taken.parts.items()
    }
