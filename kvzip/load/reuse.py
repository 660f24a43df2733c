"""A cache that knows which tokens it holds, and `generate`, which asks it.

`generate` gets all ids of a prompt, cuts off as many as its cache holds, and feeds the rest;
whether those that it cut off are the cache's, it never asks. The model sees only what is fed, and
so do the cache's layers. So `generate` itself is stood in for, from the first such cache on: with
one of these it compares the ids before it begins, and tells the cache what it has generated. With
any other cache it does what it always does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache

from kvzip.errors import KVZipError, UsageError
from kvzip.load.calls import (
    autocast_of,
    check_encoder,
    check_generate,
    chooses_adapters,
    other_inputs,
    prefix_of,
    state_of,
)
from kvzip.load.config import decoder_cache
from kvzip.load.held import check_crop
from kvzip.load.matching import Ids
from kvzip.load.own import class_for
from kvzip.load.recovery import tell
from kvzip.load.request import Request, assisted, request_of, times, use_cache
from kvzip.load.witness import watching
from kvzip.options import integer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNKNOWN = -1
"""Stands for an id that is not known, such as padding's, which may be any."""


class HeldCache(DynamicCache):
    """A `DynamicCache` that knows the ids of its first tokens, as far as that can be known.

    Known are those that it was made with, the prompts that `generate` was given since, and what
    that generated, unless in beams. What calls of the model itself feed is not seen, and is unknown
    until the next `generate` names it.
    """

    def __init__(self, *args: Any, ids: Ids | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._ids = ids
        """[batch, tokens] of the first tokens; None if nothing is known. Rows may stand for several
        of the cache's each."""
        self._rearranged = False
        self.padding: Sequence[int] | None = None
        """How many columns are padding in each row, where it was loaded for a batch."""
        self.made_by: str | None = None
        """The :func:`~kvzip.load.calls.state_of` of the model that it was loaded for."""
        self.more_than_ids: str | None = None
        """What `generate` was given, when this was filled, on which keys and values depend."""
        self.autocasts = set[str]()
        """What torch cast to by itself when `generate` filled this; "" for nothing."""
        self.encoder_ids: Ids | None = None
        """[batch, n]: what its encoder was given, where there is one and this is known."""
        self.generating = False
        """Whether a `generate` goes on from it that was asked what it is given."""
        self.unused = False
        """Whether it was loaded and not used, where it has states alone, which do not see that."""
        _stand_in()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _stand_in()

    @contextmanager
    def going_on(self, prompt: torch.Tensor, mask: torch.Tensor | None) -> Iterator[None]:
        """While this lasts, `generate` goes on from the cache with a prompt, [batch, tokens], in
        which `mask` is 0 where it is padding. Raises KVZipError for other ids than the cache's."""
        length = int(self.get_seq_length())
        seen = self._fresh and any(getattr(layer, "_rotated", False) for layer in self.layers)
        if prompt.shape[1] <= length and not seen:  # which keys tell, where they have positions
            raise KVZipError(
                f"the prompt does not continue the cached document at position {length}: the cache "
                f"holds {length} tokens, and the prompt has {prompt.shape[1]}: it must be longer "
                "than its cache. After `generate` a cache holds the tokens that were generated, "
                "too: load it anew for another prompt"
            )
        ids = prompt.detach().cpu().numpy().copy()
        self._check(ids, length)
        if mask is not None:
            ids[mask.cpu().numpy() == 0] = UNKNOWN
        before, self._ids, self._rearranged = self._ids, ids, False
        self._tell_layers(True)
        try:
            yield
        except BaseException:
            if int(self.get_seq_length()) == length:
                self._ids = before
            raise
        finally:
            self._forget_rest()
            self._tell_layers(False)

    @contextmanager
    def asked(self) -> Iterator[None]:
        """While this lasts, what is fed is fed by a `generate` that :meth:`check` has asked."""
        self.generating = True
        try:
            yield
        finally:
            self.generating = self.unused = False

    def _tell_layers(self, knows_prompt: bool) -> None:
        for layer in self.layers:
            if hasattr(layer, "knows_prompt"):
                layer.knows_prompt = knows_prompt

    def _check(self, prompt: Ids, length: int) -> None:
        """Raise KVZipError for a prompt that is longer than the cache, `length`, and differs."""
        if self._ids is None or prompt.shape[1] <= length:
            return
        at = _first_difference(self._ids, prompt)
        if at is None:
            return
        rows = f", in a batch of {len(self._ids)}" if len(self._ids) > 1 else ""
        raise KVZipError(
            f"the prompt does not continue the cached document at position {at}: the cache holds "
            f"{length} tokens{rows}, of the prompt that it was loaded for and of the answer to "
            "that, and goes on with no other text; load it anew for another prompt"
        )

    def _forget_rest(self) -> None:
        """Know no ids but of tokens that the cache holds."""
        if self._ids is not None:
            self._ids = self._ids[:, : int(self.get_seq_length())]

    def take_note(self, generated: object) -> None:
        """Remember what a `generate` has fed of what it returns."""
        found = getattr(generated, "sequences", generated)
        if self._ids is None or self._rearranged or not isinstance(found, torch.Tensor):
            return
        length, rows = int(self.get_seq_length()), self._rows
        if found.shape == (rows, length + 1) and not rows % len(self._ids):  # the last is not fed
            ids = found[:, :length].cpu().numpy()
            prompt = np.repeat(self._ids, rows // len(self._ids), axis=0)
            self._ids = np.concatenate([prompt, ids[:, prompt.shape[1] :]], axis=1)

    @property
    def _fresh(self) -> bool:
        """Whether nothing has been fed yet to a loaded cache."""
        return self.unused or any(
            getattr(layer, "_leads", False) and layer._fresh for layer in self.layers
        )

    @property
    def recovers(self) -> bool:
        """Whether it can be computed where it is not used."""
        sources = (getattr(layer, "_source", None) for layer in self.layers)
        return any(each is not None and each.recovers for each in sources)

    def check_fed(self, fed: int) -> None:
        """Raise KVZipError if a call, the first, is fed another number of tokens than it was loaded
        for."""
        for layer in self.layers:
            if getattr(layer, "_leads", False) and layer._prompt_length is not None:
                layer._check_fed(fed, layer._prompt_length - int(self.get_seq_length()))

    def check(self, model: Any, request: Request) -> bool:
        """Whether a `generate` can go on from the cache. If not, it may have been made to compute
        all itself, where it is the first and is given the whole prompt: then this is False.
        Else KVZipError is raised."""
        if not self._fresh:
            if self.get_seq_length() and prefix_of(model):
                check_encoder(model, self, request.given)
            return True
        try:
            check_generate(model, self, request.used_mask, request.given)
        except KVZipError as error:
            if not (request.whole and self.recovers):
                raise
            tell(error)
            return False
        return True

    def empty(self, config: PretrainedConfig) -> None:
        """Be as a model of this config fills it itself."""
        self.layers, self._ids = decoder_cache(config).layers, None
        self.padding, self.made_by, self.unused = None, None, False

    @property
    def known(self) -> bool:
        """Whether `generate` has named all tokens that it holds, and nothing beside their ids."""
        length, ids = int(self.get_seq_length()), self._ids
        if ids is None or ids.shape[1] < length or self.more_than_ids is not None:
            return False
        return not (ids == UNKNOWN).any()

    def note(self, model: Any, request: Request) -> None:
        """Remember what a `generate` is given beside ids, if anything."""
        given, decoder = request.given, prefix_of(model)
        told = [f"{name}=" for name in other_inputs(model, given)]
        if given.get(f"{decoder}position_ids") is not None:
            told.append(f"{decoder}position_ids=")
        if chooses_adapters(model):
            told.append("adapter_names=")
        if request.used_mask is not None and not request.used_mask.bool().all():
            told.append("a mask that hides tokens")
        if decoder and not self.get_seq_length():
            try:
                check_encoder(model, self, given)
            except KVZipError:
                told.append("more, or other, for its encoder than the ids that it was made for")
        self.more_than_ids = self.more_than_ids or ", ".join(told) or None
        self.autocasts.add(autocast_of(model))

    @property
    def _rows(self) -> int:
        """How many rows the cache holds; 0 before it holds any."""
        for layer in self.layers:
            states = getattr(layer, "conv_states", None) or {}
            for found in (getattr(layer, "keys", None), *states.values()):
                if found is not None:
                    return int(found.shape[0])
        return 0

    def spread(self, rows: int) -> None:
        """Be ready for so many rows, each as often as any other, if the cache is as it was loaded
        and holds what is used before keys tell how many rows there are: states, an indexer's."""
        lazy = [layer for layer in self.layers if hasattr(layer, "_loader")]
        unused = [layer for layer in lazy if layer._loader is not None]
        if not lazy or len(unused) < len(lazy) or not any(layer.used_early for layer in lazy):
            return
        held = unused[0].rows
        if rows > held and not rows % held:
            self.batch_repeat_interleave(rows // held)

    def crop(self, tokens_to_remove: int) -> None:
        """Take away the last tokens: `tokens_to_remove` is minus how many, as in transformers.

        Raises UsageError for more than there are, UnsupportedError where a layer cannot be put
        back; no layer is changed then.
        """
        held, removed = int(self.get_seq_length()), -integer("tokens_to_remove", tokens_to_remove)
        if not 0 <= removed <= held:
            raise UsageError(
                f"crop({tokens_to_remove}) of a cache of {held} tokens: give minus how many to "
                "take away from its end"
            )
        for i, layer in enumerate(self.layers):
            if removed:
                check_crop(layer, i, removed)
        for layer in self.layers:
            if removed or getattr(layer, "record_past", False):  # may let go of what it recorded
                layer.crop(tokens_to_remove)
        self._forget_rest()

    def reset(self) -> None:
        super().reset()
        self._ids = self.encoder_ids = None
        self.unused = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._pick(lambda ids: ids[beam_idx.cpu().numpy()])
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._pick(lambda ids: np.repeat(ids, repeats, axis=0))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._pick(lambda ids: ids[indices.cpu().numpy()])
        super().batch_select_indices(indices)

    def _pick(self, pick: Callable[[Ids], Ids]) -> None:
        """Do with the rows of ids and padding what is about to be done with the cache's."""
        self._rearranged = True
        rows = self._rows
        if self._ids is not None:
            ids = _for_each(rows, self._ids)
            self._ids = None if ids is None else pick(ids)
        if self.padding is not None:
            padding = _for_each(rows, np.array(self.padding))
            self.padding = self.padding if padding is None else pick(padding).tolist()


class StateCache(HeldCache):
    """A `HeldCache` some of whose layers keep states, which can be neither cut nor counted.

    Where no layer counts tokens it does so itself, as far as `generate` feeds it, so that this
    leaves out of a prompt what the cache has seen, as with any other cache.
    """

    def __init__(self, layers: list[Any], length: int, ids: Ids | None):
        super().__init__(ids=ids)
        Cache.__init__(self, layers=layers)
        counted = any(isinstance(layer, CacheLayerMixin) for layer in layers)
        self._length = None if counted else length
        """Tokens that the states have seen, where no layer counts them."""

    @property
    def is_linear(self) -> list[bool]:
        """As that of a `Cache`, but for one that counts tokens itself."""
        return super().is_linear if self._length is None else [False for _ in self.layers]

    @property
    def is_compileable(self) -> bool:
        """As that of a `Cache`, but for one that counts tokens itself."""
        return self._length is None and super().is_compileable

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self._length is None else self._length

    def empty(self, config: PretrainedConfig) -> None:
        super().empty(config)
        self._length = None if self._length is None else 0

    def take_note(self, generated: object) -> None:
        found = getattr(generated, "sequences", generated)
        if self._length is not None and isinstance(found, torch.Tensor):
            self._length = found.shape[1] - 1  # the last is not fed
        super().take_note(generated)


def held_cache(
    config: PretrainedConfig, layers: list[Any], states: bool, length: int, ids: Ids | None
) -> HeldCache:
    """A cache of these layers, some of which keep `states`, that has seen `length` tokens, for a
    model of this config."""
    if states:
        return class_for(config, StateCache)(layers, length, ids)
    made = HeldCache(ids=ids)
    # Its own constructor would make layers from the config, once more: a millisecond.
    Cache.__init__(made, layers=layers)
    return made


def pin(cache: Cache, model: Any, revision: str | None) -> None:
    """Have a loaded cache refuse its first call if the model has other weights then, or adapters,
    than it has now; unless the caller has said, by a `revision`, which the cache is of."""
    if revision is None:
        held_in(cache).made_by = state_of(model)


def held_in(cache: Any) -> Any:
    """What a cache holds of a decoder's own tokens: itself, if there is no encoder."""
    return getattr(cache, "self_attention_cache", cache)


def _empty(cache: Cache, config: PretrainedConfig) -> None:
    """Have a model of this config fill a cache itself."""
    held_in(cache).empty(config)
    if isinstance(cache, EncoderDecoderCache):
        cache.cross_attention_cache, cache.is_updated = DynamicCache(), {}


def _for_each(rows: int, known: Ids) -> Ids | None:
    """What is known of a cache's rows, for each of so many; None if it does not fit them."""
    times, more = divmod(rows, len(known))
    return np.repeat(known, times, axis=0) if times and not more else None


def _first_difference(held: Ids, prompt: Ids) -> int | None:
    """Where a prompt, [batch, n], first differs from the ids held, [batch, up to n]; None where it
    does not, as far as they are known. Either may have each row of the other several times."""
    rows, given = len(held), len(prompt)
    if max(rows, given) % min(rows, given):
        return None  # neither fits the other, which the model notices
    held = np.repeat(held, max(1, given // rows), axis=0)
    prompt = np.repeat(prompt[:, : held.shape[1]], max(1, rows // given), axis=0)
    differing = ((held != prompt) & (held != UNKNOWN)).any(axis=0)
    return int(differing.argmax()) if differing.any() else None


def _have_mask(model: Any, held: HeldCache, request: Request, kwargs: dict[str, Any]) -> None:
    """Have transformers cut off a prompt's ids that a cache holds, where it would feed them all
    without a mask."""
    if request.mask is not None:
        return
    decoder = prefix_of(model)
    name = f"{decoder}attention_mask"
    takes = name in inspect.signature(model.forward).parameters
    if (takes and held.get_seq_length()) if decoder else not takes:
        kwargs[name] = torch.ones_like(kwargs["decoder_input_ids"] if decoder else request.prompt)


def _stand_in() -> None:
    """Have `generate` of all models ask a `HeldCache` that it is given."""
    from transformers import GenerationMixin

    own = GenerationMixin.generate
    if getattr(own, "asks_held_caches", False):
        return

    named_ones = inspect.signature(own).parameters.values()
    positions = [p.name for p in named_ones if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
    """What `generate` takes by position after itself and the prompt."""

    @functools.wraps(own)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(positions, args[1:], strict=False))
        if not named.keys() & kwargs.keys():  # a name that is given twice is for `own` to refuse
            args, kwargs = args[:1] + args[1 + len(positions) :], named | kwargs
        caches = (kwargs.get(name) for name in ("cache", "past_key_values"))
        cache = next((each for each in caches if isinstance(held_in(each), HeldCache)), None)
        if cache is None:
            return own(self, *args, **kwargs)
        held = held_in(cache)
        if held.get_seq_length() and assisted(self, kwargs):
            raise KVZipError(
                f"the cache holds {held.get_seq_length()} tokens, and with prompt lookup, use_mtp "
                "or an assistant transformers feeds the whole prompt behind them once more, which "
                "gives other tokens: leave out the cache, or the lookup and the assistant"
            )
        use_cache(self, kwargs)
        request = request_of(self, args, kwargs)
        if not held.check(self, request):
            _empty(cache, self.config)
        held.note(self, request)
        with watching(self, cache) if held._fresh else nullcontext(), held.asked():
            if not request.whole:
                return own(self, *args, **kwargs)
            _have_mask(self, held, request, kwargs)
            held.spread(len(request.prompt) * times(self, kwargs))
            with held.going_on(request.prompt, request.mask):
                generated = own(self, *args, **kwargs)
                held.take_note(generated)
            return generated

    generate.asks_held_caches = True  # type: ignore[attr-defined]
    GenerationMixin.generate = generate
