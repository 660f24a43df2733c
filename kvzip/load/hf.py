"""Between a `.kvz` file and a transformers `Cache`: layers decoded when a model first needs them.

`generate` trusts a cache blindly: it feeds ``input_ids[:, len(cache) - len(ids):]`` and never asks
whether the cache belongs to them. With a cache as long as the prompt, or longer, that slice is the
whole prompt or a piece of its middle, at wrong positions, and the tokens that come out are wrong
without an error. So a cache made here checks the first thing that it is fed, see `load_cache`.
"""

from __future__ import annotations

import logging
import platform
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from kvzip import container, dtypes
from kvzip.container import Reader
from kvzip.errors import KVZipError, UnsupportedError
from kvzip.load.lazy import BatchLoader, FullLayer, Loader, Recovery, SlidingLayer, Taken
from kvzip.remote import open_url
from kvzip.snapshot import Layer, LayerLayout, Layout, Origin, Snapshot
from kvzip.store import Match, Store

_log = logging.getLogger("kvzip.load")

# --- what a config says of the layers --------------------------------------------------------


class LayerKind(NamedTuple):
    """Kind of one layer's cache, its window, and its index into :func:`rope_parameters`."""

    kind: Literal["full", "sliding"]
    window: int | None
    rope: int | None
    """None: keys of this layer are not rotated."""


def layer_kinds(config: Any) -> list[LayerKind]:
    """Kind, window and RoPE index of every layer, as transformers itself makes its cache.

    Raises UnsupportedError, which names the layer, for any other than full or sliding attention.
    """
    return _layers_of(config)[0]


def rope_parameters(config: Any) -> tuple[dict[str, Any], ...]:
    """The distinct RoPE parameters (theta, kind, scaling) of a config's layers."""
    return _layers_of(config)[1]


# In these families only the sliding layers rotate their keys, though the config does not say so.
_FULL_LAYERS_UNROTATED = ("cohere2", "exaone4", "exaone_moe", "flint", "kolibri1")


def _layers_of(config: Any) -> tuple[list[LayerKind], tuple[dict[str, Any], ...]]:
    text = config.get_text_config(decoder=True)
    try:
        made = [_kind_of(layer, i) for i, layer in enumerate(DynamicCache(config=text).layers)]
    except KeyError as error:
        raise UnsupportedError(f"transformers knows no cache layer of kind {error}") from None
    mixed = any(kind == "sliding" for kind, _ in made)
    types = getattr(text, "layer_types", None)
    rotated = getattr(text, "no_rope_layers", None)  # despite its name, 1 where there is RoPE
    kinds, distinct = [], list[dict[str, Any]]()
    for i, ((kind, window), own) in enumerate(zip(made, text.per_layer_config, strict=True)):
        found = getattr(own, "rope_parameters", None) or None
        if found and any(isinstance(value, dict) for value in found.values()):
            found = found.get(types[i] if types else f"{kind}_attention")
        if (
            getattr(text, "alibi", False)
            or getattr(text, "position_embedding_type", None) not in (None, "rope", "rotary")
            or (rotated and not rotated[i])
            or (kind == "full" and mixed and text.model_type.startswith(_FULL_LAYERS_UNROTATED))
        ):
            found = None
        rope = None
        if found:
            if found not in distinct:
                distinct.append(dict(found))
            rope = distinct.index(found)
        kinds.append(LayerKind(kind, window, rope))
    return kinds, tuple(distinct)


def _kind_of(layer: Any, i: int) -> tuple[Literal["full", "sliding"], int | None]:
    if type(layer) in (DynamicLayer, FullLayer):
        return "full", None
    if type(layer) in (DynamicSlidingWindowLayer, SlidingLayer):
        return "sliding", int(layer.sliding_window)
    raise UnsupportedError(
        f"layer {i} of the cache is a {type(layer).__name__}; "
        "only layers of full or sliding-window attention that are not quantised can be handled"
    )


# --- from a cache ----------------------------------------------------------------------------


