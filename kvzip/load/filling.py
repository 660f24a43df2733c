"""A model's cache of a document, with all that a snapshot keeps of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import EncoderDecoderCache

from kvzip.errors import KVZipError, UnsupportedError, UsageError, first_line
from kvzip.load.config import LayerKind, fed, plain_cache
from kvzip.load.held import TOKEN_PARTS, Held, class_name
from kvzip.load.snapshots import held_by, with_encoder_ids

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache


def filled(
    model: PreTrainedModel,
    kinds: Sequence[LayerKind],
    ids: torch.Tensor,
    given: Mapping[str, torch.Tensor],
    full_history: bool,
) -> list[Held]:
    """What a model's layers hold of a document, `ids`, [batch, tokens]; `given`: what its encoder
    gets, if it has one.

    Sliding layers hold their window, or with `full_history` all; a layer that has both states and
    a window, the window. States are those before the last token, so that this one is left to
    compute, and keys and values are there to compare with. Where only states are kept there is
    nothing of the last token.
    """
    cache = plain_cache(model.config)
    with torch.inference_mode(), _computing(model.config, ids.shape[1]):
        if not any(kind.states for kind in kinds):
            cache.activate_past_recording()
            _feed(model, cache, ids, 0, given)
            return _held(model, cache, kinds, given.get("input_ids"))
        if ids.shape[1] < 2:
            raise UsageError("a document of a model that keeps states needs at least 2 tokens")
        if full_history:
            for layer in cache.layers:
                if class_name(layer) == "DynamicSlidingWindowLayer":
                    layer.activate_past_recording()
        _feed(model, cache, ids[:, :-1], 0, given)
        before = [one.copied() for one in _held(model, cache, kinds, given.get("input_ids"))]
        if not any(kind.counts for kind in kinds):
            return before
        _feed(model, cache, ids[:, -1:], ids.shape[1] - 1, given)
        return list(map(_joined, before, _held(model, cache, kinds, given.get("input_ids"))))


def _feed(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    first: int,
    given: Mapping[str, torch.Tensor],
) -> None:
    takes = inspect.signature(model.forward).parameters
    few = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    model(**given, **fed(model, cache, ids, first), **few)


def _held(
    model: PreTrainedModel,
    cache: Cache,
    kinds: Sequence[LayerKind],
    source: torch.Tensor | None,
) -> list[Held]:
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not any(
        getattr(layer, "keys", None) is not None or kinds[i].states
        for i, layer in enumerate(own.layers)
    ):
        raise UnsupportedError(
            f"{type(model).__name__} has put nothing into a cache: it is no decoder, and has none"
        )
    found = held_by(cache, kinds)
    if source is not None:
        found = with_encoder_ids(found, source)
    if len(found) != len(kinds):
        raise KVZipError(f"the model filled {len(found)} cache layers, not {len(kinds)}")
    return found


def _joined(before: Held, after: Held) -> Held:
    """A layer's states before a token, and what it has of tokens after it; where a window slides,
    one token more than the layer itself keeps."""
    pieces = {}
    for name, piece in before.pieces.items():
        if name in TOKEN_PARTS:
            new = after.pieces[name].tensor
            if before.window is not None:
                new = torch.cat([piece.tensor, new[..., -1:, :]], dim=-2)
            piece = piece._replace(tensor=new)
        pieces[name] = piece
    return after._replace(pieces=pieces)


@contextmanager
def _computing(config: PretrainedConfig, tokens: int) -> Iterator[None]:
    """What a model fails with is told: more often than not the document is too long for it."""
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    try:
        yield
    except KVZipError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        words = f"the model cannot compute {tokens} tokens"
        if most is not None and tokens > most:
            words += f", which are more than its {most} positions"
        elif "out of memory" in str(error) or "allocate" in str(error):
            words += ": there is not enough memory"
        raise KVZipError(f"{words}: {first_line(error)}") from error
