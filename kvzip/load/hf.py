"""Between a `.kvz` file and a transformers `Cache`: layers decoded when a model first needs them.

`generate` trusts a cache blindly: it feeds ``input_ids[:, len(cache) - len(ids):]`` and never asks
whether the cache belongs to them. With a cache as long as the prompt, or longer, that slice is the
whole prompt or a piece of its middle, at wrong positions, and the tokens that come out are wrong
without an error. So with a cache made here `generate` compares the ids, and the cache checks the
first thing that it is fed, see `load_cache`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
import transformers
from numpy.typing import ArrayLike
from transformers.cache_utils import Cache, EncoderDecoderCache

from kvzip import dtypes
from kvzip.container import Reader
from kvzip.errors import KVZipError, UnsupportedError, UsageError
from kvzip.load.batch import load_batch, load_batch_or_prefill
from kvzip.load.caches import empty_cache, lazy_cache, prefill_of, spans_of
from kvzip.load.config import LayerKind, cache_argument, kind_of, layer_kinds, rope_parameters
from kvzip.load.documents import Document, OpenDocument, find_document, open_document
from kvzip.load.loaders import Loader
from kvzip.load.matching import (
    Ids,
    agreed,
    check_config,
    check_held,
    check_options,
    device_of,
    finder,
    ids_of,
    in_common,
    origin_of_model,
)
from kvzip.load.placeholders import check_text_only
from kvzip.load.recovery import Recovery, tell
from kvzip.load.witness import watch
from kvzip.models import products
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Layer, LayerLayout, Layout, Origin, Snapshot
from kvzip.store import Store

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "cache_argument",
    "cache_of_snapshot",
    "layer_kinds",
    "load_batch",
    "load_batch_or_prefill",
    "load_cache",
    "load_or_prefill",
    "rope_parameters",
    "snapshot_of_cache",
]

# --- from a cache ----------------------------------------------------------------------------


def snapshot_of_cache(
    cache: Cache,
    token_ids: ArrayLike | torch.Tensor | None = None,
    model: PreTrainedModel | str | None = None,
) -> Snapshot:
    """A snapshot of a `Cache` that a forward pass has filled; see :meth:`Snapshot.from_cache`.

    `token_ids`: ids of all tokens the cache has seen, [tokens] or [batch, tokens]. `model`: the
    model or its id. Raises UnsupportedError, which names the layer and its class, for any cache
    layer but full and sliding attention, and KVZipError when the ids do not fit the cache.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise UnsupportedError(f"a {type(cache).__name__} is not a cache of a decoder's layers")
    ropes: list[int | None] = []
    if model is not None and not isinstance(model, str):
        ropes = [kind.rope for kind in layer_kinds(model.config)]
    layers, dtype = [], None
    for i, layer in enumerate(cache.layers):
        kind, window = kind_of(layer, i)
        if layer.keys is None or layer.keys.ndim != 4:
            raise UnsupportedError(f"layer {i} of the cache is empty: run a forward pass first")
        (k, dtype), (v, _) = dtypes.as_bits(layer.keys, dtype), dtypes.as_bits(layer.values, dtype)
        if k.shape[0] == 1:
            k, v = k[0], v[0]
        length = int(layer.get_seq_length())
        rope = ropes[i] if i < len(ropes) else None
        layout = LayerLayout.of_kv(k.shape, v.shape, dtype, length, kind, window, rope)
        layers.append(Layer.of_kv(k, v, layout))
    if dtype is None:
        raise UnsupportedError("the cache has no layers: run a forward pass first")
    ids = None if token_ids is None else ids_of(token_ids, "token_ids")
    if ids is not None:
        if model is not None and not isinstance(model, str):
            check_text_only(model.config, ids, type(model).__name__)
        shape = (*layers[0].k.shape[:-3], layers[0].layout.cumulative_length)
        ids = ids[0] if ids.shape[0] == 1 and len(shape) == 1 else ids
        if ids.shape != shape:
            raise KVZipError(
                f"token_ids has shape {list(ids.shape)}, the cache {list(shape)}: "
                "give the ids of the tokens that were fed, no more and no fewer"
            )
    return Snapshot(layers, dtype, ids, _origin(model, layers[0], cache))


def _origin(model: PreTrainedModel | str | None, layer: Layer, cache: Cache) -> Origin:
    """Where a cache comes from: its model, if that is known, and the software that made it."""
    device = cache.layers[0].keys.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    software = {
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "device": f"{device.type} ({name})",
    }
    if model is None or isinstance(model, str):
        return Origin(model=model or "", software=software)
    if isinstance(model, torch.nn.Module):
        software |= products.of(model)
    return msgspec.structs.replace(origin_of_model(model), software=software)


