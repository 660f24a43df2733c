"""The worker's half: layers from documents into vLLM's blocks, and back."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from kvzip import dtypes, metrics
from kvzip.codecs.native.cuda.device import Device, get_device
from kvzip.container import Reader
from kvzip.errors import ProfileError, UnsupportedError
from kvzip.load.documents import OpenDocument, StoredDocument, open_document
from kvzip.load.vllm import pages
from kvzip.load.vllm.engine import Engine
from kvzip.load.vllm.loading import BackgroundLoads, Parts, StepLoads
from kvzip.load.vllm.metadata import Load, Save
from kvzip.load.vllm.settings import Settings
from kvzip.load.vllm.troubles import Troubles, log
from kvzip.profile import Profile
from kvzip.snapshot import Layer, Snapshot
from kvzip.store import Store
from kvzip.workers import Lock


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
        self._device: Device | None = None
        """What decodes documents that it can; the CPU decodes others."""
        self._background = BackgroundLoads(engine, self._open, self._put_at_once, self._place)
        self._invalid: set[int] = set()
        self._spoiled = False
        """Whether something of this step was not loaded."""
        self._writer = ThreadPoolExecutor(1, "kvzip-save")
        self._pending, self._lock = 0, Lock()
        self._troubles = Troubles()
        # A script may end without a shutdown. So `close` runs before Python ends all thread
        # pools (which do the same), and what is still to be stored needs some.
        threading._register_atexit(self.close)  # type: ignore[attr-defined]

    def register(self, caches: Mapping[str, torch.Tensor], context: Mapping[str, Any]) -> None:
        """Take vLLM's cache tensors, by layer; `context` holds the layers themselves."""
        self._pages = []
        self._device = self._device_of(next(iter(caches.values())))
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

    def _device_of(self, cache: torch.Tensor) -> Device | None:
        """The GPU that decodes, if one is to. Raises UnsupportedError where there is none."""
        if self._settings.decode_on == "cpu":
            return None
        try:
            return get_device(cache.device)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"decode_on is gpu, and vLLM's cache is on {cache.device}: {error}"
            ) from None

    # --- loading ---------------------------------------------------------------------------

    def start(self, loads: Sequence[Load], background: Sequence[Load]) -> None:
        """Begin to decode what this step needs, and what requests wait for that come later."""
        if loads:
            timeout = self._settings.timeout
            self._step = StepLoads(loads, self._engine, self._open, timeout, self._device)
        for load in background:
            self._background.begin(load, self._device)

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
        rest on was not loaded."""
        self._end_loads()
        spoiled, self._spoiled = self._spoiled, False
        if spoiled or not self._stores:
            return
        for save in saves:
            need = self._engine.document_bytes(len(save.token_ids))
            if self._reserve(need):
                self._writer.submit(self._write, save, self._copied(save), need)

    def _copied(self, save: Save) -> list[Layer]:
        """A prompt's layers, copied out of vLLM's blocks. Each holds the tokens that its blocks
        do, the last ones of the prompt."""
        engine, found, count = self._engine, list[Layer](), len(save.token_ids)
        for i, (layer, own) in enumerate(zip(engine.layers, self._pages, strict=True)):
            if layer is None or own is None:
                found.append(Layer({}, engine.layer_layout(i, count, count)))
                continue
            span, size = save.spans[layer.group], engine.groups[layer.group].block_tokens
            blocks = span.blocks[: -(-(count - span.start) // size)]
            taken = own.take(blocks, count - span.start)
            layout = engine.layer_layout(i, span.start, count)
            bits = {n: dtypes.as_bits(t, layout.part(n).dtype)[0] for n, t in taken.items()}
            found.append(Layer(bits, layout))
        return found

    def _reserve(self, need: int) -> bool:
        """Whether there is room in memory for a document of so many bytes, which is then taken."""
        with self._lock:
            if self._pending + need <= self._settings.pending_bytes:
                self._pending += need
                return True
        url = self._store.bucket.url
        words = "prompts come faster than %s takes them: not all are stored"
        self._troubles.tell("full", words, url)
        return False

    def take_invalid(self) -> set[int]:
        """vLLM's blocks that were not filled, once. vLLM asks when the model has run: after
        :meth:`end_step`, or, where it drafts tokens after that, before it."""
        self._end_loads()
        found, self._invalid = self._invalid, set()
        return found

    def _end_loads(self) -> None:
        """Take note of what this step's loads have not filled. The model has run."""
        step, self._step = self._step, None
        if step is not None:
            for load, error in step.end():
                self._invalid |= load.blocks
                self._spoiled = True
                self._tell(load, error)

    def _write(self, save: Save, layers: list[Layer], need: int) -> None:
        """Encode and store a document; never raises."""
        try:
            snapshot = Snapshot(
                layers,
                self._engine.dtype,
                np.asarray(save.token_ids, np.uint32),
                self._engine.split.origin(save.origin, self._part),
            )
            self._put_in_store(snapshot, save.replace)
            self._troubles.over("save")
        except Exception as error:  # a document that is not stored is a miss, no more
            self._troubles.tell("save", "prompts are not stored: %s", error)
        finally:
            with self._lock:
                self._pending -= need

    def _put_in_store(self, snapshot: Snapshot, replace: bool) -> None:
        """Store a document; with channel where the profile is of another cache than this one, as
        that of a whole model is where workers have parts of it, or windows of its layers."""

        def put(codec: str | dict[str, Any], profile: Profile | None) -> None:
            threads = self._settings.threads
            self._store.put(
                snapshot, codec=codec, profile=profile, threads=threads, replace=replace
            )

        try:
            put(self._settings.codec, self._profile)
        except (ProfileError, UnsupportedError) as error:
            if self._profile is None:
                raise
            self._troubles.tell("profile", "channel is used, not the profile's codec: %s", error)
            put("channel", None)

    def close(self) -> None:
        """Return when all that was copied is stored."""
        self._background.close()
        self._writer.shutdown()
