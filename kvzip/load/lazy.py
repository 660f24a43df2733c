"""Layers of a transformers `Cache` that decode themselves when a model first looks at them.

A loader gives what they start with. What the model is fed first is checked against the document,
see `kvzip.load.hf.load_cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch

from kvzip.errors import CancelledError, KVZipError, UnsupportedError
from kvzip.load.held import LAZY, announce, assign
from kvzip.load.loaders import AnyLoader, shapes_of
from kvzip.load.recovery import Taken
from kvzip.load.witness import (
    OtherWeights,
    distance,
    distance_of_all,
    judge,
    not_continued,
    same_key,
)

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicLayer as _Base
else:
    _Base = object  # the classes below add transformers'


class LazyLayer(_Base):
    """Knows its length; decodes when its tensors are first looked at.

    Mixed into the layers of transformers (:func:`lazy`), whose own methods then decode as they go.
    The state before the first update is `_fresh`: until then what is fed can be wrong, and is
    checked.
    """

    base: type
    """The class of transformers that this was made of."""
    lazily: tuple[str, ...] = ()
    """The attributes that are decoded when they are first looked at."""
    _loader: AnyLoader | None = None
    """A Loader or BatchLoader; None once it has given what the layer starts with."""
    _source: AnyLoader | None = None
    """The same, until the first update is admitted."""
    _fresh = False
    _witness: tuple[torch.Tensor, ...] | None = None
    """The document's key and value at the position after the last that is kept, or None."""
    _rearranged = False
    """Whether the rows are no longer the document's, each as often as any other."""
    _prompt_length: int | None = None
    """The leading layer: tokens of the prompt, the cached ones included, fed in chunks of `_chunk`
    if that is not None."""
    _chunk: int | None = None
    _limit: int | None = None
    """The leading layer: how many tokens the first call must stay below, the cached ones included,
    since keys of longer sequences are rotated by other frequencies."""
    _leads = False
    """Whether it is the first layer of its cache that is fed keys."""
    _unfed = 0
    """The leading layer: tokens of the prompt that are still to come, where it is fed in chunks."""
    _rotated = False
    """The leading layer: whether its keys tell the positions of their tokens."""
    _distances: dict[str, torch.Tensor] | None = {}  # noqa: RUF012 - each cache has one of its own
    """How far from their witnesses the layers of a cache were found, by words for what was looked
    at: shared by them. None where nobody wants to know."""
    _peers: Sequence[LazyLayer] = ()
    """The leading layer, until its first update: the layers with states, which are used before."""
    _last = False
    """Whether no layer of its kind comes after it in a call."""
    _of_encoder = False
    """Whether its tokens are an encoder's, of which a model computes all at its first call."""
    knows_prompt = False
    """Whether a `generate` feeds it that has named all ids: what follows the first call is no
    prompt, and a text that repeats itself may have keys like those of one."""
    _times = 1
    """How many rows stand for each of the document's, one after the other."""
    _removed = 0
    """How many tokens were taken away from the document's end before the first update."""
    _forgetful = False
    """Whether the model goes on from a state only one token at a time."""

    def begin(self, loader: AnyLoader, index: int, length: int) -> None:
        """Be the layer `index` of a cache of `length` tokens, which a loader gives."""
        self._loader = self._source = loader
        self._index, self._length, self._fresh = index, length, True
        self.dtype, self.device = loader.dtype, loader.device or torch.device("cpu")
        announce(self, loader.shapes(index), length)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled with all that its loader gives (:meth:`Loader.__reduce__`); copied with it."""
        return _empty, (self.base, self.lazily), vars(self).copy()

    @property
    def rows(self) -> int:
        """How many rows the document has, while it is not decoded."""
        assert self._loader is not None, "it is decoded"
        return next(iter(self._loader.shapes(self._index).values()))[0]

    @property
    def used_early(self) -> bool:
        """Whether it holds more than keys and values, which a model uses before it feeds these."""
        return not {"keys", "values"}.issuperset(type(self).lazily)

    def _decoded(self) -> None:
        if self._loader is not None:
            taken, self._loader = self._loader.take(self._index), None
            assign(self, taken.parts)
            self._witness = taken.witness

    def get_seq_length(self) -> int:
        return self._length if self._loader is not None else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not query_length:  # a prompt of half the cache's tokens
            raise not_continued(self.get_seq_length())
        if self._fresh and self._peers and self._prompt_length is not None:
            self._check_fed(query_length, self._prompt_length - self._length)
        return super().get_mask_sizes(query_length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fresh = self._fresh
        if fresh and self._of_encoder:
            return self._compare(key_states, value_states)
        try:
            if fresh:
                self._admit(key_states, value_states)
            if self._unfed:
                self._check_fed(key_states.shape[-2], self._unfed)
            if self._rotated and (fresh or not self.knows_prompt):
                self._check_goes_on(key_states)
        except KVZipError:
            for layer in self._peers:
                layer.rewind()
            raise
        for layer in self._peers:
            layer.settle()
        self._peers = ()
        if self._prompt_length is not None and self._chunk is not None:
            left = self._prompt_length - self.get_seq_length() - key_states.shape[-2]
            self._unfed = max(0, left)
        return super().update(key_states, value_states, *args, **kwargs)

    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._forgetful and conv_states.shape[-1] > 1:
            raise KVZipError(
                "models of this family forget their state when they are fed more than one token "
                "(in transformers itself): give `generate` prefill_chunk_size=1"
            )
        return super().update_conv_state(conv_states, *args, **kwargs)

    # Of calls by hand; before `generate` the whole cache is made ready for its rows.

    def update_indexer(self, indexer_key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._spread_indexer("indexer_keys", indexer_key_states)
        return super().update_indexer(indexer_key_states, *args, **kwargs)

    def update_index(self, idx_k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._spread_indexer("idx_keys", idx_k)
        return super().update_index(idx_k, *args, **kwargs)

    def _spread_indexer(self, name: str, new: torch.Tensor) -> None:
        held = getattr(self, name)
        if held is not None and held.numel() and not new.shape[0] % held.shape[0]:
            setattr(self, name, _repeated(held, new))

    def _check_fed(self, fed: int, left: int) -> None:
        """Raise unless so many tokens are fed as are left of the prompt, or a chunk of them."""
        if fed != (left if self._chunk is None else min(left, self._chunk)):
            chunked = "" if self._chunk is None else f", in chunks of {self._chunk}"
            raise KVZipError(
                f"the model was fed {fed} tokens after {self.get_seq_length()} cached ones, not "
                f"the rest of the {self._prompt_length} of prompt={chunked}: give `generate` the "
                "same ids (or the rest of them with an attention mask for all). If the prompt is "
                "fed in chunks, by hand or because `generate` or its generation_config says "
                "prefill_chunk_size, load the cache with the same prefill_chunk_size= (1 for one "
                "token at a time)"
            )

    def _check_goes_on(self, key_states: torch.Tensor) -> None:
        """Raise if what is fed is in the cache already.

        `generate` feeds ``ids[:, length - len(ids):]`` of ids that are no longer than a cache of
        that length: f tokens, the first at position (length - f) / 2. Their keys are those that lie
        there, and no other positions' are.
        """
        length, fed = self.get_seq_length(), key_states.shape[-2]
        held: torch.Tensor = cast(Any, self).keys
        begin = (length - fed) // 2
        if (fed == 1 and key_states.is_cuda) or fed > length or (length - fed) % 2:
            return  # (on a GPU each new token would wait for this)
        # A layer that slides holds the last positions only.
        first = length - held.shape[-2]
        skipped = max(0, first - begin)
        there = held[:, :, begin + skipped - first :][:, :, :1]
        if skipped >= fed or not there.shape[-2] or key_states.shape[0] % there.shape[0]:
            return
        here = key_states[:, :, skipped : skipped + 1]
        if same_key(here, _repeated(there, key_states)):
            raise KVZipError(
                f"the cache holds {length} tokens, and the model is fed what is among them "
                f"already, from position {begin}: the prompt must be longer than its cache. After "
                "`generate` a cache holds the tokens that were generated, too: load it anew for "
                "another prompt"
            )

    def _admit(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Check the first states that are fed, and get ready for them."""
        position, fed = self.get_seq_length(), key_states.shape[-2]
        if self._prompt_length is not None:
            self._check_fed(fed, self._prompt_length - position)
        if self._leads and self._limit is not None and position + fed >= self._limit:
            raise UnsupportedError(
                f"the model is fed {fed} tokens after {position} cached ones, and where there are "
                f"{self._limit} or more it rotates the keys of all tokens by other frequencies (its"
                " RoPE is dynamic or longrope): leave out the cache"
            )
        assert self._source is not None, "the first update was admitted before"
        if self._source.device is None:
            self._source.device = key_states.device
        try:
            pair = self._fitting(key_states, value_states)
        except CancelledError:
            raise
        except KVZipError as error:
            begin = self._length - self._removed
            if not self.restartable or not self._source.recovers or position != begin:
                raise
            if self._peers:  # what is fed was computed from their states: for `watch`
                anew = OtherWeights(str(error))
                anew.layer, anew.source = self, self._source
                raise anew from error
            taken = self._source.recover(self._index, error)
            self._loader, self._witness = None, taken.witness
            assign(self, taken.parts)
            self._remove_again()
            self.dtype = cast(Any, self).keys.dtype
            pair = self._fitting(key_states, value_states)
        self._begin_with(pair, key_states, value_states)

    def _compare(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What it holds, for as many rows as are fed, if that is what the model has computed of the
        encoder's tokens."""
        assert self._source is not None, "it was compared before"
        if self._source.device is None:
            self._source.device = key_states.device
        if key_states.shape[-2] != cast(Any, self).keys.shape[-2]:
            raise KVZipError(
                f"the cache holds {cast(Any, self).keys.shape[-2]} tokens of its encoder, which is "
                f"given {key_states.shape[-2]}: load it for these"
            )
        pair = self._fitting(key_states, value_states)
        if self._distances is not None:
            words = f"for the encoder's tokens, unless it is given others, layer {self._index}"
            self._distances[words] = distance_of_all((key_states, value_states), pair)
        self._begin_with(pair, key_states, value_states)
        return self.keys, self.values

    def _begin_with(
        self, pair: Sequence[torch.Tensor], key_states: torch.Tensor, value_states: torch.Tensor
    ) -> None:
        """Hold keys and values to which the first states that are fed belong, unless a layer was
        found to be of other weights."""
        if self._last:
            try:
                judge(self._distances, key_states.dtype)
            except OtherWeights as error:
                error.layer, error.source = self, self._source  # for `watch`
                raise
        super().lazy_initialization(key_states, value_states)  # devices and dtype
        self.keys, self.values = pair
        self._fresh, self._witness, self._source = False, None, None

    def _fitting(self, key_states: torch.Tensor, value_states: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values for as many rows as are fed, if what is fed goes on from them."""
        if key_states.dtype != self.dtype:
            raise UnsupportedError(
                f"the file holds {self.dtype}, the model computes {key_states.dtype}: "
                f"load the model with dtype={self.dtype}"
            )
        pair = []
        for mine, new in ((self.keys, key_states), (self.values, value_states)):
            if mine.shape[1::2] != new.shape[1::2] or new.shape[0] % mine.shape[0]:
                raise KVZipError(
                    f"layer {self._index} holds [batch, heads, tokens, dim] = {list(mine.shape)}, "
                    f"the model feeds {list(new.shape)}"
                )
            pair.append(_repeated(mine, new))
        if self._witness is not None:
            states = key_states, value_states
            witness = [_repeated(*each) for each in zip(self._witness, states, strict=True)]
            if self._leads and not same_key(key_states[:, :, :1], witness[0]):
                raise not_continued(self.get_seq_length())
            if self._distances is not None:
                words = f"for the token at position {self.get_seq_length()} layer {self._index}"
                self._distances[words] = distance(states, witness)
        return pair

    @property
    def restartable(self) -> bool:
        """Whether the rows are the document's, or each of them as often as any other."""
        return not self._rearranged

    def trust(self) -> None:
        """Do not tell other weights by what the model computes next."""
        self._distances = None

    def limit(self, tokens: int | None) -> None:
        """Refuse a first call after which there are so many tokens, or more."""
        self._limit = tokens

    def settle(self) -> None:
        """Be used: what was fed goes on from here."""
        if not self._has_tokens:
            self._fresh, self._source = False, None

    def rewind(self) -> None:
        """Be as new: what was fed was not what goes on from here."""
        if self._fresh:
            self._loader = self._source

    def restart(self, source: AnyLoader, taken: Taken) -> None:
        """Be as new, with other tensors than were loaded."""
        self._loader, self._source, self._fresh = None, source, True
        if self._distances is not None:
            self._distances.clear()
        announce(self, shapes_of(taken), self._length)
        # States and an indexer's keys are used before what is fed tells how many rows there are.
        parts = {
            name: part.repeat_interleave(self._times, dim=0) for name, part in taken.parts.items()
        }
        assign(self, parts)
        self._witness = taken.witness
        self._remove_again()
        self.dtype = source.dtype

    def _remove_again(self) -> None:
        """Of what came in place of the document, take away what was taken away from that."""
        removed, self._removed = self._removed, 0
        if removed:
            self.crop(-removed)

    def reset(self) -> None:
        self._loader = self._source = self._witness = self._prompt_length = None
        self._fresh = self._rotated = False
        self._unfed, self._peers = 0, ()
        super().reset()

    # Before the first update, the witness goes the way of the keys.

    def crop(self, tokens_to_remove: int) -> None:
        before = self.keys, self.values
        super().crop(tokens_to_remove)
        self._removed -= tokens_to_remove if self._fresh else 0
        if self._witness is not None and tokens_to_remove:
            self._witness = tuple(each[:, :, tokens_to_remove:][:, :, :1] for each in before)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._decoded()
        super().reorder_cache(beam_idx)
        self._rearranged = self._fresh
        if self._witness is not None:
            self._witness = tuple(w.index_select(0, beam_idx.to(w.device)) for w in self._witness)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._decoded()
        if self._has_tokens:
            super().batch_repeat_interleave(repeats)
        self._change_states(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        self._times *= repeats
        if self._witness is not None:
            self._witness = tuple(w.repeat_interleave(repeats, dim=0) for w in self._witness)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._decoded()
        if self._has_tokens:
            super().batch_select_indices(indices)
        self._change_states(lambda tensor: tensor[indices, ...])
        self._rearranged = self._fresh
        if self._witness is not None:
            self._witness = tuple(w[indices, ...] for w in self._witness)

    @property
    def _has_tokens(self) -> bool:
        return "keys" in vars(self)

    def _change_states(self, change: Any) -> None:
        """Change the rows of all states, which transformers leaves to itself where beams are."""
        for name in LAZY:
            found = vars(self).get(name)
            if isinstance(found, dict):
                for key, tensor in found.items():
                    found[key] = None if tensor is None else change(tensor)


class _Attribute:
    """An attribute of a lazy layer that is decoded when it is first looked at."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, layer: LazyLayer | None, owner: type) -> Any:
        if layer is None:
            return self
        layer._decoded()
        try:
            return vars(layer)[self._name]
        except KeyError:
            raise AttributeError(self._name) from None

    def __set__(self, layer: LazyLayer, value: Any) -> None:
        layer.__dict__[self._name] = value


@cache
def _lazy_class(base: Any, names: tuple[str, ...]) -> Any:
    attributes: dict[str, Any] = {name: _Attribute(name) for name in names}
    # Without a type of its own it does not become what transformers makes for every cache.
    attributes |= {"base": base, "lazily": names, "_layer_type": None}
    bases: tuple[type, ...] = (LazyLayer, base)
    return type(f"Lazy{base.__name__}", bases, attributes)


def _empty(base: Any, names: tuple[str, ...]) -> LazyLayer:
    """A lazy layer made of that class of transformers, without anything in it."""
    cls = _lazy_class(base, names)
    found: LazyLayer = cls.__new__(cls)
    return found


def lazy(layer: Any, loader: AnyLoader, index: int, length: int) -> LazyLayer:
    """A layer like an empty one of transformers that takes what it holds from a loader."""
    found = _empty(type(layer), tuple(name for name in LAZY if name in vars(layer)))
    found.__dict__.update(vars(layer))
    found.begin(loader, index, length)
    return found


def _repeated(mine: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`mine` where `new` is, with every row repeated to its batch."""
    times = new.shape[0] // mine.shape[0]
    mine = mine.to(new.device)
    return mine if times == 1 else mine.repeat_interleave(times, dim=0)
