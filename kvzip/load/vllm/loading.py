"""Documents decoded for one step, layer after layer, ahead of the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Semaphore, Thread

import torch

from kvzip import dtypes
from kvzip.container import Reader
from kvzip.errors import KVZipError, UnsupportedError
from kvzip.load.documents import OpenDocument
from kvzip.load.vllm.engine import Engine
from kvzip.load.vllm.metadata import Load
from kvzip.snapshot import Layer

_AHEAD = 2
"""Layers of each request that may lie decoded and unused."""


class StepLoads:
    """The loads of one step, decoded by a thread: layer after layer, of all requests."""

    def __init__(
        self,
        loads: Sequence[Load],
        engine: Engine,
        open_load: Callable[[Load], OpenDocument[Reader]],
        timeout: float,
    ):
        self.loads, self._engine, self._layers = loads, engine, len(engine.layers)
        self._open, self._timeout = open_load, timeout
        self._room = [Semaphore(_AHEAD) for _ in loads]
        self._ready: list[list[Future[Layer]]] = [[Future() for _ in engine.layers] for _ in loads]
        self._taken = [0] * len(loads)
        self._errors: dict[int, Exception] = {}
        self._over = False
        Thread(target=self._decode, name="kvzip-load", daemon=True).start()

    def _decode(self) -> None:
        documents: dict[int, OpenDocument[Reader]] = {}
        failed = set[int]()
        try:
            for i, n in itertools.product(range(self._layers), range(len(self.loads))):
                if n in failed:
                    continue
                self._room[n].acquire()
                if self._over:
                    return
                try:
                    self._ready[n][i].set_result(self._decode_one(documents, n, i))
                except Exception as error:  # whatever it is, the engine computes instead
                    self._ready[n][i].set_exception(error)
                    failed.add(n)
        finally:
            for document in documents.values():
                document.close()

    def _decode_one(self, documents: dict[int, OpenDocument[Reader]], n: int, i: int) -> Layer:
        """Layer i of load n, whose document is opened when it is first needed."""
        load = self.loads[n]
        span = load.start, load.stop
        if n not in documents:
            documents[n] = self._open(load)
            self._engine.check(documents[n].source)
            documents[n].source.read_ahead([span] * self._layers)
        layer: Layer = documents[n].source.decode(layers=[i], tokens=span).layers[0]
        if layer.layout.stored != load.stop - load.start:
            raise UnsupportedError(f"its layer {i} does not hold all of the tokens")
        return layer

    def take(self, n: int, i: int) -> list[torch.Tensor] | None:
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
        return [dtypes.as_tensor(bits, self._engine.dtype) for bits in layer]

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
