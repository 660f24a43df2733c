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


_FP8 = {"fp8": "fp8_e4m3fn", "fp8_e4m3": "fp8_e4m3fn", "fp8_e5m2": "fp8_e5m2"}


def fp8_format(cache_dtype: str) -> str | None:
    """Our name of the numbers of a cache of vLLM's `cache_dtype`, where these are fp8 with a scale
    for each layer and no others; None of any other, and where it is not known which fp8 it is."""
    found = _FP8.get(cache_dtype)
    if found is None or not _fnuz():
        return found
    return "fp8_e4m3fnuz" if found == "fp8_e4m3fn" else None


def _fnuz() -> bool:
    """Whether vLLM runs on GPUs of another fp8, "fnuz", which has the same names (AMD's MI300)."""
    try:
        from vllm.platforms import current_platform
    except ImportError:  # where vLLM is not installed, rows of its pool may still be read
        return False
    return bool(current_platform.is_fp8_fnuz())
