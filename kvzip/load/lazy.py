"""Layers of a transformers `Cache` that decode themselves when a model first looks at them.

A loader gives the keys and values of one layer after the other, decoded ahead of their use. What
the model is fed first is checked against the document, see `kvzip.load.hf.load_cache`.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from threading import Lock
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvzip import dtypes
from kvzip.codecs.native.cuda.device import get_device
from kvzip.container import Reader
from kvzip.errors import KVZipError, UnsupportedError
from kvzip.load.witness import OtherWeights, distance, judge, not_continued, same_key
from kvzip.snapshot import Snapshot
from kvzip.workers import Workers

_log = logging.getLogger("kvzip.load")


TOGETHER = 4
"""Layers that are decoded in one call, and that a model gets at once. When a model is done with
what it has, its OpenMP threads go on spinning for milliseconds, on cores that the decoder needs; so
it is to wait seldom."""


class Taken(NamedTuple):
    """What one layer of a cache starts with, [batch, heads, tokens, dim]."""

    keys: Any
    values: Any
    witness: Any = None
    """Each row's key and value at the next position, NaN in rows where none are known; or None."""


class Recovery:
    """Computes a cache's tokens anew when what is stored fails; says so once."""

    def __init__(self, prefill: Callable[[], list[Taken]]):
        self._prefill, self._lock = prefill, Lock()
        self._layers: list[Taken] | None = None

    @property
    def done(self) -> bool:
        """Whether the tokens have been computed."""
        return self._layers is not None

    def layers(self, error: Exception | None = None) -> list[Taken]:
        """All layers, computed; `error`: why, unless that was told already."""
        with self._lock:
            if self._layers is None:
                if error is not None:
                    tell(error)
                self._layers = self._prefill()
            return self._layers

    def take(self, i: int, load: Callable[[int], Taken]) -> Taken:
        """Layer i, loaded; or computed, if it fails or another one has."""
        if self.done:
            return self.layers()[i]
        try:
            return load(i)
        except KVZipError as error:
            return self.layers(error)[i]


def tell(error: Exception) -> None:
    """Warn that what is stored is not used."""
    _log.warning("the cache is computed anew, not loaded: %s", error)


@contextmanager
def naming(row: int) -> Iterator[None]:
    """Errors say which document of a batch they are about."""
    try:
        yield
    except KVZipError as error:
        raise type(error)(f"the document of prompts[{row}]: {error}") from error
    except OSError as error:
        error.strerror = f"the document of prompts[{row}]: {error.strerror or error}"
        raise


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
        device: Any,
        threads: int,
    ):
        self.source, self.spans, self.held, self.threads = source, spans, held, threads
        self.dtype = getattr(torch, dtypes.get(source.layout.dtype).torch)
        self.device = None if device is None else torch.device(device)
        self.decoder: Any = None
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

    def __deepcopy__(self, memo: Any) -> Loader:
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
        """As `take`; never recovers."""
        first = i - i % TOGETHER
        if self._process != os.getpid():  # a fork takes along neither threads nor what they do
            self._process, self._lock, self._ahead = os.getpid(), Lock(), {}
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

    def _from_reader(self, reader: Reader, layers: list[int], span: tuple[int, int]) -> Any:
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

    def _decoder(self, reader: Reader) -> Any:
        """The GPU that the layers are for, if it can decode them itself."""
        if self.decoder is None and self.device is not None and self.device.type == "cuda":
            if not reader.codec.on_device:
                return None
            try:
                self.decoder = get_device(self.device)
            except UnsupportedError:  # without what that needs, the CPU decodes
                return None
        return self.decoder

    def _taken(self, i: int, pair: Sequence[Any]) -> Taken:
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

    def __init__(self, recovery: Recovery, dtype: Any, device: Any):
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

    def __deepcopy__(self, memo: Any) -> BatchLoader:
        return self

    @property
    def device(self) -> Any:
        return self._device

    @device.setter
    def device(self, device: Any) -> None:
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


# --- layers that decode themselves -----------------------------------------------------------


