"""From a transformers `Cache` to a snapshot."""

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
from kvzip.errors import KVZipError, UnsupportedError, UsageError
from kvzip.identity.checkpoint import changed
from kvzip.load.calls import adapters_of, autocast_of, check_no_virtual_tokens
from kvzip.load.config import LayerKind, layer_kinds
from kvzip.load.dropout import check_draws_no_lots
from kvzip.load.held import ENCODER_IDS, TOKEN_PARTS, Held, Piece, as_bytes, has_nothing, held
from kvzip.load.matching import (
    Ids,
    check_model,
    ids_of,
    origin_of_model,
    revision_of_source,
)
from kvzip.load.own import is_own, layers_in
from kvzip.load.placeholders import check_text_only
from kvzip.load.quantized import SETTINGS
from kvzip.models import products
from kvzip.snapshot import Layer, LayerLayout, Origin, PartLayout, Snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def snapshot_of_cache(
    cache: Cache,
    token_ids: ArrayLike | torch.Tensor | None = None,
    model: PreTrainedModel | str | None = None,
    encoder_ids: ArrayLike | torch.Tensor | None = None,
) -> Snapshot:
    """A snapshot of a `Cache` that a forward pass has filled; see :meth:`Snapshot.from_cache`.

    `token_ids`: ids of all tokens the cache has seen, [tokens] or [batch, tokens]. `model`: the
    model or its id. `encoder_ids`: those of its encoder, if it has one and the cache does not know
    them. Raises UnsupportedError, which names the layer and its class, for any cache layer but full
    and sliding attention, and KVZipError when the ids do not fit the cache.
    """
    kinds = []
    if model is not None and not isinstance(model, str):
        check_model(model)
        kinds = layer_kinds(model.config)  # which says why some families' caches cannot be kept
    if not isinstance(cache, (Cache, EncoderDecoderCache)) and not is_own(cache):
        raise UnsupportedError(
            f"a {type(cache).__name__} is not a cache of a decoder's layers (of pairs of arrays "
            "Snapshot.from_arrays makes a snapshot)"
        )
    _check_filled(cache, model)
    found = [one.copied() for one in held_by(cache, kinds)]
    source = _encoder_ids(cache, encoder_ids)
    if source is not None:
        found = with_encoder_ids(found, torch.from_numpy(source.astype(np.int64)))
    total = max((one.length for one in found if one.length is not None), default=None)
    ids = None if token_ids is None else ids_of(token_ids, "token_ids")
    if total is None:  # nothing in it counts tokens
        if ids is None:
            raise KVZipError("this cache does not say how many tokens it has seen: pass token_ids")
        total = ids.shape[1]
    layers = [
        layer_of(one, total, kinds[i].rope if i < len(kinds) else None)
        for i, one in enumerate(found)
    ]
    dtype = dtype_of(layers)
    origin = _origin(model, cache, source)
    if origin.revision and any(SETTINGS in layer.parts for layer in layers):
        # The model itself computes other numbers, and must not find these.
        revision = changed(origin.revision, {"quantised": _settings(found)})
        origin = msgspec.structs.replace(origin, revision=revision)
    snapshot = Snapshot(layers, dtype, None, origin)
    if ids is not None:
        if model is not None and not isinstance(model, str):
            check_text_only(model.config, ids, type(model).__name__)
        shape = snapshot.layout.ids_shape
        ids = ids[0] if ids.shape[0] == 1 and len(shape) == 1 else ids
        if ids.shape != shape:
            raise KVZipError(
                f"token_ids has shape {list(ids.shape)}, the cache {list(shape)}: "
                "give the ids of the tokens that were fed, no more and no fewer"
            )
        snapshot = Snapshot(layers, dtype, ids, origin)
    return snapshot


def _check_filled(cache: Cache, model: PreTrainedModel | str | None) -> None:
    """Raise UnsupportedError for a cache whose keys depend on more than ids and a model's weights,
    such as chance, or on adapters that nothing tells."""
    check_draws_no_lots(model)
    check_no_virtual_tokens(model)
    own = getattr(cache, "self_attention_cache", cache)
    told = getattr(own, "more_than_ids", None)
    if told is not None:
        raise UnsupportedError(
            f"`generate` filled the cache with {told}: its keys and values depend on more than "
            "token ids, by which it would be found"
        )
    for cast in getattr(own, "autocasts", ()):
        if isinstance(model, torch.nn.Module) and cast != autocast_of(model):
            raise UnsupportedError(
                f"`generate` filled the cache under {cast or 'no autocast'}, and its model is "
                f"asked for under {autocast_of(model) or 'no autocast'}, where it computes others: "
                "take the snapshot where the cache was filled"
            )
    names = set() if model is None or isinstance(model, str) else adapters_of(model)
    if len(names) > 1 and not getattr(own, "known", False):
        raise UnsupportedError(
            f"the model carries several adapters ({', '.join(sorted(names))}), of which each call "
            "may choose others (adapter_names=), so nothing tells which of them filled the cache: "
            "fill it by `generate`, with a cache of load_or_prefill, or delete the others"
        )


