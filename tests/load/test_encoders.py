"""A model with an encoder: its cache is of one source text, all in sight, and of its weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import msgspec  # noqa: E402
from support import warnings_of  # noqa: E402

import kvzip  # noqa: E402
from kvzip.errors import (  # noqa: E402
    CancelledError,
    KVZipError,
    UnsupportedError,
    UsageError,
)
from kvzip.load.cancelling import cancel  # noqa: E402
from kvzip.load.hf import cache_argument, load_cache, load_or_prefill  # noqa: E402
from kvzip.store import Store  # noqa: E402

START = 3
_SIZES: dict[str, dict[str, Any]] = {
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    | {"initializer_factor": 2.0},
    "Bart": {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "init_std": 0.4}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "bos_token_id": START}
    | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128},
}


def some_ids(tokens: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, 64, (1, tokens), generator=generator)


SOURCE, OTHER = some_ids(20, 1), some_ids(20, 2)
DOCUMENT = torch.cat([torch.tensor([[START]]), some_ids(39, 3)], dim=1)
PROMPT = torch.cat([DOCUMENT, some_ids(9, 4)], dim=1)
HIDING = torch.ones_like(SOURCE)
HIDING[:, 19:] = 0


@pytest.fixture(params=sorted(_SIZES))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    ids = {"decoder_start_token_id": START, "pad_token_id": 0, "eos_token_id": 1}
    sizes = _SIZES[request.param] | {"vocab_size": 64, "dropout": 0.0, "dropout_rate": 0.0}
    config = getattr(transformers, f"{request.param}Config")(**sizes, **ids)
    found = getattr(transformers, f"{request.param}ForConditionalGeneration")(config).eval()
    found.generation_config.eos_token_id = found.generation_config.forced_eos_token_id = None
    return found


def filled(model: Any, **options: Any) -> Any:
    own = transformers.DynamicCache(config=model.config)
    cache = transformers.EncoderDecoderCache(own, transformers.DynamicCache())
    given = {"input_ids": SOURCE, "decoder_input_ids": DOCUMENT, **cache_argument(cache)}
    with torch.no_grad():
        model(**given | options)
    return cache


@pytest.fixture
def snapshot(model: Any) -> kvzip.Snapshot:
    return kvzip.Snapshot.from_cache(filled(model), DOCUMENT, model, encoder_ids=SOURCE)


def recoverable(snapshot: Any, model: Any) -> Any:
    cache = load_or_prefill(snapshot, model, PROMPT, encoder_ids=SOURCE)
    assert cache.get_seq_length() == 39
    return cache


def loaded(snapshot: Any, model: Any) -> Any:
    return load_cache(snapshot, model.config, prompt=PROMPT, encoder_ids=SOURCE)


def generate(model: Any, cache: Any = None, **options: Any) -> Any:
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    given = {"input_ids": SOURCE, "decoder_input_ids": PROMPT, **length}
    given |= {} if cache is None else cache_argument(cache)
    return model.generate(**given | options)


def call(model: Any, cache: Any = None, **options: Any) -> Any:
    """The logits of the prompt's last token."""
    held = 0 if cache is None else cache.get_seq_length()
    given = {"input_ids": SOURCE, "decoder_input_ids": PROMPT[:, held:]}
    given |= {} if cache is None else cache_argument(cache)
    with torch.no_grad():
        return model(**given | options).logits[:, -1]


