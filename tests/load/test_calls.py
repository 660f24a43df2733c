"""What a call is given beside ids: never other tokens than the model's own without an error."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support import tiny_model, warnings_of  # noqa: E402

import kvzip  # noqa: E402
from kvzip.capture import prefill  # noqa: E402
from kvzip.errors import KVZipError, UnsupportedError  # noqa: E402
from kvzip.load import calls  # noqa: E402
from kvzip.load.hf import (  # noqa: E402
    cache_argument,
    load_batch_or_prefill,
    load_cache,
    load_or_prefill,
)
from kvzip.models import LoadedModel  # noqa: E402
from kvzip.store import Store  # noqa: E402

TEXT = torch.randint(3, 64, (2, 60), generator=torch.Generator().manual_seed(5))
IDS, PROMPT = TEXT[:1, :40], TEXT[:1, :50]


def made(kind: str = "Llama", **more: Any) -> Any:
    return tiny_model(
        kind, dtype="float32", vocab_size=64, pad_token_id=0, initializer_range=0.4, **more
    ).model


@pytest.fixture
def model() -> Any:
    return made()


@pytest.fixture
def store(tmp_path: Any) -> Store:
    return Store(tmp_path / "store", block_tokens=4)


def document(model: Any, ids: Any = IDS, **options: Any) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, **cache_argument(cache), **options)
    return cache


def put(store: Store, model: Any, **options: Any) -> kvzip.Snapshot:
    snapshot = kvzip.Snapshot.from_cache(document(model, **options), IDS, model)
    store.put(snapshot, codec="raw")
    return snapshot


def generate(model: Any, ids: Any = PROMPT, cache: Any = None, **options: Any) -> Any:
    given = {} if cache is None else cache_argument(cache)
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = {"input_ids": ids, "pad_token_id": 0, **length, **given, **options}
    return model.generate(**found)


# --- autocast ------------------------------------------------------------------------------------


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def test_a_cache_is_not_used_under_another_autocast_than_it_was_loaded_for(
    store: Store, caplog: Any
) -> None:
    """No witness notices: what it rounds changes these weights' keys and values too little."""
    model = tiny_model("Llama", dtype="float32", vocab_size=64, pad_token_id=0).model
    put(store, model)
    with autocast():
        wanted = generate(model)
        put(store, model)
    for within, warnings in ((False, 1), (True, 0)):
        caplog.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            cache = load_or_prefill(store, model, PROMPT)
        assert cache.get_seq_length()
        with autocast():
            assert torch.equal(generate(model, cache=cache), wanted)
        assert len(warnings_of(caplog)) == warnings


def test_what_generate_filled_under_autocast_is_no_cache_of_the_model_without(
    model: Any, store: Store
) -> None:
    cache = load_or_prefill(store, model, IDS)
    with autocast():
        fed = generate(model, IDS, cache)[:, :-1]
        kvzip.Snapshot.from_cache(cache, fed, model)
    with pytest.raises(UnsupportedError, match="under autocast on cpu"):
        kvzip.Snapshot.from_cache(cache, fed, model)


# --- adapters ------------------------------------------------------------------------------------


def adapted(model: Any, *names: str) -> Any:
    """With adapters that change a little, which no witness would notice."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    found = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        found.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.05)
    return found.eval()


def filled(store: Store, model: Any, **options: Any) -> Any:
    """A cache of the prompt's beginning, which `generate` has filled."""
    cache = load_or_prefill(store, model, IDS)
    assert cache.get_seq_length() == 0
    out = generate(model, IDS, cache, max_new_tokens=1, min_new_tokens=1, **options)
    return cache, out[:, :-1]


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_the_active_adapter_is_loaded(
    model: Any, store: Store, names: tuple[str, ...], caplog: Any
) -> None:
    found = adapted(model, *names)
    cache, ids = filled(store, found)
    store.put(kvzip.Snapshot.from_cache(cache, ids, found), codec="raw")
    whole = generate(found)
    cache = load_or_prefill(store, found, PROMPT)
    assert cache.get_seq_length() == 39
    assert torch.equal(generate(found, PROMPT, cache), whole)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("chosen", ["b", "__base__"])
