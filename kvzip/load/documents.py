"""A document beside a model and a prompt: whether they fit, and how much of it can be used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, DynamicCache

from kvzip import container, dtypes
from kvzip.container import Reader
from kvzip.errors import KVZipError, UnsupportedError
from kvzip.identity import fingerprint
from kvzip.load.config import LayerKind, cache_argument, layers_of, rope_parameters
from kvzip.load.lazy import FullLayer, SlidingLayer, Taken
from kvzip.snapshot import Layout, Origin, Snapshot
from kvzip.store import Match, Store
from kvzip.store.bucket import open_url


class Opened:
    """A document as a Reader or Snapshot, or None. A file that is opened here is closed with who
    uses it, or when it comes to nothing. `find`: looks for the document, if a Store is given."""

    def __init__(
        self,
        source: Any,
        profile: Any,
        threads: int,
        find: Callable[[Store], Match | None] | None = None,
    ):
        self._given, self._profile, self._threads, self._find = source, profile, threads, find
        self._mine: Reader | None = None
        self.source: Reader | Snapshot | None = None

    def __enter__(self) -> Opened:
        try:
            self.source = self._open(self._given)
        except BaseException:
            self._close()
            raise
        return self

    def _open(self, source: Any) -> Any:
        if isinstance(source, Store) and self._find is not None:
            found = self._find(source)
            source = self._mine = None if found is None else found.reader
        elif isinstance(source, Match):
            source = source.reader
        elif not (source is None or isinstance(source, (Reader, Snapshot))):
            from_url = isinstance(source, str) and "://" in source
            opening = open_url if from_url else container.open
            source = self._mine = opening(source, self._profile, self._threads)
        if isinstance(source, Reader):
            source.decode(layers=[])  # a profile that is missing is told now
        return source

    def close_after(self, user: Any) -> None:
        """Close the file when `user` is gone."""
        if self._mine is not None:
            weakref.finalize(user, self._mine.close)
            self._mine = None

    def _close(self) -> None:
        if self._mine is not None:
            self._mine.close()

    def __exit__(self, *error: object) -> None:
        self._close()


# --- whether they fit ------------------------------------------------------------------------


def ids_of(ids: Any, name: str) -> NDArray[Any]:
    """Token ids in any form as [batch, tokens]."""
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy()
    found = np.atleast_2d(np.asarray(ids))
    if found.ndim != 2 or found.dtype.kind not in "iu" or not found.size:
        raise KVZipError(f"{name} must be token ids, [tokens] or [batch, tokens]")
    return found


def check_config(source: Reader | Snapshot, config: Any) -> list[LayerKind]:
    """The config's layer kinds; raises KVZipError unless the document is one of its caches."""
    layout = source.layout
    origin = source.origin if isinstance(source, Snapshot) else source.header.origin
    kinds, ropes = layers_of(config)
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
        if getattr(own, "kv_lora_rank", None) is None:  # there, latents lie in place of keys
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


def check_held(layout: Layout, count: int) -> None:
    i = layout.lacking(count)
    if i is not None:
        raise KVZipError(
            f"layer {i} slides and holds only the last {layout.layers[i].stored} of "
            f"{layout.tokens} tokens, so {count} cannot be kept, only all of them: pass prompt=, "
            "longer than the document and beginning with all of it, or capture the document with "
            "`kvzip capture`"
        )


def in_common(layout: Layout, document: NDArray[Any] | None, prompt: NDArray[Any]) -> int:
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


class Agreed(NamedTuple):
    """What a document and a prompt for a model agree in."""

    kinds: list[LayerKind]
    tokens: int
    """How many to keep."""
    common: int
    """How many they have in common."""


def agreed(
    document: Reader | Snapshot, model: Any, ids: NDArray[Any], tokens: int | None = None
) -> Agreed:
    """Of a document and a prompt, [batch, n]; raises KVZipError unless the document is of the model
    and its dtype."""
    kinds = check_config(document, model.config)
    stored = getattr(torch, dtypes.get(document.layout.dtype).torch)
    if stored != model.dtype:
        raise UnsupportedError(f"the file holds {stored}, the model {model.dtype}")
    common = in_common(document.layout, document.token_ids, ids)
    most = common if tokens is None else min(common, tokens)
    if most == common > 1 and document.layout.lacking(most - 1) is None:
        most -= 1  # one token less, so that its key tells whether the weights are the same
    return Agreed(kinds, most, common)


# --- into a cache ------------------------------------------------------------------------------


def name_of_model(model: Any) -> str:
    """What a model calls itself; "" where it says nothing."""
    return str(
        getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or ""
    )


def origin_of_model(model: Any) -> Origin:
    """Where caches of a transformers model come from: `revision` is its fingerprint."""
    return Origin(
        model=name_of_model(model),
        revision=fingerprint(model),
        architecture=type(model).__name__,
        rope=rope_parameters(model.config),
    )


def finder(
    model: Any,
    ids: NDArray[Any],
    name: str | None,
    revision: str | None,
    profile: Any,
    threads: int,
) -> Callable[[Store], Match | None]:
    """What looks for a model's prompt, [n], in a store: by its fingerprint, unless a revision is
    given."""
    return lambda store: store.find(
        ids,
        model=name_of_model(model) if name is None else name,
        revision=fingerprint(model) if revision is None else revision,
        dtype=str(model.dtype),
        profile=profile,
        threads=threads,
    )


def spans_of(kinds: Sequence[LayerKind], count: int, witnessed: bool) -> list[tuple[int, int]]:
    """First and last position of what each layer needs for a cache of `count` tokens, and for the
    next token if it is to be a witness."""
    stop = count + witnessed
    return [(max(0, count - (kind.window or count + 1) + 1), stop) for kind in kinds]


def lazy_cache(
    loader: Any,
    kinds: Sequence[LayerKind],
    count: int,
    prompt_length: int | None,
    chunk: int | None = None,
) -> Any:
    """A `Cache` of `count` tokens, [layers], that takes them from a Loader or BatchLoader.
    `prompt_length`: tokens of the prompt that will be fed, the cached ones included; `chunk`: so
    many at a time."""
    layers = [
        SlidingLayer(loader, i, count, sliding_window=kind.window)
        if kind.kind == "sliding"
        else FullLayer(loader, i, count)
        for i, kind in enumerate(kinds)
    ]
    layers[0]._prompt_length, layers[0]._chunk = prompt_length, chunk
    layers[0]._rotated = kinds[0].rope is not None
    layers[-1]._last = True
    distances: dict[int, Any] = {}
    for layer in layers:
        layer._distances = distances
    cache = DynamicCache()
    # Its own constructor would make layers from the config, once more: a millisecond.
    Cache.__init__(cache, layers=layers)
    return cache


def prefill_of(model: Any, ids: NDArray[Any], count: int) -> Callable[[], list[Taken]]:
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
