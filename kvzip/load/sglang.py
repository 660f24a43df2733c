"""kvzip as a storage backend of SGLang's HiCache, through its backend of type "dynamic":

.. code-block:: sh

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
      "backend_name": "kvzip", "module_path": "kvzip.load.sglang", "class_name": "KvzipStorage",
      "interface_v1": 1, "url": "s3://bucket/hicache"}'

A page is one .kvz object under the URL (a folder or a bucket), written once, whole or not at all,
under SGLang's own hash of its tokens. Keys and values are put in one order before, so hosts whose
memory is laid out in different ways read each other's pages. What cannot be read, for whatever
reason, is a miss, which SGLang computes; each kind of failure is logged once.

The interface is that of SGLang 0.5.23, ``sglang.srt.mem_cache.hicache_storage``; this module
imports without it. :class:`Settings` has all that can be set.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import lru_cache, partial
from itertools import repeat, takewhile
from threading import Event, Thread, local
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote
from weakref import WeakKeyDictionary

from kvzip import metrics
from kvzip.codec import get_codec
from kvzip.errors import KVZipError, StoreError
from kvzip.identity.checkpoint import changed, checkpoint_fingerprint, checkpoint_folder
from kvzip.load import chunks
from kvzip.load.place import Place, converted, folder_name
from kvzip.options import integer
from kvzip.parsing import from_json
from kvzip.snapshot import Origin
from kvzip.workers import Lock, Workers

if TYPE_CHECKING:
    import torch
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorage as _Base,
    )
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorageConfig,
        HiCacheStorageExtraInfo,
        PoolName,
        PoolTransfer,
        PoolTransferResult,
    )
    from sglang.srt.mem_cache.pool_host import HostKVCache
else:
    try:
        from sglang.srt.mem_cache.hicache_storage import HiCacheStorage as _Base
    except ImportError:
        _Base = object

_log = logging.getLogger("kvzip.sglang")

_PATIENCE = 2.0
"""Seconds that SGLang waits for the weights to be read, before pages are computed."""

T = TypeVar("T")
_OnPage: TypeAlias = "Callable[[str, int, HostKVCache, int | None], bool]"
"""What is done with a page: its key, the index of its first token, the pool that it is in, and the
position of that token, where it is known."""

# For each layout of SGLang's host memory, the axes of a page after those of keys and values:
# layer, token (of the page), head. The last axis is the head's dimension.
_AXES = {"layer_first": "lth", "page_first": "tlh", "page_first_direct": "lth", "page_head": "htl"}


def page_of(tensor: torch.Tensor, pool: HostKVCache | None) -> torch.Tensor:
    """A page of a host pool, flat or in the pool's layout, as a view [2, layers, heads, tokens,
    dim]; where keys and values are not told apart (MLA's latents, keys alone), [1, layers, tokens,
    channels]; any other, as an indexer's with its scales, as it is, without axes of size 1."""
    layout, tokens = getattr(pool, "layout", None), getattr(pool, "page_size", 1)
    axes = _AXES.get(str(layout))
    layers = getattr(pool, "layer_num", 0)
    heads, dim = getattr(pool, "head_num", 0), getattr(pool, "head_dim", 0)
    count = {"l": layers, "t": tokens, "h": heads}
    if axes and tensor.numel() == 2 * layers * tokens * heads * dim:
        page = tensor if tensor.ndim == 1 else tensor.squeeze(1) if tensor.ndim == 6 else tensor
        page = page.view(2, *(count[a] for a in axes), dim) if page.ndim == 1 else page
        return page.permute(0, *(1 + axes.index(a) for a in "lht"), 4)
    if axes and layers and tensor.numel() % (layers * tokens) == 0:
        order = axes.replace("h", "")
        sizes = tuple(count[a] for a in order)
        page = tensor.view(*sizes, -1) if tensor.ndim == 1 else tensor
        if page.shape[0] == 1 and tuple(page.shape[1:3]) == sizes:
            page = page[0]
        if page.ndim > 2 and tuple(page.shape[:2]) == sizes:
            page = page.view(*sizes, -1)
            return page.permute(*(order.index(a) for a in "lt"), 2)[None]
    return tensor.squeeze()


