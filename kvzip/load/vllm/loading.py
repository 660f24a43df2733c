"""Documents decoded for vLLM's blocks: within a step, ahead of the model, or before it begins."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore, Thread
from typing import Any

import torch

from kvzip import dtypes
from kvzip.codecs.native.cuda.device import Device
from kvzip.container import Reader
from kvzip.container.on_device import DeviceLayer
from kvzip.errors import KVZipError, UnsupportedError
from kvzip.layout import KV
from kvzip.load.documents import OpenDocument
from kvzip.load.vllm.engine import Engine
from kvzip.load.vllm.metadata import Load
from kvzip.load.vllm.pages import Paged
from kvzip.snapshot import Layer
from kvzip.workers import Lock

_AHEAD = 2
"""Layers of each request that may lie decoded and unused."""
_AT_ONCE = 2
"""Requests whose documents are decoded beside each other in the background."""

Parts = Mapping[str, torch.Tensor]
"""Tensors [heads, tokens, dim] by the names of a layer's parts."""


class LayersOf:
    """The layers of a load's document, decoded one by one or some together, on `device` if that
    can. Close it after use."""

    def __init__(
        self,
        load: Load,
        engine: Engine,
        document: OpenDocument[Reader],
        device: Device | None = None,
    ):
        self._load, self._engine, self._document = load, engine, document
        reader = document.source
        try:
            decodes = device is not None and reader.codec.decodes_on(device)
            self._device = device if decodes and reader.layout.plain else None
            engine.check(document.source.layout)
            spans = [self._span(i) for i in range(len(engine.layers))]
            document.source.read_ahead(spans)
        except BaseException:
            document.close()
            raise

    def _span(self, i: int) -> tuple[int, int]:
        """Positions of layer i that are loaded."""
        layer = self._engine.layers[i]
        if layer is None:
            return self._load.stop, self._load.stop
        return self._load.spans[layer.group].start, self._load.stop

    def decode(self, i: int) -> Parts:
        """The parts of layer i. Raises KVZipError."""
        (layer,) = self._decode([i])
        if isinstance(layer, DeviceLayer):
            return dict(zip(KV, layer, strict=True))
        return {
            name: dtypes.as_tensor(layer.part(name), part.dtype)
            for name, part in layer.layout.parts.items()
        }

    def decode_in_place(self, place: Callable[[Load, int], Paged | None]) -> set[int]:
        """Have the device write all layers that it can where `place` says, those together whose
        tokens lie in the same pages: which these are. Raises KVZipError."""
        together: dict[tuple[int, ...], list[tuple[int, Paged]]] = {}
        for i, layer in enumerate(self._engine.layers if self._device is not None else ()):
            found = None if layer is None else place(self._load, i)
            if found is not None:
                together.setdefault((*self._span(i), *found.pages), []).append((i, found))
        for some in together.values():
            out = [found.out for _, found in some]
            self._decode([i for i, _ in some], out=out, pages=some[0][1].pages)
        return {i for some in together.values() for i, _ in some}

    def _decode(self, layers: list[int], **options: Any) -> list[Layer | DeviceLayer]:
        """Layers of which the same positions are loaded."""
        start, stop = self._span(layers[0])
        found = self._document.source.decode(
            layers=layers, tokens=(start, stop), device=self._device, **options
        )
        decoded: list[Layer | DeviceLayer] = list(found.layers)
        for i, layer in zip(layers, decoded, strict=True):
            held = layer.layout
            if held.parts and held.kind != "state" and held.stored != stop - start:
                raise UnsupportedError(f"its layer {i} does not hold all of the tokens")
        return decoded

    def close(self) -> None:
        self._document.close()


