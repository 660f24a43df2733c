"""What a cache's layers start with, and what happens when that cannot be loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from kvzip import metrics
from kvzip.errors import CancelledError, KVZipError
from kvzip.workers import Lock

_log = logging.getLogger("kvzip.load")


class Taken(NamedTuple):
    """What one layer of a cache starts with."""

    parts: Mapping[str, torch.Tensor]
    """By the names of parts, in transformers' shapes: see :mod:`kvzip.load.held`."""
    witness: tuple[torch.Tensor, ...] | None = None
    """Each row's key and value at the next position, [batch, heads, 1, dim], NaN in rows where none
    are known; or None."""


class Recovery:
    """Computes a cache's tokens anew when what is stored fails; says so once."""

    def __init__(self, prefill: Callable[[], list[Taken]]):
        self._prefill, self._lock = prefill, Lock()
        self._layers: list[Taken] | None = None

    @property
    def done(self) -> bool:
        """Whether the tokens have been computed."""
        return self._layers is not None

    def layers(self, error: Exception | None = None) -> list[Taken]:
        """All layers, computed; `error`: why, unless that was told already."""
        with self._lock:
            if self._layers is None:
                if error is not None:
                    tell(error)
                self._layers = self._prefill()
            return self._layers

    def take(self, i: int, load: Callable[[int], Taken]) -> Taken:
        """Layer i, loaded; or computed, if it fails or another one has."""
        if self.done:
            return self.layers()[i]
        try:
            return load(i)
        except CancelledError:  # nobody wants it any more
            raise
        except KVZipError as error:
            return self.layers(error)[i]


def tell(error: Exception) -> None:
    """Warn that what is stored is not used."""
    metrics.recomputed("transformers", error)
    _log.warning("the cache is computed anew, not loaded: %s", error)


@contextmanager
def naming(row: int) -> Iterator[None]:
    """Errors say which document of a batch they are about."""
    try:
        yield
    except KVZipError as error:
        raise type(error)(f"the document of prompts[{row}]: {error}") from error
    except OSError as error:
        error.strerror = f"the document of prompts[{row}]: {error.strerror or error}"
        raise
