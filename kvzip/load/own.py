"""Caches of classes that families of transformers have of their own.

MiniMax's has a list of the linear layers' states beside the layers of a `DynamicCache`, and its
model takes no other class. Here such a state lies in a `LinearAttentionLayer`, as with all other
families, and the class gives the model what it asks for.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers.cache_utils import Cache, DynamicCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_C = TypeVar("_C", bound=DynamicCache)


def class_for(config: PretrainedConfig, base: type[_C]) -> type[_C]:
    """`base`, or the class made of it that a model of this config takes."""
    text = config.get_text_config(decoder=True)
    made: Any = base
    return _minimax(made) if text.model_type == "minimax" else base


def layers_in(cache: Cache) -> list[Any]:
    """A cache's layers, those included that MiniMax's own class keeps beside them."""
    layers = list(cache.layers)
    for i, state in enumerate(getattr(cache, "linear_cache", ())):
        if isinstance(state, torch.Tensor):
            layers[i : i + 1] = [_layer_of(state)]
    return layers


def _layer_of(state: torch.Tensor) -> Any:
    from transformers.cache_utils import LinearAttentionLayer  # there is none in older releases

    layer = LinearAttentionLayer()
    _set(layer, state)
    return layer


def _set(layer: Any, state: torch.Tensor) -> None:
    layer.recurrent_states[0] = state
    layer.is_recurrent_states_initialized[0] = layer.has_previous_state[0] = True


@cache
def _minimax(base: type[Any]) -> type[Any]:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    class States(MiniMaxCache):
        """A `MiniMaxCache` whose list stays empty: its layers have the states."""

        # What the list is in the way of.
        __len__ = DynamicCache.__len__
        batch_repeat_interleave = DynamicCache.batch_repeat_interleave
        batch_select_indices = DynamicCache.batch_select_indices

        def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
            layer: Any = self.layers[layer_idx]
            return layer.recurrent_states[0] if layer.has_previous_state[0] else None

        def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
            _set(self.layers[layer_idx], linear_cache)

    bases = (States,) if base is DynamicCache else (base, States)
    return type(f"MiniMax{base.__name__}", bases, {})
