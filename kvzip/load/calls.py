"""What a call of a model is given beside token ids, where keys and values depend on it.

A loaded cache holds what the model computes of ids alone: tokens that see all before them, but for
the padding of a batch, at positions that are counted from 0, with the adapters that were active
when it was loaded. The first call that goes on from it must not have meant anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvzip.errors import KVZipError, UnsupportedError
from kvzip.identity import fingerprint
from kvzip.identity.code import autocasts
from kvzip.identity.live import weights_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvzip.load.matching import Ids
    from kvzip.load.reuse import HeldCache

_BY_IDS = frozenset(
    {
        *("inputs", "input_ids", "decoder_input_ids", "encoder_outputs"),
        *("attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids"),
        *("negative_prompt_ids", "negative_prompt_attention_mask", "labels", "logits_to_keep"),
    }
)
"""What `generate` takes that says nothing of a prompt's tokens but their ids, masks and positions,
which are compared, as what an encoder gave is."""
_TEXT_IS_ZERO = {
    "mm_token_type_ids": "",
    "moe_mm_token_type_ids": "",
    "token_type_ids": "gemma",
}
"""Kinds of tokens of which 0 stands for text, as if they were not given, and the families that take
them so. (In GPT-2 0 has an embedding of its own, in PaliGemma it stands for a prefix.)"""


def innermost(model: Any) -> Any:
    """The model of transformers in what PEFT made of it."""
    while callable(getattr(model, "get_base_model", None)):
        model = model.get_base_model()
    return model


def check_call(model: torch.nn.Module, cache: HeldCache, given: Mapping[str, Any]) -> None:
    """Raise KVZipError if a call with these arguments, the first to go on from a loaded cache,
    would not have computed the cache's tokens as the cache has them. Where a `generate` makes the
    call, it has been asked for the model and what its encoder is given."""
    held = int(cache.get_seq_length())
    if not held:
        return
    decoder = prefix_of(model)
    if not cache.generating:
        _check_model(model, cache)
        if decoder:
            check_encoder(model, cache, given)
    ids = given.get(f"{decoder}input_ids")
    if ids is not None:
        cache.check_fed(ids.shape[-1])
    mask, positions = given.get(f"{decoder}attention_mask"), given.get(f"{decoder}position_ids")
    _check_mask(mask, held, cache)
    if isinstance(positions, torch.Tensor) and not _hidden_last(mask, held):
        _check_positions(positions[..., :1], held, held, cache.padding)


def check_generate(
    model: Any, cache: HeldCache, mask: torch.Tensor | None, given: Mapping[str, Any]
) -> None:
    """The same of what `generate` is given, for a whole prompt; `mask`: that it uses for that."""
    held = int(cache.get_seq_length())
    if not held:
        return
    check_no_virtual_tokens(model)
    _check_model(model, cache)
    for name in other_inputs(model, given):
        raise KVZipError(
            f"`generate` is given {name}=, on which keys and values may depend, and the loaded "
            "cache was computed of token ids alone: leave it out, or the cache"
        )
    decoder = prefix_of(model)
    if decoder:
        check_encoder(model, cache, given)
    _check_mask(mask, held, cache)
    positions = given.get(f"{decoder}position_ids")
    if isinstance(positions, torch.Tensor) and positions.shape[-1] > held:
        _check_positions(positions[..., : held + 1], 0, held, cache.padding)


def prefix_of(model: Any) -> str:
    """What stands before the names of a decoder's own arguments, where an encoder has some, too."""
    config = getattr(model, "config", None)
    return "decoder_" if getattr(config, "is_encoder_decoder", False) else ""


def state_of(model: Any) -> str | None:
    """What tells whether a model's weights have changed, or what torch casts them to by itself;
    None where they are not in memory. Hooks that were put on since say nothing, but for those by
    which a call chooses adapters."""
    inner = innermost(model)
    if not isinstance(inner, torch.nn.Module):
        return None
    if adapters_of(inner):
        return fingerprint(inner)
    try:
        return weights_of(inner) + autocast_of(inner)
    except KVZipError:
        return None


