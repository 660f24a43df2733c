"""Layers of unequal shape, and keys of other dimensions than values: Gemma 4, DeepSeek V3."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support import damaged, warnings_of  # noqa: E402

import kvzip  # noqa: E402
from kvzip.load.hf import layer_kinds, load_batch, load_cache, load_or_prefill  # noqa: E402


@pytest.fixture(params=["gemma4", "deepseek_v3"])
def case(request: pytest.FixtureRequest, tiny: Any, dtype: str) -> Any:
    return tiny(request.param, dtype)


def test_their_shapes(tiny: Any) -> None:
    """What the other tests rest on."""
    shapes = {(layer.k.shape, layer.v.shape) for layer in tiny("gemma4").snapshot.layers}
    assert shapes == {((2, 16, 16),) * 2, ((1, 50, 32),) * 2}
    shapes = {
        tuple((name, bits.shape) for name, bits in layer.parts.items())
        for layer in tiny("deepseek_v3").snapshot.layers
    }
    assert shapes == {(("latent", (1, 50, 16)), ("k_rope", (1, 50, 8)))}


def test_it_goes_on_as_from_the_cache_in_memory(case: Any) -> None:
    for codec in ("raw", "planes", "channel"):
        blob = kvzip.encode(case.snapshot, codec, block_tokens=8, threads=1)
        cache = load_cache(blob, case.config, prompt=case.longer())
        assert cache.get_seq_length() == 50
        assert case.same(case.longer(), cache, copy.deepcopy(case.cache))


@pytest.mark.parametrize("shared", [1, 7, 30, 48])
def test_a_shared_prefix(case: Any, shared: int) -> None:
    history = kvzip.Snapshot.from_cache(copy.deepcopy(case.history), case.ids, case.model)
    ids = case.longer()
    ids[0, shared] = (ids[0, shared] - 2) % 61 + 3
    ids = ids[:, : shared + 5]
    cache = load_cache(kvzip.encode(history, codec="planes", threads=1), case.config, prompt=ids)
    assert cache.get_seq_length() == shared
    assert case.same(ids, cache, case.kept(shared))


def test_beams(case: Any) -> None:
    ids = case.longer()
    repeated = copy.deepcopy(case.cache)
    repeated.batch_repeat_interleave(3)
    expected, _ = case.generate(ids, repeated, num_beams=3)
    cache = load_cache(case.blob, case.config, prompt=ids)
    assert torch.equal(case.generate(ids, cache, num_beams=3)[0], expected)


def test_a_batch_of_two_documents(case: Any) -> None:
    prompts = [case.longer()[0], case.longer(seed=7)[0, :55]]
    history = kvzip.Snapshot.from_cache(copy.deepcopy(case.history), case.ids, case.model)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    right = case.model.generate(**load_batch([None] * 2, case.config, prompts), **options)
    found = load_batch([history] * 2, case.config, prompts)
    assert torch.equal(case.model.generate(**found, **options), right)


@pytest.mark.parametrize(("layer", "number"), [(0, 0), (2, 1)])
def test_damage_is_computed(case: Any, layer: int, number: int, caplog: Any) -> None:
    right, _ = case.generate(case.longer(), None)
    part = list(case.snapshot.layers[layer].parts)[number]
    cache = load_or_prefill(damaged(case.blob, layer, part), case.model, case.longer())
    assert torch.equal(case.generate(case.longer(), cache)[0], right)
    assert len(warnings_of(caplog)) == 1


def test_a_prompt_that_is_too_short(case: Any) -> None:
    """No latent tells its position, so the prompt must be given."""
    if layer_kinds(case.config)[0].rope is None:
        with pytest.raises(kvzip.KVZipError, match="pass prompt="):
            load_cache(case.blob, case.config)
        return
    for length in (1, 20, 49):
        with pytest.raises(kvzip.KVZipError, match="does not continue"):
            case.generate(case.ids[:, :length], load_cache(case.blob, case.config))
