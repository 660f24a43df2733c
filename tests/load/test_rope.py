"""RoPE that turns by other frequencies in long sequences: a model's tokens stay its own."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support import tiny_model, warnings_of  # noqa: E402

import kvzip  # noqa: E402
from kvzip.errors import KVZipError, UnsupportedError  # noqa: E402
from kvzip.load.config import rope_length  # noqa: E402
from kvzip.load.hf import (  # noqa: E402
    cache_argument,
    load_batch,
    load_batch_or_prefill,
    load_cache,
    load_or_prefill,
)
from kvzip.store import Store  # noqa: E402

ORIGINAL = 32
_BASE = {"rope_theta": 1e4}
_DYNAMIC = {**_BASE, "rope_type": "dynamic", "factor": 4.0}
_LONG = {
    **_BASE,
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": ORIGINAL,
}
_PHI = {"max_position_embeddings": 128, "original_max_position_embeddings": ORIGINAL}
_SLIDING = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LONGER = {
    "dynamic": ("Llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "longrope": ("Llama", {"rope_parameters": _LONG, "max_position_embeddings": 128}),
    "phi3": ("Phi3", {"rope_parameters": _LONG, **_PHI}),
    "phimoe": (
        "Phimoe",
        {
            "rope_parameters": {**_LONG, "short_mscale": 1.0, "long_mscale": 1.3},
            "num_local_experts": 2,
            **_PHI,
        },
    ),
    "one kind of layers dynamic": (
        "Gemma3Text",
        {
            "rope_parameters": {"full_attention": _DYNAMIC, "sliding_attention": _BASE},
            "max_position_embeddings": ORIGINAL,
            **_SLIDING,
        },
    ),
    "one kind of layers longrope": (
        "Gemma3Text",
        {
            "rope_parameters": {"full_attention": _BASE, "sliding_attention": _LONG},
            "max_position_embeddings": 128,
            **_SLIDING,
        },
    ),
}
"""Models whose frequencies depend on the length from 32 tokens on."""
STEADY = {
    "linear": {**_BASE, "rope_type": "linear", "factor": 4.0},
    "yarn": {**_BASE, "rope_type": "yarn", "factor": 4.0},
    "llama3": {
        **_BASE,
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}
"""RoPE that is scaled, by one factor for all lengths."""
TEXT = torch.randint(3, 64, (2, 120), generator=torch.Generator().manual_seed(5))


def made(kind: str, options: dict[str, Any]) -> Any:
    more = {"dtype": "float32", "vocab_size": 64, "pad_token_id": 0, "initializer_range": 0.4}
    return tiny_model(kind, **more, **copy.deepcopy(options)).model


@pytest.fixture(params=LONGER)
def model(request: pytest.FixtureRequest) -> Any:
    return made(*LONGER[request.param])


@pytest.fixture
def store(tmp_path: Any) -> Store:
    return Store(tmp_path / "store", block_tokens=4)


def call(model: Any, ids: Any) -> Any:
    """What the model holds of ids, computed in one call."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    return cache


def document(model: Any, tokens: int, of: int | None = None) -> kvzip.Snapshot:
    """What another process stored of a text: its first `tokens`, of so many that were computed."""
    other = copy.deepcopy(model)
    cache = transformers.DynamicCache(config=model.config)
    cache.activate_past_recording()  # sliding layers keep all that they have seen
    before = kvzip.fingerprint(other)
    with torch.no_grad():
        other(TEXT[:1, : of or tokens], **cache_argument(cache))
    if of is not None:
        cache.crop(tokens - of)
    snapshot = kvzip.Snapshot.from_cache(cache, TEXT[:1, :tokens], other)
    snapshot.origin = msgspec.structs.replace(snapshot.origin, revision=before)
    return snapshot


def generate(model: Any, ids: Any, cache: Any = None, tokens: int = 12, **options: Any) -> Any:
    """The ids and the tokens after them."""
    given = {} if cache is None else cache_argument(cache)
    found: Any = model.generate(
        ids,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **given,
        **options,
    )
    return found


def own(model: Any, ids: Any, kept: int, **options: Any) -> tuple[Any, Any]:
    """What the model gives without kvzip: in one go, and after it has been fed the first `kept`."""
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    whole = generate(one, ids, **options)
    parts = generate(other, ids, call(other, ids[:, :kept]), **options) if kept else whole
    return whole, parts


