"""Prompts out of vLLM's blocks into documents, beside the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvzip import dtypes
from kvzip.codecs.native.cuda.device import Device
from kvzip.errors import ProfileError, UnsupportedError
from kvzip.load.vllm.engine import Engine
from kvzip.load.vllm.metadata import Save
from kvzip.load.vllm.pages import Pages, StatePages, reached
from kvzip.load.vllm.settings import Settings
from kvzip.load.vllm.troubles import Troubles
from kvzip.profile import Profile
from kvzip.snapshot import Layer, Snapshot
from kvzip.store import Store
from kvzip.workers import Lock


@dataclass(frozen=True)
class _Copy:
    """A prompt's layers, copied out of vLLM's blocks."""

    layers: Sequence[Mapping[str, torch.Tensor]]
    """Parts by their names; none of a layer that has no cache of its own."""
    ready: torch.cuda.Event | None
    """When they are whole, where a GPU copies them by itself."""


class Saves:
    """Copies prompts while the engine waits, and encodes and stores them beside it.

    `part`: which of the parts that the model is cut into is in this process.
    """

    def __init__(
        self, settings: Settings, engine: Engine, store: Store, profile: Profile | None, part: int
    ):
        self._settings, self._engine, self._store = settings, engine, store
        self._profile, self._part = profile, part
        self._pages: Sequence[Pages | StatePages | None] = ()
        self._device: Device | None = None
        self._writer = ThreadPoolExecutor(1, "kvzip-save")
        self._pending, self._lock = 0, Lock()
        self._troubles = Troubles()

    def register(self, pages: Sequence[Pages | StatePages | None], device: Device | None) -> None:
        """Take vLLM's blocks, by layer, and what encodes where they lie; None: the CPU does."""
        self._pages, self._device = pages, device

    def begin(self, save: Save) -> None:
        """Copy a prompt, to be stored, if there is room for it. Its blocks may change after."""
        need = self._engine.document_bytes(len(save.token_ids))
        if not self._reserve(need):
            return
        try:
            copied = self._copied(save)
        except Exception as error:  # the engine goes on without
            self._give_back(need)
            self._troubles.tell("save", "prompts are not stored: %s", error)
            return
        self._writer.submit(self._write, save, copied, need)

    def close(self) -> None:
        """Return when all that was copied is stored."""
        self._writer.shutdown()

    # --- room ------------------------------------------------------------------------------

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

    def _give_back(self, need: int) -> None:
        with self._lock:
            self._pending -= need

    # --- copying ---------------------------------------------------------------------------

    def _copied(self, save: Save) -> _Copy:
        """Beside vLLM's blocks if they are to be encoded there, and else, or if the GPU has no
        memory for it, in the host's memory."""
        layers = range(len(self._pages))
        if self._device is not None:
            try:
                beside = [self._taken(save, i) for i in layers]
                return _Copy(beside, _recorded(beside))
            except torch.OutOfMemoryError:
                pass
        # One layer after the other, so that the GPU's memory holds no more of them.
        return _Copy([{n: t.cpu() for n, t in self._taken(save, i).items()} for i in layers], None)

    def _taken(self, save: Save, i: int) -> dict[str, torch.Tensor]:
        """The parts of layer i, with the tokens that its blocks hold, the last ones of the
        prompt."""
        layer, own = self._engine.layers[i], self._pages[i]
        if layer is None or own is None:
            return {}
        span, size = save.spans[layer.group], self._engine.groups[layer.group].block_tokens
        tokens = len(save.token_ids) - span.start
        return own.take(span.blocks[: -(-tokens // size)], tokens)

    # --- storing ---------------------------------------------------------------------------

    def _write(self, save: Save, copied: _Copy, need: int) -> None:
        """Encode and store a document; never raises."""
        try:
            self._put(self._snapshot(save, copied), save.replace)
            self._troubles.over("save")
        except Exception as error:  # a document that is not stored is a miss, no more
            self._troubles.tell("save", "prompts are not stored: %s", error)
        finally:
            self._give_back(need)

    def _snapshot(self, save: Save, copied: _Copy) -> Snapshot:
        if copied.ready is not None:
            copied.ready.synchronize()
        engine, count = self._engine, len(save.token_ids)
        layers = []
        for i, parts in enumerate(copied.layers):
            layer = engine.layers[i]
            first = count if layer is None else save.spans[layer.group].start
            layout = engine.layer_layout(i, first, count)
            bits = {
                name: dtypes.held_bits(part, layout.part(name).dtype, written=True)[0]
                for name, part in parts.items()
            }
            layers.append(Layer(bits, layout))
        ids = np.asarray(save.token_ids, np.uint32)
        return Snapshot(layers, engine.dtype, ids, engine.split.origin(save.origin, self._part))

    def _put(self, snapshot: Snapshot, replace: bool) -> None:
        """Store a document; with channel where the profile is of another cache than this one, as
        that of a whole model is where workers have parts of it, or windows of its layers."""

        def put(codec: str | dict[str, Any], profile: Profile | None) -> None:
            self._store.put(
                snapshot,
                codec=codec,
                profile=profile,
                threads=self._settings.threads,
                replace=replace,
                device=self._device,
            )

        try:
            put(self._settings.codec, self._profile)
        except (ProfileError, UnsupportedError) as error:
            if self._profile is None:
                raise
            self._troubles.tell("profile", "channel is used, not the profile's codec: %s", error)
            put("channel", None)


def _recorded(layers: Sequence[Mapping[str, torch.Tensor]]) -> torch.cuda.Event | None:
    """When these are whole; None where they are so at once."""
    on = next((t.device for parts in layers for t in parts.values() if t.is_cuda), None)
    return None if on is None else reached(on)
