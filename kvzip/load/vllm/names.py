"""What vLLM's names of layers mean."""

from __future__ import annotations

import re

from kvzip.errors import UnsupportedError


def index_of(name: str, layers: int) -> int:
    """Which of the model's layers vLLM's name means: "model.layers.3.self_attn.attn" is 3."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if len(numbers) != 1 or int(numbers[0]) >= layers:
        raise UnsupportedError(
            f"vLLM keeps a cache {name}, which is none of the model's {layers} layers: draft "
            "models and several caches of a layer are not handled"
        )
    return int(numbers[0])
