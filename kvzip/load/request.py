"""What a `generate` is given to go on from a loaded cache: which ids, and what it makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from kvzip.errors import KVZipError
from kvzip.load.calls import prefix_of


def _setting(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """What a `generate` with these arguments takes for a setting: its own argument, or what its
    `generation_config` says, or the model's."""
    configs = kwargs.get("generation_config"), getattr(model, "generation_config", None)
    told = kwargs.get(name), *(getattr(config, name, None) for config in configs)
    return next((each for each in told if each is not None), None)


def assisted(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a `generate` with these arguments has candidates tried (assisted generation)."""
    names = ("prompt_lookup_num_tokens", "assistant_early_exit")
    told = [_setting(model, kwargs, name) for name in names]
    if _setting(model, kwargs, "use_mtp"):  # the model's own layers for that
        return True
    return any(each is not None for each in (kwargs.get("assistant_model"), *told))


def use_cache(model: Any, kwargs: dict[str, Any]) -> None:
    """Have a `generate` that is given a cache use it, whatever the model's configuration says: it
    would feed all of the text behind it, for each token. Raises KVZipError if it is told not to."""
    told = kwargs.get("use_cache")
    if told is not None and not told:
        raise KVZipError(
            "`generate` was given a cache, and use_cache=False, with which it would feed the whole "
            "text behind that for each token: leave out one of the two"
        )
    if _setting(model, kwargs, "use_cache") is False:
        kwargs["use_cache"] = True


def _mask_of(model: Any, prompt: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The mask that a `generate` with these arguments uses: without one, transformers hides what
    has the padding's id."""
    mask: torch.Tensor | None = kwargs.get("attention_mask")
    if mask is not None or not isinstance(prompt, torch.Tensor) or prompt.is_floating_point():
        return mask
    pad, ends = (_setting(model, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or pad in ([] if ends is None else np.atleast_1d(ends).tolist()):
        return None
    return prompt != pad


def _with_start(model: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The ids and the mask that a decoder beside an encoder gets of a `generate` with these
    arguments: transformers puts the id that it starts with before those that do not."""
    ids, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    names = ("decoder_start_token_id", "bos_token_id")
    told = (_setting(model, kwargs, name) for name in names)
    start = next((each for each in told if each is not None), None)
    if start is None or not isinstance(ids, torch.Tensor) or ids.ndim != 2 or _starts_itself(model):
        return ids, mask
    first = torch.as_tensor(start, device=ids.device).reshape(-1, 1)
    if len(first) not in (1, len(ids)) or not (ids[:, :1] != first).all():
        return ids, mask
    if isinstance(mask, torch.Tensor):
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=-1)
    return torch.cat([first.expand(len(ids), 1), ids], dim=-1), mask


def _starts_itself(model: Any) -> bool:
    """Whether transformers leaves the first id of a decoder as it is given."""
    encoder = getattr(model.config, "encoder", None)
    words = f"{type(model).__name__} {getattr(encoder, 'model_type', '')}".lower()
    return "donut" in words or model.config.model_type == "whisper"


class Request(NamedTuple):
    """What a `generate` is given to go on from."""

    prompt: Any
    """The ids that its cache's tokens are of, [batch, tokens]."""
    mask: torch.Tensor | None
    used_mask: torch.Tensor | None
    """The mask that transformers uses for them; `mask` is what it is given."""
    whole: bool
    """Whether these are all ids of the prompt, and not its end alone."""
    given: dict[str, Any]
    """All arguments by name; `input_ids` are an encoder's, if there is one."""


def request_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request:
    """What a `generate` is given by these arguments; by position, that is the prompt alone."""
    prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    given = kwargs | {"input_ids": prompt}
    if prefix_of(model):
        prompt, mask = _with_start(model, kwargs)
        used, ids_alone = mask, True
    else:
        mask, used = kwargs.get("attention_mask"), _mask_of(model, prompt, kwargs)
        ids_alone = kwargs.get("inputs_embeds") is None
    # With a mask for more than there are ids, they are the prompt's end alone.
    fits = mask is None or getattr(mask, "shape", None) == getattr(prompt, "shape", ())
    whole = isinstance(prompt, torch.Tensor) and prompt.ndim == 2 and ids_alone and fits
    return Request(prompt, mask, used, whole, given)


def times(model: Any, kwargs: dict[str, Any]) -> int:
    """How many rows a `generate` with these arguments makes of each."""
    return max(_setting(model, kwargs, n) or 1 for n in ("num_beams", "num_return_sequences"))
