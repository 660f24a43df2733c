"""Ending a load that is under way.

A lazily loaded cache (:mod:`kvzip.load.hf`) decodes in threads, ahead of the model. When nobody
wants the answer any more, :func:`cancel` ends them:

.. code-block:: python

    from kvzip.load.cancelling import cancel

    cancel(cache)       # from any thread; who waits for a layer gets a CancelledError

A document that is read by hand is ended by :meth:`kvzip.Reader.cancel`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvzip.load.loaders import BatchLoader, Loader
from kvzip.load.witness import lazy_layers

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


def cancel(cache: Cache) -> None:
    """End the loading of a cache that was loaded by `load_cache`, `load_or_prefill` or those for
    batches: what is not decoded yet never is, nor computed in its place. Returns when the threads
    that decode have ended.

    Who waits for a layer of it, in another thread, and who feeds it later, gets a CancelledError;
    layers that are decoded stay as they are. Copies of the cache that share its document are
    cancelled with it. A cache of anything else, and one that is all decoded, stays as it is.
    """
    for layer in lazy_layers(cache):
        for loader in (layer._loader, layer._source):
            _cancel(loader)


def _cancel(loader: Any) -> None:
    if isinstance(loader, Loader):
        loader.cancel()
    elif isinstance(loader, BatchLoader):
        for row in loader.rows:
            _cancel(row)
