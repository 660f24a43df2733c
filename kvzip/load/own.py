"""Caches of classes that families of transformers have of their own.

MiniMax's has a list of the linear layers' states beside the layers of a `DynamicCache`, and its
model takes no other class; xLSTM's has three states a layer, and is no `Cache`. Here such states
lie in a `LinearAttentionLayer`, as with all other families, and the class gives the model what it
asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_C = TypeVar("_C", bound=DynamicCache)


def class_for(config: PretrainedConfig, base: type[_C]) -> type[_C]:
    """`base`, or the class made of it that a model of this config takes."""
    text = config.get_text_config(decoder=True)
    made: Any = base
    if text.model_type == "minimax":
        return _minimax(made)
    return _xlstm(made, text.dtype or torch.float32) if text.model_type == "xlstm" else base


def layers_for(text: PretrainedConfig) -> list[Any] | None:
    """The empty layers of a cache of a class of its own; None where those of a `DynamicCache` of
    this config are right."""
    if text.model_type != "xlstm":
        return None
    return [_layer_of(_XLSTM_STATES) for _ in range(text.num_hidden_layers)]


def is_own(cache: object) -> bool:
    """Whether a cache that is no `Cache` is one that can be read: xLSTM's."""
    found = type(cache)
    return found.__name__ == "xLSTMCache" and found.__module__.startswith("transformers.")


def layers_in(cache: Any) -> list[Any]:
    """A cache's layers, those included that a class of its own keeps elsewhere."""
    if is_own(cache):
        return [_layer_of(len(states), *states) for states in cache.rnn_state.values()]
    layers = list(cache.layers)
    for i, state in enumerate(getattr(cache, "linear_cache", ())):
        if isinstance(state, torch.Tensor):
            layers[i : i + 1] = [_layer_of(1, state)]
    return layers


def _layer_of(count: int, *states: torch.Tensor) -> Any:
    """A layer for so many states, which has these already."""
    from transformers.cache_utils import LinearAttentionLayer  # there is none in older releases

    layer = LinearAttentionLayer(number_of_states=count)
    for n, state in enumerate(states):
        _set(layer, state, n)
    return layer


def _set(layer: Any, state: torch.Tensor, n: int = 0) -> None:
    layer.recurrent_states[n] = state
    layer.is_recurrent_states_initialized[n] = layer.has_previous_state[n] = True


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
    return type(f"MiniMax{base.__name__}", bases, {"__reduce__": _reduced_to(_minimax, base)})


_XLSTM_STATES = 3


@cache
def _xlstm(base: type[Any], dtype: torch.dtype) -> type[Any]:
    class States(DynamicCache):
        """What an xLSTM model takes for its own cache."""

        seqlen_offset = 0
        rnn_state_initial = True

        @property
        def rnn_state(self) -> list[_States]:
            return [_States(layer, dtype) for layer in self.layers]

    bases = (States,) if base is DynamicCache else (base, States)
    reduced = _reduced_to(_xlstm, base, dtype)
    return type(f"xLSTM{base.__name__}", bases, {"__reduce__": reduced})


def _reduced_to(make: Any, *arguments: Any) -> Callable[[Any], tuple[object, ...]]:
    """The ``__reduce__`` of a class that is made when it is called for: pickle knows none but
    those that have a name in a module."""
    return lambda self: (_empty, (make, *arguments), vars(self).copy())


def _empty(make: Any, *arguments: Any) -> Any:
    cls = make(*arguments)
    return cls.__new__(cls)


class _States:
    """A layer's states. To go through them gives tensors, or None before the first token; what
    stands at an index takes a new one with `copy_`."""

    def __init__(self, layer: Any, dtype: torch.dtype):
        self._layer, self._dtype = layer, dtype

    def __len__(self) -> int:
        return _XLSTM_STATES

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        for n in range(len(self)):
            seen = self._layer.has_previous_state[n]
            yield self._layer.recurrent_states[n] if seen else None

    def __getitem__(self, n: int) -> _State:
        return _State(self._layer, n, self._dtype)


class _State:
    """A place for one state of a layer."""

    def __init__(self, layer: Any, n: int, dtype: torch.dtype):
        self._layer, self._n, self._dtype = layer, n, dtype

    def copy_(self, state: torch.Tensor) -> None:
        """Keep a state, in the dtype that xLSTM's own cache has."""
        _set(self._layer, state.to(self._dtype, copy=True), self._n)
