"""Between a `.kvz` file and a transformers `Cache`: layers decoded when a model first needs them.

`generate` trusts a cache blindly: it feeds ``input_ids[:, len(cache) - len(ids):]`` and never asks
whether the cache belongs to them. With a cache as long as the prompt, or longer, that slice is the
whole prompt or a piece of its middle, at wrong positions, and the tokens that come out are wrong
without an error. So with a cache made here `generate` compares the ids, and the cache checks the
first thing that it is fed, see `load_cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from kvzip.container import Reader
from kvzip.errors import KVZipError, UsageError, extra_told

with extra_told("caches of transformers need more", "hf"):
    import torch
    from transformers.cache_utils import Cache

from kvzip.load.batch import load_batch, load_batch_or_prefill
from kvzip.load.caches import devices_of, empty_cache, lazy_cache, prefill_of, spans_of
from kvzip.load.config import (
    LayerKind,
    cache_argument,
    check_fed_one_by_one,
    layer_kinds,
    rope_length,
    rope_parameters,
)
from kvzip.load.documents import Document, OpenDocument, find_document, open_document
from kvzip.load.loaders import Loader
from kvzip.load.matching import (
    Ids,
    agreed,
    check_config,
    check_encoder,
    check_encoder_given,
    check_held,
    check_model,
    check_options,
    check_rope,
    check_weights,
    device_of,
    encoder_ids_of,
    finder,
    ids_of,
    in_common,
)
from kvzip.load.placeholders import check_text_only
from kvzip.load.recovery import Recovery, tell
from kvzip.load.reuse import pin
from kvzip.load.snapshots import snapshot_of_cache
from kvzip.load.witness import lazy_layers, watch
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Layout, Snapshot
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


def cache_of_snapshot(snapshot: Snapshot, config: PretrainedConfig) -> Cache:
    """A `DynamicCache` with every token of a snapshot; see :meth:`Snapshot.to_cache`."""
    kinds = check_config(snapshot, config)
    kept = snapshot.layout.state_length
    count = snapshot.tokens if kept is None else kept
    check_held(snapshot.layout, count)
    loader = Loader(snapshot, spans_of(kinds, count, False), count, None, 0)
    ids = None if snapshot.token_ids is None else np.atleast_2d(snapshot.token_ids)
    source = encoder_ids_of(snapshot)
    return lazy_cache(loader, config, kinds, count, None, ids=ids, encoder_ids=source)


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
    encoder_ids: ArrayLike | torch.Tensor | None = None,
) -> Cache:
    """A transformers `Cache` from a .kvz file, for ``generate(ids, cache=...)``
    (``past_key_values=`` before transformers 5.24).

    `source`: what :func:`kvzip.open` takes, a URL (``https://``, ``s3://``), a Reader, what
    :meth:`kvzip.store.Store.find` found, or a Snapshot. Its document has N tokens. From a URL or a
    store only the bytes that are needed are read, ahead of their use.
    `config`: the model's. A few layers are decoded when the first of them is used, and then the
    next few in a thread beside; nothing is decoded here. `device`: where decoded tensors go
    (default: where the model computes; states, which do not see that, on the CPU); a GPU decodes
    itself what it can (docs/gpu.md). `threads`: for decoding one layer; 0 for all cores.

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

    Layers that keep states (linear attention, Mamba) go on from one length only: the document's
    tokens but its last. A prompt that shares fewer raises. Such a cache cannot be cropped, and what
    is wrong with ids that a model is fed without `generate` is seen in its layers of attention, if
    it has any. `encoder_ids`: what the encoder gets, [n] or [batch, n], if the model has one; the
    document's must have got the same. Then `prompt` is what the decoder gets, and `generate` needs
    ``decoder_attention_mask=``, a one for each of its ids.

    The cache can be copied, pickled and saved with `torch.save` at any time, with all that it
    holds: what is not decoded yet is then, and what is read back needs neither file nor store.

    Raises UnsupportedError when the prompt has images or sound (docs/identity.md), or when RoPE's
    frequencies depend on the length (dynamic, longrope) and document or prompt are not shorter than
    the original length; KVZipError when file, config, prompt and model do not fit each other,
    FormatError or CorruptError for a bad file; while generating, KVZipError (CorruptError, ...)
    from `update`.
    """
    check_options(None if prompt is None else tokens, threads, prefill_chunk_size, profile)
    device = device_of(device)
    source_ids = None if encoder_ids is None else ids_of(encoder_ids, "encoder_ids")
    with open_document(source, profile, threads) as opened:
        kinds = check_config(opened.source, config)
        check_encoder(opened.source, config, source_ids)
        ids = None if prompt is None else ids_of(prompt, "prompt")
        length = None if ids is None else ids.shape[1]
        check_rope(config, opened.source.layout.tokens, length, source_ids)
        fed = opened.source.token_ids if ids is None else ids
        check_text_only(config, fed, f"the model of {type(config).__name__}")
        cache, _ = _lazy(
            opened, config, kinds, ids, tokens, device, threads, prefill_chunk_size, source_ids
        )
    limit = rope_length(config.get_text_config(decoder=True))
    for layer in lazy_layers(cache):
        layer.limit(limit)
        if not check_weights:
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
    encoder_ids: ArrayLike | torch.Tensor | None = None,
) -> Cache:
    """A `Cache` for ``model.generate(prompt, cache=...)`` that is right whatever happens to what is
    stored: it is loaded as by :func:`load_cache`, or computed by the model.

    `source`: what :func:`load_cache` takes, or a :class:`kvzip.store.Store`, where the document
    that shares the longest prefix with the prompt is looked for under the model's `name` and
    `revision` (default: its own, as :meth:`Snapshot.from_cache` notes them). None, and a store
    without such a document, give an empty cache, which `generate` fills.

    What cannot be opened or is of another model, dtype or profile gives an empty cache, too, and so
    does a file whose fingerprint is not the model's, unless a `revision` is given. What
    shows only when the model runs (a damaged block, a store that dies or is too slow for its
    `timeout`, other weights) makes the model compute the kept tokens then, once, and go on
    from them. Either is logged as one warning ("kvzip.load"). What still raises is wrong use: other
    ids than `prompt` that are fed, and arguments that make no sense (UsageError).
    """
    ids = ids_of(prompt, "prompt")
    check_model(model)
    check_options(tokens, threads, prefill_chunk_size, profile, name=name, revision=revision)
    check_text_only(model.config, ids, type(model).__name__)
    source_ids = None if encoder_ids is None else ids_of(encoder_ids, "encoder_ids")
    check_encoder_given(model.config, source_ids)
    find = finder(model, ids[0], name, revision, profile, threads, source_ids)
    try:
        found = find_document(source, find, profile, threads)
        if found is None:
            return empty_cache(model.config, source_ids)
        with found as opened:
            kinds, most, _ = agreed(opened.source, model, ids, tokens)
            check_weights(source, opened.source, model, revision, source_ids)
            check_encoder(opened.source, model.config, source_ids)
            check_rope(model.config, prompt=ids.shape[1], encoder_ids=source_ids)
            cache, loader = _lazy(
                *(opened, model.config, kinds, ids, most, None, threads, prefill_chunk_size),
                source_ids,
            )
            rows = ids[: opened.source.layout.batch or 1]
            loader.devices = devices_of(model, kinds)
            loader.recovery = Recovery(prefill_of(model, rows, loader.held, source_ids))
            pin(cache, model, revision)
            watch(model, cache)
            return cache
    except UsageError:  # a source that is none
        raise
    except (KVZipError, OSError) as error:
        tell(error)
        return empty_cache(model.config, source_ids)


def _lazy(
    opened: OpenDocument[Reader | Snapshot],
    config: PretrainedConfig,
    kinds: Sequence[LayerKind],
    ids: Ids | None,
    tokens: int | None,
    device: torch.device | str | None,
    threads: int,
    prefill_chunk_size: int | None,
    encoder_ids: Ids | None,
) -> tuple[Cache, Loader]:
    """A `Cache` of an opened document whose layers are of these kinds, as :func:`load_cache`, and
    what decodes it."""
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
    if length is not None:
        check_fed_one_by_one(config, length - count, prefill_chunk_size)
    if ids is None and document.token_ids is not None:
        ids = np.atleast_2d(document.token_ids)
    cache = lazy_cache(loader, config, kinds, count, length, prefill_chunk_size, ids, encoder_ids)
    return cache, loader


def _count_without_prompt(kinds: Sequence[LayerKind], layout: Layout, tokens: int | None) -> int:
    """How many tokens to keep where the prompt is not known."""
    total = layout.tokens
    count = total - 1 if tokens is None else integer("tokens", tokens)
    if not 1 <= count < total:
        raise UsageError(
            f"without prompt= from 1 to {total - 1} tokens of the document's {total} can be kept, "
            f"not {count}: `generate` must compute at least one"
        )
    if next((kind.rope for kind in kinds if kind.counts), None) is None:
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
    kept = layout.state_length
    if kept is not None and count >= kept:
        count = kept
    elif length == 2 * count and count > 1 and layout.lacking(count - 1) is None:
        # Ids of the suffix alone, given without a full-length mask, go in at position 0. That
        # shows in how many are fed, unless suffix and cache are of one length.
        count -= 1
    check_held(layout, count)
    return count, count < common and count < layout.tokens
