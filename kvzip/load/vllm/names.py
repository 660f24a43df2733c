"""What vLLM's names of layers and of formats mean."""

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


FP8 = {"fp8": "fp8_e4m3fn", "fp8_e4m3": "fp8_e4m3fn", "fp8_e5m2": "fp8_e5m2"}
"""vLLM's names of caches whose numbers have a scale for each layer and no others, and ours."""
