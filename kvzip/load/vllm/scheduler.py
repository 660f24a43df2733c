"""The scheduler's half: which prompts the store has, and what a step loads and saves."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import metrics
from kvzip.errors import KVZipError
from kvzip.identity.checkpoint import changed
from kvzip.load.vllm.engine import Engine
from kvzip.load.vllm.metadata import Load, Metadata, Save, Span
from kvzip.load.vllm.settings import Settings
from kvzip.load.vllm.split import Split
from kvzip.load.vllm.troubles import Troubles, log
from kvzip.profile import Profile
from kvzip.snapshot import Layout, Origin
from kvzip.store import Match, Store
from kvzip.store.keys import Identity

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_PATIENCE = 0.005
"""Seconds that the scheduler waits for a lookup before it goes on and asks again."""
_REST = 30.0
"""Seconds without lookups after the store did not answer."""
_LOOKS = 8
"""After how many misses documents for other numbers of workers are no longer looked for."""
_PASS_OVER = 600.0
"""Seconds in which a document that could not be loaded is not tried again."""


Documents = tuple[str, ...]
"""Keys in the store, one for each part that the model is cut into."""


@dataclass(frozen=True)
class _Found:
    """What the store has of a prompt."""

    documents: Documents = ()
    tokens: int = 0
    failed: bool = False
    """The store has something, which could not be loaded before."""
    layouts: tuple[Layout, ...] = ()


@dataclass
class _Request:
    """A request while vLLM works on it."""

    token_ids: list[int]
    """The prompt's ids."""
    known: int
    """How many of them the store has."""
    replace: Documents
    """The documents that could not be loaded, if any."""
    saved: bool
    junction: int = 0
    """Where there are states: up to where vLLM has seen other prompts begin alike, and keeps the
    states, too. That beginning is stored besides; 0 if there is none, or it was."""
    blocks: list[list[int]] = field(default_factory=list)
    """Of each group. Blocks that a window has left behind stay in the list."""


