"""Caches of transformers: put together from loaders, or computed by the model itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from kvzip.errors import KVZipError, UnsupportedError
from kvzip.load.config import ONE_BY_ONE, LayerKind, decoder_cache, fed, layer_kinds, plain_cache
from kvzip.load.held import Held, has_states
from kvzip.load.lazy import LazyLayer, lazy
from kvzip.load.loaders import BatchLoader, Loader
from kvzip.load.matching import Ids
from kvzip.load.quantized import SETTINGS, fp8_layer, grouped_layer
from kvzip.load.recovery import Taken, tell
from kvzip.load.reuse import held_cache
from kvzip.load.snapshots import held_by

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def spans_of(kinds: Sequence[LayerKind], count: int, witnessed: bool) -> list[tuple[int, int]]:
    """First and last position of what each layer needs for a cache of `count` tokens, and for the
    next token if it is to be a witness."""
    stop = count + witnessed
    return [(max(0, count - (kind.window or count + 1) + 1), stop) for kind in kinds]


def lazy_cache(
    loader: Loader | BatchLoader,
    config: PretrainedConfig,
    kinds: Sequence[LayerKind],
    count: int,
    prompt_length: int | None,
    chunk: int | None = None,
    ids: Ids | None = None,
    encoder_ids: Ids | None = None,
) -> Cache:
    """A `Cache` of `count` tokens for a model of that config, whose layers are of these kinds, that
    takes them from a Loader or BatchLoader. `prompt_length`: tokens of the prompt that will be fed,
    the cached ones included; `chunk`: so many at a time. `ids`: of the cache's tokens, and perhaps
    of more, [batch, n], if known; `encoder_ids`: of its encoder's."""
    layers: list[Any] = []
    for i, layer in enumerate(decoder_cache(config).layers):
        if kinds[i].empty:
            layers.append(layer)
        elif not {"k_scale", SETTINGS}.isdisjoint(loader.shapes(i)):
            layers.append(_quantized(loader, i, count, config))
        else:
            layers.append(lazy(layer, loader, i, count))
    own = [layer for layer in layers if isinstance(layer, LazyLayer)]
    distances: dict[str, torch.Tensor] = {}
    forgetful = config.get_text_config(decoder=True).model_type in ONE_BY_ONE
    for layer in own:
        layer._distances, layer._forgetful = distances, forgetful
    with_tokens = [layer for layer in own if kinds[layer._index].kind != "state"]
    states = [layer for layer in own if kinds[layer._index].states]
    if with_tokens:
        lead = with_tokens[0]
        lead._prompt_length, lead._chunk, lead._leads = prompt_length, chunk, True
        lead._rotated = kinds[lead._index].rope is not None
        lead._peers = states
        with_tokens[-1]._last = True
    held = None if ids is None else ids[:, :count]
    made = held_cache(config, layers, bool(states), count, held)
    made.unused = bool(states) and not with_tokens
    if not config.is_encoder_decoder:
        return made
    made.encoder_ids = encoder_ids
    cross, at = DynamicCache(), len(layers)
    for i in range(at, 2 * at):
        layer = lazy(DynamicLayer(), loader, i, loader.shapes(i)["k"][-2])
        layer._distances, layer._of_encoder = distances, True
        layer._last = i == 2 * at - 1
        cross.layers.append(layer)
    both = EncoderDecoderCache(made, cross)
    both.is_updated = dict.fromkeys(range(at), False)
    return both


def _quantized(loader: Loader | BatchLoader, i: int, count: int, config: PretrainedConfig) -> Any:
    """Layer i with quantised keys and values, decoded now."""
    if isinstance(loader, BatchLoader):
        raise UnsupportedError("quantised caches cannot be put together to a batch")
    parts = loader.load(i).parts  # what a model computes anew is not quantised
    if SETTINGS in parts:
        return grouped_layer(parts, count)
    computed = config.get_text_config(decoder=True).dtype or torch.float32
    return fp8_layer(parts, count, computed)


