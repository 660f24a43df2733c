"""Caches that are pickled, saved and copied, at any time, go on as they would have."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import Family  # noqa: E402
from family_checks import Checks  # noqa: E402
from support import damaged, readme_document, readme_model  # noqa: E402

import kvzip  # noqa: E402
from kvzip.load.hf import (  # noqa: E402
    cache_argument,
    load_batch_or_prefill,
    load_cache,
    load_or_prefill,
)
from kvzip.store import Store  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return readme_model(dtype="float32", pad_token_id=0)


@pytest.fixture(scope="module")
def ids():
    return torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def snapshot(model, ids):
    return readme_document(model, ids)


@pytest.fixture(scope="module")
def prompt(ids):
    return torch.cat([ids, torch.tensor([[60, 61, 62, 63, 64]])], 1)


def generate(model, prompt, cache=None, **more):
    given = {} if cache is None else cache_argument(cache)
    return model.generate(
        prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **given, **more
    )


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": pickled, "torch.save": saved, "deepcopy": copy.deepcopy}
SOURCES = {
    "load_or_prefill": lambda s, m, p: load_or_prefill(kvzip.encode(s), m, p),
    "a snapshot": lambda s, m, p: load_or_prefill(s, m, p),
    "load_cache": lambda s, m, p: load_cache(kvzip.encode(s), m.config, prompt=p),
    "to_cache": lambda s, m, p: s.to_cache(m.config),
    "nothing there": lambda s, m, p: load_or_prefill(None, m, p),
    "a batch": lambda s, m, p: batch_of(load_batch_or_prefill([kvzip.encode(s)], m, p)),
}


def batch_of(given):
    """The cache among the arguments for `generate`."""
    return next(given[name] for name in ("cache", "past_key_values") if name in given)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.drawn(2)
def test_a_copy_goes_on_as_the_cache_would(model, snapshot, prompt, way, source):
    wanted = generate(model, prompt)
    cache = SOURCES[source](snapshot, model, prompt)
    again = WAYS[way](cache)
    assert again.get_seq_length() == cache.get_seq_length()
    assert torch.equal(generate(model, prompt, again), wanted)
    assert torch.equal(generate(model, prompt, cache), wanted)  # which is as it was
    # After its first use, too, and with the ids that it has seen.
    used, other = WAYS[way](again), WAYS[way](again)
    longer = torch.cat([wanted, torch.tensor([[5, 6]])], 1)
    assert torch.equal(generate(model, longer, used), generate(model, longer, again))
    with pytest.raises(kvzip.KVZipError, match="does not continue"):
        generate(model, longer.flip(1), other)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize(
    "family",
    [Family(name) for name in ("minimax", "xlstm", "mamba2", "qwen3_next", "gemma3_text")]
    + [Family("bart", seq2seq=True)],
    ids=str,
)
@pytest.mark.drawn(2)
def test_every_kind_of_layer_goes_on(family, way):
    """States, windows, an encoder's tokens, and classes that a family has of its own."""
    torch.set_num_threads(1)
    checks = Checks(family)
    snapshot, prompt = checks.snapshot(checks.ids), checks.longer(checks.ids, 9)
    given = {**checks.slowly, **checks.given}
    cache = load_cache(snapshot, checks.model.config, prompt=prompt, **given)
    again = WAYS[way](cache)
    assert type(again) is type(cache)
    wanted = checks.says(prompt, cache)
    assert torch.equal(checks.says(prompt, again), wanted)
    # As each of them is after its first use.
    once, twice = WAYS[way](again), WAYS[way](cache)
    longer = torch.cat([prompt, wanted, prompt[:, -2:]], 1)
    assert torch.equal(checks.says(longer, once), checks.says(longer, twice))


def test_a_pickled_cache_needs_neither_file_nor_store(model, snapshot, prompt, tmp_path):
    store = Store(tmp_path / "store", block_tokens=8)
    entry = store.put(snapshot)
    reader = store.open(entry.key)
    data = pickle.dumps(load_cache(reader, model.config, prompt=prompt))
    reader.close()
    store.remove(entry.key)
    assert torch.equal(generate(model, prompt, pickle.loads(data)), generate(model, prompt))


