"""A loaded cache of other weights shows at the first call, however deep they changed.

Everything here is loaded from a file, which no fingerprint guards.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support import warnings_of  # noqa: E402

import kvzip  # noqa: E402
from kvzip.load.hf import (  # noqa: E402
    cache_argument,
    load_batch_or_prefill,
    load_cache,
    load_or_prefill,
)
from kvzip.load.witness import OtherWeights  # noqa: E402


def generate(model: Any, ids: Any, cache: Any = None, **more: Any) -> Any:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    given = {} if cache is None else cache_argument(cache)
    return model.generate(ids, **{**options, **given, **more})


def after_the_last_values(name: str, layers: int) -> bool:
    """Whether no key or value depends on a parameter."""
    last = f"layers.{layers - 1}."
    early = ("k_proj", "v_proj", "k_norm", "input_layernorm")
    return (
        name.startswith(("lm_head", "model.norm"))
        or (last in name and not any(part in name for part in early))
    )  # fmt: skip


def noisy(model: Any, name: str, share: float) -> Any:
    """A copy of a model with noise on one parameter, of that share of its own size."""
    other = copy.deepcopy(model)
    weight = other.get_parameter(name)
    torch.manual_seed(3)
    with torch.no_grad():
        weight.add_(torch.randn_like(weight) * weight.float().pow(2).mean().sqrt() * share)
    return other


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.drawn(2)
def test_any_parameter_that_keys_or_values_depend_on(name: str, tiny: Any, caplog: Any) -> None:
    case = tiny(name)
    ids, layers = case.longer(), len(case.cache.layers)
    tied = case.config.tie_word_embeddings
    for parameter, _ in case.model.named_parameters():
        model = noisy(case.model, parameter, 0.5)
        cache = load_or_prefill(case.unpinned, model, ids)
        assert cache.get_seq_length() == 49
        assert torch.equal(generate(model, ids, cache), generate(model, ids)), parameter
        told = warnings_of(caplog)
        if after_the_last_values(parameter, layers) and not (tied and "lm_head" in parameter):
            assert told == [], parameter  # the cache is still what the model computes
        else:
            assert len(told) == 1, (parameter, told)
            with pytest.raises(kvzip.KVZipError, match=r"other weights|does not continue"):
                generate(model, case.ids, load_cache(case.blob, case.config, prompt=case.ids))
        assert "forward" not in vars(model)


def deep(case: Any) -> Any:
    """A model whose first layer is the document's, and whose third is not."""
    return noisy(case.model, "model.layers.2.self_attn.v_proj.weight", 0.5)


@pytest.mark.parametrize("weights", ["first layer", "deep"])
@pytest.mark.parametrize("rows", [1, 2])
def test_what_was_taken_away_before_the_first_call_stays_away(
    tiny: Any, caplog: Any, rows: int, weights: str
) -> None:
    """Also where the model computes the tokens instead."""
    case = tiny("llama")
    first = "model.layers.0.self_attn.k_proj.weight"
    model = deep(case) if weights == "deep" else noisy(case.model, first, 0.5)
    ids = case.longer()
    cache = load_or_prefill(case.unpinned, model, ids)
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    cache.crop(-1)
    cache.crop(-2)
    assert cache.get_seq_length() == 46
    found = generate(model, ids.repeat(rows, 1), cache)
    assert torch.equal(found, generate(model, ids).repeat(rows, 1))
    [told] = warnings_of(caplog)
    assert "other weights" in told or "does not continue" in told