# --- to a cache ------------------------------------------------------------------------------


def cache_of_snapshot(snapshot: Snapshot, config: PretrainedConfig) -> Cache:
    """A `DynamicCache` with every token of a snapshot; see :meth:`Snapshot.to_cache`."""
    kinds = check_config(snapshot, config)
    check_held(snapshot.layout, snapshot.tokens)
    count = snapshot.tokens
    loader = Loader(snapshot, spans_of(kinds, count, False), count, None, 0)
    ids = None if snapshot.token_ids is None else np.atleast_2d(snapshot.token_ids)
    return lazy_cache(loader, kinds, count, None, ids=ids)


def load_cache(
    source: Document,
    config: PretrainedConfig,
    *,
    prompt: ArrayLike | torch.Tensor | None = None,
    tokens: int | None = None,
    profile: Profile | None = None,
    device: torch.device | str | None = None,
    threads: int = 0,
    prefill_chunk_size: int | None = None,
    check_weights: bool = True,
) -> Cache:
    """A transformers `Cache` from a .kvz file, for ``generate(ids, cache=...)``
    (``past_key_values=`` before transformers 5.24).

    `source`: what :func:`kvzip.open` takes, a URL (``https://``, ``s3://``), a Reader, what
    :meth:`kvzip.store.Store.find` found, or a Snapshot. Its document has N tokens. From a URL or a
    store only the bytes that are needed are read, ahead of their use.
    `config`: the model's. A few layers are decoded when the first of them is used, and then the
    next few in a thread beside; nothing is decoded here. `device`: where decoded tensors go
    (default: where the model computes); a GPU decodes itself what it can (docs/gpu.md). `threads`:
    for decoding one layer; 0 for all cores.

    At least one token must be left for the model to compute, so not all are kept:

    - With `prompt`, the ids that `generate` will get ([n] or [batch, n]): the longest prefix
      that they share with the document, less than n tokens. The file must have its token ids.
    - Without: the first N-1 tokens (or `tokens`, at most N-1), for prompts that are the document
      or go on from it.

    `generate` then raises for ids that do not begin with those that are kept, and, however often it
    is called with the cache, for ids that do not go on from all that it holds, the generated ones
    among them (:mod:`kvzip.load.reuse`). Where it is not `generate` that feeds the cache, or its
    ids are the prompt's end alone, with a mask for all, what is fed first is checked, before it
    changes anything. Without `prompt`, its first key of layer 0, which depends on a token and its
    position alone, must be the one that the document has there; so a prompt that is too short, ids
    of the suffix without a full-length attention mask, or another text raise. With it, as many
    tokens must be fed as the prompt has more than the cache; or, if `generate` is to feed the
    prompt in chunks, as many as `prefill_chunk_size` says, which is `generate`'s own argument. A
    batch of more rows than the file's (beams, `num_return_sequences`) gets every row repeated.

    The first call also compares every layer's next key and value with the document's, which tells
    other weights; `check_weights=False` leaves that out, for caches that are meant to differ
    (quantised ones whose cost is to be measured).

    Later, too, feeding what is among the cached tokens raises. (Where layer 0 slides, this is seen
    within its window.)

    Raises UnsupportedError when the prompt has images or sound (docs/identity.md), KVZipError
    when file, config, prompt and model do not fit each other, FormatError or
    CorruptError for a bad file; while generating, KVZipError (CorruptError, ...) from `update`.
    """
    check_options(None if prompt is None else tokens, threads, prefill_chunk_size, profile)
    device = device_of(device)
    with open_document(source, profile, threads) as opened:
        kinds = check_config(opened.source, config)
        ids = None if prompt is None else ids_of(prompt, "prompt")
        fed = opened.source.token_ids if ids is None else ids
        check_text_only(config, fed, f"the model of {type(config).__name__}")
        cache = _lazy(opened, kinds, ids, tokens, device, threads, prefill_chunk_size)
    if not check_weights:
        for layer in cache.layers:
            layer.trust()
    return cache