@pytest.mark.parametrize("prompt", [24, 29, 31])
@pytest.mark.drawn(2)
def test_short_ones_are_loaded(model: Any, store: Store, prompt: int, caplog: Any) -> None:
    """And go on beyond the original length as the model does."""
    store.put(document(model, 20), codec="raw")
    whole, parts = own(model, TEXT[:1, :prompt], 19)
    assert torch.equal(whole, parts)
    cache = load_or_prefill(store, model, TEXT[:1, :prompt])
    assert cache.get_seq_length() == 19
    assert torch.equal(generate(model, TEXT[:1, :prompt], cache), whole)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(("stored", "prompt"), [(20, 32), (31, 32), (32, 20), (40, 31), (40, 60)])
@pytest.mark.drawn(3)
def test_long_ones_are_computed(
    model: Any, store: Store, stored: int, prompt: int, caplog: Any
) -> None:
    snapshot = document(model, stored)
    store.put(snapshot, codec="raw")
    ids = TEXT[:1, :prompt]
    whole, _ = own(model, ids, 0)
    for source in (store, kvzip.encode(snapshot, "raw")):
        asked = copy.deepcopy(model)
        cache = load_or_prefill(source, asked, ids)
        assert cache.get_seq_length() == 0
        assert torch.equal(generate(asked, ids, cache), whole)
        [told] = warnings_of(caplog)
        assert "fewer than 32" in told
        with pytest.raises(UnsupportedError, match="fewer than 32"):
            load_cache(snapshot, model.config, prompt=ids)
        with pytest.raises(UnsupportedError, match="fewer than 32"):
            load_batch([snapshot], model.config, ids)


@pytest.mark.parametrize("longest", [31, 40])
@pytest.mark.drawn(2)
def test_the_longest_row_decides(model: Any, store: Store, longest: int, caplog: Any) -> None:
    store.put(document(model, 20), codec="raw")
    rows = [TEXT[0, :25], TEXT[1, :longest]]
    empty = load_batch_or_prefill([None, None], model, rows)
    ids, mask = empty["input_ids"], empty["attention_mask"]
    whole, _ = own(model, ids, 0, attention_mask=mask)
    asked = copy.deepcopy(model)
    given = load_batch_or_prefill(store, asked, rows)
    [cache] = (value for name, value in given.items() if name in cache_argument(None))
    assert bool(cache.get_seq_length()) == (longest < ORIGINAL)
    assert torch.equal(generate(asked, ids, cache, attention_mask=mask), whole)
    assert len(warnings_of(caplog)) == (longest >= ORIGINAL)


def test_after_a_long_sequence(model: Any, store: Store, caplog: Any) -> None:
    """What was cut short after a long call has the name of the model in that state."""
    ids = TEXT[:1, :25]
    fresh = kvzip.fingerprint(model)
    store.put(document(model, 20), codec="raw")
    call(model, TEXT[:1, :60])
    store.put(document(model, 20, of=60), codec="raw")
    whole, _ = own(model, ids, 0, tokens=4)
    cache = load_or_prefill(store, model, ids)
    assert cache.get_seq_length() == 0
    [told] = warnings_of(caplog)
    assert "as a long sequence has left it" in told
    assert torch.equal(generate(model, ids, cache, tokens=4), whole)
    # That was a short one; where each kind of layers counts, the count is kept, and it is a miss.
    counts = model.config.rope_parameters.get("full_attention", {}).get("rope_type") == "dynamic"
    cache = load_or_prefill(store, model, ids)
    assert (kvzip.fingerprint(model) == fresh) == (not counts)
    assert cache.get_seq_length() == (0 if counts else 19)
    assert torch.equal(generate(model, ids, cache, tokens=4), whole)


def test_a_prompt_that_is_not_known(model: Any, caplog: Any) -> None:
    """`load_cache` sees what it is fed."""
    if model.config.model_type == "gemma3_text":
        pytest.skip("its first layer slides, which wants the prompt")
    snapshot = document(model, 20)
    whole, _ = own(model, TEXT[:1, :31], 0)
    fits = load_cache(snapshot, model.config)
    assert torch.equal(generate(copy.deepcopy(model), TEXT[:1, :31], fits), whole)
    too_long = load_cache(snapshot, model.config, check_weights=False)
    with pytest.raises(KVZipError, match="leave out the cache"):
        generate(copy.deepcopy(model), TEXT[:1, :32], too_long)


@pytest.mark.parametrize("name", STEADY)
def test_other_scaling_is_loaded_at_any_length(name: str, store: Store, caplog: Any) -> None:
    model = made("Llama", {"rope_parameters": STEADY[name], "max_position_embeddings": 128})
    assert rope_length(model.config) is None
    store.put(document(model, 40), codec="raw")
    whole, _ = own(model, TEXT[:1, :60], 39)
    cache = load_or_prefill(store, model, TEXT[:1, :60])
    assert cache.get_seq_length() == 39
    assert torch.equal(generate(model, TEXT[:1, :60], cache), whole)
    assert warnings_of(caplog) == []