def test_an_adapter_that_a_call_chooses(model: Any, store: Store, chosen: str, caplog: Any) -> None:
    found = adapted(model, "a", "b")
    cache, ids = filled(store, found)
    store.put(kvzip.Snapshot.from_cache(cache, ids, found), codec="raw")
    cache = load_or_prefill(store, found, PROMPT)
    assert cache.get_seq_length() == 39
    whole = generate(found, adapter_names=[chosen])
    assert torch.equal(generate(found, PROMPT, cache, adapter_names=[chosen]), whole)
    [told] = warnings_of(caplog)
    assert "other adapters" in told
    cache = load_or_prefill(store, found, PROMPT)
    assert cache.get_seq_length() == 39
    with pytest.raises(KVZipError, match="other adapters"):
        found(PROMPT[:, 39:], adapter_names=[chosen], **cache_argument(cache))


def test_a_batch_of_adapters(model: Any, store: Store) -> None:
    found = adapted(model, "a", "b")
    cache, ids = filled(store, found)
    store.put(kvzip.Snapshot.from_cache(cache, ids, found), codec="raw")
    given = load_batch_or_prefill(store, found, [PROMPT[0], PROMPT[0]])
    ids = given.pop("input_ids")
    [cache] = (given[name] for name in cache_argument(None))
    assert cache.get_seq_length() == 39
    for beams in (1, 3):
        given["num_beams"] = beams
        whole = generate(found, ids, adapter_names=["a", "b"], num_beams=beams)
        again = load_batch_or_prefill(store, found, [PROMPT[0], PROMPT[0]])
        options = {"adapter_names": ["a", "b"], "num_beams": beams}
        assert torch.equal(generate(found, **again | options), whole)


def test_an_adapter_that_is_set_after_loading(model: Any, store: Store, caplog: Any) -> None:
    found = adapted(model, "a", "b")
    found.set_adapter("a")
    cache, ids = filled(store, found)
    store.put(kvzip.Snapshot.from_cache(cache, ids, found), codec="raw")
    cache = load_or_prefill(store, found, PROMPT)
    found.set_adapter("b")
    assert torch.equal(generate(found, PROMPT, cache), generate(found))
    found.set_adapter("a")
    cache = load_or_prefill(store, found, PROMPT)
    assert cache.get_seq_length() == 39
    with found.disable_adapter():
        assert torch.equal(generate(found, PROMPT, cache), generate(found))
    assert len(warnings_of(caplog)) == 2


def test_the_model_is_compared_once(model: Any, store: Store, monkeypatch: Any) -> None:
    """By `generate`, or else by the first call."""
    put(store, model)
    asked: list[Any] = []
    own = calls.state_of
    monkeypatch.setattr(calls, "state_of", lambda model: asked.append(model) or own(model))
    generate(model, PROMPT, load_or_prefill(store, model, PROMPT))
    assert len(asked) == 1
    model(PROMPT[:, 39:], **cache_argument(load_or_prefill(store, model, PROMPT)))
    assert len(asked) == 2


def test_caches_of_a_chosen_adapter_are_not_kept(model: Any, store: Store) -> None:
    found = adapted(model, "a", "b")
    cache, ids = filled(store, found, adapter_names=["b"])
    with pytest.raises(UnsupportedError, match="adapter_names="):
        kvzip.Snapshot.from_cache(cache, ids, found)
    plain = document(found, adapter_names=["b"])
    with pytest.raises(UnsupportedError, match="several adapters"):
        kvzip.Snapshot.from_cache(plain, IDS, found)


def test_a_revision_vouches_for_adapters(model: Any, store: Store) -> None:
    found = adapted(model, "a", "b")
    snapshot = kvzip.Snapshot.from_cache(document(found, adapter_names=["b"]), IDS)
    snapshot.origin = kvzip.Origin(model="m", revision="with b")
    store.put(snapshot, codec="raw")
    cache = load_or_prefill(store, found, PROMPT, name="m", revision="with b")
    assert cache.get_seq_length() == 39
    whole = generate(found, adapter_names=["b"])
    assert torch.equal(generate(found, PROMPT, cache, adapter_names=["b"]), whole)


