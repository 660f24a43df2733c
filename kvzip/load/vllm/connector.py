"""A connector for vLLM: prompts' caches go into a store, and come back instead of a prefill.

.. code-block:: python

    KVTransferConfig(
        kv_connector="KvzipConnector", kv_connector_module_path="kvzip.load.vllm",
        kv_role="kv_both", kv_load_failure_policy="recompute",
        kv_connector_extra_config={"url": "s3://bucket/caches", "codec": "channel"})

The scheduler's half looks a prompt up in the store, beside the engine's work; what the store has is
used in whole blocks of vLLM's. The worker's half decodes the document layer after layer in a
thread, ahead of the model, which waits only for the layer that it is at. After a prefill it copies
each layer out as the model passes it, and encodes and stores the document beside the engine.

Nothing that goes wrong ends a request: a store that does not answer is a miss; a document that
cannot be loaded is reported to vLLM, which computes those tokens, and is passed over for a while.

The interface is that of vLLM 0.32.0, ``vllm.distributed.kv_transfer.kv_connector.v1.base``. A
document holds whole layers, so the model must lie on one worker. docs/vllm.md has all settings.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock, Semaphore, Thread
from typing import Any

import msgspec
import numpy as np
import torch

import vllm
from kvzip import dtypes
from kvzip.container import Reader
from kvzip.errors import KVZipError, UnsupportedError
from kvzip.identity.checkpoint import changed, checkpoint_fingerprint
from kvzip.load.config import LayerKind, layer_kinds, rope_parameters
from kvzip.load.vllm import pages
from kvzip.profile import Profile
from kvzip.snapshot import Layer, LayerLayout, Origin, Snapshot
from kvzip.store import BLOCK_TOKENS, Store
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

_log = logging.getLogger("kvzip.vllm")

_PATIENCE = 0.005
"""Seconds that the scheduler waits for a lookup before it goes on and asks again."""
_REST = 30.0
"""Seconds without lookups after the store did not answer."""
_PASS_OVER = 600.0
"""Seconds in which a document that could not be loaded is not tried again."""
_AHEAD = 2
"""Layers of each request that may lie decoded and unused."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``kv_connector_extra_config``."""

    url: str
    """The store: a folder, ``s3://bucket/prefix``, or ``http(s)://`` to load from only."""
    codec: str | dict[str, Any] = "channel"
    profile: str | None = None
    """Path of a .kvprofile, for codecs that need one."""
    model: str | None = None
    """What documents call the model; default: what vLLM was given."""
    revision: str | None = None
    """What pins the weights; default: the checkpoint's fingerprint, or the hub's commit where its
    files are not on this machine."""
    min_tokens: int = BLOCK_TOKENS
    """Prompts below are not stored."""
    min_new: float = 0.25
    """A prompt is stored when the store lacks at least this share of it. At 1/4 a conversation
    that grows takes at most four times its last size."""
    pending_bytes: int = 1 << 30
    """What may wait in memory to be stored, uncompressed; what comes on top is not stored."""
    threads: int = 0
    """For one document; 0: all cores."""
    timeout: float = 10.0
    """Seconds after which a lookup is a miss, and a layer that has not come an error."""
    retries: int = 1
    limit_bytes: int | None = None
    block_tokens: int | None = None
    options: dict[str, Any] | None = None
    """The last three and `retries`: see `kvzip.store.Store`."""


@dataclass
class Load:
    """Tokens `start` to `stop` of a document, and vLLM's blocks that they fill."""

    request: str
    document: str
    start: int
    stop: int
    blocks: list[int]


@dataclass
class Save:
    """A prompt whose tokens lie in `blocks` when the step is done."""

    request: str
    token_ids: list[int]
    blocks: list[int]
    origin: Origin
    replace: bool
    """Whether what the store has may be damaged."""


@dataclass
class Metadata(KVConnectorMetadata):
    """What a step's scheduler tells the worker."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass(frozen=True)
class _Found:
    """What the store has of a prompt."""

    document: str = ""
    tokens: int = 0
    failed: bool = False
    """The store has something, which could not be loaded before."""


@dataclass
class _Request:
    """A request while vLLM works on it."""

    token_ids: list[int]
    """Of the prompt."""
    known: int
    """How many of them the store has."""
    replace: str
    """The document that could not be loaded, if any."""
    saved: bool
    blocks: list[int] = field(default_factory=list)


class _Voice:
    """Warnings, one for each kind of trouble until it is over."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, kind: str, message: str, *values: Any) -> None:
        if kind not in self._told:
            self._told.add(kind)
            _log.warning(message, *values)

    def over(self, kind: str) -> None:
        self._told.discard(kind)