def autocast_of(model: Any) -> str:
    """What torch casts to by itself in a model's calls, in the code under way; "" for nothing."""
    inner = innermost(model)
    return ", ".join(autocasts(inner)) if isinstance(inner, torch.nn.Module) else ""


def _check_model(model: torch.nn.Module, cache: HeldCache) -> None:
    """Raise KVZipError if a model is no longer the one that a cache was loaded for."""
    if cache.made_by is not None and state_of(model) != cache.made_by:
        raise KVZipError(
            "the model computes with other adapters, or other weights, than when the cache was "
            "loaded for it (adapter_names=, set_adapter, autocast, ...): load it after such a "
            "change; for calls with adapter_names= give an empty cache, or load_or_prefill a "
            "revision= that stands for them"
        )


def other_inputs(model: Any, given: Mapping[str, Any]) -> Iterator[str]:
    """The arguments of a `generate` that are, or hold, tensors and may tell more of a prompt than
    its ids."""
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    for name, value in given.items():
        if name in _BY_IDS or not _has_tensors(value):
            continue
        if hasattr(getattr(model, "generation_config", None), name):
            continue
        as_text = _TEXT_IS_ZERO.get(name)
        if as_text is not None and family.startswith(as_text) and not value.any():
            continue
        yield name


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor)


