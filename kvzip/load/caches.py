"""Caches of transformers: put together from loaders, or computed by the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache

from kvzip.load.config import LayerKind, cache_argument
from kvzip.load.lazy import FullLayer, SlidingLayer
from kvzip.load.loaders import BatchLoader, Loader
from kvzip.load.matching import Ids
from kvzip.load.recovery import Taken
from kvzip.load.reuse import HeldCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def spans_of(kinds: Sequence[LayerKind], count: int, witnessed: bool) -> list[tuple[int, int]]:
    """First and last position of what each layer needs for a cache of `count` tokens, and for the
    next token if it is to be a witness."""
    stop = count + witnessed
    return [(max(0, count - (kind.window or count + 1) + 1), stop) for kind in kinds]


def lazy_cache(
    loader: Loader | BatchLoader,
    kinds: Sequence[LayerKind],
    count: int,
    prompt_length: int | None,
    chunk: int | None = None,
    ids: Ids | None = None,
) -> Cache:
    """A `Cache` of `count` tokens, [layers], that takes them from a Loader or BatchLoader.
    `prompt_length`: tokens of the prompt that will be fed, the cached ones included; `chunk`: so
    many at a time. `ids`: of the cache's tokens, and perhaps of more, [batch, n], if known."""
    layers = [
        SlidingLayer(loader, i, count, sliding_window=kind.window)
        if kind.kind == "sliding"
        else FullLayer(loader, i, count)
        for i, kind in enumerate(kinds)
    ]
    layers[0]._prompt_length, layers[0]._chunk = prompt_length, chunk
    layers[0]._rotated = kinds[0].rope is not None
    layers[-1]._last = True
    distances: dict[int, torch.Tensor] = {}
    for layer in layers:
        layer._distances = distances
    cache = HeldCache(ids=None if ids is None else ids[:, :count])
    # Its own constructor would make layers from the config, once more: a millisecond.
    Cache.__init__(cache, layers=layers)
    return cache


def prefill_of(model: PreTrainedModel, ids: Ids, count: int) -> Callable[[], list[Taken]]:
    """What computes the caches of the first `count` tokens of `ids`, [batch, n], and layer 0's next
    key and value."""

    def prefill() -> list[Taken]:
        fed = torch.from_numpy(ids.astype(np.int64)).to(model.device)
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        with torch.no_grad():
            model(fed[:, :count], use_cache=True, **cache_argument(cache))
            layers = [Taken(layer.keys, layer.values) for layer in cache.layers]
            # Appending makes new tensors, so those above stay as they are.
            model(fed[:, count : count + 1], use_cache=True, **cache_argument(cache))
        next_token = tuple(
            each[:, :, -1:] for each in (cache.layers[0].keys, cache.layers[0].values)
        )
        return [layers[0]._replace(witness=next_token), *layers[1:]]

    return prefill


def empty_cache(config: PretrainedConfig) -> Cache:
    """A cache that a model of this config fills itself."""
    return HeldCache(config=config.get_text_config(decoder=True))
