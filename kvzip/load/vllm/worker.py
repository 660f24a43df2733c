"""The worker's half: layers from documents into vLLM's blocks, and back."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvzip import metrics
from kvzip.codecs.native.cuda.device import Device, get_device
from kvzip.container import Reader
from kvzip.errors import UnsupportedError
from kvzip.load.documents import OpenDocument, StoredDocument, open_document
from kvzip.load.vllm import pages
from kvzip.load.vllm.engine import Engine
from kvzip.load.vllm.loading import BackgroundLoads, Parts, StepLoads
from kvzip.load.vllm.metadata import Load, Save
from kvzip.load.vllm.saving import Saves
from kvzip.load.vllm.settings import Settings
from kvzip.load.vllm.troubles import log
from kvzip.profile import Profile
from kvzip.store import Store


class Worker:
    """Moves layers from documents into vLLM's blocks and back.

    `part`: which of the parts that the model is cut into is in this process. `stores`: whether it
    is this process that stores it.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        store: Store,
        profile: Profile | None,
        part: int = 0,
        stores: bool = True,
    ):
        self._settings, self._engine, self._store = settings, engine, store
        self._profile, self._part, self._stores = profile, part, stores
        self._pages: list[pages.Pages | pages.StatePages | None] = []
        self._number = {layer.name: i for i, layer in enumerate(engine.layers) if layer}
        self._step: StepLoads | None = None
        self._where = torch.device("cpu")
        """Where vLLM has its cache."""
        self._decoder: Device | None = None
        """What decodes documents that it can; the CPU decodes others."""
        self._background = BackgroundLoads(engine, self._open, self._put_at_once, self._place)
        self._invalid: set[int] = set()
        self._failures = self._known = 0
        """In how many steps something was not loaded, and of how many vLLM knew when it planned
        this one: it plans the next step before it has seen the last one's end."""
        self._saves = Saves(settings, engine, store, profile, part)
        # A script may end without a shutdown. So `close` runs before Python ends all thread
        # pools (which do the same), and what is still to be stored needs some.
        threading._register_atexit(self.close)  # type: ignore[attr-defined]

    def register(self, caches: Mapping[str, torch.Tensor], context: Mapping[str, Any]) -> None:
        """Take vLLM's cache tensors, by layer; `context` holds the layers themselves."""
        self._pages = []
        where = self._where = next(iter(caches.values())).device
        self._decoder = self._device("decode_on", where)
        for layer in self._engine.layers:
            if layer is None:
                self._pages.append(None)
                continue
            own, cache = context[layer.name], caches[layer.name]
            if layer.states:
                self._pages.append(pages.StatePages(cache, layer.layout("", 0, 0).parts))
                continue
            itemsize = cache.element_size()
            kernels = pages.kernels_of(own, itemsize)
            arrangement = pages.arrangement_of(own.attn_backend.get_name(), kernels, itemsize)
            size = self._engine.groups[layer.group].block_tokens
            self._pages.append(pages.Pages(cache, arrangement, layer.parts, size))
        self._saves.register(self._pages, self._device("encode_on", where))

    def _device(self, setting: str, where: torch.device) -> Device | None:
        """The GPU that has vLLM's cache, if a setting asks for it. Raises UnsupportedError where
        there is none."""
        if getattr(self._settings, setting) == "cpu":
            return None
        try:
            return get_device(where)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"{setting} is gpu, and vLLM's cache is on {where}: {error}"
            ) from None

    # --- loading ---------------------------------------------------------------------------

    def start(self, loads: Sequence[Load], background: Sequence[Load], failures: int = 0) -> None:
        """Begin to decode what this step needs, and what requests wait for that come later.
        `failures`: see :class:`~kvzip.load.vllm.metadata.Metadata`."""
        self._known = failures
        if loads:
            timeout = self._settings.timeout
            self._step = StepLoads(loads, self._engine, self._open, timeout, self._decoder)
        for load in background:
            self._background.begin(load, pages.reached(self._where), self._decoder)

    def _open(self, load: Load) -> OpenDocument[Reader]:
        document = StoredDocument(self._store, load.documents[self._part])
        return open_document(document, self._profile, self._settings.threads)

    def _place(self, load: Load, i: int) -> pages.Paged | None:
        """Where a device may write layer i of a load itself."""
        layer, own = self._engine.layers[i], self._pages[i]
        if layer is None or not isinstance(own, pages.Pages):
            return None
        span = load.spans[layer.group]
        return own.paged(span.blocks, span.start)

    def _put(self, load: Load, i: int, parts: Parts) -> None:
        """Bring the parts of layer i into the blocks of a load."""
        layer, own = self._engine.layers[i], self._pages[i]
        assert layer is not None and own is not None
        own.put(load.spans[layer.group].blocks, parts)

    def _put_at_once(self, load: Load, i: int, parts: Parts) -> None:
        """The same; what was put is there when this returns."""
        self._put(load, i, parts)
        own = self._pages[i]
        assert own is not None
        own.settle()

    def wait(self, name: str) -> None:
        """Return when a layer's blocks are filled, or known to be invalid."""
        if self._step is None or name not in self._number:
            return
        i = self._number[name]
        for n, load in enumerate(self._step.loads):
            parts = self._step.take(n, i)
            if parts is not None:
                self._put(load, i, parts)

    def take_done(self) -> tuple[set[str], set[str]]:
        """Requests whose loads in the background are done, and which of these failed; once."""
        done, failed = set[str](), set[str]()
        for load, error in self._background.take_done():
            done.add(load.request)
            if error is not None:
                failed.add(load.request)
                self._tell(load, error)
        return done, failed

    def _tell(self, load: Load, error: Exception) -> None:
        metrics.recomputed("vllm", error)
        log.warning(
            "document %s is not used, %s tokens are computed: %s",
            load.documents[self._part],
            load.stop - load.start,
            error,
        )

    # --- saving ----------------------------------------------------------------------------

    def end_step(self, saves: Sequence[Save]) -> None:
        """Copy the prompts that this step completes, to be stored, unless something that they may
        rest on was not loaded, in this step or in one that vLLM knew nothing of yet."""
        self._end_loads()
        if self._known < self._failures or not self._stores:
            return
        for save in saves:
            self._saves.begin(save)

    def take_invalid(self) -> set[int]:
        """vLLM's blocks that were not filled, once. vLLM asks when the model has run: after
        :meth:`end_step`, or, where it drafts tokens after that, before it."""
        self._end_loads()
        found, self._invalid = self._invalid, set()
        return found

    def _end_loads(self) -> None:
        """Take note of what this step's loads have not filled. The model has run."""
        step, self._step = self._step, None
        failed = [] if step is None else step.end()
        if failed:  # those of other workers, which vLLM knows of, count with this one's
            self._failures = max(self._failures, self._known) + 1
        for load, error in failed:
            self._invalid |= load.blocks
            self._tell(load, error)

    def close(self) -> None:
        """Return when all that was copied is stored."""
        self._background.close()
        self._saves.close()