def _counted(first: int, count: int, padding: Sequence[int] | None, rows: int) -> torch.Tensor:
    """The positions of `count` columns from `first` on in each row, [rows, count], as they are
    counted after its padding, where they are negative."""
    pads = torch.tensor(padding or [0])
    pads = pads.repeat_interleave(max(1, rows // len(pads)))[:, None]
    return first - pads + torch.arange(count)


def _check_positions(
    positions: torch.Tensor, first: int, held: int, padding: Sequence[int] | None
) -> None:
    """Raise KVZipError unless positions, [..., rows, n], of the columns from `first` on, are those
    that are counted. Padding may have any."""
    positions = torch.atleast_2d(positions).cpu()
    wanted = _counted(first, positions.shape[-1], padding, positions.shape[-2])
    if ((positions != wanted) & (wanted >= 0)).any():
        raise KVZipError(
            f"the prompt does not continue the cached document at position {held}: the model is "
            "given other positions than those of the cache's tokens, which are counted from 0. "
            "Either it is shorter than the cache, or its suffix came without a full-length "
            "attention mask, or position_ids= says so"
        )


def _check_mask(mask: Any, held: int, cache: HeldCache) -> None:
    """Raise KVZipError unless a call's mask shows all of a cache's tokens, but for its padding.

    What is hidden at their end alone changes nothing of those before. But the next token may be
    compared with the document's, and so a cache that can be computed is, there, too.
    """
    padding = cache.padding
    if mask is None and not any(padding or ()):
        return
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise KVZipError(
            "the cache goes on with a mask of [batch, tokens], in which 0 is padding: others may "
            "hide tokens from one another that see each other in the cache"
        )
    mask = mask[:, : held + 1 if cache.recovers else held].cpu() != 0
    wrong = mask != (_counted(0, mask.shape[1], padding, mask.shape[0]) >= 0)
    if not cache.recovers:
        wrong &= mask.flip(1).cumsum(1).flip(1) > 0
    if wrong.any():
        columns = wrong.any(dim=0)
        raise KVZipError(
            f"the attention mask hides {int(columns.sum())} of the {held} tokens that the cache "
            f"holds (or shows its padding), first at position {int(columns.int().argmax())}, and "
            "the others were computed with all of them in sight: mask nothing of the document "
            "(transformers masks pad_token_id by itself, if the prompt has that id), or leave out "
            "the cache"
        )


def _hidden_last(mask: torch.Tensor | None, held: int) -> bool:
    """Whether a cache's last token is hidden in a row, so that the next has a position before."""
    return mask is not None and not bool(mask[:, held - 1 : held].all())


# --- an encoder's tokens -------------------------------------------------------------------------


def check_encoder(model: Any, cache: HeldCache, given: Mapping[str, Any]) -> None:
    """Raise KVZipError unless an encoder is given, by these arguments, the ids that it was given
    for a cache, all in sight, as far as that is known; or has made of them what is given."""
    if cache.encoder_ids is None:
        return
    tokens, mask = cache.encoder_ids.shape[1], given.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.all()):
        raise KVZipError(
            f"the attention mask hides some of the encoder's tokens, and the cache was computed "
            f"with all {tokens} of them in sight: mask none of them, or leave out the cache"
        )
    outputs, ids = given.get("encoder_outputs"), given.get("input_ids")
    if outputs is not None:
        if not _is_made_of(model, cache.encoder_ids, outputs):
            raise KVZipError(
                "encoder_outputs= is not, bit for bit, what the model's encoder makes of the "
                f"{tokens} tokens (encoder_ids=) that it was given for the cache: leave it out and "
                "give those, or leave out the cache"
            )
    elif ids is None or not _same_rows(cache.encoder_ids, ids.detach().cpu().numpy()):
        raise KVZipError(
            "the encoder is given other tokens than for the loaded cache (encoder_ids=), in which "
            "keys and values depend on them: load it for these"
        )


def _same_rows(held: Ids, given: Ids) -> bool:
    """Whether `given`, [batch, n], is `held` with each row as often as any other."""
    rows, more = divmod(len(given), len(held))
    return not more and np.array_equal(np.repeat(held, rows, axis=0), given)


def _is_made_of(model: Any, ids: Ids, outputs: Any) -> bool:
    """Whether an encoder's outputs are what it makes of these ids, [batch, n], of each row once or
    of as many as there are outputs."""
    try:
        found = outputs[0]
        rows, more = divmod(len(found), len(ids))
    except (TypeError, LookupError):
        return False
    if more or not isinstance(found, torch.Tensor):
        return False
    for before in dict.fromkeys((1, rows)):
        source = torch.from_numpy(np.repeat(ids, before, axis=0).astype(np.int64))
        with torch.no_grad():
            own = model.get_encoder()(input_ids=source.to(model.device), return_dict=True)[0]
        if torch.equal(own.repeat_interleave(rows // before, dim=0), found.to(own.device)):
            return True
    return False


# --- adapters ------------------------------------------------------------------------------------


def adapters_of(model: torch.nn.Module) -> set[str]:
    """The names of the adapters of PEFT that a model carries."""
    return {name for layer in _tuned(model) for name in _adapters_in(layer)}


def check_no_virtual_tokens(model: Any) -> None:
    """Raise UnsupportedError for a model of PEFT that computes tokens of its own before a prompt's
    (prompt tuning, P-tuning, prefix tuning), or one by which such a model generates."""
    made = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)
    for each in (model, made):
        found: Any = getattr(each, "active_peft_config", None)
        if getattr(found, "is_prompt_learning", False):
            raise UnsupportedError(
                f"the {type(each).__name__} computes {found.num_virtual_tokens} tokens of its own "
                f"before a prompt's ({type(found).__name__.removesuffix('Config')} of PEFT), and a "
                "cache that is kept or loaded holds a prompt's alone"
            )


def chooses_adapters(model: torch.nn.Module) -> bool:
    """Whether the call that is under way says which adapters are used, and where."""
    return any(layer._forward_pre_hooks for layer in _tuned(model))


def _tuned(model: torch.nn.Module) -> list[Any]:
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None or not isinstance(model, torch.nn.Module):
        return []
    return [module for module in model.modules() if isinstance(module, peft.BaseTunerLayer)]


def _adapters_in(layer: Any) -> set[str]:
    held = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return {key for each in held if each is not None for key in each}
