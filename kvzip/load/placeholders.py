"""Prompts whose keys and values depend on more than their token ids: those with images or sound.

Where such a prompt has an image it has placeholders, the same ids for any image of its size. A
cache is known by its ids, so one image's cache would be used for another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvzip.errors import UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PretrainedConfig

_MEDIA = "image|video|audio|vision|speech|vit"
_PART = re.compile(rf"(.*_)?({_MEDIA})(_.*)?_config|img_processor")
_TOKEN = re.compile(rf"(.*_)?({_MEDIA})(_.*)?_token_(id|index)")


def check_text_only(config: PretrainedConfig, token_ids: NDArray[Any] | None, owner: str) -> None:
    """Raise UnsupportedError if `token_ids` hold what stands for an image, a video or sound.

    `owner` is the model's class, for the message. Models of text alone take any ids. A model that
    has a part for images or sound, and a config that does not say which ids stand for them, is
    refused with any.
    """
    if token_ids is None:
        return
    if not config.sub_configs and config.get_text_config(decoder=True) is config:
        return
    described = config.to_dict()
    names = list(_names(described))
    if not any(_PART.fullmatch(name) for name, _ in names):
        return
    tokens = {
        value: name
        for name, value in names
        if _TOKEN.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool)
    }
    if not tokens:
        raise UnsupportedError(
            f"{owner} takes images or sound, and its config does not say which token ids stand for "
            "them: its caches cannot be known by their token ids"
        )
    held = np.isin(list(tokens), token_ids)
    if held.any():
        token, name = list(tokens.items())[int(held.argmax())]
        raise UnsupportedError(
            f"{owner} takes images or sound, and the token ids hold {token} ({name}), which stands "
            "for any: keys and values depend on more than token ids there, and are not kept. "
            "Prompts of text alone are"
        )


def _names(described: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """All names in a config and in its parts, with their values."""
    for name, value in described.items():
        yield str(name), value  # some are numbers
        if isinstance(value, Mapping):
            yield from _names(value)
