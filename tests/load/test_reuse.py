"""A cache that was used, one as long as its prompt, and prompts that are fed in chunks."""

from __future__ import annotations

import pytest
import torch
from support import readme_document, readme_model

import kvzip
from kvzip.load.hf import cache_argument, load_cache, load_or_prefill

NEW = 5


@pytest.fixture(scope="module", params=["full", "sliding"])
def model(request):
    if request.param == "full":
        return readme_model(pad_token_id=0)
    from support import tiny_model

    return tiny_model("Gemma3Text", vocab_size=500, sliding_window=64).model


@pytest.fixture(scope="module")
def document(model):
    return torch.arange(3, 103)[None]


@pytest.fixture(scope="module")
def blob(model, document):
    return kvzip.encode(readme_document(model, document))


@pytest.fixture
def prompt(document):
    return torch.cat([document, torch.arange(200, 220)[None]], 1)


def generate(model, ids, cache=None, **more):
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        **({} if cache is None else cache_argument(cache)),
        **more,
    )
    return out[:, ids.shape[1] :].tolist()


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