def test_in_another_process_ids_are_compared_too(model, snapshot, prompt, tmp_path):
    cache = load_cache(kvzip.encode(snapshot), model.config, prompt=prompt)
    torch.save((cache, model, prompt), tmp_path / "saved")
    code = (
        "import sys, torch, kvzip\n"
        "cache, model, prompt = torch.load(sys.argv[1], weights_only=False)\n"
        "try: model.generate(prompt.flip(1), max_new_tokens=2, pad_token_id=0, "
        "past_key_values=cache)\n"
        "except kvzip.KVZipError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "saved"], capture_output=True, text=True
    )
    assert "does not continue the cached document" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("revision", "told"), [(None, "or other weights"), ("mine", "of other weights")]
)
def test_other_weights_are_noticed_behind_a_pickle(model, snapshot, prompt, revision, told):
    """By the weights that the cache was loaded for; by its witness, where the caller vouches."""
    cache = pickled(load_or_prefill(snapshot, model, prompt, revision=revision))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight.mul_(3)
    with pytest.raises(kvzip.KVZipError, match=told):
        generate(other, prompt, cache)


def test_what_cannot_be_read_cannot_be_pickled(model, snapshot, prompt):
    blob = damaged(kvzip.encode(snapshot), 1, "k")
    with pytest.raises(kvzip.CorruptError):
        pickle.dumps(load_cache(blob, model.config, prompt=prompt))
    # What recovers does so.
    cache = pickled(load_or_prefill(blob, model, prompt))
    assert torch.equal(generate(model, prompt, cache), generate(model, prompt))


# --- what is told when a cache is used otherwise -------------------------------------------------


@pytest.mark.parametrize("hidden", [(0, 3), (5, 9), (0, 20), (37, 38)])
def test_a_mask_that_hides_what_the_cache_holds(model, snapshot, prompt, caplog, hidden):
    mask = torch.ones_like(prompt)
    mask[:, slice(*hidden)] = 0
    words = f"hides {hidden[1] - hidden[0]} of the .* position {hidden[0]},"
    cache = load_cache(snapshot, model.config, prompt=prompt)
    with pytest.raises(kvzip.KVZipError, match=words):
        generate(model, prompt, cache, attention_mask=mask)
    cache = load_or_prefill(snapshot, model, prompt)
    length = cache.get_seq_length()
    with pytest.raises(kvzip.KVZipError, match=words):
        model(prompt[:, length:], attention_mask=mask, **cache_argument(cache))
    assert not caplog.records  # told once
    assert torch.equal(generate(model, prompt, cache), generate(model, prompt))  # nothing was fed


def test_a_mask_may_hide_the_last_token_that_the_cache_holds(model, snapshot, prompt):
    mask = torch.ones_like(prompt)
    cache = load_cache(snapshot, model.config, prompt=prompt)
    mask[:, cache.get_seq_length() - 1] = 0
    wanted = generate(model, prompt, attention_mask=mask)
    assert torch.equal(generate(model, prompt, cache, attention_mask=mask), wanted)


def test_a_mask_may_hide_what_is_behind_the_cache(model, snapshot, prompt):
    mask = torch.ones_like(prompt)
    mask[:, 41:43] = 0
    cache = load_or_prefill(snapshot, model, prompt)
    wanted = generate(model, prompt, attention_mask=mask)
    assert torch.equal(generate(model, prompt, cache, attention_mask=mask), wanted)


@pytest.fixture
def without_cache(model):
    model.config.use_cache = model.generation_config.use_cache = False
    yield model
    model.config.use_cache = model.generation_config.use_cache = True


@pytest.mark.parametrize("source", SOURCES)
def test_models_that_are_configured_without_a_cache_use_one(
    without_cache, snapshot, prompt, source
):
    cache = SOURCES[source](snapshot, without_cache, prompt)
    wanted = generate(without_cache, prompt)
    assert torch.equal(generate(without_cache, prompt, cache), wanted)
    assert cache.get_seq_length() == wanted.shape[1] - 1


@pytest.mark.parametrize("source", SOURCES)
def test_a_cache_and_no_cache_at_once(model, snapshot, prompt, source):
    cache = SOURCES[source](snapshot, model, prompt)
    with pytest.raises(kvzip.KVZipError, match="use_cache=False"):
        generate(model, prompt, cache, use_cache=False)


def test_chunks_that_were_not_named_are_told_with_how_to(model, snapshot, prompt):
    for cache in (
        load_or_prefill(snapshot, model, prompt),
        load_cache(snapshot, model.config, prompt=prompt),
    ):
        with pytest.raises(kvzip.KVZipError, match="load the cache with the same prefill_chunk"):
            generate(model, prompt, cache, prefill_chunk_size=2)
