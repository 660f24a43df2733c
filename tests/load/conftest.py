"""Tiny random models, and what their caches hold after a document."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvzip  # noqa: E402
from kvzip.load.hf import cache_argument  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

VOCABULARY, DOCUMENT, WINDOW = 64, 50, 16
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that a wrong cache gives other tokens
}
_SLIDE, _FULL = "sliding_attention", "full_attention"
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": WINDOW, "layer_types": [_SLIDE, _SLIDE, _FULL, _SLIDE]},
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    # Full layers with other heads and another head dimension than the sliding ones.
    "gemma4": (
        "Gemma4TextConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": [_SLIDE, _SLIDE, _FULL, _FULL],
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    # Latents of 16 numbers, which are not rotated, in place of keys; a rotated key of 8 as value.
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 4,
            "moe_intermediate_size": 16,
        },
    ),
    "gpt2": ("GPT2Config", {"n_layer": 4, "n_embd": 48, "n_head": 4, "n_positions": 256}),
    "bloom": ("BloomConfig", {"n_layer": 4, "hidden_size": 48, "n_head": 4}),
}


def make_config(name: str, **changes: Any) -> Any:
    kind, extra = CONFIGS[name]
    if name in ("gpt2", "bloom"):
        extra = {"vocab_size": VOCABULARY, "initializer_range": 0.2, **extra}
    else:
        extra = {**_SIZES, **extra}
    return getattr(transformers, kind)(**{**extra, **changes})


def random_ids(batch: int, tokens: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)


@dataclass
class Case:
    """A model, a document, and its cache: as transformers left it, and with its whole history."""

    model: Any
    ids: Any
    cache: Any
    history: Any
    snapshot: kvzip.Snapshot
    """Sliding layers hold `window` tokens, as `kvzip capture` makes them."""

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def blob(self) -> bytes:
        return kvzip.encode(self.snapshot, codec="planes", block_tokens=8, threads=1)

    @property
    def unpinned(self) -> bytes:
        """The same of a document that does not say which weights it is of: the witness is left."""
        made = copy.copy(self.snapshot)
        made.origin = msgspec.structs.replace(made.origin, revision="")
        return kvzip.encode(made, codec="planes", block_tokens=8, threads=1)

    def kept(self, count: int) -> Any:
        """The uncompressed cache of the first `count` tokens, rolled back by transformers."""
        found = copy.deepcopy(self.history)
        found.crop(count - self.ids.shape[1])
        for layer in found.layers:
            layer.record_past = False
        return found

    def longer(self, tokens: int = 9, seed: int = 5) -> Any:
        return torch.cat([self.ids, random_ids(self.ids.shape[0], tokens, seed)], dim=1)

    def generate(self, ids: Any, past: Any, **options: Any) -> tuple[Any, Any]:
        """New greedy tokens [batch, steps] and logits [steps, batch, vocabulary]."""
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
        out = self.model.generate(
            ids,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **cache_argument(past),
            **options,
        )
        return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)

    def same(self, ids: Any, one: Any, other: Any, **options: Any) -> bool:
        """Whether two caches give the same tokens and bit-equal logits."""
        (t1, l1), (t2, l2) = (self.generate(ids, past, **options) for past in (one, other))
        return torch.equal(t1, t2) and torch.equal(l1, l2)


@cache
def make_case(name: str, dtype: str = "float32", batch: int = 1) -> Case:
    torch.manual_seed(0)
    config = make_config(name)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.to(getattr(torch, dtype)).eval()
    ids = random_ids(batch, DOCUMENT, 1)
    ids[:, 0] = ids[:, -1]  # the nastiest document: a wrong slice begins with the right token
    caches = []
    for record in (False, True):
        cache = transformers.DynamicCache(config=config)
        if record:
            cache.activate_past_recording()
        with torch.no_grad():
            model(ids, **cache_argument(cache))
        caches.append(cache)
    held = copy.deepcopy(caches[1])
    for layer in held.layers:
        if layer.is_sliding:
            layer.keys = layer.keys[:, :, -layer.sliding_window :]
            layer.values = layer.values[:, :, -layer.sliding_window :]
    return Case(model, ids, *caches, kvzip.Snapshot.from_cache(held, ids, model))


@pytest.fixture(params=["llama", "qwen3", "gemma3", "mistral"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(name: str, dtype: str) -> Case:
    return make_case(name, dtype)


@pytest.fixture
def tiny() -> Any:
    """`make_case(name, dtype, batch)`: a test cannot import this file."""
    return make_case


@pytest.fixture
def config_of() -> Any:
    """`make_config(name, **changes)`."""
    return make_config
