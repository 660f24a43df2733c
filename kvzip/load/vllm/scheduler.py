"""The scheduler's half: which prompts the store has, and what a step loads and saves."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip.identity.checkpoint import changed
from kvzip.load.vllm.engine import Engine
from kvzip.load.vllm.metadata import Load, Metadata, Save
from kvzip.load.vllm.settings import Settings
from kvzip.load.vllm.troubles import Troubles
from kvzip.profile import Profile
from kvzip.snapshot import Origin
from kvzip.store import Store

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_PATIENCE = 0.005
"""Seconds that the scheduler waits for a lookup before it goes on and asks again."""
_REST = 30.0
"""Seconds without lookups after the store did not answer."""
_PASS_OVER = 600.0
"""Seconds in which a document that could not be loaded is not tried again."""


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
    """The prompt's ids."""
    known: int
    """How many of them the store has."""
    replace: str
    """The document that could not be loaded, if any."""
    saved: bool
    blocks: list[int] = field(default_factory=list)


class Scheduler:
    """Finds prompts in the store, and says what to load and what to save."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
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
        self._troubles = Troubles()
        self._lookups: dict[str, tuple[float, Future[_Found]]] = {}
        self._usable: dict[str, tuple[int, int]] = {}
        """Requests that were told of tokens in the store: from which to which."""
        self._requests: dict[str, _Request] = {}
        self._loads: list[Load] = []
        self._steps: deque[Metadata] = deque(maxlen=4)
        """The last steps; vLLM may have begun one before it has seen the last one's end."""
        self._passed_over: dict[str, float] = {}
        self._rest_until = 0.0

    def matched(self, request: Request, computed: int) -> int | None:
        """How many tokens can be loaded after the first `computed`; None: ask again."""
        self._usable.pop(request.request_id, None)
        # One token at least is left for the model, which must compute the next one.
        size = self._engine.block_tokens
        most = (request.num_tokens - 1) // size * size
        loads = self._may_load and most > computed
        saves = self._may_save and request.num_prompt_tokens >= self._settings.min_tokens
        wanted = (loads or saves) and _follows_from_ids(request)
        found = self._lookup(request) if wanted else _Found()
        if not loads:
            return 0
        if found is None:
            return None
        stop = min(found.tokens // size * size, most)
        if stop <= computed:
            return 0
        self._usable[request.request_id] = (computed, stop)
        return stop - computed

    def _lookup(self, request: Request) -> _Found | None:
        """What the store has of a request's prompt; None while it is looked for."""
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
            self._troubles.tell("lookup", "prompts are computed: %s is slow to answer", url)
            return _Found()

    def _find(self, ids: NDArray[np.uint32]) -> _Found:
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
            self._troubles.tell("lookup", "prompts are computed: %s", error)
            return _Found()
        self._troubles.over("lookup")
        if match is None:
            return _Found()
        match.reader.close()
        if time.monotonic() - self._passed_over.get(match.key, -_PASS_OVER) < _PASS_OVER:
            return _Found(match.key, failed=True)
        return _Found(match.key, match.tokens)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """Take note of a request that will be computed, and of `external` tokens to load."""
        name = request.request_id
        _, future = self._lookups.pop(name, (0.0, None))
        start, stop = self._usable.pop(name, (0, 0))
        if not _follows_from_ids(request):
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

    def plan(self, output: SchedulerOutput) -> Metadata:
        """What the step that was scheduled loads and saves."""
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
        """Whether the store lacks enough of a prompt that is long enough."""
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
        """Forget a request."""
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


def _follows_from_ids(request: Request) -> bool:
    """Whether a request's cache follows from its token ids and the model alone, and may be seen by
    whoever has the same ids."""
    return (
        bool(request.prompt_token_ids)
        and getattr(request, "lora_request", None) is None
        and not getattr(request, "mm_features", None)
        and getattr(request, "prompt_embeds", None) is None
        and not getattr(request, "cache_salt", None)
    )