def snapshot_of_cache(cache: Any, token_ids: Any = None, model: Any = None) -> Snapshot:
    """A snapshot of a `Cache` that a forward pass has filled; see :meth:`Snapshot.from_cache`.

    `token_ids`: ids of all tokens the cache has seen, [tokens] or [batch, tokens]. `model`: the
    model or its id. Raises UnsupportedError, which names the layer and its class, for any cache
    layer but full and sliding attention, and KVZipError when the ids do not fit the cache.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise UnsupportedError(f"a {type(cache).__name__} is not a cache of a decoder's layers")
    described = not (model is None or isinstance(model, str))
    ropes = [kind.rope for kind in layer_kinds(model.config)] if described else []
    layers, dtype = [], None
    for i, layer in enumerate(cache.layers):
        kind, window = _kind_of(layer, i)
        if layer.keys is None or layer.keys.ndim != 4:
            raise UnsupportedError(f"layer {i} of the cache is empty: run a forward pass first")
        (k, dtype), (v, _) = dtypes.as_bits(layer.keys, dtype), dtypes.as_bits(layer.values, dtype)
        if k.shape[0] == 1:
            k, v = k[0], v[0]
        length = int(layer.get_seq_length())
        rope = ropes[i] if i < len(ropes) else None
        layers.append(Layer(k, v, LayerLayout(k.shape, v.shape, length, kind, window, rope)))
    if dtype is None:
        raise UnsupportedError("the cache has no layers: run a forward pass first")
    ids = None if token_ids is None else _ids(token_ids, "token_ids")
    if ids is not None:
        shape = (*layers[0].k.shape[:-3], layers[0].layout.cumulative_length)
        ids = ids[0] if ids.shape[0] == 1 and len(shape) == 1 else ids
        if ids.shape != shape:
            raise KVZipError(
                f"token_ids has shape {list(ids.shape)}, the cache {list(shape)}: "
                "give the ids of the tokens that were fed, no more and no fewer"
            )
    return Snapshot(layers, dtype, ids, _origin(model, layers[0], cache))


def _origin_of_model(model: Any) -> Origin:
    config = model.config
    return Origin(
        model=str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "")),
        revision=str(getattr(config, "_commit_hash", None) or ""),
        architecture=type(model).__name__,
        rope=rope_parameters(config),
    )


def _origin(model: Any, layer: Layer, cache: Any) -> Origin:
    device = cache.layers[0].keys.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    software = {
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "device": f"{device.type} ({name})",
    }
    if model is None or isinstance(model, str):
        return Origin(model=model or "", software=software)
    return msgspec.structs.replace(_origin_of_model(model), software=software)


def _ids(ids: Any, name: str) -> NDArray[Any]:
    """Token ids in any form as [batch, tokens]."""
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy()
    found = np.atleast_2d(np.asarray(ids))
    if found.ndim != 2 or found.dtype.kind not in "iu" or not found.size:
        raise KVZipError(f"{name} must be token ids, [tokens] or [batch, tokens]")
    return found


# --- to a cache ------------------------------------------------------------------------------

_RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_CACHE = "cache" if _RELEASE >= (5, 24) else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """What hands a model a cache, in any transformers: ``generate(ids, **cache_argument(cache))``.

    The argument of `forward` and `generate` is ``cache`` from transformers 5.24 on, and was
    ``past_key_values``, of which 5.24 warns.
    """
    return {_CACHE: cache}


def cache_of_snapshot(snapshot: Snapshot, config: Any) -> Any:
    """A `DynamicCache` with every token of a snapshot; see :meth:`Snapshot.to_cache`."""
    _check_config(snapshot, config)
    _check_held(snapshot.layout, snapshot.tokens)
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    for layer, layout, pair in zip(
        cache.layers, snapshot.layout.layers, snapshot.tensors(), strict=True
    ):
        layer.update(*(t if t.ndim == 4 else t[None] for t in pair))  # crops to the window
        if layout.kind == "sliding":
            layer.cumulative_length = layout.cumulative_length
    return cache


def load_cache(
    source: Any,
    config: Any,
    *,
    prompt: Any = None,
    tokens: int | None = None,
    profile: Any = None,
    device: Any = None,
    threads: int = 0,
) -> Any:
    """A transformers `Cache` from a .kvz file, for ``generate(ids, cache=...)``
    (``past_key_values=`` before transformers 5.24).

    `source`: what :func:`kvzip.open` takes, a URL (``https://``, ``s3://``), a Reader, what
    :meth:`kvzip.store.Store.find` found, or a Snapshot. Its document has N tokens. From a URL or a
    store only the bytes that are needed are read, ahead of their use.
    `config`: the model's. A few layers are decoded when the first of them is used, and then the
    next few in a thread beside; nothing is decoded here. `device`: where decoded tensors go
    (default: where the model computes). `threads`: for decoding one layer; 0 for all cores.

    At least one token must be left for the model to compute, so not all are kept:

    - With `prompt`, the ids that `generate` will get ([n] or [batch, n]): the longest prefix
      that they share with the document, less than n tokens. The file must have its token ids.
    - Without: the first N-1 tokens (or `tokens`, at most N-1), for prompts that are the document
      or go on from it.

    The first update is then checked, before it changes anything. Without `prompt`, its first key
    of layer 0, which depends on a token and its position alone, must be the one that the document
    has there; so a prompt that is too short, ids of the suffix without a full-length attention
    mask, or another text raise. With it, as many tokens must be fed as the prompt has more than
    the cache. What no cache can see is a prompt that differs *before* the kept tokens end and
    agrees after; `prompt` is compared there, too. A batch of more rows than the file's (beams,
    `num_return_sequences`) gets every row repeated.

    Raises KVZipError when file, config, prompt and model do not fit each other, FormatError or
    CorruptError for a bad file; while generating, KVZipError (CorruptError, ...) from `update`.
    """
    with _Opened([source], profile, threads) as opened:
        [source] = opened.sources
        kinds = _check_config(source, config)
        ids = None if prompt is None else _ids(prompt, "prompt")
        if ids is None:
            count = _count_without_prompt(kinds, source.layout, tokens)
            witnessed = True
        else:
            count, witnessed = _count_with_prompt(source.layout, source.token_ids, ids, tokens)
        loader = Loader(source, _spans(kinds, count, witnessed), count, device, threads)
        opened.close_after(loader)
    return _cache(loader, config, kinds, count, None if ids is None else ids.shape[1])


class _Opened:
    """Documents as Readers or Snapshots. Files that are opened here are closed with who uses them,
    or when it comes to nothing."""

    def __init__(
        self, sources: Sequence[Any], profile: Any, threads: int, mine: Sequence[Reader] = ()
    ):
        self._given, self._profile, self._threads = sources, profile, threads
        self._mine = list(mine)
        self.sources: list[Any] = []

    def __enter__(self) -> _Opened:
        try:
            self.sources = [self._open(source) for source in self._given]
        except BaseException:
            self._close()
            raise
        return self

    def _open(self, source: Any) -> Any:
        if isinstance(source, Match):
            source = source.reader
        if not (source is None or isinstance(source, (Reader, Snapshot))):
            from_url = isinstance(source, str) and "://" in source
            opening = open_url if from_url else container.open
            source = opening(source, self._profile, self._threads)
            self._mine.append(source)
        if isinstance(source, Reader):
            source.decode(layers=[])  # a profile that is missing is told now
        return source

    def close_after(self, user: Any) -> None:
        """Close the files when `user` is gone."""
        for reader in self._mine:
            weakref.finalize(user, reader.close)
        self._mine = []

    def _close(self) -> None:
        for reader in self._mine:
            reader.close()

    def __exit__(self, *error: object) -> None:
        self._close()


def _spans(kinds: Sequence[LayerKind], count: int, witnessed: bool) -> list[tuple[int, int]]:
    """First and last position of what each layer needs for a cache of `count` tokens."""
    spans = [(max(0, count - (kind.window or count + 1) + 1), count) for kind in kinds]
    spans[0] = (spans[0][0], count + witnessed)
    return spans


def _cache(
    loader: Any, config: Any, kinds: Sequence[LayerKind], count: int, prompt_length: int | None
) -> Any:
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [
        SlidingLayer(loader, i, count, sliding_window=kind.window)
        if kind.kind == "sliding"
        else FullLayer(loader, i, count)
        for i, kind in enumerate(kinds)
    ]
    cache.layers[0]._prompt_length = prompt_length
    return cache


def load_batch(
    sources: Sequence[Any],
    config: Any,
    prompts: Sequence[Any],
    *,
    pad_token_id: int = 0,
    profile: Any = None,
    device: Any = None,
    threads: int = 0,
) -> dict[str, Any]:
    """Several prompts with a document each as one batch: ``generate(**load_batch(...))``.

    `sources`: for each prompt what :func:`load_cache` takes, or None where there is no document.
    `prompts`: token ids, [n] each, of any lengths. Returns ``input_ids``, ``attention_mask`` (both
    [batch, longest], padded at the left) and the cache, as :func:`cache_argument` names it.

    All rows of a cache end at one column, so the row with the most tokens after its document tells
    how much the others compute again. Checks and errors are those of :func:`load_cache` with
    `prompt`; what is fed must be what was returned.
    """
    if not len(sources) == len(prompts) > 0:
        raise KVZipError(f"{len(sources)} documents for {len(prompts)} prompts")
    rows = [_ids(prompt, "prompts")[0] for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.from_numpy(row.astype(np.int64))
        mask[i, longest - len(row) :] = 1
    result = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    kinds = layer_kinds(config)
    with _Opened(sources, profile, threads) as opened:
        shared = []
        for source, row in zip(opened.sources, rows, strict=True):
            common = 0
            if source is not None:
                _check_config(source, config)
                common = _common(source.layout, source.token_ids, row[None])
            shared.append(common)
        count = min(
            min(common, len(row) - 1) + longest - len(row)
            for common, row in zip(shared, rows, strict=True)
        )
        kept = [max(0, count - longest + len(row)) for row in rows]
        if not any(kept):
            cache = DynamicCache(config=config.get_text_config(decoder=True))
            return result | cache_argument(cache)
        loaders: list[Loader | None] = []
        for source, n, common in zip(opened.sources, kept, shared, strict=True):
            if n:
                _check_held(source.layout, n)
                spans = _spans(kinds, n, n < common)
                loaders.append(Loader(source, spans, n, device, threads))
            else:
                loaders.append(None)
        if len({loader.dtype for loader in loaders if loader is not None}) > 1:
            raise KVZipError("the documents of a batch are not all of one dtype")
        batch = BatchLoader(loaders, count, [kind.window for kind in kinds])
        opened.close_after(batch)
    return result | cache_argument(_cache(batch, config, kinds, count, longest))


def load_or_prefill(
    source: Any,
    model: Any,
    prompt: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    tokens: int | None = None,
    profile: Any = None,
    threads: int = 0,
) -> Any:
    """A `Cache` for ``model.generate(prompt, cache=...)`` that is right whatever happens to what is
    stored: it is loaded as by :func:`load_cache`, or computed by the model.

    `source`: what :func:`load_cache` takes, or a :class:`kvzip.store.Store`, where the document
    that shares the longest prefix with the prompt is looked for under the model's `name` and
    `revision` (default: its own, as :meth:`Snapshot.from_cache` notes them). A store
    without such a document gives an empty cache, which `generate` fills.

    What cannot be opened or is of another model, dtype or profile gives an empty cache, too. What
    shows only when the model runs (a damaged block, a store that dies or is too slow for its
    `timeout`, other weights) makes the model compute the kept tokens then, once, and go on
    from them. Either is logged as one warning ("kvzip.load"). What still raises is wrong use: other
    ids than `prompt` that are fed.
    """
    ids = _ids(prompt, "prompt")
    config = model.config
    empty = DynamicCache(config=config.get_text_config(decoder=True))
    mine = []
    try:
        if isinstance(source, Store):
            known = _origin_of_model(model)
            source = source.find(
                ids[0],
                model=known.model if name is None else name,
                revision=known.revision if revision is None else revision,
                dtype=str(model.dtype),
                profile=profile,
                threads=threads,
            )
            if source is None:
                return empty
            mine.append(source.reader)
        with _Opened([source], profile, threads, mine) as opened:
            [source] = opened.sources
            _check_config(source, config)
            common = _common(source.layout, source.token_ids, ids)
            most = common if tokens is None else min(common, tokens)
            if most == common > 1 and source.layout.lacking(most - 1) is None:
                most -= 1  # one token less, so that its key tells whether the weights are the same
            cache = load_cache(source, config, prompt=ids, tokens=most, threads=threads)
            loader = cache.layers[0]._source
            if loader.dtype != model.dtype:
                raise UnsupportedError(f"the file holds {loader.dtype}, the model {model.dtype}")
            opened.close_after(loader)
    except (KVZipError, OSError) as error:
        _log.warning("the cache is computed anew, not loaded: %s", error)
        return empty
    rows = source.layout.layers[0].k
    batch = rows[0] if len(rows) == 4 else 1
    loader.recovery = Recovery(_prefill(model, ids[:batch], loader.held))
    return cache


def _prefill(model: Any, ids: NDArray[Any], count: int) -> Callable[[], list[Taken]]:
    """What computes the caches of the first `count` tokens of `ids`, [batch, n], and layer 0's next
    key."""

    def prefill() -> list[Taken]:
        fed = torch.from_numpy(ids.astype(np.int64)).to(model.device)
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        with torch.no_grad():
            model(fed[:, :count], use_cache=True, **cache_argument(cache))
            layers = [Taken(layer.keys, layer.values) for layer in cache.layers]
            # Appending makes new tensors, so those above stay as they are.
            model(fed[:, count : count + 1], use_cache=True, **cache_argument(cache))
        return [layers[0]._replace(witness=cache.layers[0].keys[:, :, -1:]), *layers[1:]]

    return prefill


def _check_config(source: Reader | Snapshot, config: Any) -> list[LayerKind]:
    """The config's layer kinds; raises KVZipError unless the document is one of its caches."""
    layout = source.layout
    origin = source.origin if isinstance(source, Snapshot) else source.header.origin
    kinds, ropes = _layers_of(config)
    if len(layout.layers) != len(kinds):
        raise KVZipError(f"the file has {len(layout.layers)} layers, the model {len(kinds)}")
    text = config.get_text_config(decoder=True)
    for i, (layer, kind, own) in enumerate(
        zip(layout.layers, kinds, text.per_layer_config, strict=True)
    ):
        pairs: list[tuple[str, Any, Any]] = [
            ("kind of attention", layer.kind, kind.kind),
            ("sliding window", layer.window, kind.window),
        ]
        if getattr(own, "kv_lora_rank", None) is None:  # there, keys are wider than head_dim
            heads = getattr(own, "num_key_value_heads", None)
            dim = getattr(own, "head_dim", None)
            if dim is None and heads is not None:
                dim = own.hidden_size // own.num_attention_heads
            pairs += [("KV heads", layer.k[-3], heads), ("head dimension", layer.k[-1], dim)]
        for what, stored, wanted in pairs:
            if stored != wanted and (wanted is not None or what == "sliding window"):
                raise KVZipError(
                    f"the file is not of this model: layer {i} has {what} {stored}, not {wanted}"
                )
        if layer.rope is not None and layer.rope < len(origin.rope) and kind.rope is not None:
            stored, wanted = origin.rope[layer.rope], msgspec.to_builtins(ropes[kind.rope])
            for key in sorted(stored.keys() & wanted.keys()):
                if stored[key] != wanted[key]:
                    raise KVZipError(
                        f"the file is not of this model: layer {i} has {key} {stored[key]}, "
                        f"not {wanted[key]}"
                    )
    if (
        any(layer.cumulative_length != layout.tokens for layer in layout.layers)
        or not layout.tokens
    ):
        raise KVZipError("the file's layers do not all end at the same token")
    return kinds