class Scheduler:
    """Finds prompts in the store, and says what to load and what to save."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        store: Store,
        profile_of: Callable[[Split, int], Profile | None],
        origin: Origin,
        *,
        loads: bool,
        saves: bool,
        blocks: int,
    ):
        """`blocks`: how many of vLLM's blocks there are."""
        self._settings, self._engine, self._store = settings, engine, store
        self._profile_of, self._origin = profile_of, origin
        parts = range(engine.split.parts)
        self._profiles = [profile_of(engine.split, part) for part in parts]
        self._may_load, self._may_save = loads, saves
        self._pool = ThreadPoolExecutor(4, "kvzip-lookup")
        self._troubles = Troubles()
        self._lookups: dict[str, tuple[float, Future[_Found]]] = {}
        self._usable: dict[str, tuple[int, int]] = {}
        """Requests that were told of tokens in the store: from which to which."""
        self._requests: dict[str, _Request] = {}
        self._loads: list[Load] = []
        self._waiting: dict[str, Load] = {}
        """Loads of requests that wait for them."""
        self._blocks = blocks
        self._holding: dict[str, int] = {}
        """Requests that wait for their loads, or have waited and are not yet scheduled, and how
        many blocks they need to be."""
        self._parked: dict[str, None] = {}
        """Requests that vLLM was told to ask for again, in their order, until they have blocks."""
        self._ahead = engine.split.pipeline + 1
        """How many steps vLLM may have planned before it has seen the first one's end."""
        self._steps: deque[Metadata] = deque(maxlen=2 * self._ahead)
        """The last steps with loads or saves."""
        self._fresh: deque[set[int]] = deque(maxlen=self._ahead)
        """Of each of the last steps the blocks that it loads: it is not known whether it did."""
        self._failures = 0
        self._passed_over: dict[Documents, float] = {}
        self._rest_until = 0.0
        self._looked = 0

    @property
    def in_background(self) -> bool:
        """Whether vLLM lets a request wait until its document is loaded."""
        return self._engine.in_background

    def matched(self, request: Request, computed: int) -> int | None:
        """How many tokens can be loaded after the first `computed`; None: ask again."""
        self._usable.pop(request.request_id, None)
        most = self._engine.most(request.num_tokens)
        loads = self._may_load and most > computed
        saves = self._may_save and request.num_prompt_tokens >= self._settings.min_tokens
        wanted = (loads or saves) and _follows_from_ids(request)
        found = self._lookup(request) if wanted else _Found()
        if not loads:
            return 0
        if found is None:
            self._parked.setdefault(request.request_id)
            return None
        usable = (self._engine.usable(f, found.tokens, most, computed) for f in found.layouts)
        stop = min(usable, default=0)
        if stop <= computed:
            return 0
        if self.in_background and self._may_block(request):
            self._parked.setdefault(request.request_id)
            return None
        self._usable[request.request_id] = (computed, stop)
        return stop - computed

    def _may_block(self, request: Request) -> bool:
        """Whether a load in the background might leave vLLM without a request that it can go on
        with. It takes no blocks from one that waits for its load, or was not scheduled since; looks
        at none behind one that does not fit; and of windows it keeps fewer blocks free than a
        request still needs (0.32.0, 0.33.0). So no load is begun behind a request that has no
        blocks yet, nor beside others where all could not go on at once."""
        behind = next(iter(self._parked), request.request_id) != request.request_id
        needed = sum(self._holding.values()) + self._needed(request)
        return behind or (bool(self._holding) and needed >= self._blocks)

    def _needed(self, request: Request) -> int:
        """How many blocks a request needs at most to be computed, and for a first answer."""
        groups = self._engine.groups
        return sum(request.num_tokens // group.block_tokens + 2 for group in groups)

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
        matches: list[Match] = []
        try:
            for part in range(self._engine.split.parts):
                match = self._match(ids, part)
                if match is None:
                    break
                matches.append(match)
        except Exception as error:  # a lookup must not end the engine
            self._rest_until = time.monotonic() + _REST
            self._troubles.tell("lookup", "prompts are computed: %s", error)
            return _Found()
        finally:
            for match in matches:
                match.reader.close()
        self._troubles.over("lookup")
        if len(matches) < self._engine.split.parts:
            with suppress(KVZipError, OSError):  # nothing is lost but a word
                self._tell_of_other_splits()
            return _Found()
        documents = tuple(match.key for match in matches)
        if time.monotonic() - self._passed_over.get(documents, -_PASS_OVER) < _PASS_OVER:
            return _Found(documents, failed=True)
        layouts = tuple(match.reader.layout for match in matches)
        return _Found(documents, min(match.tokens for match in matches), layouts=layouts)

    def _match(self, ids: NDArray[np.uint32], part: int) -> Match | None:
        origin = self._engine.split.origin(self._origin, part)
        return self._store.find(
            ids,
            model=origin.model,
            revision=origin.revision,
            dtype=self._engine.dtype,
            profile=self._profiles[part],
        )

    def _tell_of_other_splits(self) -> None:
        """After a miss: say once if the store has documents of the model for workers that it is cut
        over in another way."""
        if self._looked >= _LOOKS:
            return
        self._looked += 1
        split = self._engine.split
        for other in split.others():
            there = other.origin(self._origin, 0)
            profile = self._profile_of(other, 0)
            needed = "" if profile is None else profile.id
            identity = Identity.of(there.model, there.revision, self._engine.dtype, needed)
            if self._store.bucket.get(f"{identity.namespace}/about.json") is not None:
                self._looked = _LOOKS
                log.warning(
                    "%s has documents of %s for %s, and this engine has %s: they are not used",
                    self._store.bucket.url,
                    there.model,
                    other,
                    split,
                )
                return

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """Take note of a request that will be computed, and of `external` tokens to load."""
        name = request.request_id
        self._parked.pop(name, None)
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
                found.documents if found.failed else (),
                not self._may_save,
                self._junction(request) if self._may_save else 0,
            )
            result = "hit" if external else "near_miss" if found.failed else "miss"
            metrics.count("lookups", where="vllm", result=result)
        if external:
            metrics.count("found_tokens", external, where="vllm")
            assert stop - start == external, "vLLM loads other tokens than it was told of"
            spans = self._spans(blocks.get_block_ids(), start, stop, stop)
            load = Load(name, found.documents, start, stop, spans)
            if self._engine.in_background:
                self._waiting[name] = load
                self._holding[name] = self._needed(request)
            self._loads.append(load)

    def _spans(
        self, blocks: Sequence[Sequence[int]], start: int, stop: int, position: int
    ) -> list[Span]:
        """Of each group the blocks with tokens `start` to `stop`, less those that are not needed to
        go on at `position`."""
        found = []
        for group, ids in zip(self._engine.groups, blocks, strict=True):
            size, first = group.block_tokens, max(start, group.needed_from(position))
            found.append(Span(first, list(ids[first // size : -(-stop // size)])))
        return found

    def plan(self, output: SchedulerOutput) -> Metadata:
        """What the step that was scheduled loads and saves."""
        computed = {}
        for new in output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            if new.req_id in self._requests:
                self._requests[new.req_id].blocks = [list(ids) for ids in new.block_ids]
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            computed[name] = cached.num_computed_tokens[i]
            known = self._requests.get(name)
            if known is not None:
                more = [list(ids) for ids in cached.new_block_ids[i] or ()]
                if name in cached.resumed_req_ids:
                    known.blocks = more
                else:
                    for ids, new_ids in zip(known.blocks, more, strict=bool(more)):
                        ids += new_ids
        behind = self._engine.in_background
        step = Metadata(
            [] if behind else self._loads,
            self._loads if behind else [],
            failures=self._failures,
        )
        self._fresh.append({block for load in step.loads for block in load.blocks})
        self._loads = []
        for name, count in output.num_scheduled_tokens.items():
            self._holding.pop(name, None)
            known = self._requests.get(name)
            if known is None:
                continue
            stop, reached = self._engine.kept(len(known.token_ids)), computed[name] + count
            if 0 < known.junction <= reached:
                step.saves += self._saves(name, known, known.junction, computed[name], output)
                known.junction = 0
            if not known.saved and stop <= reached and not self._rests_on_others(known):
                step.saves += self._saves(name, known, stop, computed[name], output)
                known.saved = True
        if step.loads or step.saves:
            self._steps.append(step)
        return step

    def _rests_on_others(self, known: _Request) -> bool:
        """Whether a request has blocks of which it is not known yet whether all workers have loaded
        their parts. What a worker computes rests on what the others have, and it does not see
        whether they have it."""
        if self._engine.split.tensor * self._engine.split.pipeline == 1:
            return False
        fresh = set[int]().union(*self._fresh)
        return any(not fresh.isdisjoint(blocks) for blocks in known.blocks)

    def _junction(self, request: Request) -> int:
        """See :attr:`_Request.junction`."""
        found = getattr(request, "shared_prefix_boundary", 0) if self._engine.has_states else 0
        stop = self._engine.kept(request.num_prompt_tokens)
        return found if found < stop and found % self._engine.block_tokens == 0 else 0

    def _saves(
        self, name: str, known: _Request, stop: int, computed: int, output: SchedulerOutput
    ) -> list[Save]:
        """What is to be stored of a request of which this step reaches `stop`: nothing, or its
        tokens up to there."""
        spans = self._spans(known.blocks, 0, stop, computed)
        if not (self._worth_saving(known, stop) and self._have_states(spans, output, name, stop)):
            return []
        self._passed_over.pop(known.replace, None)  # what is found next is written anew
        return [Save(name, known.token_ids[:stop], spans, self._origin, bool(known.replace))]

    def _have_states(
        self, spans: list[Span], output: SchedulerOutput, name: str, stop: int
    ) -> bool:
        """Let spans name the blocks that hold states at `stop`; whether there are all. vLLM says at
        each step which block will hold a request's state at which position."""
        if not self._engine.has_states:
            return True
        offered = output.kv_connector_block_state.boundary_state_offloads.get(name, ())
        blocks = {group: block for group, block, tokens in offered if tokens == stop}
        for number, group in enumerate(self._engine.groups):
            if group.state:
                if number not in blocks:
                    return False
                spans[number] = Span(stop - group.block_tokens, [blocks[number]])
        return True

    def _worth_saving(self, known: _Request, count: int) -> bool:
        """Whether the store lacks enough of the first `count` tokens, and these are enough."""
        if count < self._settings.min_tokens:
            return False
        return count - known.known >= max(1, self._settings.min_new * count)

    def failed(self, blocks: Collection[int]) -> None:
        """Blocks could not be loaded: nothing of that step was saved, nor of those that were
        planned since, and their documents are passed over."""
        if not blocks:
            return
        self._failures += 1
        spoiled = False
        for step in self._steps:
            bad = [load for load in step.loads if not load.blocks.isdisjoint(blocks)]
            for load in bad:
                self._pass_over(load)
            spoiled = spoiled or bool(bad)
            if spoiled:
                for save in step.saves:
                    if save.request in self._requests:
                        self._requests[save.request].saved = False

    def loaded(self, requests: Collection[str], failed: Collection[str]) -> None:
        """The loads that requests waited for are done; the documents of those that failed are
        passed over."""
        for name in requests:
            load = self._waiting.pop(name, None)
            if load is not None and name in failed:
                self._pass_over(load)

    def _pass_over(self, load: Load) -> None:
        self._passed_over[load.documents] = time.monotonic()
        known = self._requests.get(load.request)
        if known is not None:
            known.known, known.replace = 0, load.documents
            known.saved = not self._may_save

    def finished(self, name: str) -> None:
        """Forget a request."""
        self._requests.pop(name, None)
        self._waiting.pop(name, None)
        self._usable.pop(name, None)
        self._holding.pop(name, None)
        self._parked.pop(name, None)
        _, future = self._lookups.pop(name, (0.0, None))
        if future is not None:
            future.cancel()

    def forget_weights(self) -> None:
        """From now on nothing is found that was stored, and what is stored is found by this engine
        alone: vLLM does not show its weights."""
        revision = changed(self._origin.revision, {"weights since": uuid.uuid4().hex})
        self._origin = msgspec.structs.replace(self._origin, revision=revision)
        for known in self._requests.values():
            known.saved, known.junction = True, 0  # this may rest on the weights before
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