class _LazyLayer:
    """Knows its length; decodes when its keys or values are first looked at.

    Mixed into the layers of transformers, whose own methods then decode as they go. The state
    before the first update is `_fresh`: until then what is fed can be wrong, and is checked.
    """

    _loader: Any = None
    """A Loader or BatchLoader; None once it has given what the layer starts with."""
    _source: Any = None
    """The same, until the first update is admitted."""
    _fresh = False
    _keys: Any = None
    _values: Any = None
    _witness: Any = None
    """The document's key and value at the position after the last that is kept, or None."""
    _rearranged = False
    """Whether the rows are no longer the document's, each as often as any other."""
    _prompt_length: int | None = None
    """Layer 0: tokens of the prompt, the cached ones included, fed in chunks of `_chunk` if that is
    not None."""
    _chunk: int | None = None
    _unfed = 0
    """Layer 0: tokens of the prompt that are still to come, where it is fed in chunks."""
    _rotated = False
    """Layer 0: whether its keys tell the positions of their tokens."""
    _distances: dict[int, Any] | None = {}  # noqa: RUF012 - each cache has one of its own
    """How far from their witnesses the layers of a cache were found, by layer: shared by them. None
    where nobody wants to know."""
    _last = False

    def __init__(self, loader: Any, index: int, length: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._loader = self._source = loader
        self._index, self._length, self._fresh = index, length, True
        self.dtype, self.device = loader.dtype, loader.device or torch.device("cpu")
        self.is_initialized = True
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = length

    def _decoded(self) -> None:
        if self._loader is not None:
            self._keys, self._values, self._witness = self._loader.take(self._index)
            self._loader = None

    @property
    def keys(self) -> Any:
        """[batch, heads, tokens, dim], or None after `reset`."""
        self._decoded()
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._keys = keys

    @property
    def values(self) -> Any:
        """[batch, heads, tokens, dim], or None after `reset`."""
        self._decoded()
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._values = values

    def get_seq_length(self) -> int:
        return self._length if self._loader is not None else cast(Any, super()).get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not query_length:  # a prompt of half the cache's tokens
            raise not_continued(self.get_seq_length())
        return cast(Any, super()).get_mask_sizes(query_length)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self._fresh:
            self._admit(key_states, value_states)
        if self._unfed:
            self._check_fed(key_states.shape[-2], self._unfed)
        if self._rotated:
            self._check_goes_on(key_states)
        if self._prompt_length is not None and self._chunk is not None:
            left = self._prompt_length - self.get_seq_length() - key_states.shape[-2]
            self._unfed = max(0, left)
        return cast(Any, super()).update(key_states, value_states, *args, **kwargs)

    def _check_fed(self, fed: int, left: int) -> None:
        """Raise unless so many tokens are fed as are left of the prompt, or a chunk of them."""
        if fed != (left if self._chunk is None else min(left, self._chunk)):
            chunked = "" if self._chunk is None else f", in chunks of {self._chunk}"
            raise KVZipError(
                f"the model was fed {fed} tokens after {self.get_seq_length()} cached ones, not "
                f"the rest of the {self._prompt_length} of prompt={chunked}: give `generate` the "
                "same ids (or the rest of them with an attention mask for all); if it is to feed "
                "them in chunks, name the same prefill_chunk_size= here"
            )

    def _check_goes_on(self, key_states: Any) -> None:
        """Raise if what is fed is in the cache already.

        `generate` feeds ``ids[:, length - len(ids):]`` of ids that are no longer than a cache of
        that length: f tokens, the first at position (length - f) / 2. Their keys are those that lie
        there, and no other positions' are.
        """
        length, fed = self.get_seq_length(), key_states.shape[-2]
        held, begin = self.keys, (length - fed) // 2
        if (fed == 1 and key_states.is_cuda) or fed > length or (length - fed) % 2:
            return  # (on a GPU each new token would wait for this)
        # A layer that slides holds the last positions only.
        first = length - held.shape[-2]
        skipped = max(0, first - begin)
        there = held[:, :, begin + skipped - first :][:, :, :1]
        if skipped >= fed or not there.shape[-2] or key_states.shape[0] % there.shape[0]:
            return
        here = key_states[:, :, skipped : skipped + 1]
        if same_key(here, _repeated(there, key_states)):
            raise KVZipError(
                f"the cache holds {length} tokens, and the model is fed what is among them "
                f"already, from position {begin}: the prompt must be longer than its cache. After "
                "`generate` a cache holds the tokens that were generated, too: load it anew for "
                "another prompt"
            )

    def _admit(self, key_states: Any, value_states: Any) -> None:
        """Check the first states that are fed, and get ready for them."""
        position, fed = self.get_seq_length(), key_states.shape[-2]
        if self._prompt_length is not None:
            self._check_fed(fed, self._prompt_length - position)
        if self._source.device is None:
            self._source.device = key_states.device
        try:
            pair = self._fitting(key_states, value_states)
        except KVZipError as error:
            if not self.restartable or not self._source.recovers or position != self._length:
                raise
            anew = self._source.recover(self._index, error)
            self._keys, self._values, self._witness = anew
            self._loader, self.dtype = None, self._keys.dtype
            pair = self._fitting(key_states, value_states)
        if self._last:
            try:
                judge(self._distances, position, key_states.dtype)
            except OtherWeights as error:
                error.layer, error.source = self, self._source  # for `watch`
                raise
        cast(Any, super()).lazy_initialization(key_states, value_states)  # devices and dtype
        self._keys, self._values = pair
        self._fresh, self._witness, self._source = False, None, None

    def _fitting(self, key_states: Any, value_states: Any) -> list[Any]:
        """Keys and values for as many rows as are fed, if what is fed goes on from them."""
        if key_states.dtype != self.dtype:
            raise UnsupportedError(
                f"the file holds {self.dtype}, the model computes {key_states.dtype}: "
                f"load the model with dtype={self.dtype}"
            )
        pair = []
        for mine, new in ((self.keys, key_states), (self.values, value_states)):
            if mine.shape[1::2] != new.shape[1::2] or new.shape[0] % mine.shape[0]:
                raise KVZipError(
                    f"layer {self._index} holds [batch, heads, tokens, dim] = {list(mine.shape)}, "
                    f"the model feeds {list(new.shape)}"
                )
            pair.append(_repeated(mine, new))
        if self._witness is not None:
            states = key_states, value_states
            witness = [_repeated(*each) for each in zip(self._witness, states, strict=True)]
            if self._index == 0 and not same_key(key_states[:, :, :1], witness[0]):
                raise not_continued(self.get_seq_length())
            if self._distances is not None:
                self._distances[self._index] = distance(states, witness)
        return pair

    @property
    def restartable(self) -> bool:
        """Whether the rows are the document's, or each of them as often as any other."""
        return not self._rearranged

    def trust(self) -> None:
        """Do not tell other weights by what the model computes next."""
        self._distances = None

    def restart(self, source: Any, taken: Taken) -> None:
        """Be as new, with other keys and values than were loaded."""
        self._loader, self._source, self._fresh = None, source, True
        if self._distances is not None:
            self._distances.clear()
        self._keys, self._values, self._witness = taken
        self.dtype = taken.keys.dtype
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = self._length

    def reset(self) -> None:
        self._loader = self._source = self._witness = self._prompt_length = None
        self._fresh = self._rotated = False
        self._unfed = 0
        cast(Any, super()).reset()

    # Before the first update, the witness goes the way of the keys.

    def crop(self, tokens_to_remove: int) -> None:
        before = self.keys, self.values
        cast(Any, super()).crop(tokens_to_remove)
        if self._witness is not None and tokens_to_remove:
            self._witness = tuple(each[:, :, tokens_to_remove:][:, :, :1] for each in before)

    def reorder_cache(self, beam_idx: Any) -> None:
        cast(Any, super()).reorder_cache(beam_idx)
        self._rearranged = self._fresh
        if self._witness is not None:
            self._witness = tuple(w.index_select(0, beam_idx.to(w.device)) for w in self._witness)

    def batch_repeat_interleave(self, repeats: int) -> None:
        cast(Any, super()).batch_repeat_interleave(repeats)
        if self._witness is not None:
            self._witness = tuple(w.repeat_interleave(repeats, dim=0) for w in self._witness)

    def batch_select_indices(self, indices: Any) -> None:
        cast(Any, super()).batch_select_indices(indices)
        self._rearranged = self._fresh
        if self._witness is not None:
            self._witness = tuple(w[indices, ...] for w in self._witness)


class FullLayer(_LazyLayer, DynamicLayer):
    pass


class SlidingLayer(_LazyLayer, DynamicSlidingWindowLayer):
    pass


def _repeated(mine: Any, new: Any) -> Any:
    """`mine` where `new` is, with every row repeated to its batch."""
    times = new.shape[0] // mine.shape[0]
    mine = mine.to(new.device)
    return mine if times == 1 else mine.repeat_interleave(times, dim=0)
