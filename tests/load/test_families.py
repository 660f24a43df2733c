"""Every family of transformers: its cache goes through a file and back, as docs/models.md says."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import UNABLE, Family, families  # noqa: E402
from family_checks import (  # noqa: E402
    DOCUMENT,
    NEW,
    TABLE,
    VERSION,
    Checks,
    row,
    stored_rows,
    warnings_told,
)

import kvzip  # noqa: E402
from kvzip.load.caches import devices_of  # noqa: E402
from kvzip.load.hf import layer_kinds, load_batch, load_cache, load_or_prefill  # noqa: E402

ROWS = stored_rows()
"""What the table says."""


def _cases() -> list[Any]:
    """All families; those that are as another one before are for `make test-long`."""
    seen, cases = set[str](), []
    for family in families():
        _, _, found = ROWS.get(str(family), "").partition(" | ")
        marks = [pytest.mark.long] if found in seen else []
        cases.append(pytest.param(family, id=str(family), marks=marks))
        seen.add(found)
    return cases


def test_the_table_has_every_family() -> None:
    if VERSION not in TABLE.read_text(encoding="utf-8"):
        pytest.skip("the table is of another version of transformers")
    assert list(ROWS) == [str(family) for family in families()]
    assert not set(UNABLE) - {family.name for family in families()}


@pytest.mark.parametrize("family", _cases())
@pytest.mark.drawn(4)
def test_a_family(family: Family) -> None:
    """It works, and what the table says of it is so."""
    torch.set_num_threads(1)
    found = str(row(family))
    if VERSION in TABLE.read_text(encoding="utf-8"):
        assert found == ROWS[str(family)]


@pytest.fixture(scope="module")
def mixed() -> Checks:
    """A model with layers that keep states and others that keep keys and values."""
    return Checks(Family("qwen3_next"))


def test_a_state_at_another_length_says_what_it_needs(mixed: Checks) -> None:
    snapshot, config = mixed.snapshot(mixed.ids), mixed.model.config
    for prompt in (mixed.longer(mixed.ids[:, :20], 9), mixed.ids[:, :39]):
        with pytest.raises(kvzip.KVZipError, match="keeps a state after 39 of 40 tokens"):
            load_cache(snapshot, config, prompt=prompt)
    cache = load_cache(snapshot, config)
    with pytest.raises(kvzip.UnsupportedError, match="layer 0, of kind state, keeps states"):
        cache.crop(-1)
    assert torch.equal(mixed.says(mixed.ids, cache), mixed.says(mixed.ids))


def test_where_layers_are() -> None:
    """Of a model whose layers are on several devices, each state goes where its layer is."""
    model = Family("qwen3_next").model()
    model.model.layers[1].to("meta")
    found = devices_of(model, layer_kinds(model.config))
    assert found is not None and [device.type for device in found] == ["cpu", "meta"]
    assert devices_of(Family("llama").model(), layer_kinds(Family("llama").config())) is None


def test_a_snapshot_stays_while_the_model_goes_on(mixed: Checks) -> None:
    """The model updates states in place."""
    with torch.no_grad():
        cache = mixed.model(mixed.ids, use_cache=True).cache
        found = kvzip.Snapshot.from_cache(cache, mixed.ids, mixed.model)
        before = kvzip.encode(found, "raw", threads=1)
        mixed.model(mixed.ids[:, :1], cache=cache)
    assert kvzip.encode(found, "raw", threads=1) == before


def test_from_memory_to_memory(mixed: Checks) -> None:
    """A snapshot without a file is a cache again, as far as its states are good."""
    cache = mixed.snapshot(mixed.ids).to_cache(mixed.model.config)
    assert cache.get_seq_length() == 39
    prompt = mixed.longer(mixed.ids, 9)
    assert torch.equal(mixed.says(prompt, cache), mixed.says(prompt))


def test_beams_go_on_from_states(mixed: Checks) -> None:
    prompt, given = mixed.longer(mixed.ids, 9), {"max_new_tokens": 6, "do_sample": False}
    right = mixed.model.generate(prompt, num_beams=3, **given)
    cache = load_cache(mixed.snapshot(mixed.ids), mixed.model.config, prompt=prompt)
    assert torch.equal(mixed.model.generate(prompt, num_beams=3, cache=cache, **given), right)


def test_what_is_fed_wrongly_leaves_states_as_they_were(mixed: Checks) -> None:
    prompt = mixed.longer(mixed.ids, 9)
    cache = load_cache(mixed.snapshot(mixed.ids), mixed.model.config, prompt=prompt)
    with pytest.raises(kvzip.KVZipError, match="fed 4 tokens"), torch.no_grad():
        mixed.model(prompt[:, 39:43], cache=cache)
    assert torch.equal(mixed.says(prompt, cache), mixed.says(prompt))


def test_states_of_a_batch_end_at_one_column(mixed: Checks) -> None:
    snapshot = mixed.snapshot(mixed.ids)
    prompts = [mixed.longer(mixed.ids, n)[0] for n in (9, 5)]
    with pytest.raises(kvzip.KVZipError, match="must all end at one column"):
        load_batch([snapshot] * 2, mixed.model.config, prompts)
    same = [prompts[0], prompts[0]]
    batch = load_batch([snapshot] * 2, mixed.model.config, same)
    right = mixed.says(same[0][None])
    found = mixed.model.generate(**batch, max_new_tokens=right.shape[1], do_sample=False)
    assert all(torch.equal(line[-right.shape[1] :], right[0]) for line in found)


def test_an_encoder_that_was_given_other_tokens() -> None:
    checks = Checks(Family("bart", seq2seq=True))
    snapshot = checks.snapshot(checks.ids)
    prompt = checks.longer(checks.ids, 9)
    with pytest.raises(kvzip.KVZipError, match="other tokens than encoder_ids"):
        other = checks.encoder + 1
        load_cache(snapshot, checks.model.config, prompt=prompt, encoder_ids=other)
    with pytest.raises(kvzip.UsageError, match="they are missing"):
        load_cache(snapshot, checks.model.config, prompt=prompt)


@pytest.mark.parametrize("types", [("full", "linear"), ("linear", "full", "linear")])
def test_a_cache_of_minimax_own_class(types: tuple[str, ...]) -> None:
    """Its states lie beside its layers, and any layer may be the first."""
    module = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    checks, config = Checks(Family("minimax")), Family("minimax").config()
    config.num_hidden_layers = len(types)
    config.layer_types = [f"{name}_attention" for name in types]
    torch.manual_seed(0)
    checks.model = transformers.AutoModelForCausalLM.from_config(config).eval()
    checks.model.generation_config.eos_token_id = None
    cache = module.MiniMaxCache()
    with torch.no_grad():
        checks.model(checks.ids, cache=cache)
    found = kvzip.Snapshot.from_cache(cache, checks.ids, checks.model)
    kinds = ["full" if name == "full" else "state" for name in types]
    assert [layer.kind for layer in found.layers] == kinds
    state = found.layers[kinds.index("state")].parts["recurrent"]
    held = cache.linear_cache[kinds.index("state")][0]
    assert (state == held.view(torch.int32).numpy().view(state.dtype)).all()
    prompt = checks.longer(checks.ids, 9)
    right = checks._generate(NEW, input_ids=prompt, use_cache=False)
    for snapshot in (found, checks.snapshot(checks.ids)):
        blob = kvzip.encode(snapshot, "channel", threads=1)
        assert kvzip.decode(blob, threads=1) == snapshot
        loaded = load_cache(blob, config, prompt=prompt)
        assert isinstance(loaded, module.MiniMaxCache)
        assert torch.equal(checks.says(prompt, loaded), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_xlstm_own_class(dtype: torch.dtype) -> None:
    """A prompt that it is the beginning of goes on from it, in rows and in beams, too."""
    pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    checks = Checks(Family("xlstm"))
    config = Family("xlstm").config()
    config.dtype = dtype
    torch.manual_seed(0)
    checks.model = transformers.AutoModelForCausalLM.from_config(config).eval()
    checks.model.generation_config.eos_token_id = None
    with torch.no_grad():
        cache = checks.model(checks.ids, use_cache=True).cache
    found = kvzip.Snapshot.from_cache(cache, checks.ids, checks.model)
    for i, layer in enumerate(found.layers):
        for part, state in zip(layer.parts.values(), cache.rnn_state[i], strict=True):
            size = {2: torch.int16, 4: torch.int32}[state.element_size()]
            assert (part == state[0].view(size).numpy().view(part.dtype)).all()
    prompt = checks.longer(checks.ids, 9)
    with torch.no_grad():  # what transformers itself makes of its cache
        right = checks.model(prompt[:, 40:], cache=cache, use_cache=True).logits
        loaded = load_cache(kvzip.encode(found, "channel", threads=1), config, prompt=prompt)
        assert torch.equal(checks.model(prompt[:, 40:], cache=loaded).logits, right)
        again = kvzip.Snapshot.from_cache(loaded, prompt, checks.model)
        assert again == kvzip.Snapshot.from_cache(cache, prompt, checks.model)
    if dtype != torch.float32:
        return  # rounding differs where one stops
    given = {"max_new_tokens": 6, "do_sample": False}
    for fed, options in ((prompt, {"num_beams": 3}), (prompt.expand(2, -1), {})):
        wanted = checks.model.generate(fed, use_cache=False, **given, **options)
        loaded = load_cache(found, config, prompt=prompt)
        assert torch.equal(checks.model.generate(fed, cache=loaded, **given, **options), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1", "deepseek_v32"])
def test_static_caches(name: str) -> None:
    """Only what is filled is kept, oldest first."""
    checks = Checks(Family(name))
    config = checks.model.config.get_text_config(decoder=True)
    cache = transformers.StaticCache(config=config, max_cache_len=64)
    with torch.no_grad():
        checks.model(checks.ids, cache=cache)
    found = kvzip.Snapshot.from_cache(cache, checks.ids, checks.model)
    assert found.tokens == checks.ids.shape[1]
    prompt = checks.longer(checks.ids, 9)
    loaded = load_cache(found, checks.model.config, prompt=prompt)
    assert torch.equal(checks.says(prompt, loaded), checks.says(prompt))


def test_a_cache_in_fp8_keeps_its_scales() -> None:
    checks = Checks(Family("llama"))
    cache = transformers.QuantizedCache("fp8", config=checks.model.config)
    with torch.no_grad():
        checks.model(checks.ids, cache=cache)
    found = kvzip.Snapshot.from_cache(cache, checks.ids, checks.model)
    assert found.dtype == "fp8_e4m3fn"
    assert list(found.layers[0].parts) == ["k", "v", "k_scale", "v_scale"]
    codes, scale = cache.layers[0]._quantized_keys
    assert (found.layers[0].k == codes[0].view(torch.uint8).numpy()).all()
    assert float(found.layers[0].parts["k_scale"].view("f4")) == float(scale)
    prompt = checks.longer(checks.ids, 9)
    right = checks.says(prompt, copy.deepcopy(cache))
    blob = kvzip.encode(found, "channel", threads=1)
    loaded = load_cache(blob, checks.model.config, prompt=prompt)
    with pytest.raises(kvzip.UnsupportedError, match="layer 0, of kind full, is quantised"):
        loaded.crop(-1)
    assert torch.equal(checks.says(prompt, loaded), right)


@pytest.mark.parametrize("name", ["deepseek_v32", "minimax_m3_vl_text", "falcon_h1", "llama"])
def test_one_document_for_several_rows(name: str) -> None:
    """All that a layer holds is there for each of them, an indexer's keys and states, too."""
    checks = Checks(Family(name))
    document, prompt = checks.snapshot(checks.ids), checks.longer(checks.ids, 9)
    two = torch.cat([prompt, checks.longer(checks.ids, 9, seed=7)])
    for ids, options in (
        (prompt, {"num_beams": 3}),
        (prompt, {"num_return_sequences": 2, "num_beams": 2}),
        (two, {}),
    ):
        given = {"max_new_tokens": 6, "do_sample": False, **options}
        right = checks.model.generate(ids, **given)
        for load, of in ((load_cache, checks.model.config), (load_or_prefill, checks.model)):
            cache = load(document, of, prompt=ids)
            assert torch.equal(checks.model.generate(ids, cache=cache, **given), right)
            if name == "falcon_h1" or options:
                continue
            cache = load(document, of, prompt=ids)
            held = cache.get_seq_length()
            with torch.no_grad():
                found = checks.model(ids[:, held:], cache=cache).logits
                whole = checks.model(ids).logits[:, held:]
            assert torch.equal(found.argmax(-1), whole.argmax(-1))


