"""Between a `.kvz` file and a transformers `Cache`: layers decoded when a model first needs them.

`generate` trusts a cache blindly: it feeds ``input_ids[:, len(cache) - len(ids):]`` and never asks
whether the cache belongs to them. With a cache as long as the prompt, or longer, that slice is the
whole prompt or a piece of its middle, at wrong positions, and the tokens that come out are wrong
without an error. So a cache made here checks the first thing that it is fed, see `load_cache`.
"""

from __future__ import annotations

import platform
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, Literal, NamedTuple, cast

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
from kvzip.snapshot import Layer, LayerLayout, Layout, Origin, Snapshot

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
    if type(layer) in (DynamicLayer, _FullLayer):
        return "full", None
    if type(layer) in (DynamicSlidingWindowLayer, _SlidingLayer):
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
    config = model.config
    return Origin(
        model=str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "")),
        revision=str(getattr(config, "_commit_hash", None) or ""),
        architecture=type(model).__name__,
        rope=rope_parameters(config),
        software=software,
    )


def _ids(ids: Any, name: str) -> NDArray[Any]:
    """Token ids in any form as [batch, tokens]."""
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy()
    found = np.atleast_2d(np.asarray(ids))
    if found.ndim != 2 or found.dtype.kind not in "iu" or not found.size:
        raise KVZipError(f"{name} must be token ids, [tokens] or [batch, tokens]")
    return found


# --- to a cache ------------------------------------------------------------------------------


def cache_of_snapshot(snapshot: Snapshot, config: Any) -> Any:
    """A `DynamicCache` with every token of a snapshot; see :meth:`Snapshot.to_cache`."""
    kinds = _check_config(snapshot.layout, snapshot.origin, config)
    _check_held(kinds, snapshot.layout, snapshot.tokens)
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
    """A transformers `Cache` from a .kvz file, for ``generate(ids, past_key_values=...)``.

    `source`: what :func:`kvzip.open` takes, a Reader, or a Snapshot. Its document has N tokens.
    `config`: the model's. A layer is decoded when it is first used, and then the next one in a
    thread beside; nothing is decoded here. `device`: where decoded tensors go (default: where the
    model computes). `threads`: for decoding one layer; 0 for all cores.

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
    opened = None
    if not isinstance(source, (Reader, Snapshot)):
        source = opened = container.open(source, profile, threads)
    try:
        layout = source.layout
        origin = source.origin if isinstance(source, Snapshot) else source.header.origin
        kinds = _check_config(layout, origin, config)
        ids = None if prompt is None else _ids(prompt, "prompt")
        if ids is None:
            count = _count_without_prompt(kinds, layout, tokens)
            witnessed = True
        else:
            count, witnessed = _count_with_prompt(kinds, layout, source.token_ids, ids, tokens)
        spans = [(max(0, count - (kind.window or count + 1) + 1), count) for kind in kinds]
        spans[0] = (spans[0][0], count + witnessed)
        loader = _Loader(source, spans, device, threads)
        if opened is not None:
            weakref.finalize(loader, opened.close)
    except BaseException:
        if opened is not None:
            opened.close()
        raise
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [
        _SlidingLayer(loader, i, count, sliding_window=kind.window)
        if kind.kind == "sliding"
        else _FullLayer(loader, i, count)
        for i, kind in enumerate(kinds)
    ]
    cache.layers[0]._prompt_length = None if ids is None else ids.shape[1]
    return cache


def _check_config(layout: Layout, origin: Origin, config: Any) -> list[LayerKind]:
    """The config's layer kinds; raises KVZipError unless the layout is one of its caches."""
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


def _lacking(kinds: Sequence[LayerKind], layout: Layout, count: int) -> int | None:
    """The first layer that lacks some of what a cache of `count` tokens needs, or None."""
    for i, (kind, layer) in enumerate(zip(kinds, layout.layers, strict=True)):
        if layer.first > (0 if kind.window is None else max(0, count - kind.window + 1)):
            return i
    return None


def _check_held(kinds: Sequence[LayerKind], layout: Layout, count: int) -> None:
    i = _lacking(kinds, layout, count)
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
    _check_held(kinds, layout, count)
    return count


