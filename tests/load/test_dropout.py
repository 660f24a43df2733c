"""A model that computes other keys each time gives no cache that anybody could go on from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvzip  # noqa: E402
from kvzip.capture import prefill  # noqa: E402
from kvzip.load.hf import cache_argument, load_or_prefill  # noqa: E402
from kvzip.models.models import LoadedModel  # noqa: E402
from kvzip.store import Store  # noqa: E402

IDS = torch.arange(3, 33)[None]
_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(rate: float) -> Any:
    """A rate that attention reads."""
    return transformers.LlamaConfig(intermediate_size=48, attention_dropout=rate, **_SIZES)


def gpt2(rate: float) -> Any:
    """A module for dropout."""
    return transformers.GPT2Config(attn_pdrop=0.0, resid_pdrop=rate, embd_pdrop=0.0, **_SIZES)


def opt(rate: float) -> Any:
    """Whole layers that are left out."""
    return transformers.OPTConfig(ffn_dim=48, dropout=0.0, layerdrop=rate, **_SIZES)


def made(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def cache_of(model: Any) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, **cache_argument(cache))
    return cache


@pytest.mark.parametrize("config", [llama, gpt2, opt])
def test_only_what_draws_lots_is_refused(config: Any, tmp_path: Path, caplog: Any) -> None:
    store, model = Store(tmp_path, block_tokens=8), made(config(0.1)).eval()
    store.put(kvzip.Snapshot.from_cache(cache_of(model), IDS, model), codec="raw")
    prompt = torch.cat([IDS, IDS[:, :5]], 1)
    assert load_or_prefill(store, model, prompt).get_seq_length() > 0

    model.train()
    with pytest.raises(kvzip.UnsupportedError, match=r"drop.* is 0\.1|\.p is 0\.1"):
        kvzip.Snapshot.from_cache(cache_of(model.eval()), IDS, model.train())
    with pytest.raises(kvzip.UnsupportedError, match=r"model\.eval\(\)"):
        prefill(LoadedModel(model, None, "m", ""), np.asarray(IDS[0]))
    with caplog.at_level(logging.WARNING, "kvzip.load"):
        assert load_or_prefill(store, model, prompt).get_seq_length() == 0
    [told] = [r.getMessage() for r in caplog.records if r.name == "kvzip.load"]
    assert "training mode" in told

    same = made(config(0.0)).train()
    kvzip.Snapshot.from_cache(cache_of(same), IDS, same)
    prefill(LoadedModel(same, None, "m", ""), np.asarray(IDS[0]))


def test_one_part_in_training_is_enough() -> None:
    model = made(gpt2(0.1)).eval()
    model.transformer.h[1].mlp.train()
    with pytest.raises(kvzip.UnsupportedError, match=r"h\.1\.mlp\.dropout\.p"):
        kvzip.Snapshot.from_cache(cache_of(model), IDS, model)