@pytest.mark.parametrize("name", ["zamba2", "granitemoehybrid", "gpt_neox", "llama"])
def test_a_text_that_repeats_itself(name: str) -> None:
    """New tokens whose keys are like earlier ones' are no prompt that is fed once more."""
    checks = Checks(Family(name))
    ids = checks.ids[:, :20]
    prompt = checks.longer(ids, 3)
    words = range(checks.model.config.get_text_config(decoder=True).vocab_size)
    given: dict[str, Any] = {"max_new_tokens": 80, "do_sample": False, **checks.slowly}
    given["suppress_tokens"] = [word for word in words if word != 52]
    right = checks.model.generate(prompt, **given)
    cache = load_or_prefill(checks.snapshot(ids), checks.model, prompt, **checks.slowly)
    assert cache.get_seq_length() > 0
    assert torch.equal(checks.model.generate(prompt, cache=cache, **given), right)


@pytest.mark.parametrize("name", ["bamba", "qwen4_exp"])
def test_other_weights_behind_states(name: str) -> None:
    """What the first layer of attention is fed was computed from states of the other weights."""
    checks = Checks(Family(name))
    document, prompt = checks.snapshot(checks.ids), checks.longer(checks.ids, 9)
    checks.model = copy.deepcopy(checks.model)
    torch.manual_seed(3)
    with torch.no_grad():
        for weights in checks.model.parameters():
            weights.add_(torch.randn_like(weights) * 0.1)
    for options in ({}, {"num_beams": 2}):
        given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, **options}
        with warnings_told() as told:
            cache = load_or_prefill(document, checks.model, prompt, revision="the document's")
            found = checks.model.generate(prompt, cache=cache, **given)
        assert torch.equal(found, checks.model.generate(prompt, **given))
        assert len(told) == 1