def test_other_weights_are_noticed_below_an_adapter(model: Any, store: Store, caplog: Any) -> None:
    """`generate` of PEFT's model calls the one within, which is watched."""
    snapshot = put(store, made(rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    torch.manual_seed(3)
    other = made()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    found = adapted(other, "a")
    snapshot.origin = kvzip.Origin(model="m", revision="r")
    store.put(snapshot, codec="raw")
    cache = load_or_prefill(store, found, PROMPT, name="m", revision="r")
    assert cache.get_seq_length() == 39
    assert torch.equal(generate(found, PROMPT, cache), generate(found))
    [told] = warnings_of(caplog)
    assert "computed anew" in told


@pytest.mark.parametrize("kind", ["PromptTuning", "PromptEncoder", "PrefixTuning"])
def test_tokens_of_an_adapters_own(model: Any, store: Store, kind: str, caplog: Any) -> None:
    """Those of prompt tuning, P-tuning and prefix tuning stand before a prompt's."""
    peft = pytest.importorskip("peft")
    snapshot = kvzip.Snapshot.from_cache(document(model), IDS)
    snapshot.origin = kvzip.Origin(model="m", revision="r")
    store.put(snapshot, codec="raw")
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=5)
    found = peft.get_peft_model(model, config).eval()
    given = {"attention_mask": torch.ones_like(PROMPT)}
    right = generate(found, **given)
    for source in (store, snapshot):
        cache = load_or_prefill(source, found, PROMPT, name="m", revision="r")
        assert torch.equal(generate(found, PROMPT, cache, **given), right)
        [told] = warnings_of(caplog)
        assert "5 tokens of its own" in told
        with pytest.raises(UnsupportedError, match="5 tokens of its own"):
            kvzip.Snapshot.from_cache(cache, torch.zeros(1, cache.get_seq_length()).long(), found)
    loaded = load_cache(snapshot, model.config, prompt=PROMPT)
    for cache in (loaded, snapshot.to_cache(model.config)):
        with pytest.raises(UnsupportedError, match="5 tokens of its own"):
            generate(found, PROMPT, cache, **given)
    with pytest.raises(UnsupportedError, match="5 tokens of its own"):
        prefill(LoadedModel(found, None, "m", "r"), IDS)


# --- masks and positions -------------------------------------------------------------------------


def mask(lo: int, hi: int) -> Any:
    found = torch.ones_like(PROMPT)
    found[:, lo:hi] = 0
    return found


HIDES = [(0, 3), (5, 9), (0, 20), (36, 38)]


@pytest.mark.parametrize("hidden", HIDES)
def test_a_mask_that_hides_what_is_cached(
    model: Any, store: Store, hidden: Any, caplog: Any
) -> None:
    snapshot, hiding = put(store, model), {"attention_mask": mask(*hidden)}
    cache = load_cache(snapshot, model.config, prompt=PROMPT)
    with pytest.raises(KVZipError, match="mask hides"):
        generate(model, PROMPT, cache, **hiding)
    assert torch.equal(generate(model, PROMPT, cache), generate(model))
    cache = load_or_prefill(store, model, PROMPT)
    with pytest.raises(KVZipError, match="mask hides"):
        model(PROMPT[:, 39:], **hiding, **cache_argument(cache))
    # The cache is as it was, and `generate` may have all of it computed in place of that.
    assert torch.equal(generate(model, PROMPT, cache, **hiding), generate(model, **hiding))
    [told] = warnings_of(caplog)
    assert "mask hides" in told


def test_a_mask_that_hides_what_is_fed(model: Any, store: Store, caplog: Any) -> None:
    put(store, model)
    for lo, hi in ((40, 44), (41, 42)):
        whole = generate(model, attention_mask=mask(lo, hi))
        cache = load_or_prefill(store, model, PROMPT)
        assert cache.get_seq_length() == 39
        assert torch.equal(generate(model, PROMPT, cache, attention_mask=mask(lo, hi)), whole)
    assert warnings_of(caplog) == []


def test_a_mask_of_four_dimensions(model: Any, store: Store) -> None:
    put(store, model)
    cache = load_or_prefill(store, model, PROMPT)
    square = torch.ones(1, 1, 11, 50, dtype=torch.bool).tril(39)
    with pytest.raises(KVZipError, match=r"mask of \[batch, tokens\]"):
        model(PROMPT[:, 39:], attention_mask=square, **cache_argument(cache))


def test_ids_of_padding_that_transformers_hides(model: Any, store: Store, caplog: Any) -> None:
    """Without a mask `generate` hides what has the padding's id, in the middle of a text, too."""
    ids = PROMPT.clone()
    ids[:, 7] = 0
    snapshot = kvzip.Snapshot.from_cache(document(model, ids[:, :40]), ids[:, :40], model)
    store.put(snapshot, codec="raw")
    cache = load_or_prefill(store, model, ids)
    assert cache.get_seq_length() == 39
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    assert len(warnings_of(caplog)) == 1
    cache = load_or_prefill(store, model, ids)
    shown = torch.ones_like(ids)
    whole = generate(model, ids, attention_mask=shown)
    assert torch.equal(generate(model, ids, cache, attention_mask=shown), whole)


def test_what_was_filled_under_a_mask_is_not_kept(model: Any, store: Store) -> None:
    for options in (
        {"attention_mask": mask(3, 5)[:, :40]},
        {"position_ids": torch.arange(40)[None]},
    ):
        cache, ids = filled(store, model, **options)
        with pytest.raises(UnsupportedError, match="depend on more than"):
            kvzip.Snapshot.from_cache(cache, ids, model)


def test_positions(model: Any, store: Store, caplog: Any) -> None:
    snapshot = put(store, model)
    counted = torch.arange(50)[None]
    for positions, right in ((counted, True), (counted + 5, False), (counted * 2, False)):
        whole = generate(model, position_ids=positions)
        cache = load_or_prefill(store, model, PROMPT)
        assert torch.equal(generate(model, PROMPT, cache, position_ids=positions), whole)
        assert len(warnings_of(caplog)) == (not right)
        if right:
            continue
        cache = load_cache(snapshot, model.config, prompt=PROMPT)
        with pytest.raises(KVZipError, match="other positions"):
            generate(model, PROMPT, cache, position_ids=positions)
        cache = load_or_prefill(store, model, PROMPT)
        given = {"position_ids": positions[:, 39:], **cache_argument(cache)}
        with pytest.raises(KVZipError, match="other positions"):
            model(PROMPT[:, 39:], **given)


def test_the_mask_of_a_batch(model: Any, store: Store, caplog: Any) -> None:
    put(store, model)
    given = load_batch_or_prefill(store, model, [PROMPT[0], PROMPT[0, :45]])
    right = given["attention_mask"]
    whole = generate(model, given["input_ids"], attention_mask=right)
    assert torch.equal(generate(model, **given), whole)
    assert warnings_of(caplog) == []
    for wrong in (torch.ones_like(right), right.roll(1, 0)):
        given = load_batch_or_prefill(store, model, [PROMPT[0], PROMPT[0, :45]])
        whole = generate(model, given["input_ids"], attention_mask=wrong)
        assert torch.equal(generate(model, **given | {"attention_mask": wrong}), whole)
        assert len(warnings_of(caplog)) == 1


# --- other inputs --------------------------------------------------------------------------------


def test_kinds_of_tokens(store: Store, caplog: Any) -> None:
    """GPT-2 adds an embedding of each, of 0, too."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64, n_layer=3, n_embd=32, n_head=4, n_positions=128, initializer_range=0.4
        )
    ).eval()
    snapshot = kvzip.Snapshot.from_cache(document(model), IDS)
    snapshot.origin = kvzip.Origin(model="m", revision="r")
    store.put(snapshot, codec="raw")
    for kinds in (torch.zeros_like(PROMPT), torch.ones_like(PROMPT)):
        cache = load_or_prefill(store, model, PROMPT, name="m", revision="r")
        assert cache.get_seq_length() == 39
        whole = generate(model, token_type_ids=kinds)
        assert torch.equal(generate(model, PROMPT, cache, token_type_ids=kinds), whole)
        assert len(warnings_of(caplog)) == 1
        cache = load_cache(snapshot, model.config, prompt=PROMPT)
        with pytest.raises(KVZipError, match="token_type_ids="):
            generate(model, PROMPT, cache, token_type_ids=kinds)


def test_embeddings(model: Any, store: Store) -> None:
    put(store, model)
    embeddings = model.get_input_embeddings()(PROMPT)
    cache = load_or_prefill(store, model, PROMPT)
    with pytest.raises(KVZipError, match="inputs_embeds="):
        generate(model, PROMPT, cache, inputs_embeds=embeddings * 2)


def test_tokens_that_see_those_after_them(store: Store, caplog: Any) -> None:
    """Of a text whose end depends on its beginning, and its beginning on its end."""
    sizes = {"sliding_window": 64, "layer_types": ["full_attention"] * 4}
    model = made("Gemma3Text", use_bidirectional_attention=True, **sizes)
    with pytest.raises(UnsupportedError, match="see those after them"):
        put(store, model)
    snapshot = kvzip.Snapshot.from_cache(document(model), IDS)
    cache = load_or_prefill(snapshot, model, PROMPT)
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, PROMPT, cache), generate(model))
    assert len(warnings_of(caplog)) == 1
    for causal in (True, False):
        model = made()
        model.config.is_causal = causal
        cache = load_or_prefill(kvzip.Snapshot.from_cache(document(model), IDS), model, PROMPT)
        assert cache.get_seq_length() == (39 if causal else 0)


# --- settings ------------------------------------------------------------------------------------


def test_settings_that_are_given_by_position(model: Any, store: Store, caplog: Any) -> None:
    put(store, model)
    config = transformers.GenerationConfig
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cache = load_or_prefill(store, model, PROMPT)
    with pytest.raises(KVZipError, match="prompt lookup"):
        looks = config(prompt_lookup_num_tokens=3, **given)
        model.generate(PROMPT, looks, **cache_argument(cache))
    found = model.generate(PROMPT, config(**given), **cache_argument(cache))
    assert torch.equal(found, generate(model))
    assert warnings_of(caplog) == []
    cache = load_or_prefill(store, model, PROMPT)
    with pytest.raises(TypeError, match="multiple values"):
        model.generate(PROMPT, config(), generation_config=config(), **cache_argument(cache))


def test_settings_that_a_config_leaves_to_the_models(model: Any, store: Store, caplog: Any) -> None:
    """The padding's id, which hides tokens, among them."""
    ids = PROMPT.clone()
    ids[:, 7] = 0
    snapshot = kvzip.Snapshot.from_cache(document(model, ids[:, :40]), ids[:, :40], model)
    store.put(snapshot, codec="raw")
    model.generation_config.pad_token_id = 0
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False)
    right = model.generate(ids, config)
    for given in ((ids, config), (ids,)):
        cache = load_or_prefill(store, model, ids)
        assert cache.get_seq_length() == 39
        more = {} if len(given) == 2 else {"generation_config": config}
        assert torch.equal(model.generate(*given, **more, **cache_argument(cache)), right)
        assert len(warnings_of(caplog)) == 1


def test_rows_of_a_padded_batch_that_are_picked(model: Any, store: Store) -> None:
    rows = [TEXT[0, :50], TEXT[1, :44], TEXT[0, :47]]
    for row in rows:
        ids = row[None, :-9]
        store.put(kvzip.Snapshot.from_cache(document(model, ids), ids, model), codec="raw")
    batch = load_batch_or_prefill(store, model, rows)
    [name] = cache_argument(None)
    assert batch[name].get_seq_length() > 0
    which = torch.tensor([2, 0])
    batch[name].batch_select_indices(which)
    picked = {key: value[which] for key, value in batch.items() if key != name}
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**picked, **{name: batch[name]}, **given)
    assert torch.equal(found, model.generate(**picked, **given))