def _check_held(layout: Layout, count: int) -> None:
    i = layout.lacking(count)
    if i is not None:
        raise KVZipError(
            f"layer {i} slides and holds only the last {layout.layers[i].stored} of "
            f"{layout.tokens} tokens, so {count} cannot be kept, only all of them: pass prompt=, "
            "longer than the document and beginning with all of it, or capture the document with "
            "`kvzip capture`"
        )


def _count_without_prompt(kinds: Sequence[LayerKind], layout: Layout, tokens: int | None) -> int:
    total = layout.tokens
    count = total - 1 if tokens is None else tokens
    if not 1 <= count < total:
        raise KVZipError(
            f"without prompt= from 1 to {total - 1} tokens of the document's {total} can be kept, "
            f"not {count}: `generate` must compute at least one"
        )
    if kinds[0].rope is None:
        raise KVZipError(
            "the first layer of this model does not rotate its keys, so the cache could not tell "
            "a prompt that is too short: pass prompt="
        )
    _check_held(layout, count)
    return count


def _common(layout: Layout, document: NDArray[Any] | None, prompt: NDArray[Any]) -> int:
    """How many first tokens a document and a prompt, [batch, n], have in common, more than 0."""
    if document is None:
        raise KVZipError("the file has no token ids to compare prompt= with: leave prompt out")
    document = np.atleast_2d(document)
    if document.shape[0] not in (1, prompt.shape[0]):
        raise KVZipError(
            f"prompt has a batch of {prompt.shape[0]}, the file one of {document.shape[0]}"
        )
    shared = min(prompt.shape[1], layout.tokens)
    equal = (prompt[:, :shared] == document[:, :shared]).all(axis=0)
    common = int(np.append(equal, False).argmin())
    if not common:
        raise KVZipError("the prompt and the cached document have no prefix in common")
    return common


def _count_with_prompt(
    layout: Layout,
    document: NDArray[Any] | None,
    prompt: NDArray[Any],
    tokens: int | None,
) -> tuple[int, bool]:
    """How many tokens to keep, and whether the prompt's next one is still the document's."""
    length, common = prompt.shape[1], _common(layout, document, prompt)
    count = min(common, length - 1, layout.tokens if tokens is None else tokens)
    if count < 1:
        raise KVZipError("nothing can be kept: tokens= is below 1, or the prompt is one token")
    if length == 2 * count and count > 1 and layout.lacking(count - 1) is None:
        # Ids of the suffix alone, given without a full-length mask, go in at position 0. That
        # shows in how many are fed, unless suffix and cache are of one length.
        count -= 1
    _check_held(layout, count)
    return count, count < common and count < layout.tokens