def empty_cache(config: PretrainedConfig, encoder_ids: Ids | None = None) -> Cache:
    """A cache that a model of this config fills itself, and that knows its tokens. `encoder_ids`:
    what its encoder will get, [batch, n], if it has one."""
    plain = plain_cache(config)
    own = getattr(plain, "self_attention_cache", plain)
    own = held_cache(config, own.layers, any(map(has_states, own.layers)), 0, None)
    own.encoder_ids = encoder_ids
    return EncoderDecoderCache(own, DynamicCache()) if config.is_encoder_decoder else own


def devices_of(model: PreTrainedModel, kinds: Sequence[LayerKind]) -> Sequence[torch.device] | None:
    """Where each of a model's layers with states is; None for a model that has none."""
    if not any(kind.states for kind in kinds):
        return None
    found: dict[int, torch.device] = {}
    for name, parameter in model.named_parameters():
        numbers = _LAYER.findall(name)
        if len(numbers) == 1 and not _MEDIA.search(name):
            found.setdefault(int(numbers[0]), parameter.device)
    return [found.get(i, model.device) for i in range(len(kinds))]


_LAYER = re.compile(r"\.(?:layers|blocks|h)\.(\d+)\.")
_MEDIA = re.compile("vision|visual|image|audio|speech|encoder")


def prefill_of(
    model: PreTrainedModel, ids: Ids, count: int, encoder_ids: Ids | None = None
) -> Callable[[], list[Taken]]:
    """What computes the caches of the first `count` tokens of `ids`, [batch, n], and the next key
    and value of the first layer that has them."""

    def prefill() -> list[Taken]:
        prompt = torch.from_numpy(ids.astype(np.int64)).to(model.device)
        given = {}
        if encoder_ids is not None:
            given["input_ids"] = torch.from_numpy(encoder_ids.astype(np.int64)).to(model.device)
        cache = plain_cache(model.config)
        own = getattr(cache, "self_attention_cache", cache)
        kinds = layer_kinds(model.config)
        with torch.no_grad():
            model(**given, **fed(model, cache, prompt[:, :count], 0))
            layers = [_taken(one) for one in held_by(cache, kinds)]
            lead = next((i for i, kind in enumerate(kinds) if kind.counts), None)
            if lead is None or prompt.shape[1] == count:
                return layers
            # Appending makes new tensors, so those above stay as they are.
            model(**given, **fed(model, cache, prompt[:, count : count + 1], count))
        next_token = tuple(
            each[:, :, -1:] for each in (own.layers[lead].keys, own.layers[lead].values)
        )
        layers[lead] = layers[lead]._replace(witness=next_token)
        return layers

    return prefill


def prefill_after(
    loader: Loader,
    model: PreTrainedModel,
    ids: Ids,
    count: int,
    otherwise: Callable[[], list[Taken]],
) -> Callable[[], list[Taken]]:
    """What computes the caches of the first `count` tokens of `ids`, [1, n], from a loader's, which
    has fewer; or, if that fails, does it `otherwise`."""

    def prefill() -> list[Taken]:
        kinds = layer_kinds(model.config)
        begin = loader.held
        prompt = torch.from_numpy(ids.astype(np.int64)).to(model.device)
        cache = lazy_cache(loader, model.config, kinds, begin, None)
        step = 1 if model.config.get_text_config(decoder=True).model_type in ONE_BY_ONE else count
        try:
            with torch.no_grad():
                for at in range(begin, count, step):
                    model(**fed(model, cache, prompt[:, at : min(at + step, count)], at))
        except KVZipError as error:
            tell(error)
            return otherwise()
        return [_taken(one) for one in held_by(cache, kinds)]

    return prefill


def _taken(one: Held) -> Taken:
    """What a layer holds, by the names of parts, for the model to go on from."""
    return Taken({name: piece.tensor for name, piece in one.copied().pieces.items()})