class Settings(Place, frozen=True, forbid_unknown_fields=True):
    """The backend's part of ``--hicache-storage-backend-extra-config``."""

    timeout: float = 3.0
    retries: int = 1
    codec: str | dict[str, Any] = "channel"
    """What pages are stored with; channel in place of one that needs a profile."""
    workers: int = 4
    """Pages at once."""
    model: str | None = None
    """Where the weights lie, and"""
    revision: str | None = None
    """what pins them, where the server's arguments do not say it."""
    backend_name: Any = None
    module_path: Any = None
    class_name: Any = None
    interface_v1: Any = None
    allocator: Any = None
    hicache_storage_pass_prefix_keys: Any = None
    """The last six are SGLang's own, which may leave them here."""


class KvzipStorage(_Base):
    """SGLang's `HiCacheStorage` on a folder or bucket of .kvz objects."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: object = None):
        where = "--hicache-storage-backend-extra-config"
        told = converted(where, dict(storage_config.extra_config or {}), Settings)
        self.codec = chunks.codec_for_chunks(get_codec(told.codec), _log)
        self.bucket = told.objects()
        self.model = str(storage_config.model_name or "")
        self._ranks = _ranks(storage_config)
        self._alike = bool(storage_config.is_mla_model) and storage_config.tp_size > 1
        self._weights = _Weights(told.model, told.revision, self.model)
        with suppress(KVZipError):  # what lies there now is what the server has loaded
            self._weights.pinned(wait=False)
        # A recurrent state and a draft's heads are cut over ranks even where MLA's pages are not.
        self._rank_suffix = f".tp{storage_config.tp_rank}of{storage_config.tp_size}"
        self._pool = Workers(integer("workers", told.workers, 1, 1024), "kvzip-sglang")
        self._told: set[str] = set()
        self._failed: set[str] = set()
        """Paths of pages that are there and could not be loaded."""
        self._gives_copies: WeakKeyDictionary[HostKVCache, bool] = WeakKeyDictionary()
        self._storing = local()
        """Of each of SGLang's threads that store: for which weights it has."""
        self.mem_pool_host: HostKVCache | None = None
        self.registered_pools: dict[PoolName, HostKVCache] = {}

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: HostKVCache, host_pool_name: PoolName) -> None:
        self.registered_pools[host_pool_name] = host_pool
        if self._cut_besides(host_pool):
            _log.warning(
                "no pages are loaded from %s: SGLang has the first rank alone store the pool %s, "
                "whose heads are cut over ranks; serve without that draft model, or from one rank",
                self.bucket.url,
                host_pool_name,
            )

    # --- one page --------------------------------------------------------------------------

    @property
    def scope(self) -> str:
        """Where the pages of these weights and of this rank lie."""
        return self._scope(self._weights.pinned())

    def _scope(self, weights: str) -> str:
        parts = [folder_name(self.model or "model"), folder_name(weights, "+"), *self._ranks]
        return "/".join(filter(None, parts))

    def _path(self, key: str, pool: HostKVCache | None, weights: str | None = None) -> str:
        """Where a page is, by default of the weights that the server has now. The dtype is in the
        path: a page in another can be there beside it."""
        dtype = str(getattr(pool, "dtype", "") or "any").removeprefix("torch.")
        if dtype == "uint8":  # as SGLang keeps every format of 8 bits
            dtype = "-".join([dtype, *self._weights.formats()])
        scope = self.scope if weights is None else self._scope(weights)
        return f"{scope}/{dtype}/{quote(key, safe='.')}.kvz"

    def _try(self, do: Callable[[], bool], key: str, dead: Event | None = None) -> bool:
        """What `do` gives, or False after a failure, which is told once for each kind. `dead`: of
        pages that are asked for together, whether the store has failed: then nothing is done. One
        that does not answer would else hold up SGLang for the time of each page, and SGLang gives
        its threads 10 seconds to end."""
        if dead is not None and dead.is_set():
            return False
        try:
            return do()
        except Exception as error:  # any that got out would be an error of SGLang's
            if dead is not None and isinstance(error, StoreError):
                dead.set()
            self._tell(type(error).__name__, error, key)
            metrics.recomputed("sglang", error)
            return False

    def _tell(self, kind: str, why: object, key: str) -> None:
        """Warn that pages are computed, once for each kind of trouble; `key`: the first page."""
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("page %s of %s is computed instead: %s", key, self.bucket.url, why)

    def _load(self, key: str, tensor: torch.Tensor, pool: HostKVCache | None) -> bool:
        """Fill a page. Raises KVZipError and OSError."""
        path = self._path(key, pool)
        data = self.bucket.get(path, chunks.most_stored(tensor.nbytes))
        found = "miss" if data is None else "hit"
        metrics.count("lookups", where="sglang", result=found)
        if data is None:
            return False
        try:
            chunks.decode(data, page_of(tensor, pool))
        except Exception:
            self._failed.add(path)
            raise
        return True

    def _store(
        self,
        weights: str,
        key: str,
        tensor: torch.Tensor,
        pool: HostKVCache | None,
        first: int | None = None,
    ) -> bool:
        """Store a page that is not there. Raises KVZipError and OSError."""
        path, page = self._path(key, pool, weights), page_of(tensor, pool)
        if not self._there(path):
            turned, ropes = None, tuple[dict[str, Any], ...]()
            if first is not None:
                layers, ropes = self._weights.ropes()
                start = getattr(pool, "start_layer", 0)
                turned = chunks.Turned(first, layers[start : start + getattr(pool, "layer_num", 0)])
            origin = Origin(model=self.model, revision=weights, rope=ropes)
            data = chunks.encode(page, self.codec, 1, origin, turned)
            self.bucket.put(path, data, create=False)
            self._failed.discard(path)
        return True

    def _stored_for(self, key: str) -> str | None:
        """Which weights pages are of that SGLang has stored now; None where that is not known. It
        takes other weights while pages of those before wait to be stored. When it empties its
        caches then, it ends the thread that stores, and begins another one; the same one may have
        pages of before."""
        found = None

        def same() -> bool:
            nonlocal found
            now = self._weights.pinned()
            if now == self._storing.__dict__.setdefault("weights", now):
                found = now
            else:
                why = "SGLang has taken other weights, and not emptied its caches (flush_cache)"
                self._tell("other weights", f"{why}: pages may be of those before", key)
            return found is not None

        self._try(same, key)
        return found

    def _each(self, do: Callable[..., T], *arguments: Iterable[object]) -> list[T]:
        return list(self._pool.map(do, *arguments))

    # --- pages as flat tensors -------------------------------------------------------------

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: object = None
    ) -> torch.Tensor | None:
        """Fill `target_location`, a flat page; it, or None for a miss."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self,
        keys: Sequence[str],
        target_locations: Sequence[torch.Tensor | None] | None = None,
        target_sizes: object = None,
    ) -> list[torch.Tensor | None]:
        dead = Event()

        def fill(key: str, page: torch.Tensor | None) -> torch.Tensor | None:
            if page is None:
                return None
            there = self._try(lambda: self._load(key, page, self.mem_pool_host), key, dead)
            return page if there else None

        return self._each(fill, keys, target_locations or [None] * len(keys))

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: torch.Tensor | None = None,
        target_sizes: object = None,
    ) -> bool:
        page = target_location if value is None else value
        return page is not None and self.batch_set([key], [page])

    def batch_set(
        self,
        keys: Sequence[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: Sequence[torch.Tensor] | None = None,
        target_sizes: object = None,
    ) -> bool:
        pages, dead = target_locations if values is None else values, Event()
        weights = self._stored_for(next(iter(keys), ""))
        if pages is None or weights is None:
            return False

        def store(key: str, page: torch.Tensor) -> bool:
            do = partial(self._store, weights, key, page, self.mem_pool_host)
            return self._try(do, key, dead)

        return all(self._each(store, keys, pages))

    def exists(self, key: str) -> bool:
        return self._has(key, self.mem_pool_host)

    def _has(self, key: str, pool: HostKVCache | None, dead: Event | None = None) -> bool:
        return self._try(lambda: self._there(self._path(key, pool)), key, dead)

    def _there(self, path: str) -> bool:
        """Whether a page is there that is worth loading: not empty (a power cut can leave a file
        so), and none that failed."""
        if path in self._failed:
            return False
        found = self.bucket.head(path)
        return found is not None and found.size > 0

    def batch_exists(self, keys: Sequence[str], extra_info: object = None) -> int:
        """How many of the first keys are there, without a gap."""
        return self._leading(keys, self.mem_pool_host)

    def _leading(self, keys: Sequence[str], pool: HostKVCache | None) -> int:
        """How many of the first keys a pool has pages of. Those behind the first that it has not
        are not asked for, but for a few that threads have begun with."""
        dead = Event()
        there = self._pool.map(lambda key: self._has(key, pool, dead), keys)
        return sum(1 for _ in takewhile(bool, there))

    # --- pages in the host's memory --------------------------------------------------------

    def _pages(
        self,
        do: _OnPage,
        keys: Sequence[str],
        indices: torch.Tensor | None,
        pool: HostKVCache | None,
        before: Sequence[str] | None = None,
    ) -> list[bool]:
        """Do it for each page, the first of which tokens are at `indices`; False where none are.
        `before`: the pages before these, from the sequence's first on, where SGLang tells them."""
        size = getattr(pool, "page_size", 1) or 1
        if pool is None or indices is None or len(indices) != len(keys) * size:
            return [False] * len(keys)

        dead = Event()

        def page(key: str, start: int, first: int | None) -> bool:
            return self._try(lambda: do(key, start, pool, first), key, dead)

        begin = 0 if before is None else len(before) * size
        firsts = repeat(None) if before is None else range(begin, begin + len(indices), size)
        return self._each(page, keys, indices[::size].tolist(), firsts)

    def _copies(self, pool: HostKVCache, start: int) -> bool:
        """Whether what a pool gives as a page is a copy, as of a Mamba state's several tensors."""
        if pool not in self._gives_copies:
            first, again = (pool.get_data_page(start, flat=False) for _ in range(2))
            self._gives_copies[pool] = first.data_ptr() != again.data_ptr()
        return self._gives_copies[pool]

    def _load_at(self, key: str, start: int, pool: HostKVCache, _: int | None) -> bool:
        """Fill the page of a pool that begins at an index."""
        page = pool.get_data_page(start, flat=False)
        loaded = self._load(key, page, pool)
        if loaded and self._copies(pool, start):
            pool.set_from_flat_data_page(start, page)
        return loaded

    def _store_at(
        self, weights: str, key: str, start: int, pool: HostKVCache, first: int | None
    ) -> bool:
        """Store the page of a pool that begins at an index."""
        return self._store(weights, key, pool.get_data_page(start, flat=False), pool, first)

    def batch_get_v1(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: object = None
    ) -> list[bool]:
        return self._pages(self._load_at, keys, host_indices, self.mem_pool_host)

    def batch_set_v1(
        self,
        keys: Sequence[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        weights = self._stored_for(next(iter(keys), ""))
        if weights is None:
            return [False] * len(keys)
        before = getattr(extra_info, "prefix_keys", None)
        return self._pages(
            partial(self._store_at, weights), keys, host_indices, self.mem_pool_host, before
        )

    # --- pages of several pools ------------------------------------------------------------

    def _component(self, key: str, name: PoolName | str) -> str:
        name = str(getattr(name, "value", name))
        if name == "kv":
            return key
        cut = name == "mamba" or self._cut_besides(self.registered_pools.get(name))
        return f"{key}.{name}" + (self._rank_suffix if cut else "")

    def _cut_besides(self, pool: HostKVCache | None) -> bool:
        """Whether ranks hold different heads in a pool beside pages that all ranks hold alike."""
        return self._alike and hasattr(pool, "head_num")

    def _batch_v2(
        self,
        do: _OnPage,
        transfers: Iterable[PoolTransfer],
    ) -> dict[PoolName, list[bool]]:
        results = {}
        for transfer in transfers:
            keys = [self._component(key, transfer.name) for key in transfer.keys or []]
            pool = self.registered_pools.get(transfer.name)
            results[transfer.name] = self._pages(do, keys, transfer.host_indices, pool)
        return results

    def batch_get_v2(
        self, transfers: Iterable[PoolTransfer], extra_info: object = None
    ) -> dict[PoolName, list[bool]]:
        return self._batch_v2(self._load_at, transfers)

    def batch_set_v2(
        self, transfers: Iterable[PoolTransfer], extra_info: object = None
    ) -> dict[PoolName, list[bool]]:
        transfers = list(transfers)
        weights = self._stored_for(next((key for t in transfers for key in t.keys or []), ""))
        if weights is None:
            return {t.name: [False] * len(t.keys or []) for t in transfers}
        return self._batch_v2(partial(self._store_at, weights), transfers)

    def batch_exists_v2(
        self,
        keys: Sequence[str],
        pool_transfers: Iterable[PoolTransfer] | None = None,
        extra_info: object = None,
    ) -> PoolTransferResult:
        """The lengths of prefix that all pools can restore; see SGLang's docstring.

        A pool of "block_groups" is a second form of pages that are there besides: it never limits
        the prefix, and no verdict is given of it. A policy that is not known may ask for anything,
        so nothing is restored with it.
        """
        from sglang.srt.mem_cache.hicache_storage import PoolTransferResult

        pages = self.batch_exists(keys)
        hits = {"kv": pages} if pages else {}
        lengths = list(range(1, pages + 1))
        for transfer in pool_transfers or []:
            if not lengths:
                break
            policy = str(getattr(transfer.hit_policy, "value", transfer.hit_policy))
            if policy == "block_groups":
                continue
            pool = self.registered_pools.get(transfer.name)
            names = [self._component(key, transfer.name) for key in keys[:pages]]
            if policy == "all_pages":
                good = set(range(1, self._leading(names, pool) + 1))
            elif policy == "trailing_pages":
                dead = Event()
                here = self._each(lambda n, pool=pool, dead=dead: self._has(n, pool, dead), names)
                last = max(1, len(transfer.keys or []))
                good = {n for n in range(1, pages + 1) if all(here[max(0, n - last) : n])}
            else:
                # An error would end the thread in which SGLang looks pages up, for good.
                why = f"hit policy {policy!r} of {transfer.name} is not known"
                self._tell(policy, why, next(iter(keys), ""))
                good = set[int]()
            if good:
                hits[transfer.name] = max(good)
            lengths = [n for n in lengths if n in good]
        return PoolTransferResult(lengths[-1] if lengths else 0, hits, lengths)

    # --- all of them -----------------------------------------------------------------------

    def clear(self) -> None:
        """Delete all pages of this model and rank."""
        self._each(self.bucket.delete, [meta.path for meta in list(self.bucket.under(self.scope))])

    def close(self) -> None:
        self._pool.shutdown()


class _Ropes(NamedTuple):
    """What turns a model's keys."""

    layers: Sequence[int | None] = ()
    """Of each layer, which of `parameters`; None: its keys are not turned."""
    parameters: tuple[dict[str, Any], ...] = ()


@lru_cache(maxsize=4)
def _ropes_of(model: str, commit: str | None, overrides: str) -> _Ropes:
    """Of a model's checkpoint. `overrides`: what its config is changed by, as JSON."""
    folder = checkpoint_folder(model, commit)
    # The config may be one that transformers, which need not be here, does not know.
    with suppress(ImportError, OSError, ValueError, KVZipError):
        from transformers import AutoConfig

        from kvzip.load.config import layer_kinds, rope_of_config

        if folder is not None:
            config = AutoConfig.from_pretrained(folder, **from_json(overrides, dict[str, Any]))
            return _Ropes([kind.rope for kind in layer_kinds(config)], rope_of_config(config))
    return _Ropes()


class _Weights:
    """Which weights the server computes with: those of its checkpoint, and what it was told to
    change. SGLang does not show them, but says what it loaded, and loads others while it runs.

    `model`: where they lie, and `revision`: what pins them, from the backend's settings; `name`:
    what SGLang calls the model.
    """

    def __init__(self, model: str | None, revision: str | None, name: str):
        self._model, self._revision, self._name = model, revision, name
        self._known: tuple[tuple[str, ...], str] | None = None
        self._where: tuple[str, str | None, str] = "", None, "{}"
        self._first = ""
        self._reading: tuple[tuple[str, ...], float, Future[str]] | None = None
        self._lock = Lock()

    def pinned(self, wait: bool = True) -> str:
        """The checkpoint's fingerprint with the changes; "" if nothing pins them.

        Raises KVZipError while the checkpoint is being read, which may take minutes: SGLang gives
        its threads 10 seconds to end. `wait`: for small ones, a little.
        """
        server = _server()
        told: dict[str, object] = {
            name: str(value)
            for name, usual in _TOLD.items()
            if (value := server[name]) and value != usual
        }
        loaded = str(server["model_path"] or "")
        state = loaded, str(server["loads"]), *(f"{name}={told[name]}" for name in sorted(told))
        with self._lock:
            self._first = self._first or loaded
            if loaded != self._first:  # the server took other weights while it ran
                told["model_path"] = loaded
            model = loaded if "model_path" in told else self._model or loaded or self._name
            if self._known is not None and self._known[0] == state:
                return self._known[1]
            if self._reading is None or self._reading[0] != state:
                read = partial(self._read, server, told, model)
                self._reading = state, time.monotonic() + _PATIENCE, _in_a_thread(read)
            _, until, reading = self._reading
        try:
            found = reading.result(max(0.0, until - time.monotonic()) if wait else 0.0)
        except TimeoutError:
            raise KVZipError(f"the weights of {model!r} are being read, to know them by") from None
        except BaseException:
            with self._lock:
                self._reading = None  # it is tried again
            raise
        with self._lock:
            self._known = state, found
            self._where = model, server["revision"], server["json_model_override_args"] or "{}"
        return found

    def _read(self, server: Mapping[str, Any], told: dict[str, object], model: str) -> str:
        told |= _contents(server)
        fingerprint = self._fingerprint(model, server["revision"])
        if fingerprint == (self._revision or "") and server["loads"]:
            told["loads"] = server["loads"]  # of the same path, which may hold others now
        return changed(fingerprint, told)

    def formats(self) -> list[str]:
        """What numbers of 8 bits are in the server's caches, as far as it was told and what its
        machine makes of that."""
        server = _server()
        told = [folder_name(str(server[name])) for name in _FORMAT if server[name]]
        return [*told, "fnuz"] if _fnuz() else told

    def ropes(self) -> _Ropes:
        """What the checkpoint's config says of RoPE, which the server may have been told to
        change; nothing where there is none on this machine."""
        self.pinned()
        return _ropes_of(*self._where)

    def _fingerprint(self, model: str, commit: str | None) -> str:
        if self._revision is not None:
            return self._revision
        try:
            return checkpoint_fingerprint(model, commit)
        except KVZipError as error:
            _log.warning(
                'pages are told apart by the name %r alone (%s): set "model" to where its weights '
                'lie, or "revision", in the extra config, and change that with them',
                self._name,
                error,
            )
            return ""


_TOLD: dict[str, object] = {
    "quantization": None,
    "modelopt_quant": None,
    "quantize_and_serve": False,
    "rl_quant_profile": None,
    "quantization_param_path": None,
    "load_format": "auto",
    "model_loader_extra_config": "{}",
    "json_model_override_args": "{}",
    "lora_paths": None,
    "weight_version": "default",
    "speculative_draft_model_path": None,
    "speculative_draft_model_revision": None,
    "speculative_draft_model_quantization": None,
}
"""What a server can be told that makes other pages of the same checkpoint, by SGLang's names, and
where it makes none. (A draft's layers lie in pages beside the model's.)"""
_FORMAT = "kv_cache_dtype", "speculative_draft_kv_cache_dtype"
_SAYS = "model_path", "revision", *_TOLD, *_FORMAT


def _server() -> dict[str, Any]:
    """What the server in this process goes by now, and how often it loaded weights while it ran;
    nothing of it is set where there is no server.

    Raises KVZipError where SGLang does not say it: pages could be another model's.
    """
    found = dict.fromkeys(_SAYS) | _TOLD | {"loads": 0}
    if _Base is object:
        return found
    try:
        from sglang.srt.runtime_context import get_context

        context = get_context()
        if not context.is_config_namespace_published("model"):
            return found
        found |= {name: context.config_leaf(name) for name in _SAYS}
        found["loads"] = sum("model_path" in fields for _, fields in context.overrides_log())
    except (ImportError, AttributeError, ValueError) as error:
        raise KVZipError(
            "this release of SGLang does not say which weights its server computes with, as 0.5.23 "
            f"does ({error}): use that one"
        ) from error
    return found


def _in_a_thread(do: Callable[[], T]) -> Future[T]:
    """What `do` will have given; a process that ends does not wait for it."""
    found = Future[T]()

    def run() -> None:
        try:
            found.set_result(do())
        except BaseException as error:
            found.set_exception(error)

    Thread(target=run, name="kvzip-sglang-weights", daemon=True).start()
    return found


def _fnuz() -> bool:
    """Whether fp8 is of the kind without a negative zero on this machine: AMD's, of some years."""
    with suppress(ImportError):
        from sglang.kernels.ops.quantization.fp8_kernel import is_fp8_fnuz

        return bool(is_fp8_fnuz())
    return False


def _contents(server: Mapping[str, Any]) -> dict[str, object]:
    """What lies at paths that a server was told, where they can be read: the same path may have
    others tomorrow, and the same files lie elsewhere on another host."""
    found: dict[str, object] = {}
    draft, commit = (server[f"speculative_draft_model_{name}"] for name in ("path", "revision"))
    if draft and draft != server["model_path"]:
        found["speculative_draft_model_path"] = _content(draft, commit)
    elif draft:  # in the same checkpoint
        found["speculative_draft_model_path"] = True
    if server["quantization_param_path"]:
        found["quantization_param_path"] = _content(server["quantization_param_path"])
    if server["lora_paths"]:
        paths = [str(getattr(one, "lora_path", None) or one) for one in server["lora_paths"]]
        found["lora_paths"] = [_content(path) for path in paths]
    return found


def _content(path: str, commit: str | None = None) -> str:
    try:
        return checkpoint_fingerprint(path, commit)
    except KVZipError:
        return path


def _ranks(config: HiCacheStorageConfig) -> list[str]:
    """The rank as parts of a path. Ranks hold different heads, but of an MLA model the same
    numbers, of which one rank writes."""
    parts = []
    if not config.is_mla_model:
        parts.append(f"tp{config.tp_rank}of{config.tp_size}")
    for name in ("pp", "attn_cp", "dcp"):
        if getattr(config, f"{name}_size", 1) > 1:
            rank, size = getattr(config, f"{name}_rank"), getattr(config, f"{name}_size")
            parts.append(f"{name}{rank}of{size}")
    return parts
