"""Whether a loaded cache is of the model that goes on from it: witnesses, and a second try.

A document's next token, which the model computes itself, has keys and values in the file, too: in
every layer both are compared. A layer's depend on all the weights before, so weights that changed
show there, if they change a number by more than rounding does: other kernels, batches and ways to
cut a prompt change them, too.

What is found is looked at in the last layer, so that a GPU need not be waited for in each; the call
of the model that found it has to be made again then: :func:`watch` does that.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from kvzip.errors import KVZipError, WeightsError
from kvzip.load.calls import check_call, innermost
from kvzip.workers import Lock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvzip.load.lazy import LazyLayer
    from kvzip.load.loaders import AnyLoader

ROOM = {torch.bfloat16: 2**-3, torch.float16: 2**-5, torch.float32: 2**-7}
"""How far a token's keys (or values) of a layer may be from the file's, by their Euclidean norm.
Rounding was seen to move them by up to 2**-5 in bf16 (SmolLM2, 30 layers: chunks, batches, eager
against fused attention); fp32 has room for products in TF32."""


class OtherWeights(WeightsError):
    """A layer's keys and values are not those that the model computes for the same token."""

    layer: LazyLayer | None = None
    """The cache's layer that saw it."""
    source: AnyLoader | None = None
    """Its loader."""


