"""Weights that change between `load_or_prefill` and the first call, too little for a witness."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvzip  # noqa: E402
from kvzip.errors import KVZipError  # noqa: E402
from kvzip.load.batch import load_batch_or_prefill  # noqa: E402
from kvzip.load.hf import cache_argument, load_or_prefill  # noqa: E402
from kvzip.store import Store  # noqa: E402

IDS = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(1))
PROMPT = torch.cat([IDS, IDS[:, :9]], 1)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture
def store(model: Any, tmp_path: Path) -> Store:
    store, cache = Store(tmp_path, block_tokens=8), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, **cache_argument(cache))
    store.put(kvzip.Snapshot.from_cache(cache, IDS, model), codec="raw")
    return store


def generate(model: Any, prompt: Any, cache: Any = None) -> Any:
    given = {} if cache is None else cache_argument(cache)
    return model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, **given)


def changed(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1.01)


def loaded(store: Store, model: Any, **options: Any) -> Any:
    cache = load_or_prefill(store, model, PROMPT, **options)
    assert cache.get_seq_length() == 39
    return cache


def warnings_of(caplog: Any) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "kvzip.load"]


@pytest.mark.parametrize("whose", ["its own", "a copy's"])
def test_generate_computes_anew(model: Any, store: Store, whose: str, caplog: Any) -> None:
    cache = loaded(store, model)
    user = model if whose == "its own" else copy.deepcopy(model)
    changed(user)
    assert torch.equal(generate(user, PROMPT, cache), generate(user, PROMPT))
    [told] = warnings_of(caplog)
    assert "other weights" in told


def test_a_call_by_hand_raises(model: Any, store: Store) -> None:
    cache = loaded(store, model)
    changed(model)
    with pytest.raises(KVZipError, match="other weights"):
        model(PROMPT[:, 39:], **cache_argument(cache))


def test_a_batch(model: Any, store: Store, caplog: Any) -> None:
    prompts = [PROMPT[0], PROMPT[0, :45]]
    given = load_batch_or_prefill(store, model, prompts)
    changed(model)
    whole = load_batch_or_prefill([None, None], model, prompts)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, **options), model.generate(**whole, **options))
    assert "other weights" in " ".join(warnings_of(caplog))


def test_no_false_alarm(model: Any, store: Store, caplog: Any) -> None:
    """For an equal model, and for hooks that look on."""
    fed: list[int] = []
    for user in (model, copy.deepcopy(model)):
        cache = loaded(store, model)
        hook = user.model.layers[1].register_forward_hook(lambda *given: fed.append(1))
        assert torch.equal(generate(user, PROMPT, cache), generate(user, PROMPT))
        hook.remove()
    assert fed and not warnings_of(caplog)


def test_who_vouches_by_a_revision_is_believed(model: Any, store: Store, caplog: Any) -> None:
    cache = loaded(store, model, revision=kvzip.fingerprint(model))
    changed(model)
    generate(model, PROMPT, cache)
    assert not warnings_of(caplog)