class KvzipConnector(KVConnectorBase_V1):
    """vLLM makes one for the scheduler and one for the worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        try:
            settings = msgspec.convert(transfer.kv_connector_extra_config, Settings)
        except msgspec.ValidationError as error:
            raise KVZipError(f"kv_connector_extra_config: {error}") from None
        _check_parallel(vllm_config.parallel_config)
        engine = _Engine.of(vllm_config, kv_cache_config)
        profile = None if settings.profile is None else Profile.load(settings.profile)
        store = Store(
            settings.url,
            limit_bytes=settings.limit_bytes,
            block_tokens=settings.block_tokens,
            timeout=settings.timeout,
            retries=settings.retries,
            options=settings.options,
        )
        self._scheduler: _Scheduler | None = None
        self._worker: _Worker | None = None
        if role == KVConnectorRole.SCHEDULER:
            origin = _origin(vllm_config, settings, engine)
            if transfer.kv_load_failure_policy != "recompute":
                _log.warning(
                    "a request whose document cannot be loaded will fail: "
                    'set kv_load_failure_policy="recompute"'
                )
            self._scheduler = _Scheduler(
                settings,
                engine,
                store,
                profile,
                origin,
                loads=transfer.is_kv_consumer,
                saves=transfer.is_kv_producer and store.bucket.writable,
            )
        else:
            self._worker = _Worker(settings, engine, store, profile)

    @property
    def requires_kv_delivery(self) -> bool:
        """What is not stored is a miss later on, no more."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: Mapping[str, Any]) -> bool:
        """Layers are waited for and copied out one by one, which a whole graph would skip."""
        return True

    # --- for the scheduler -----------------------------------------------------------------

    @property
    def _planner(self) -> _Scheduler:
        assert self._scheduler is not None, "asked of the worker's half"
        return self._scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._planner.matched(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._planner.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Metadata:
        return self._planner.plan(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._planner.failed(connector_output.invalid_block_ids or ())

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self._planner.finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool | None:
        """vLLM calls this when its weights are no longer those of the checkpoint."""
        if self._scheduler is None:
            return None
        self._scheduler.forget_weights()
        return True

    # --- for the worker --------------------------------------------------------------------

    @property
    def _mover(self) -> _Worker:
        assert self._worker is not None, "asked of the scheduler's half"
        return self._worker

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        context = self._vllm_config.compilation_config.static_forward_context
        self._mover.register(kv_caches, context)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._mover.start(self._get_connector_metadata().loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._mover.wait(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        self._mover.copy_out(layer_name, self._get_connector_metadata().saves)

    def wait_for_save(self) -> None:
        self._mover.end_step()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._mover.take_invalid()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()


# --- what the engine is ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Engine:
    """What both halves must know of the model's cache."""

    layers: tuple[str, ...]
    """vLLM's names of the layers, in the model's order."""
    kinds: tuple[LayerKind, ...]
    ropes: tuple[dict[str, Any], ...]
    block_tokens: int
    heads: int
    dim: int
    dtype: str

    @classmethod
    def of(cls, vllm_config: Any, kv_cache_config: Any) -> _Engine:
        """Raises UnsupportedError, which says what is not, for caches of other kinds."""
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise UnsupportedError(
                f"the model's cache is managed in {len(groups)} groups, of which kvzip handles "
                "one: set disable_hybrid_kv_cache_manager=True"
            )
        spec, layers = groups[0].kv_cache_spec, tuple(groups[0].layer_names)
        kind = type(spec).__name__
        if kind not in ("FullAttentionSpec", "SlidingWindowSpec"):
            raise UnsupportedError(f"a cache of {kind} is none of full or sliding-window attention")
        if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UnsupportedError(
                f"a cache of {spec.dtype} depends on scales besides: use kv_cache_dtype='auto'"
            )
        config = vllm_config.model_config.hf_config
        kinds = layer_kinds(config)
        if len(kinds) != len(layers):
            raise UnsupportedError(
                f"vLLM keeps a cache of {len(layers)} layers, the model's config has {len(kinds)}; "
                "draft models and layers that share a cache are not handled"
            )
        return cls(
            layers,
            tuple(kinds),
            rope_parameters(config),
            spec.block_size,
            spec.num_kv_heads,
            spec.head_size,
            dtypes.get(str(spec.dtype)).name,
        )

    def layout(self, i: int, tokens: int) -> LayerLayout:
        shape = (self.heads, tokens, self.dim)
        kind = self.kinds[i]
        return LayerLayout(shape, shape, tokens, kind.kind, kind.window, kind.rope)

    def check(self, reader: Reader) -> None:
        """Raise UnsupportedError unless a document has this cache's layers."""
        found = reader.layout
        shapes = {(layer.k[0], layer.k[-1], layer.v[-1]) for layer in found.layers}
        if (
            found.dtype != self.dtype
            or len(found.layers) != len(self.layers)
            or shapes != {(self.heads, self.dim, self.dim)}
        ):
            raise UnsupportedError(
                f"it holds {len(found.layers)} layers of {found.dtype}, [heads, dim] in "
                f"{sorted({s[:2] for s in shapes})}; the engine has {len(self.layers)} of "
                f"{self.dtype}, {(self.heads, self.dim)}"
            )


def _check_parallel(config: Any) -> None:
    for name in ("tensor", "pipeline", "decode_context", "prefill_context"):
        if getattr(config, f"{name}_parallel_size", 1) > 1:
            raise UnsupportedError(
                f"{name}_parallel_size is above 1: documents hold whole layers, which no worker has"
            )


def _origin(vllm_config: Any, settings: Settings, engine: _Engine) -> Origin:
    """What documents are found by: the checkpoint, and what vLLM was told to change about it.
    Raises KVZipError when nothing pins the weights."""
    config = vllm_config.model_config
    load_format = str(getattr(getattr(vllm_config, "load_config", None), "load_format", "auto"))
    usual = load_format.rpartition(".")[2].lower() in ("auto", "safetensors", "hf")
    revision = settings.revision
    if revision is None:
        commit = getattr(config.hf_config, "_commit_hash", None)
        try:
            revision = checkpoint_fingerprint(config.model, commit, every=not usual)
        except KVZipError:
            revision = commit  # an engine may stream weights that never lie on this machine
        if not revision:
            raise KVZipError(
                f"nothing says which weights of {config.model} these are: set revision in "
                "kv_connector_extra_config, and change it whenever they change"
            )
    told = {
        "quantization": getattr(config, "quantization", None),
        "hf_overrides": getattr(config, "hf_overrides", None),
        "load_format": not usual and load_format,
    }
    return Origin(
        model=settings.model or config.model,
        revision=changed(revision, told),
        architecture=next(iter(getattr(config.hf_config, "architectures", None) or []), ""),
        rope=engine.ropes,
        software={"vllm": str(vllm.__version__), "torch": str(torch.__version__)},
    )


# --- the scheduler's half ----------------------------------------------------------------------


class _Scheduler:
    """Finds prompts in the store, and says what to load and what to save."""

    def __init__(
        self,
        settings: Settings,
        engine: _Engine,
        store: Store,
        profile: Profile | None,
        origin: Origin,
        *,
        loads: bool,
        saves: bool,
    ):
        self._settings, self._engine, self._store = settings, engine, store
        self._profile, self._origin = profile, origin
        self._may_load, self._may_save = loads, saves
        self._pool = ThreadPoolExecutor(4, "kvzip-lookup")
        self._voice = _Voice()
        self._lookups: dict[str, tuple[float, Future[_Found]]] = {}
        self._usable: dict[str, tuple[int, int]] = {}
        """Requests that were told of tokens in the store: from which to which."""
        self._requests: dict[str, _Request] = {}
        self._loads: list[Load] = []
        self._steps: deque[Metadata] = deque(maxlen=4)
        """The last steps; vLLM may have begun one before it has seen the last one's end."""
        self._passed_over: dict[str, float] = {}
        self._rest_until = 0.0

    def matched(self, request: Any, computed: int) -> int | None:
        """Tokens that can be loaded after the first `computed`; None: ask again."""
        self._usable.pop(request.request_id, None)
        # One token at least is left for the model, which must compute the next one.
        size = self._engine.block_tokens
        most = (request.num_tokens - 1) // size * size
        loads = self._may_load and most > computed
        saves = self._may_save and request.num_prompt_tokens >= self._settings.min_tokens
        found = self._lookup(request) if _plain(request) and (loads or saves) else _Found()
        if not loads:
            return 0
        if found is None:
            return None
        stop = min(found.tokens // size * size, most)
        if stop <= computed:
            return 0
        self._usable[request.request_id] = (computed, stop)
        return stop - computed

    def _lookup(self, request: Any) -> _Found | None:
        name, now = request.request_id, time.monotonic()
        if name not in self._lookups:
            ids = np.asarray(list(request.all_token_ids), np.uint32)
            self._lookups[name] = (now, self._pool.submit(self._find, ids))
        begun, future = self._lookups[name]
        try:
            return future.result(_PATIENCE if self._may_load else 0.0)
        except TimeoutError:
            if now - begun < self._settings.timeout:
                return None
            url = self._store.bucket.url
            self._voice.tell("lookup", "prompts are computed: %s is slow to answer", url)
            return _Found()

    def _find(self, ids: Any) -> _Found:
        """What the store has of a prompt; never raises."""
        if time.monotonic() < self._rest_until:
            return _Found()
        try:
            match = self._store.find(
                ids,
                model=self._origin.model,
                revision=self._origin.revision,
                dtype=self._engine.dtype,
                profile=self._profile,
            )
        except Exception as error:  # a lookup must not end the engine
            self._rest_until = time.monotonic() + _REST
            self._voice.tell("lookup", "prompts are computed: %s", error)
            return _Found()
        self._voice.over("lookup")
        if match is None:
            return _Found()
        match.reader.close()
        if time.monotonic() - self._passed_over.get(match.key, -_PASS_OVER) < _PASS_OVER:
            return _Found(match.key, failed=True)
        return _Found(match.key, match.tokens)

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        """Take note of a request that will be computed, and of `external` tokens to load."""
        name = request.request_id
        _, future = self._lookups.pop(name, (0.0, None))
        start, stop = self._usable.pop(name, (0, 0))
        if not _plain(request):
            return
        found = future.result() if future is not None and future.done() else _Found()
        known = self._requests.get(name)
        if known is None:  # else it was preempted, and goes on
            self._requests[name] = known = _Request(
                list(request.prompt_token_ids),
                found.tokens,
                found.document if found.failed else "",
                not self._may_save,
            )
        if external:
            assert stop - start == external, "vLLM loads other tokens than it was told of"
            size = self._engine.block_tokens
            ids = blocks.get_block_ids()[0][start // size : stop // size]
            self._loads.append(Load(name, found.document, start, stop, list(ids)))

    def plan(self, output: Any) -> Metadata:
        """The step's work."""
        computed = {}
        for new in output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            if new.req_id in self._requests:
                self._requests[new.req_id].blocks = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            computed[name] = cached.num_computed_tokens[i]
            known = self._requests.get(name)
            if known is not None:
                more = list((cached.new_block_ids[i] or ([],))[0])
                known.blocks = more if name in cached.resumed_req_ids else known.blocks + more
        step = Metadata(self._loads)
        self._loads = []
        for name, count in output.num_scheduled_tokens.items():
            known = self._requests.get(name)
            if known is None or known.saved or computed[name] + count < len(known.token_ids):
                continue
            known.saved = True
            if self._worth_saving(known):
                step.saves.append(
                    Save(name, known.token_ids, known.blocks, self._origin, bool(known.replace))
                )
                self._passed_over.pop(known.replace, None)  # what is found next is written anew
        if step.loads or step.saves:
            self._steps.append(step)
        return step

    def _worth_saving(self, known: _Request) -> bool:
        count = len(known.token_ids)
        if count < self._settings.min_tokens:
            return False
        return count - known.known >= max(1, self._settings.min_new * count)

    def failed(self, blocks: Collection[int]) -> None:
        """Blocks could not be loaded: nothing of that step was saved, and their documents are
        passed over."""
        if not blocks:
            return
        for step in self._steps:
            bad = [load for load in step.loads if not set(blocks).isdisjoint(load.blocks)]
            for load in bad:
                self._passed_over[load.document] = time.monotonic()
                if load.request in self._requests:
                    self._requests[load.request].known = 0
                    self._requests[load.request].replace = load.document
                    self._requests[load.request].saved = not self._may_save
            if bad:
                for save in step.saves:
                    if save.request in self._requests:
                        self._requests[save.request].saved = False

    def finished(self, name: str) -> None:
        self._requests.pop(name, None)
        self._usable.pop(name, None)
        _, future = self._lookups.pop(name, (0.0, None))
        if future is not None:
            future.cancel()

    def forget_weights(self) -> None:
        """From now on nothing is found that was stored, and what is stored is found by this engine
        alone: vLLM does not show its weights."""
        revision = changed(self._origin.revision, {"weights since": uuid.uuid4().hex})
        self._origin = msgspec.structs.replace(self._origin, revision=revision)
        for known in self._requests.values():
            known.saved = True  # what is under way may rest on the weights before
        for _, future in self._lookups.values():
            future.cancel()
        self._lookups.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _plain(request: Any) -> bool:
    """Whether a request's cache follows from its token ids and the model alone, and may be seen by
    whoever has the same ids."""
    return (
        bool(request.prompt_token_ids)
        and getattr(request, "lora_request", None) is None
        and not getattr(request, "mm_features", None)
        and getattr(request, "prompt_embeds", None) is None
        and not getattr(request, "cache_salt", None)
    )


# --- the worker's half -------------------------------------------------------------------------


class _Worker:
    """Moves layers from documents into vLLM's blocks and back."""

    def __init__(self, settings: Settings, engine: _Engine, store: Store, profile: Profile | None):
        self._settings, self._engine, self._store = settings, engine, store
        self._profile = profile
        self._pages: list[pages.Pages] = []
        self._number = {name: i for i, name in enumerate(engine.layers)}
        self._step: _Step | None = None
        self._invalid: set[int] = set()
        self._gathered: dict[str, _Gathered] = {}
        self._writer = ThreadPoolExecutor(1, "kvzip-save")
        self._pending, self._lock = 0, Lock()
        self._voice = _Voice()
        # A script may end without a shutdown. Like this `close` runs before Python ends all thread
        # pools (which do the same), and what is still to be stored needs some.
        threading._register_atexit(self.close)  # type: ignore[attr-defined]

    def register(self, caches: Mapping[str, Any], context: Mapping[str, Any]) -> None:
        """Take vLLM's cache tensors, by layer; `context` holds the layers themselves."""
        engine, self._pages = self._engine, []
        for name in engine.layers:
            layer, cache = context[name], caches[name]
            arrangement = pages.arrangement_of(
                layer.attn_backend.get_name(), getattr(layer, "isa", None), cache.element_size()
            )
            self._pages.append(pages.Pages(cache, arrangement, engine.dim))

    # --- loading ---------------------------------------------------------------------------

    def start(self, loads: Sequence[Load]) -> None:
        """Begin to decode what this step needs."""
        if loads:
            layers, dtype = len(self._engine.layers), self._engine.dtype
            self._step = _Step(loads, layers, dtype, self._open, self._settings.timeout)

    def _open(self, load: Load) -> Reader:
        reader = self._store.open(load.document, self._profile, self._settings.threads)
        self._engine.check(reader)
        return reader

    def wait(self, name: str) -> None:
        """Return when a layer's blocks are filled, or known to be invalid."""
        if self._step is None or name not in self._number:
            return
        i = self._number[name]
        for n, load in enumerate(self._step.loads):
            pair = self._step.take(n, i)
            if pair is not None:
                blocks = torch.tensor(load.blocks, dtype=torch.int64)
                self._pages[i].put(blocks, *pair)

    # --- saving ----------------------------------------------------------------------------

    def copy_out(self, name: str, saves: Sequence[Save]) -> None:
        """Copy a layer of prompts that this step completes."""
        i = self._number.get(name)
        if i is None:
            return
        for save in saves:
            if save.request not in self._gathered:
                self._gathered[save.request] = _Gathered(save, self._reserve(save))
            gathered = self._gathered[save.request]
            if not gathered.bytes:
                continue
            count = len(save.token_ids)
            used = -(-count // self._engine.block_tokens)
            blocks = torch.tensor(save.blocks[:used], dtype=torch.int64)
            k, v = (dtypes.as_bits(t)[0] for t in self._pages[i].take(blocks, count))
            gathered.layers[i] = Layer(k, v, self._engine.layout(i, count))

    def _reserve(self, save: Save) -> int:
        """Room in memory for a document; 0 when there is none."""
        engine = self._engine
        token = 2 * engine.heads * engine.dim * dtypes.get(engine.dtype).itemsize
        need = token * len(save.token_ids) * len(engine.layers)
        with self._lock:
            if self._pending + need <= self._settings.pending_bytes:
                self._pending += need
                return need
        url = self._store.bucket.url
        self._voice.tell("full", "prompts come faster than %s takes them: not all are stored", url)
        return 0

    def _release(self, count: int) -> None:
        with self._lock:
            self._pending -= count

    def end_step(self) -> None:
        """Hand over what was copied, unless something that it may rest on was not loaded."""
        step, self._step = self._step, None
        if step is not None:
            for load, error in step.end():
                self._invalid |= set(load.blocks)
                _log.warning(
                    "document %s is not used, %s tokens are computed: %s",
                    load.document,
                    load.stop - load.start,
                    error,
                )
        gathered, self._gathered = self._gathered, {}
        for one in gathered.values():
            if not one.bytes:
                continue
            if self._invalid or len(one.layers) != len(self._engine.layers):
                self._release(one.bytes)
            else:
                self._writer.submit(self._write, one)

    def take_invalid(self) -> set[int]:
        """vLLM's blocks that were not filled, once."""
        found, self._invalid = self._invalid, set()
        return found

    def _write(self, one: _Gathered) -> None:
        """Encode and store a document; never raises."""
        save = one.save
        try:
            snapshot = Snapshot(
                [one.layers[i] for i in range(len(one.layers))],
                self._engine.dtype,
                np.asarray(save.token_ids, np.uint32),
                save.origin,
            )
            self._store.put(
                snapshot,
                codec=self._settings.codec,
                profile=self._profile,
                threads=self._settings.threads,
                replace=save.replace,
            )
            self._voice.over("save")
        except Exception as error:  # a document that is not stored is a miss, no more
            self._voice.tell("save", "prompts are not stored: %s", error)
        finally:
            self._release(one.bytes)

    def close(self) -> None:
        """Return when all that was copied is stored."""
        self._writer.shutdown()


class _Gathered:
    """A prompt's layers, as they are copied out."""

    def __init__(self, save: Save, count: int):
        self.save, self.bytes = save, count
        self.layers: dict[int, Layer] = {}


class _Step:
    """The loads of one step, decoded by a thread: layer after layer, of all requests."""

    def __init__(
        self,
        loads: Sequence[Load],
        layers: int,
        dtype: str,
        open_document: Callable[[Load], Reader],
        timeout: float,
    ):
        self.loads, self._layers, self._dtype = loads, layers, dtype
        self._open, self._timeout = open_document, timeout
        self._room = [Semaphore(_AHEAD) for _ in loads]
        self._ready: list[list[Future[Layer]]] = [[Future() for _ in range(layers)] for _ in loads]
        self._taken = [0] * len(loads)
        self._errors: dict[int, Exception] = {}
        self._over = False
        Thread(target=self._decode, name="kvzip-load", daemon=True).start()

    def _decode(self) -> None:
        readers: dict[int, Reader] = {}
        failed = set[int]()
        try:
            for i, n in itertools.product(range(self._layers), range(len(self.loads))):
                if n in failed:
                    continue
                self._room[n].acquire()
                if self._over:
                    return
                try:
                    self._ready[n][i].set_result(self._decode_one(readers, n, i))
                except Exception as error:  # whatever it is, the engine computes instead
                    self._ready[n][i].set_exception(error)
                    failed.add(n)
        finally:
            for reader in readers.values():
                reader.close()

    def _decode_one(self, readers: dict[int, Reader], n: int, i: int) -> Layer:
        load = self.loads[n]
        span = load.start, load.stop
        if n not in readers:
            readers[n] = self._open(load)
            readers[n].read_ahead([span] * self._layers)
        layer = readers[n].decode(layers=[i], tokens=span).layers[0]
        if layer.layout.stored != load.stop - load.start:
            raise UnsupportedError(f"its layer {i} does not hold all of the tokens")
        return layer

    def take(self, n: int, i: int) -> list[Any] | None:
        """K and V of layer i of load n, tensors [heads, tokens, dim]; None after a failure."""
        if n in self._errors:
            return None
        try:
            layer = self._ready[n][i].result(self._timeout)
        except TimeoutError:
            self._fail(n, KVZipError(f"layer {i} did not come within {self._timeout:g} s"))
            return None
        except Exception as error:
            self._fail(n, error)
            return None
        self._taken[n] += 1
        self._room[n].release()
        return [dtypes.as_tensor(bits, self._dtype) for bits in layer]

    def _fail(self, n: int, error: Exception) -> None:
        self._errors[n] = error
        self._room[n].release(self._layers)  # it must not hold up the others

    def end(self) -> list[tuple[Load, Exception]]:
        """Loads that failed, and why; the thread stops at its next layer."""
        self._over = True
        for n, room in enumerate(self._room):
            room.release(self._layers)
            if self._taken[n] != self._layers:
                self._errors.setdefault(n, KVZipError("vLLM did not ask for all layers"))
        return [(self.loads[n], error) for n, error in sorted(self._errors.items())]