@pytest.mark.parametrize("name", ["mamba", "xlstm", "qwen3_next"])
def test_weights_that_change_between_loading_and_use(name: str) -> None:
    """Where there are states alone, too, which see nothing of what is fed."""
    checks = Checks(Family(name))
    document, prompt = checks.snapshot(checks.ids), checks.longer(checks.ids, 9)
    checks.model = copy.deepcopy(checks.model)
    first, second = (
        load_or_prefill(document, checks.model, prompt, **checks.slowly) for _ in range(2)
    )
    with torch.no_grad():
        for weights in checks.model.parameters():
            weights.mul_(1.3)
    checks.said = {}
    with pytest.raises(kvzip.KVZipError, match="other weights"):
        checks.model(prompt[:, first.get_seq_length() :], cache=first)
    with warnings_told() as told:
        assert torch.equal(checks.says(prompt, second), checks.says(prompt))
    assert len(told) == 1 and "other weights" in told[0]


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_beams_of_a_cache_that_is_computed_anew(name: str) -> None:
    """States that take the place of those of other weights are there for each row."""
    checks = Checks(Family(name))
    document, prompt = checks.snapshot(checks.ids), checks.longer(checks.ids, 9)
    with torch.no_grad():
        for weights in checks.model.parameters():
            weights.mul_(1.3)
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    right = checks.model.generate(prompt, **given)
    with warnings_told() as told:
        cache = load_or_prefill(document, checks.model, prompt, revision="the document's")
        assert torch.equal(checks.model.generate(prompt, cache=cache, **given), right)
    assert len(told) == 1 and "computed anew" in told[0]


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gemma3_text"])
def test_a_cache_that_was_made_without_the_config_keeps_what_the_window_left(name: str) -> None:
    checks = Checks(Family(name))
    cache = transformers.DynamicCache()
    with torch.no_grad():
        checks.model(input_ids=checks.ids, cache=cache)
    snapshot = kvzip.Snapshot.from_cache(cache, checks.ids, checks.model)
    assert snapshot.layers[0].kind == "sliding"
    assert {layer.layout.stored for layer in snapshot.layers} == {DOCUMENT}
    blob = kvzip.encode(snapshot, "channel", threads=1)
    # Whoever shares only a beginning can use it, as with --full-history.
    for shared in (DOCUMENT, 30):
        prompt = checks.longer(checks.ids[:, :shared], 5, seed=8)
        loaded = load_cache(blob, checks.model.config, prompt=prompt)
        assert torch.equal(checks.says(prompt, loaded), checks.says(prompt))