def encoded(model: Any, ids: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model.get_encoder()(input_ids=ids, return_dict=True, **options)


def changed(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


# --- other sources -------------------------------------------------------------------------------


def of_another_source(model: Any) -> list[tuple[str, dict[str, Any]]]:
    """What is given that is not the source that a cache is of, all in sight, and what is said."""
    hidden = encoded(model, SOURCE, attention_mask=HIDING)
    embedded = model.get_input_embeddings()(SOURCE).detach() * 1.01
    return [
        ("other tokens", {"input_ids": OTHER}),
        ("other tokens", {"input_ids": torch.cat([SOURCE[:, :-1], OTHER[:, :1]], dim=1)}),
        ("other tokens", {"input_ids": torch.cat([SOURCE, OTHER], dim=1)}),
        ("other tokens", {"input_ids": torch.cat([SOURCE, OTHER]), **rows(2)}),
        ("mask hides", {"attention_mask": HIDING}),
        ("mask hides", {"attention_mask": HIDING, "input_ids": None, "encoder_outputs": hidden}),
        ("encoder_outputs=", {"input_ids": None, "encoder_outputs": hidden}),
        ("encoder_outputs=", {"encoder_outputs": encoded(model, OTHER)}),
        ("encoder_outputs=", {"input_ids": None, "encoder_outputs": encoded(model, OTHER)}),
        ("inputs_embeds=", {"input_ids": None, "inputs_embeds": embedded}),
    ]


def rows(count: int) -> dict[str, Any]:
    return {"decoder_input_ids": PROMPT.repeat(count, 1)}


def test_generate_computes_all_of_another_source(model: Any, snapshot: Any, caplog: Any) -> None:
    for said, given in of_another_source(model):
        right = generate(model, **copy.deepcopy(given))
        found = generate(model, recoverable(snapshot, model), **given)
        assert torch.equal(found, right), said
        [told] = warnings_of(caplog)
        assert said in told


def test_what_cannot_be_computed_raises(model: Any, snapshot: Any) -> None:
    right = generate(model)
    for said, given in of_another_source(model):
        cache = loaded(snapshot, model)
        with pytest.raises(KVZipError, match=said):
            generate(model, cache, **given)
        assert torch.equal(generate(model, cache), right)  # it is as it was
        with pytest.raises(KVZipError, match=said):
            generate(model, snapshot.to_cache(model.config), **given)


def test_a_call_by_hand_raises(model: Any, snapshot: Any) -> None:
    right = call(model)
    for said, given in of_another_source(model):
        if "decoder_input_ids" in given:
            given["decoder_input_ids"] = given["decoder_input_ids"][:, 39:]
        said = "other tokens" if said == "inputs_embeds=" else said
        cache = recoverable(snapshot, model)
        with pytest.raises(KVZipError, match=said):
            call(model, cache, **given)
        assert torch.allclose(call(model, cache), right, atol=1e-4)


def test_a_call_by_hand_without_a_model_to_ask(model: Any, snapshot: Any) -> None:
    """`load_cache` has none: the keys of the encoder's tokens tell."""
    for given in ({"input_ids": OTHER}, {"encoder_outputs": encoded(model, OTHER)}):
        with pytest.raises(KVZipError, match="the encoder's tokens"):
            call(model, loaded(snapshot, model), **given)
    with pytest.raises(KVZipError, match="20 tokens of its encoder, which is given 25"):
        longer = torch.cat([SOURCE, OTHER[:, :5]], dim=1)
        call(model, loaded(snapshot, model), input_ids=longer)


@pytest.mark.parametrize("load", [loaded, recoverable])
@pytest.mark.drawn(2)
def test_the_same_source_in_other_ways(model: Any, snapshot: Any, load: Any, caplog: Any) -> None:
    twice = {"input_ids": SOURCE.repeat(2, 1), **rows(2)}
    for given in (
        {},
        {"attention_mask": torch.ones_like(SOURCE)},
        {"decoder_attention_mask": torch.ones_like(PROMPT)},
        {"decoder_input_ids": PROMPT[:, 1:]},  # transformers puts the first before them
        {"input_ids": None, "encoder_outputs": encoded(model, SOURCE)},
        {"num_beams": 3, "num_return_sequences": 2},
        {**twice},
        {**twice, "input_ids": None, "encoder_outputs": encoded(model, SOURCE.repeat(2, 1))},
        {**twice, "num_beams": 2},
    ):
        right = generate(model, **copy.deepcopy(given))
        assert torch.equal(generate(model, load(snapshot, model), **given), right), given.keys()
    hidden = encoded(model, SOURCE)
    for outputs in (None, hidden, tuple(hidden.values())):
        given = {} if outputs is None else {"input_ids": None, "encoder_outputs": outputs}
        found = call(model, load(snapshot, model), **given)
        assert torch.allclose(found, call(model, **given), atol=1e-4)
    assert warnings_of(caplog) == []


def test_the_encoder_is_not_asked_again(model: Any, snapshot: Any) -> None:
    """`generate` encodes the source; what it is given for the decoder's calls is that."""
    asked = []
    model.get_encoder().register_forward_hook(lambda *_: asked.append(1))
    cache = load_cache(snapshot, model.config, prompt=PROMPT, encoder_ids=SOURCE)
    generate(model, cache)
    assert len(asked) == 1


# --- the decoder's own prompt --------------------------------------------------------------------


@pytest.mark.parametrize("load", [loaded, recoverable])
def test_other_ids_of_the_decoder(model: Any, snapshot: Any, load: Any) -> None:
    other = PROMPT.clone()
    other[:, 7] = 9
    with pytest.raises(KVZipError, match="cached document at position 7"):
        generate(model, load(snapshot, model), decoder_input_ids=other)
    with pytest.raises(KVZipError, match="must be longer than its cache"):
        generate(model, load(snapshot, model), decoder_input_ids=PROMPT[:, :30])
    with pytest.raises(KVZipError, match="the prompt has 1"):
        generate(model, load(snapshot, model), decoder_input_ids=PROMPT[:, :1])


def test_a_mask_of_the_decoder(model: Any, snapshot: Any, caplog: Any) -> None:
    mask = torch.ones_like(PROMPT)
    mask[:, 4:7] = 0
    right = generate(model, decoder_attention_mask=mask)
    cache = recoverable(snapshot, model)
    assert torch.equal(generate(model, cache, decoder_attention_mask=mask), right)
    [told] = warnings_of(caplog)
    assert "mask hides" in told
    with pytest.raises(KVZipError, match="mask hides"):
        generate(model, loaded(snapshot, model), decoder_attention_mask=mask)


def test_a_conversation_is_of_one_source(model: Any, snapshot: Any) -> None:
    cache = loaded(snapshot, model)
    longer = torch.cat([generate(model, cache), some_ids(5, 6)], dim=1)
    right = generate(model, decoder_input_ids=longer)
    for said, given in (
        ("other tokens", {"input_ids": OTHER}),
        ("mask hides", {"attention_mask": HIDING}),
        ("encoder_outputs=", {"input_ids": None, "encoder_outputs": encoded(model, OTHER)}),
    ):
        with pytest.raises(KVZipError, match=said):
            generate(model, cache, decoder_input_ids=longer, **given)
    assert torch.equal(generate(model, cache, decoder_input_ids=longer), right)


def test_copies_and_pickles(model: Any, snapshot: Any, caplog: Any) -> None:
    for again in (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
        cache = recoverable(snapshot, model)
        for each in (again(cache), cache):
            assert torch.equal(generate(model, each), generate(model))
        with pytest.raises(KVZipError, match="other tokens"):
            generate(model, again(loaded(snapshot, model)), input_ids=OTHER)
    assert warnings_of(caplog) == []


def test_a_source_without_ids() -> None:
    """Sound: a snapshot's own cache is compared by the keys of what the encoder made of it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
    sizes |= {"max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1}
    config = transformers.WhisperConfig(**sizes, init_std=0.4, decoder_start_token_id=START)
    whisper = transformers.WhisperForConditionalGeneration(config).eval()
    sound, other = torch.randn(2, 1, 8, 100).unbind()
    cache = transformers.EncoderDecoderCache(*(transformers.DynamicCache() for _ in range(2)))
    with torch.no_grad():
        whisper(input_features=sound, decoder_input_ids=DOCUMENT, **cache_argument(cache))
    snapshot = kvzip.Snapshot.from_cache(cache, DOCUMENT, whisper)

    def told(features: Any, **cache: Any) -> Any:
        given = {"input_features": features, "decoder_input_ids": PROMPT, "max_new_tokens": 6}
        suppressed = {"begin_suppress_tokens": None, "suppress_tokens": None}
        return whisper.generate(**given, **suppressed, do_sample=False, **cache)

    whole = told(sound)
    assert torch.equal(told(sound, **cache_argument(snapshot.to_cache(config))), whole)
    with pytest.raises(KVZipError, match="encoder's tokens"):
        told(other, **cache_argument(snapshot.to_cache(config)))
    with pytest.raises(KVZipError, match="does not say what tokens its encoder"):
        load_cache(snapshot, config, prompt=PROMPT, encoder_ids=SOURCE)


# --- other weights -------------------------------------------------------------------------------


def test_weights_that_change_after_loading(model: Any, snapshot: Any, caplog: Any) -> None:
    cache, again = recoverable(snapshot, model), recoverable(snapshot, model)
    changed(model)
    with pytest.raises(KVZipError, match="other weights"):
        call(model, again)
    assert torch.equal(generate(model, cache), generate(model))
    [told] = warnings_of(caplog)
    assert "other weights" in told


@pytest.mark.parametrize("part", ["all", "encoder", "crossing"])
def test_weights_that_a_witness_tells(model: Any, snapshot: Any, part: str, caplog: Any) -> None:
    """Also those that only an encoder's tokens go through."""
    snapshot.origin = msgspec.structs.replace(snapshot.origin, revision="")
    words = {"all": "", "encoder": "encoder.", "crossing": "EncDecAttention.k encoder_attn.k_proj"}
    names = words[part].split(" ")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(each in name for each in names) and "embed" not in name and "shared" not in name:
                parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num(0.1))
    for options in ({}, {"num_beams": 3}):
        cache = recoverable(snapshot, model)
        assert torch.equal(generate(model, cache, **options), generate(model, **options))
        [told] = warnings_of(caplog)
        assert "other weights" in told or "does not continue" in told
    cache = recoverable(snapshot, model)
    assert torch.allclose(call(model, cache), call(model), atol=1e-4)
    assert len(warnings_of(caplog)) == 1
    with pytest.raises(KVZipError, match=r"of other weights.*encoder's tokens"):
        generate(model, loaded(snapshot, model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.drawn(2)
def test_rounding_is_no_other_weight(model: Any, dtype: torch.dtype, caplog: Any) -> None:
    model = model.to(dtype)
    snapshot = kvzip.Snapshot.from_cache(filled(model), DOCUMENT, model, encoder_ids=SOURCE)
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        for given in ({}, {"num_beams": 2}, {"input_ids": SOURCE.repeat(3, 1), **rows(3)}):
            for load in (loaded, recoverable):
                generate(model, load(snapshot, model), **given)
    assert warnings_of(caplog) == []


# --- what is kept --------------------------------------------------------------------------------


def test_what_generate_fills_of_the_source(model: Any, tmp_path: Any) -> None:
    store = Store(tmp_path / "store", block_tokens=4)
    cache = load_or_prefill(store, model, DOCUMENT, encoder_ids=SOURCE)
    seen = generate(model, cache, decoder_input_ids=DOCUMENT)[:, :-1]
    for told in ({}, {"encoder_ids": SOURCE}):
        found = kvzip.Snapshot.from_cache(cache, seen, model, **told)
        store.put(found, codec="raw")
        longer = torch.cat([seen, some_ids(4, 7)], dim=1)
        cached = load_or_prefill(store, model, longer, encoder_ids=SOURCE)
        assert cached.get_seq_length() == seen.shape[1] - 1
        right = generate(model, decoder_input_ids=longer)
        assert torch.equal(generate(model, cached, decoder_input_ids=longer), right)
    with pytest.raises(KVZipError, match="other tokens of the encoder"):
        kvzip.Snapshot.from_cache(cache, seen, model, encoder_ids=OTHER)


def test_what_generate_fills_of_more_is_not_kept(model: Any) -> None:
    for _, given in of_another_source(model):
        cache = load_or_prefill(None, model, DOCUMENT, encoder_ids=SOURCE)
        count = len(given.get("decoder_input_ids", PROMPT))
        given["decoder_input_ids"] = DOCUMENT.repeat(count, 1)
        seen = generate(model, cache, **given)[:, :-1]
        for told in ({}, {"encoder_ids": SOURCE}):
            with pytest.raises(UnsupportedError, match="depend on more than"):
                kvzip.Snapshot.from_cache(cache, seen, model, **told)


def test_ids_that_do_not_fit_the_encoder(model: Any) -> None:
    for wrong in (SOURCE[:, :-1], SOURCE.repeat(2, 1)):
        with pytest.raises(KVZipError, match="encoder_ids has shape"):
            kvzip.Snapshot.from_cache(filled(model), DOCUMENT, model, encoder_ids=wrong)
    own = filled(model).self_attention_cache
    with pytest.raises(UsageError, match="this cache has none"):
        kvzip.Snapshot.from_cache(own, DOCUMENT, encoder_ids=SOURCE)


def test_a_cancelled_load(model: Any, snapshot: Any) -> None:
    """Of both caches, that of the decoder's own tokens and that of the encoder's."""
    blob = kvzip.encode(snapshot, "raw")
    for cache in (loaded(blob, model), recoverable(blob, model)):
        cancel(cache)
        with pytest.raises(CancelledError):
            generate(model, cache)