def _count_with_prompt(
    kinds: Sequence[LayerKind],
    layout: Layout,
    document: NDArray[Any] | None,
    prompt: NDArray[Any],
    tokens: int | None,
) -> tuple[int, bool]:
    """How many tokens to keep, and whether the prompt's next one is still the document's."""
    if document is None:
        raise KVZipError("the file has no token ids to compare prompt= with: leave prompt out")
    document = np.atleast_2d(document)
    if document.shape[0] not in (1, prompt.shape[0]):
        raise KVZipError(
            f"prompt has a batch of {prompt.shape[0]}, the file one of {document.shape[0]}"
        )
    length = prompt.shape[1]
    shared = min(length, layout.tokens)
    equal = (prompt[:, :shared] == document[:, :shared]).all(axis=0)
    common = int(np.append(equal, False).argmin())
    if not common:
        raise KVZipError("the prompt and the cached document have no prefix in common")
    count = min(common, length - 1, layout.tokens if tokens is None else tokens)
    if count < 1:
        raise KVZipError("nothing can be kept: tokens= is below 1, or the prompt is one token")
    if length == 2 * count and count > 1 and _lacking(kinds, layout, count - 1) is None:
        # Ids of the suffix alone, given without a full-length mask, go in at position 0. That
        # shows in how many are fed, unless suffix and cache are of one length.
        count -= 1
    _check_held(kinds, layout, count)
    return count, count < common and count < layout.tokens


# --- layers that decode themselves -----------------------------------------------------------


class _Loader:
    """Decodes layers of one source, each when it is taken, and the next one ahead.

    Copies of a cache share it: it keeps nothing but the layer that is being decoded ahead.
    """

    def __init__(
        self, source: Reader | Snapshot, spans: list[tuple[int, int]], device: Any, threads: int
    ):
        self.source, self.spans, self.threads = source, spans, threads
        self.dtype = getattr(torch, dtypes.get(source.layout.dtype).torch)
        self.device = None if device is None else torch.device(device)
        self._worker = ThreadPoolExecutor(1, "kvzip-ahead")
        self._ahead: dict[int, Future[tuple[Any, Any]]] = {}
        self._lock = Lock()

    def __deepcopy__(self, memo: Any) -> _Loader:
        return self

    def take(self, i: int) -> tuple[Any, Any]:
        """K and V of layer i, [batch, heads, tokens, dim]. Raises KVZipError."""
        with self._lock:
            ahead = self._ahead.pop(i, None)
        try:
            pair = self._decode(i) if ahead is None else ahead.result()
        except KVZipError:
            raise
        except Exception as error:
            raise KVZipError(f"layer {i} cannot be read: {error}") from error
        with self._lock:
            if i + 1 < len(self.spans) and i + 1 not in self._ahead:
                self._ahead[i + 1] = self._worker.submit(self._decode, i + 1)
        return pair

    def _decode(self, i: int) -> tuple[Any, Any]:
        start, stop = self.spans[i]
        if isinstance(self.source, Snapshot):
            found = self.source.layers[i]
            cut = slice(start - found.layout.first, stop - found.layout.first)
            arrays = [np.array(bits[..., cut, :]) for bits in found]
        else:
            arrays = list(
                self.source.decode(layers=[i], tokens=(start, stop), threads=self.threads).layers[0]
            )
        k, v = (dtypes.as_tensor(a, self.source.layout.dtype).to(self.device) for a in arrays)
        return (k, v) if k.ndim == 4 else (k[None], v[None])


