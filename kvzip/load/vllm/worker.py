"""The worker's half: layers from documents into vLLM's blocks, and back."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from kvzip import dtypes
from kvzip.container import Reader
from kvzip.load.documents import OpenDocument, StoredDocument, open_document
from kvzip.load.vllm import pages
from kvzip.load.vllm.engine import Engine
from kvzip.load.vllm.loading import StepLoads
from kvzip.load.vllm.metadata import Load, Save
from kvzip.load.vllm.settings import Settings
from kvzip.load.vllm.troubles import Troubles, log
from kvzip.profile import Profile
from kvzip.snapshot import Layer, Snapshot
from kvzip.store import Store
from kvzip.workers import Lock


class _CopiedOut:
    """A prompt's layers, as they are copied out."""

    def __init__(self, save: Save, count: int):
        self.save, self.bytes = save, count
        """`bytes` of memory are taken for it; 0 where there was no room."""
        self.layers: dict[int, Layer] = {}


class Worker:
    """Moves layers from documents into vLLM's blocks and back."""

    def __init__(self, settings: Settings, engine: Engine, store: Store, profile: Profile | None):
        self._settings, self._engine, self._store = settings, engine, store
        self._profile = profile
        self._pages: list[pages.Pages] = []
        self._number = {name: i for i, name in enumerate(engine.layers)}
        self._step: StepLoads | None = None
        self._invalid: set[int] = set()
        self._copied: dict[str, _CopiedOut] = {}
        self._writer = ThreadPoolExecutor(1, "kvzip-save")
        self._pending, self._lock = 0, Lock()
        self._troubles = Troubles()
        # A script may end without a shutdown. So `close` runs before Python ends all thread
        # pools (which do the same), and what is still to be stored needs some.
        threading._register_atexit(self.close)  # type: ignore[attr-defined]

    def register(self, caches: Mapping[str, torch.Tensor], context: Mapping[str, Any]) -> None:
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
            self._step = StepLoads(loads, self._engine, self._open, self._settings.timeout)

    def _open(self, load: Load) -> OpenDocument[Reader]:
        document = StoredDocument(self._store, load.document)
        return open_document(document, self._profile, self._settings.threads)

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
            if save.request not in self._copied:
                self._copied[save.request] = _CopiedOut(save, self._reserve(save))
            copied = self._copied[save.request]
            if not copied.bytes:
                continue
            count = len(save.token_ids)
            used = -(-count // self._engine.block_tokens)
            blocks = torch.tensor(save.blocks[:used], dtype=torch.int64)
            k, v = (dtypes.as_bits(t)[0] for t in self._pages[i].take(blocks, count))
            copied.layers[i] = Layer.of_kv(k, v, self._engine.layout(i, count))

    def _reserve(self, save: Save) -> int:
        """Room in memory for a document; 0 when there is none."""
        need = self._engine.token_bytes * len(save.token_ids)
        with self._lock:
            if self._pending + need <= self._settings.pending_bytes:
                self._pending += need
                return need
        url = self._store.bucket.url
        words = "prompts come faster than %s takes them: not all are stored"
        self._troubles.tell("full", words, url)
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
                log.warning(
                    "document %s is not used, %s tokens are computed: %s",
                    load.document,
                    load.stop - load.start,
                    error,
                )
        copied, self._copied = self._copied, {}
        for one in copied.values():
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

    def _write(self, one: _CopiedOut) -> None:
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
            self._troubles.over("save")
        except Exception as error:  # a document that is not stored is a miss, no more
            self._troubles.tell("save", "prompts are not stored: %s", error)
        finally:
            self._release(one.bytes)

    def close(self) -> None:
        """Return when all that was copied is stored."""
        self._writer.shutdown()
