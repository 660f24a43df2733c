"""What transformers says of a model: its layers' kinds, their RoPE, how it is handed a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvzip.errors import UnsupportedError
from kvzip.load.lazy import FullLayer, SlidingLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.cache_utils import Cache, CacheLayerMixin

_RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_CACHE = "cache" if _RELEASE >= (5, 24) else "past_key_values"


def cache_argument(cache: Cache) -> dict[str, Cache]:
    """What hands a model a cache, in any transformers: ``generate(ids, **cache_argument(cache))``.

    The argument of `forward` and `generate` is ``cache`` from transformers 5.24 on, and was
    ``past_key_values``, of which 5.24 warns.
    """
    return {_CACHE: cache}


class LayerKind(NamedTuple):
    """Kind of one layer's cache, its window, and its index into :func:`rope_parameters`."""

    kind: Literal["full", "sliding"]
    window: int | None
    rope: int | None
    """None: keys of this layer are not rotated."""


def layer_kinds(config: PretrainedConfig) -> list[LayerKind]:
    """Kind, window and RoPE index of every layer, as transformers itself makes its cache.

    Raises UnsupportedError, which names the layer, for any other than full or sliding attention.
    """
    return layers_of(config)[0]


def rope_parameters(config: PretrainedConfig) -> tuple[dict[str, Any], ...]:
    """The distinct RoPE parameters (theta, kind, scaling) of a config's layers."""
    return layers_of(config)[1]


# In these families only the sliding layers rotate their keys, though the config does not say so.
_FULL_LAYERS_UNROTATED = ("cohere2", "exaone4", "exaone_moe", "flint", "kolibri1")


def layers_of(config: PretrainedConfig) -> tuple[list[LayerKind], tuple[dict[str, Any], ...]]:
    """What :func:`layer_kinds` and :func:`rope_parameters` give."""
    text = config.get_text_config(decoder=True)
    try:
        made = [kind_of(layer, i) for i, layer in enumerate(DynamicCache(config=text).layers)]
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
            # Latents in place of keys; what is rotated of a key lies in place of its value.
            or getattr(own, "kv_lora_rank", None) is not None
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


def kind_of(layer: CacheLayerMixin, i: int) -> tuple[Literal["full", "sliding"], int | None]:
    """Kind and window of layer i of a cache. Raises UnsupportedError for any other layer."""
    if type(layer) in (DynamicLayer, FullLayer):
        return "full", None
    if type(layer) in (DynamicSlidingWindowLayer, SlidingLayer):
        return "sliding", int(layer.sliding_window)
    raise UnsupportedError(
        f"layer {i} of the cache is a {type(layer).__name__}; "
        "only layers of full or sliding-window attention that are not quantised can be handled"
    )