class _LazyLayer:
    """Knows its length; decodes when its keys or values are first looked at.

    Mixed into the layers of transformers, whose own methods then decode as they go. The state
    before the first update is `_fresh`: until then what is fed can be wrong, and is checked.
    """

    _loader: _Loader | None = None
    _fresh = False
    _keys: Any = None
    _values: Any = None
    _witness: Any = None
    """Layer 0: the document's key at the position after the last that is kept, or None."""
    _prompt_length: int | None = None

    def __init__(self, loader: _Loader, index: int, length: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._loader, self._index, self._length, self._fresh = loader, index, length, True
        self.dtype, self.device = loader.dtype, loader.device or torch.device("cpu")
        self.is_initialized = True
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = length

    def _decoded(self) -> None:
        if self._loader is not None:
            keys, values = self._loader.take(self._index)
            start, stop = self._loader.spans[self._index]
            held = self._length - start
            self._keys, self._values = keys[:, :, :held], values[:, :, :held]
            self._witness = keys[:, :, held:] if stop > self._length else None
            self._loader = None

    @property
    def keys(self) -> Any:
        """[batch, heads, tokens, dim], or None after `reset`."""
        self._decoded()
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._keys = keys

    @property
    def values(self) -> Any:
        """[batch, heads, tokens, dim], or None after `reset`."""
        self._decoded()
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._values = values

    def get_seq_length(self) -> int:
        return self._length if self._loader is not None else cast(Any, super()).get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self._fresh and not query_length:  # a prompt of less than half the cache's tokens
            raise _not_continued(self.get_seq_length())
        return cast(Any, super()).get_mask_sizes(query_length)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self._fresh:
            self._admit(key_states, value_states)
        return cast(Any, super()).update(key_states, value_states, *args, **kwargs)

    def _admit(self, key_states: Any, value_states: Any) -> None:
        """Check the first states that are fed, and get ready for them."""
        if key_states.dtype != self.dtype:
            raise UnsupportedError(
                f"the file holds {self.dtype}, the model computes {key_states.dtype}: "
                f"load the model with dtype={self.dtype}"
            )
        position, fed = self.get_seq_length(), key_states.shape[-2]
        if self._prompt_length is not None and fed != self._prompt_length - position:
            raise KVZipError(
                f"the model was fed {fed} tokens after {position} cached ones, not the rest of "
                f"the {self._prompt_length} of prompt=: give `generate` the same ids (or the "
                "rest of them with an attention mask for all), and not in chunks"
            )
        if self._loader is not None and self._loader.device is None:
            self._loader.device = key_states.device
        pair = []
        for mine, new in ((self.keys, key_states), (self.values, value_states)):
            if mine.shape[1::2] != new.shape[1::2] or new.shape[0] % mine.shape[0]:
                raise KVZipError(
                    f"layer {self._index} holds [batch, heads, tokens, dim] = {list(mine.shape)}, "
                    f"the model feeds {list(new.shape)}"
                )
            pair.append(_repeated(mine, new))
        if self._witness is not None and not _same(
            key_states[:, :, :1], _repeated(self._witness, key_states)
        ):
            raise _not_continued(position)
        cast(Any, super()).lazy_initialization(key_states, value_states)  # devices and dtype
        self._keys, self._values = pair
        self._fresh, self._witness = False, None

    def reset(self) -> None:
        self._loader = self._witness = self._prompt_length = None
        self._fresh = False
        cast(Any, super()).reset()

    # Before the first update, the witness goes the way of the keys.

    def crop(self, tokens_to_remove: int) -> None:
        before = self.keys
        cast(Any, super()).crop(tokens_to_remove)
        if self._witness is not None and tokens_to_remove:
            self._witness = before[:, :, tokens_to_remove:][:, :, :1]

    def reorder_cache(self, beam_idx: Any) -> None:
        cast(Any, super()).reorder_cache(beam_idx)
        if self._witness is not None:
            self._witness = self._witness.index_select(0, beam_idx.to(self._witness.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        cast(Any, super()).batch_repeat_interleave(repeats)
        if self._witness is not None:
            self._witness = self._witness.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Any) -> None:
        cast(Any, super()).batch_select_indices(indices)
        if self._witness is not None:
            self._witness = self._witness[indices, ...]


class _FullLayer(_LazyLayer, DynamicLayer):
    pass


class _SlidingLayer(_LazyLayer, DynamicSlidingWindowLayer):
    pass


def _repeated(mine: Any, new: Any) -> Any:
    """`mine` where `new` is, with every row repeated to its batch."""
    times = new.shape[0] // mine.shape[0]
    mine = mine.to(new.device)
    return mine if times == 1 else mine.repeat_interleave(times, dim=0)


def _not_continued(position: int) -> KVZipError:
    return KVZipError(
        f"the prompt does not continue the cached document at position {position}: it is shorter "
        f"than the {position} tokens of the cache, or another text, or its suffix came without a "
        "full-length attention mask; pass prompt= to load_cache to keep only what they share"
    )


def _same(new: Any, stored: Any) -> bool:
    """Whether keys [batch, heads, 1, dim] are equal but for rounding.

    A number counts as another when it is off by more than 1/16 of its size (its pair's in the
    rotation, and the head's median), 16 roundings of bf16. A turn by one position moves at least
    the fastest pairs by far more (10 % of SmolLM2's numbers are off then), and another token moves
    most numbers (75 % or more). One number in a hundred may be off.
    """
    new, stored = new.float(), stored.float()
    size = stored.abs()
    pair = torch.maximum(size, size.roll(size.shape[-1] // 2, -1))
    room = (pair + size.median(-1, keepdim=True).values) / 16
    off = ((new - stored).abs() > room).float().mean(dim=(1, 2, 3))
    return bool((off <= 0.01).all())