def test_the_call_is_made_again_once(case: Any, caplog: Any) -> None:
    model, ids, calls = deep(case), case.longer(), []
    right = generate(model, ids)
    # Counted within the model, since its own hooks are outside of what is made again.
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: calls.append(args[0].shape[1])
    )
    cache = load_or_prefill(case.unpinned, model, ids)
    assert torch.equal(generate(model, ids, cache), right)
    # 10 tokens on what was loaded; its 49 tokens and the next one, computed; 10 tokens again.
    assert calls == [10, 49, 1, 10, 1, 1]
    [told] = warnings_of(caplog)
    assert "other weights" in told


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams(tiny: Any, options: Any, caplog: Any) -> None:
    case = tiny("llama")
    model, ids = deep(case), case.longer()
    cache = load_or_prefill(case.unpinned, model, ids)
    assert torch.equal(generate(model, ids, cache, **options), generate(model, ids, **options))
    assert len(warnings_of(caplog)) == 1


def test_a_batch_of_documents(tiny: Any, caplog: Any) -> None:
    case = tiny("llama")
    model = deep(case)
    prompts = [case.longer()[0], case.longer(seed=8)[0, :54]]
    batch = load_batch_or_prefill([case.unpinned, case.unpinned], model, prompts)
    found = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    plain = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    right = model.generate(**plain, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, right)
    assert len(warnings_of(caplog)) == 1


def test_models_are_left_as_they_were(tiny: Any) -> None:
    """Copied, stored or used otherwise while a cache waits; or the cache is never used."""
    case = tiny("llama")
    model, ids = deep(case), case.longer()
    before = kvzip.fingerprint(model)
    caches = [load_or_prefill(case.unpinned, model, ids) for _ in range(3)]
    assert kvzip.fingerprint(model) == before
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            made.lm_head.weight.zero_()
            assert not made(ids).logits.any() and model(ids).logits.any()
            assert "forward" not in vars(made)
    right = generate(model, ids)
    assert torch.equal(generate(model, ids, caches.pop()), right)
    assert "forward" in vars(model)
    del caches[:]
    assert torch.equal(generate(model, ids), right)
    assert "forward" not in vars(model)


def test_a_model_within_another_raises_rather_than_go_wrong(tiny: Any) -> None:
    case = tiny("llama")
    model, ids = deep(case), case.longer()
    cache = load_or_prefill(case.unpinned, model, ids)
    with pytest.raises(OtherWeights, match="layer"), torch.no_grad():
        model.model(ids[:, 49:], use_cache=True, **cache_argument(cache))


def loads_without_alarm(tiny: Any, caplog: Any, count: int) -> None:
    """Documents as one kernel computed them, in chunks or alone, in any batch, for another."""
    generator = torch.Generator().manual_seed(0)

    def pick(values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    for _ in range(count):
        case = tiny(pick(["llama", "qwen3", "gemma3", "mistral"]), pick(["bfloat16", "float32"]))
        model = copy.copy(case.model)
        tokens = torch.randint(3, 64, (pick([1, 2, 5]), 80), generator=generator)
        model.set_attn_implementation(pick(["eager", "sdpa"]))
        cache = transformers.DynamicCache(config=case.config)
        cache.activate_past_recording()
        at = 0
        with torch.no_grad():
            while at < 60:
                stop = min(60, at + pick([1, 7, 16, 60]))
                model(tokens[:, at:stop], **cache_argument(cache))
                at = stop
        row = pick(range(len(tokens)))
        cache.batch_select_indices(torch.tensor([row]))
        document = kvzip.Snapshot.from_cache(cache, tokens[row, :60], "m")
        model.set_attn_implementation(pick(["eager", "sdpa"]))
        ids = tokens[row : row + 1, : pick([61, 70, 80])].repeat(pick([1, 3]), 1)
        cache = load_or_prefill(document, model, ids, tokens=pick([None, 20, 57]))
        with torch.no_grad():
            model(ids[:, cache.get_seq_length() :], **cache_argument(cache))
        assert warnings_of(caplog) == []


def test_no_false_alarm(tiny: Any, caplog: Any) -> None:
    loads_without_alarm(tiny, caplog, 40)


@pytest.mark.long
def test_no_false_alarm_in_a_thousand_loads(tiny: Any, caplog: Any) -> None:
    loads_without_alarm(tiny, caplog, 1000)