def _encoder_ids(cache: Cache, told: ArrayLike | torch.Tensor | None) -> Ids | None:
    """What a cache's encoder was given, [batch, n], if that is told or the cache knows it. Raises
    KVZipError where the two differ, UsageError where there is no encoder."""
    known: Ids | None = getattr(getattr(cache, "self_attention_cache", cache), "encoder_ids", None)
    if told is None:
        return known
    source = ids_of(told, "encoder_ids")
    if not isinstance(cache, EncoderDecoderCache):
        raise UsageError("encoder_ids is for what a model's encoder gets, and this cache has none")
    if known is not None and not np.array_equal(known, source):
        raise KVZipError("the cache was made for other tokens of the encoder than encoder_ids=")
    return source


def _origin(model: PreTrainedModel | str | None, cache: Cache, encoder_ids: Ids | None) -> Origin:
    """Where a cache comes from: its model, if that is known, and the software that made it."""
    device = _device_of(cache)
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
    origin = origin_of_model(model)
    revision = revision_of_source(origin.revision, encoder_ids)
    return msgspec.structs.replace(origin, revision=revision, software=software)


def _settings(found: Sequence[Held]) -> str:
    """How the first of these layers that is quantised was quantised."""
    pieces = next(one.pieces for one in found if SETTINGS in one.pieces)
    return bytes(pieces[SETTINGS].tensor.tolist()).decode()


def held_by(cache: Cache, kinds: Sequence[LayerKind] = ()) -> list[Held]:
    """What the layers of a cache hold, those that look at an encoder's tokens last; `kinds`: what
    they are, if their model is known.

    Raises UnsupportedError for layers of another kind, and for empty ones.
    """
    if isinstance(cache, EncoderDecoderCache):
        own = held_by(cache.self_attention_cache, kinds)
        cross = held_by(cache.cross_attention_cache)
        return own + [one._replace(kind="cross", window=None) for one in cross]
    layers = layers_in(cache)
    if not layers:
        raise UnsupportedError("the cache has no layers: run a forward pass first")
    found = []
    for i, layer in enumerate(layers):
        kind = kinds[i] if i < len(kinds) else None
        if kind is not None and kind.empty:
            found.append(Held("full", None, None, {}))
            continue
        one = held(layer, i, kind is not None and kind.kind == "latent")
        if kind is not None and kind.window is not None:
            # A static layer has less, if it is short; and a cache that was made without the model's
            # config keeps the tokens that the window has left behind.
            one = one._replace(
                window=kind.window, kind="sliding" if one.kind == "full" else one.kind
            )
        found.append(one)
    return found


def with_encoder_ids(found: Sequence[Held], ids: torch.Tensor) -> list[Held]:
    """Layers, of which the first that looks at an encoder's tokens has their ids, [batch, n], as a
    part, too. Raises KVZipError where these do not fit the layers."""
    marked = list(found)
    at = next(i for i, one in enumerate(marked) if one.kind == "cross")
    keys = marked[at].pieces["k"].tensor
    if ids.shape != keys.shape[::2]:
        raise KVZipError(
            f"encoder_ids has shape {list(ids.shape)}, and the cache holds {list(keys.shape[::2])} "
            "tokens of the encoder: give what that got, no more and no less"
        )
    pieces = {**marked[at].pieces, ENCODER_IDS: Piece(as_bytes(ids), "btd")}
    marked[at] = marked[at]._replace(pieces=pieces)
    return marked


def layer_of(one: Held, seen: int, rope: int | None, single: bool | None = None) -> Layer:
    """What a layer of a cache holds as raw bits. `seen`: how many tokens its states have seen;
    `single`: whether to leave out the axis of the batch, by default where that is one."""
    bits: dict[str, dtypes.Bits | dtypes.DeviceBits] = {}
    parts = {}
    for name, (tensor, axes) in one.pieces.items():
        numbers, form = dtypes.held_bits(tensor, "bytes" if tensor.dtype == torch.uint8 else None)
        if "b" in axes and (tensor.shape[0] == 1 if single is None else single):
            numbers, axes = numbers[0], axes.removeprefix("b")
        bits[name], parts[name] = numbers, PartLayout(form, numbers.shape, axes)
    states = any(name not in TOKEN_PARTS and axes for name, (_, axes) in one.pieces.items())
    length = seen if one.length is None else one.length
    layout = LayerLayout(parts, length, one.kind, one.window, rope, seen if states else None)
    return Layer(bits, layout)


def dtype_of(layers: Sequence[Layer]) -> str:
    """The format of keys and values; where there are none, of the first part."""
    ordered = sorted(layers, key=lambda layer: layer.kind == "state")
    formats = (part.dtype for layer in ordered for part in layer.layout.parts.values())
    found = next(formats, None)
    if found is None:
        raise UnsupportedError("the cache is empty: run a forward pass first")
    return found


def format_of(held_layers: Sequence[Held]) -> str:
    """As :func:`dtype_of`, of layers whose bits were not taken yet."""
    ordered = sorted(held_layers, key=lambda one: one.kind == "state")
    return dtypes.get(next(p.tensor.dtype for one in ordered for p in one.pieces.values())).name


def _device_of(cache: Cache) -> torch.device:
    """Where a cache's first tensor lies."""
    own = getattr(cache, "self_attention_cache", cache)
    layer = next(layer for layer in layers_in(own) if not has_nothing(layer))
    return next(iter(held(layer, 0).pieces.values())).tensor.device
