from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 16},
    "Gemma3Text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 1
                   + ["sliding_attention"]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(kind, dtype, tied)`: the folder of a random model of that kind."""

    def save(kind: str = "Llama", dtype: str = "bfloat16", seed: int = 0, **more: Any) -> Path:
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **KINDS[kind]})
        # Not .to(dtype): that would bring what RoPE turns by to it, too.
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        folder = tmp_path / f"{kind}-{dtype}-{seed}"
        model.save_pretrained(folder, **more)
        return folder

    return save


@pytest.fixture
def load() -> Callable[..., Any]:
    """`load(folder, dtype)`: the model as transformers loads it."""

    def load_(folder: Path, dtype: str = "bfloat16", **more: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), **more
        ).eval()

    return load_