def distance(states: Sequence[torch.Tensor], witness: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far the keys and values are that the model computed for a token, the first of `states`,
    from those of the file, `witness`: [2, batch], relative to the norm of the file's. All are
    [batch, heads, tokens, dim]; rows of NaN have no witness, and are no distance away."""
    found = [
        _relative(new[:, :, :1].flatten(1), stored.flatten(1))
        for new, stored in zip(states, witness, strict=True)
    ]
    return torch.stack(found).nan_to_num(0.0)


def distance_of_all(states: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same for all tokens that the file holds. One token alone, which rounding may move further
    than most, counts for a quarter."""
    found = []
    for new, stored in zip(states, held, strict=True):
        whole = _relative(new.flatten(1), stored.flatten(1))
        each = _relative(new.transpose(1, 2).flatten(2), stored.transpose(1, 2).flatten(2))
        found.append(torch.maximum(whole, each.amax(dim=1) / 4))
    return torch.stack(found)


def _relative(new: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """How far vectors in the last axis are apart, relative to the norm of those stored."""
    stored = stored.float()
    return (new.float() - stored).norm(dim=-1) / stored.norm(dim=-1).clamp_min(1e-30)


def judge(distances: Mapping[str, torch.Tensor] | None, dtype: torch.dtype) -> None:
    """Raise OtherWeights if one of the layers is farther away than rounding explains. They are by
    what was looked at, in words."""
    if not distances:
        return
    worst = torch.stack([found.detach().max().cpu() for found in distances.values()])
    if float(worst.max()) > ROOM.get(dtype, ROOM[torch.bfloat16]):
        at = int(worst.argmax())
        raise OtherWeights(
            f"the cache is of other weights than the model: {list(distances)[at]} holds keys or "
            f"values that differ from the model's own by {float(worst[at]):.1%}"
        )


def same_key(new: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether keys [batch, heads, 1, dim] of the first layer are equal but for rounding.

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


def not_continued(position: int) -> KVZipError:
    """The error of a prompt that does not continue a cache of `position` tokens."""
    return KVZipError(
        f"the prompt does not continue the cached document at position {position}: it is shorter "
        f"than the {position} tokens of the cache, or another text, or its suffix came without a "
        "full-length attention mask; pass prompt= to load_cache to keep only what they share"
    )


# --- a second try ------------------------------------------------------------------------------


_watching = Lock()
"""Held while a model's `forward` is replaced or put back: threads may share a model."""


def watch(model: PreTrainedModel, cache: Cache) -> None:
    """Until `cache` has been used, a call of the model that finds it to be of other weights gets
    the cache that the model computes itself, and is made again, once. What such a call is given
    beside ids is checked before, see :mod:`kvzip.load.calls`."""
    model = innermost(model)  # what PEFT's calls, too, and where adapters have been put on
    if not isinstance(model, torch.nn.Module):
        return
    with _watching:
        watched = vars(model).get("forward")
        if not isinstance(watched, _Watched):
            watched = _Watched(model)
            model.forward = watched
        if not watched.awaits(cache):
            watched.pending.append(weakref.ref(cache))


@contextmanager
def watching(model: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """The same while this lasts, if it was not so before."""
    watched = vars(innermost(model)).get("forward")
    if isinstance(watched, _Watched) and watched.awaits(cache):
        yield
        return
    watch(model, cache)
    try:
        yield
    finally:
        watched = vars(innermost(model)).get("forward")
        if isinstance(watched, _Watched):
            watched.forget(cache)


class _Watched:
    """Stands in for a model's `forward` for as long as there are caches that were not used."""

    idle = True  # it changes nothing of what the model computes: see kvzip.identity.structure

    def __init__(self, model: torch.nn.Module):
        self.model, self.before = model, vars(model).get("forward")
        self.pending: list[weakref.ref[Cache]] = []
        compiles = "torch._dynamo" in sys.modules  # and must not compile fingerprints, too
        self.check_call = torch.compiler.disable(check_call) if compiles else check_call

    def awaits(self, cache: Cache) -> bool:
        """Whether a cache is one of those that were not used."""
        return any(ref() is cache for ref in self.pending)

    def forget(self, cache: Cache) -> None:
        """Await a cache no longer."""
        with _watching:
            self.pending = [ref for ref in self.pending if ref() is not cache]
        self._settle()

    @property
    def own(self) -> Callable[..., Any]:
        """The model's `forward` without this."""
        return self.before or type(self.model).forward.__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:  # transformers looks at it
        return inspect.signature(self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self._check(args, kwargs)
            return self.own(*args, **kwargs)
        except OtherWeights as error:
            cache, source = _cache_with(error.layer, (*args, *kwargs.values())), error.source
            if cache is None or source is None or not source.recovers:
                raise
            layers = lazy_layers(cache)
            if not all(layer.restartable for layer in layers):
                raise
            for layer in layers:
                layer.restart(source, source.recover(layer._index, error))
                if layer._of_encoder:
                    have_computed(cache, layer)
        finally:
            self._settle()
        return self.own(*args, **kwargs)

    def _check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise KVZipError if the call means other tokens than those of a cache not used yet."""
        for value in (*args, *kwargs.values()):
            cache: Any = getattr(value, "self_attention_cache", value)
            if getattr(cache, "_fresh", False):
                given = self.__signature__.bind_partial(*args, **kwargs)
                self.check_call(self.model, cache, {**given.arguments, **given.kwargs})
                cache.unused = False

    def _settle(self) -> None:
        """Go, when all caches have been used or are gone."""
        with _watching:
            caches = [ref() for ref in self.pending]
            self.pending = [
                ref
                for ref, cache in zip(self.pending, caches, strict=True)
                if cache is not None and _is_awaited(cache)
            ]
            if not self.pending and vars(self.model).get("forward") is self:
                if self.before is None:
                    del self.model.forward
                else:
                    self.model.forward = self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watched:
        return _Watched(memo.get(id(self.model), self.model))

    def __reduce__(self) -> tuple[object, ...]:
        return _Watched, (self.model,)


def _is_awaited(cache: Cache) -> bool:
    """Whether a cache was not used yet, as far as it can be told whether it has been."""
    held: Any = getattr(cache, "self_attention_cache", cache)
    return held.unused or any(each._last and each._fresh for each in lazy_layers(cache))


def have_computed(cache: EncoderDecoderCache, layer: LazyLayer) -> None:
    """Have a model compute a layer over an encoder's tokens at its next call, and hand that to the
    layer, which knows what it is to be."""
    at = next(i for i, each in enumerate(cache.cross_attention_cache.layers) if each is layer)
    cache.is_updated[at] = False


def _cache_with(layer: object, values: Iterable[object]) -> Cache | None:
    """The cache among a call's arguments that has that layer."""
    for value in values:
        held = lazy_layers(value) if isinstance(value, (Cache, EncoderDecoderCache)) else []
        if any(each is layer for each in held):
            return value
    return None


def lazy_layers(cache: Cache) -> list[LazyLayer]:
    """Those of a cache's layers that a loader gives, those over an encoder's tokens last."""
    if isinstance(cache, EncoderDecoderCache):
        parts = cache.self_attention_cache, cache.cross_attention_cache
        return [layer for part in parts for layer in lazy_layers(part)]
    return [layer for layer in getattr(cache, "layers", []) if hasattr(type(layer), "restartable")]