class StepLoads:
    """The loads of one step, decoded by a thread: layer after layer, of all requests."""

    def __init__(
        self,
        loads: Sequence[Load],
        engine: Engine,
        open_load: Callable[[Load], OpenDocument[Reader]],
        timeout: float,
        device: Device | None = None,
    ):
        self.loads, self._engine, self._device = loads, engine, device
        self._numbers = [i for i, layer in enumerate(engine.layers) if layer is not None]
        self._layers = len(self._numbers)
        self._open, self._timeout = open_load, timeout
        self._room = [Semaphore(_AHEAD) for _ in loads]
        self._ready: list[list[Future[Parts]]] = [[Future() for _ in self._numbers] for _ in loads]
        """Of each load the layers in their order; one that was taken is let go."""
        self._taken = [set[int]() for _ in loads]
        self._errors: dict[int, Exception] = {}
        self._over = False
        Thread(target=self._decode, name="kvzip-load", daemon=True).start()

    def _decode(self) -> None:
        documents: dict[int, LayersOf] = {}
        failed = set[int]()
        try:
            for i, n in itertools.product(range(self._layers), range(len(self.loads))):
                if n in failed:
                    continue
                self._room[n].acquire()
                if self._over:
                    return
                try:
                    if n not in documents:
                        load = self.loads[n]
                        opened = self._open(load)
                        documents[n] = LayersOf(load, self._engine, opened, self._device)
                    self._ready[n][i].set_result(documents[n].decode(self._numbers[i]))
                except Exception as error:  # whatever it is, the engine computes instead
                    self._ready[n][i].set_exception(error)
                    failed.add(n)
        finally:
            for document in documents.values():
                document.close()

    def take(self, n: int, number: int) -> Parts | None:
        """The parts of a layer of load n, by the layer's number, once; None after that, and after
        a failure."""
        i = self._numbers.index(number)
        if n in self._errors or i in self._taken[n]:
            return None
        try:
            parts = self._ready[n][i].result(self._timeout)
        except TimeoutError:
            self._fail(n, KVZipError(f"layer {i} did not come within {self._timeout:g} s"))
            return None
        except Exception as error:
            self._fail(n, error)
            return None
        self._taken[n].add(i)
        self._ready[n][i] = Future()  # which held all of the layer to the step's end
        self._room[n].release()
        return parts

    def _fail(self, n: int, error: Exception) -> None:
        self._errors[n] = error
        self._room[n].release(self._layers)  # it must not hold up the others

    def end(self) -> list[tuple[Load, Exception]]:
        """Loads that failed, and why; the thread stops at its next layer."""
        self._over = True
        for n, room in enumerate(self._room):
            room.release(self._layers)
            if len(self._taken[n]) != self._layers:
                self._errors.setdefault(n, KVZipError("vLLM did not ask for all layers"))
        return [(self.loads[n], error) for n, error in sorted(self._errors.items())]


class BackgroundLoads:
    """The loads of requests that vLLM lets wait until they are done, each by a thread of its own.

    `put` brings a layer's parts into the blocks of a load; `place` says where a device may write
    them itself. vLLM uses the blocks for nothing else until a load is told to be done, however long
    that takes.
    """

    def __init__(
        self,
        engine: Engine,
        open_load: Callable[[Load], OpenDocument[Reader]],
        put: Callable[[Load, int, Parts], None],
        place: Callable[[Load, int], Paged | None],
    ):
        self._engine, self._open, self._put, self._place = engine, open_load, put, place
        self._pool = ThreadPoolExecutor(_AT_ONCE, "kvzip-load")
        self._lock = Lock()
        self._done: list[tuple[Load, Exception | None]] = []

    def begin(
        self, load: Load, reached: torch.cuda.Event | None = None, device: Device | None = None
    ) -> None:
        """Load a document's layers into vLLM's blocks, beside the engine's work. What vLLM has
        begun by then may still use these blocks for another request, in a stream of vLLM's own:
        nothing is written before it is done, which `reached` tells."""
        self._pool.submit(self._run, load, reached, device)

    def _run(self, load: Load, reached: torch.cuda.Event | None, device: Device | None) -> None:
        found: Exception | None = None
        try:
            document = LayersOf(load, self._engine, self._open(load), device)
            try:
                if reached is not None:
                    reached.synchronize()
                done = document.decode_in_place(self._place)
                for i, layer in enumerate(self._engine.layers):
                    if layer is not None and i not in done:
                        self._put(load, i, document.decode(i))
            finally:
                document.close()
        except Exception as error:  # whatever it is, the engine computes instead
            found = error
        with self._lock:
            self._done.append((load, found))

    def take_done(self) -> list[tuple[Load, Exception | None]]:
        """Loads that are done, once each, and why those that failed did."""
        with self._lock:
            found, self._done = self._done, []
        return found

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