def load_or_prefill(
    source: Document | Store | None,
    model: PreTrainedModel,
    prompt: ArrayLike | torch.Tensor,
    *,
    name: str | None = None,
    revision: str | None = None,
    tokens: int | None = None,
    profile: Profile | None = None,
    threads: int = 0,
    prefill_chunk_size: int | None = None,
) -> Cache:
    """A `Cache` for ``model.generate(prompt, cache=...)`` that is right whatever happens to what is
    stored: it is loaded as by :func:`load_cache`, or computed by the model.

    `source`: what :func:`load_cache` takes, or a :class:`kvzip.store.Store`, where the document
    that shares the longest prefix with the prompt is looked for under the model's `name` and
    `revision` (default: its own, as :meth:`Snapshot.from_cache` notes them). None, and a store
    without such a document, give an empty cache, which `generate` fills.

    What cannot be opened or is of another model, dtype or profile gives an empty cache, too. What
    shows only when the model runs (a damaged block, a store that dies or is too slow for its
    `timeout`, other weights) makes the model compute the kept tokens then, once, and go on
    from them. Either is logged as one warning ("kvzip.load"). What still raises is wrong use: other
    ids than `prompt` that are fed, and arguments that make no sense (UsageError).
    """
    ids = ids_of(prompt, "prompt")
    check_options(tokens, threads, prefill_chunk_size, profile, name=name, revision=revision)
    check_text_only(model.config, ids, type(model).__name__)
    find = finder(model, ids[0], name, revision, profile, threads)
    try:
        found = find_document(source, find, profile, threads)
        if found is None:
            return empty_cache(model.config)
        with found as opened:
            kinds, most, _ = agreed(opened.source, model, ids, tokens)
            cache = _lazy(opened, kinds, ids, most, None, threads, prefill_chunk_size)
            batch = opened.source.layout.batch or 1
            loader = cache.layers[0]._source
            loader.recovery = Recovery(prefill_of(model, ids[:batch], loader.held))
            watch(model, cache)
            return cache
    except UsageError:  # a source that is none
        raise
    except (KVZipError, OSError) as error:
        tell(error)
        return empty_cache(model.config)


def _lazy(
    opened: OpenDocument[Reader | Snapshot],
    kinds: Sequence[LayerKind],
    ids: Ids | None,
    tokens: int | None,
    device: torch.device | str | None,
    threads: int,
    prefill_chunk_size: int | None,
) -> Cache:
    """A `Cache` of an opened document whose layers are of these kinds; as :func:`load_cache`."""
    if prefill_chunk_size is not None:
        prefill_chunk_size = integer("prefill_chunk_size", prefill_chunk_size, 1)
    document = opened.source
    if ids is None:
        count, witnessed = _count_without_prompt(kinds, document.layout, tokens), True
    else:
        count, witnessed = _count_with_prompt(document.layout, document.token_ids, ids, tokens)
    loader = Loader(document, spans_of(kinds, count, witnessed), count, device, threads)
    opened.close_after(loader)
    length = None if ids is None else ids.shape[1]
    if ids is None and document.token_ids is not None:
        ids = np.atleast_2d(document.token_ids)
    return lazy_cache(loader, kinds, count, length, prefill_chunk_size, ids)


def _count_without_prompt(kinds: Sequence[LayerKind], layout: Layout, tokens: int | None) -> int:
    """How many tokens to keep where the prompt is not known."""
    total = layout.tokens
    count = total - 1 if tokens is None else integer("tokens", tokens)
    if not 1 <= count < total:
        raise UsageError(
            f"without prompt= from 1 to {total - 1} tokens of the document's {total} can be kept, "
            f"not {count}: `generate` must compute at least one"
        )
    if kinds[0].rope is None:
        raise KVZipError(
            "the first layer of this model does not rotate its keys, so the cache could not tell "
            "a prompt that is too short: pass prompt="
        )
    check_held(layout, count)
    return count


def _count_with_prompt(
    layout: Layout, document: Ids | None, prompt: Ids, tokens: int | None
) -> tuple[int, bool]:
    """How many tokens to keep, and whether the prompt's next one is still the document's."""
    length, common = prompt.shape[1], in_common(layout, document, prompt)
    count = min(common, length - 1, layout.tokens if tokens is None else tokens)
    if count < 1:
        raise KVZipError("nothing can be kept: tokens= is below 1, or the prompt is one token")
    if length == 2 * count and count > 1 and layout.lacking(count - 1) is None:
        # Ids of the suffix alone, given without a full-length mask, go in at position 0. That
        # shows in how many are fed, unless suffix and cache are of one length.
        count -= 1
    check_held(layout, count)
    return count, count < common and count < layout.tokens