def rotated_by(model: Any) -> list[int | None]:
    """For each layer 0 where its keys tell the positions of the same tokens, else None."""
    ids, found = torch.arange(20, 30)[None], []
    for first in (0, 7):
        cache = transformers.DynamicCache(config=model.config)
        positions = torch.arange(first, first + 10)[None]
        with torch.no_grad():
            model.eval()(ids, position_ids=positions, cache=cache)
        found.append([layer.keys for layer in cache.layers])
    return [
        None if torch.allclose(*keys, rtol=1e-3, atol=1e-4) else 0
        for keys in zip(*found, strict=True)
    ]


def test_layers_that_do_not_rotate_their_keys() -> None:
    config = Family("cohere2_moe").config()
    config.num_hidden_layers = 3
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    config.mlp_layer_types = ["dense", "sparse", "sparse"]
    for pattern, ropes in ((1, [0, 0, None]), (2, [None, 0, None])):
        config.prefix_dense_sliding_window_pattern = pattern
        assert [kind.rope for kind in layer_kinds(config)] == ropes
        assert rotated_by(transformers.AutoModelForCausalLM.from_config(config)) == ropes
    config = Family("lara_mini").config()
    assert [kind.rope for kind in layer_kinds(config)] == [None, 0, None]
    for name, rotated in (("zamba2", False), ("granitemoehybrid", False), ("llama", True)):
        kinds = layer_kinds(Family(name).config())
        assert {kind.rope is not None for kind in kinds if kind.kind == "full"} == {rotated}
