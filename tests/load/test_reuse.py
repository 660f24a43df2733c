"""A cache that was used, one as long as its prompt, and prompts that are fed in chunks."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support import readme_document, readme_model, tiny_model

import kvzip
from kvzip.load.hf import cache_argument, load_batch, load_cache, load_or_prefill

NEW = 5


@pytest.fixture(scope="module", params=["full", "sliding"])
def model(request):
    if request.param == "full":
        return readme_model(dtype="float32", pad_token_id=0)
    return tiny_model("Gemma3Text", dtype="float32", vocab_size=500, sliding_window=64).model


@pytest.fixture(scope="module")
def document(model):
    return torch.arange(3, 103)[None]


@pytest.fixture(scope="module")
def blob(model, document):
    return kvzip.encode(readme_document(model, document))


@pytest.fixture
def prompt(document):
    return torch.cat([document, torch.arange(200, 220)[None]], 1)


def sequences(model, ids, cache=None, **more):
    """What was fed, and the new tokens, [batch, tokens]."""
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 0,
    }
    given = {} if cache is None else cache_argument(cache)
    return model.generate(ids, **{**options, **given, **more})


def generate(model, ids, cache=None, **more):
    return sequences(model, ids, cache, **more)[:, ids.shape[1] :].tolist()


def caches(model, blob, prompt, **more):
    yield load_cache(blob, model.config, prompt=prompt, **more)
    yield load_or_prefill(blob, model, prompt, **more)


def test_a_used_cache_is_no_cache_of_the_same_prompt(model, blob, prompt):
    for cache in caches(model, blob, prompt):
        fresh = generate(model, prompt)
        assert generate(model, prompt, cache) == fresh
        for reused in (
            prompt,
            prompt[:, :110],
            prompt[:, :101],
            torch.cat([prompt] * 2, 1)[:, :122],
        ):
            with pytest.raises(kvzip.KVZipError, match=r"longer than its cache|does not continue"):
                generate(model, reused, cache)


def test_a_used_cache_goes_on(model, blob, prompt):
    for cache in caches(model, blob, prompt):
        told = prompt
        for turn in range(3):
            answer = generate(model, told, cache)
            assert answer == generate(model, told)
            told = torch.cat([told, torch.tensor(answer), torch.arange(300, 307)[None] + turn], 1)


def changed(ids, at):
    """Other text: another token at a position, and all else as it was."""
    ids = ids.clone()
    ids[:, at] = (ids[:, at] + 7) % 400
    return ids


def test_a_used_cache_goes_on_with_no_other_text(model, blob, prompt):
    """Other ids anywhere in what it holds, the generated ones among them, however much follows."""
    more = torch.arange(300, 340)[None]
    for cache in (*caches(model, blob, prompt), load_or_prefill(None, model, prompt)):
        answer = torch.tensor(generate(model, prompt, cache))
        told = torch.cat([prompt, answer, more], 1)
        length = cache.get_seq_length()
        assert length == prompt.shape[1] + NEW - 1
        for at in (0, 50, 99, 100, 119, 120, length - 1):
            for size in (length + 1, length + 2, told.shape[1]):
                with pytest.raises(kvzip.KVZipError, match=f"does not continue .* position {at}:"):
                    generate(model, changed(told, at)[:, :size], cache)
        assert cache.get_seq_length() == length
        for at in (length, length + 10):  # beyond what it holds anything may follow
            other = changed(told, at)
            assert generate(model, other, copy.deepcopy(cache)) == generate(model, other)
        assert generate(model, told, cache) == generate(model, told)
        with pytest.raises(kvzip.KVZipError, match="does not continue"):
            generate(model, changed(torch.cat([told, told], 1), length + 10), cache)


def test_a_fresh_cache_is_of_its_own_text_only(model, blob, prompt):
    made = [
        lambda: load_cache(blob, model.config, prompt=prompt),
        lambda: load_or_prefill(blob, model, prompt),
    ]
    if all(layer.kind == "full" for layer in kvzip.info(blob).header.layout.layers):
        made.append(lambda: load_cache(blob, model.config))
        made.append(lambda: kvzip.decode(blob).to_cache(model.config))
    for make in made:
        for at in (0, 30, 98):
            with pytest.raises(kvzip.KVZipError, match=f"does not continue .* position {at}:"):
                generate(model, changed(prompt, at), make())


def test_a_cache_that_raised_is_as_it_was(model, blob, prompt):
    for cache in caches(model, blob, prompt):
        for wrong in (changed(prompt, 30), changed(prompt, 30)[:, :70], prompt[:, :101]):
            with pytest.raises(kvzip.KVZipError):
                generate(model, wrong, cache)
        assert generate(model, prompt, cache) == generate(model, prompt)


def test_the_rest_of_a_prompt_with_a_mask_for_all(model, blob, prompt):
    """`generate` takes ids that its mask goes beyond for those that are to be fed."""
    cache = load_cache(blob, model.config, prompt=prompt)
    rest = prompt[:, cache.get_seq_length() :]
    mask = torch.ones_like(prompt)
    assert generate(model, rest, cache, attention_mask=mask) == generate(model, prompt)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_after_beams_the_prompt_is_known(model, blob, prompt, more):
    for cache in caches(model, blob, prompt):
        out = generate(model, prompt, cache, **more)
        assert out == generate(model, prompt, **more)
        longer = torch.cat([prompt, torch.arange(300, 340)[None]], 1)
        for at in (0, 99, 119):
            with pytest.raises(kvzip.KVZipError, match=f"position {at}:"):
                generate(model, changed(longer, at), cache, **more)


def test_after_several_sequences_each_is_known(model, blob, prompt):
    cache = load_cache(blob, model.config, prompt=prompt)
    torch.manual_seed(0)
    whole = sequences(model, prompt, cache, do_sample=True, num_return_sequences=3)
    told = torch.cat([whole, torch.arange(300, 307)[None].expand(3, -1)], 1)
    for row in range(3):
        other = told.clone()
        other[row, 121] = (other[row, 121] + 7) % 400
        with pytest.raises(kvzip.KVZipError, match="position 121"):
            generate(model, other, cache)
    assert generate(model, told, cache) == generate(model, told)


def test_a_batch_goes_on_whatever_its_padding_is(model, blob, prompt):
    if any(layer.kind == "sliding" for layer in kvzip.info(blob).header.layout.layers):
        pytest.skip("its windows are cropped")
    prompts = [prompt[0], prompt[0, :108]]
    given = load_batch([blob, blob], model.config, prompts)
    [name] = cache_argument(None)
    cache, mask = given[name], given["attention_mask"]
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    whole = model.generate(**given, pad_token_id=0, **settings)
    told = torch.cat([whole, torch.arange(300, 307)[None].expand(2, -1)], 1)
    mask = torch.cat([mask, torch.ones(2, NEW + 7, dtype=mask.dtype)], 1)
    told[1, :12] = 9  # padding may be any
    for at in (20, 119, 121):
        with pytest.raises(kvzip.KVZipError, match=f"position {at}:"):
            model.generate(
                changed(told, at), attention_mask=mask, **settings, **cache_argument(cache)
            )
    went = model.generate(told, attention_mask=mask, **settings, **cache_argument(cache))
    assert went.tolist() == model.generate(told, attention_mask=mask, **settings).tolist()


def test_what_was_cropped_is_forgotten(model, blob, prompt):
    if type(model).__name__.startswith("Gemma"):
        pytest.skip("transformers does not crop windows that are full")
    for cache in caches(model, blob, prompt):
        generate(model, prompt, cache)
        cache.crop(60 - cache.get_seq_length())
        other = changed(prompt, 60)
        assert generate(model, other, cache) == generate(model, other)
        with pytest.raises(kvzip.KVZipError, match="position 59"):
            generate(model, changed(torch.cat([prompt] * 2, 1), 59), cache)


def test_what_the_model_was_fed_by_hand_is_taken_on_trust(model, blob, prompt):
    cache = load_cache(blob, model.config, prompt=prompt)
    generate(model, prompt, cache)
    by_hand = torch.arange(300, 310)[None]
    with torch.no_grad():
        model(by_hand, **cache_argument(cache))
    length = cache.get_seq_length()
    told = torch.cat([prompt, torch.zeros(1, length - 120, dtype=torch.long), by_hand], 1)
    with pytest.raises(kvzip.KVZipError, match=r"position 12\d:"):  # generated, and known
        generate(model, told, cache)
    with pytest.raises(kvzip.KVZipError, match=r"position 7:"):
        generate(model, changed(told, 7), cache)


def test_other_caches_are_none_of_ours(model, prompt):
    cache = transformers.DynamicCache(config=model.config)
    generate(model, prompt, cache)
    other = changed(torch.cat([prompt, prompt], 1), 5)
    assert generate(model, other, cache)
    assert model.generate.__func__ is transformers.GenerationMixin.generate
    assert model.generate.__doc__.strip().startswith("Generates sequences")


@pytest.mark.skipif(
    transformers.__version__.startswith("5.20."), reason="it forgets a cache's tokens itself"
)
@pytest.mark.parametrize("chunk", [1, 3, 8, 20, 64])
def test_a_prompt_in_chunks(model, blob, prompt, chunk):
    for cache in caches(model, blob, prompt, prefill_chunk_size=chunk):
        whole = generate(model, prompt)
        assert generate(model, prompt, cache, prefill_chunk_size=chunk) == whole
    for cache in caches(model, blob, prompt, prefill_chunk_size=chunk + 1):
        if chunk < 20:
            with pytest.raises(kvzip.KVZipError, match="in chunks of"):
                generate(model, prompt, cache, prefill_chunk_size=chunk)
    with pytest.raises(kvzip.UsageError, match="prefill_chunk_size"):
        load_cache(blob, model.config, prompt=prompt, prefill_chunk_size=0)


@pytest.mark.parametrize("how", ["lookup", "assistant", "early exit", "own layers", "config"])
def test_assisted_generation_is_refused_where_a_cache_has_tokens(model, blob, prompt, how):
    """transformers feeds the whole prompt again then, after what any cache holds."""
    more = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {
            "assistant_model": readme_model(dtype="float32", pad_token_id=0, num_hidden_layers=1)
        },
        "early exit": {"assistant_early_exit": 1},
        "own layers": {"use_mtp": True},
        "config": {"generation_config": transformers.GenerationConfig(prompt_lookup_num_tokens=3)},
    }[how]
    for cache in caches(model, blob, prompt):
        for _ in ("fresh", "used"):
            with pytest.raises(kvzip.KVZipError, match="lookup and the assistant"):
                generate(model, prompt, cache, **more)
            prompt = torch.cat([prompt, torch.tensor(generate(model, prompt, cache))], 1)
        prompt = prompt[:, :120]
    empty = load_or_prefill(None, model, prompt)
    if how == "lookup" and not any(empty.is_sliding):
        assert generate(model, prompt, empty, **more) == generate(model, prompt, **more)


def test_a_prompt_that_is_fed_by_hand_one_token_at_a_time(model, blob, prompt):
    for cache in caches(model, blob, prompt):
        with pytest.raises(kvzip.KVZipError, match="1 for one token at a time"), torch.no_grad():
            model(prompt[:, cache.get_seq_length() :][:, :1], **cache_argument(cache))
    for cache in caches(model, blob, prompt, prefill_chunk_size=1):
        with torch.no_grad():
            for at in range(cache.get_seq_length(), 120):
                out = model(prompt[:, at : at + 1], **cache_argument(cache))
        assert [[int(out.logits[0, -1].argmax())]] == [generate(model, prompt)[0][:1]]


def test_the_cache_of_a_snapshot(model, blob, document, prompt):
    snapshot = kvzip.decode(blob)
    if snapshot.layout.lacking(snapshot.tokens) is not None:
        pytest.skip("its windows are cropped")
    assert generate(model, prompt, snapshot.to_cache(model.config)) == generate(model, prompt)
    for length in (100, 99, 80, 52, 51, 50):
        with pytest.raises(kvzip.KVZipError):
            generate(model, document[:, :length], snapshot.to_cache(model.config))
    again = kvzip.Snapshot.from_cache(snapshot.to_cache(model.config), document, model)
    for mine, its in zip(again.layers, snapshot.layers, strict=True):
        assert (mine.k == its.k).all() and (mine.v == its.v).all()
