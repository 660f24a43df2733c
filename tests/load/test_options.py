"""Arguments that make no sense raise at once, whatever is stored, and are no failure of a store."""

from __future__ import annotations

import pytest
import torch
from support import readme_document, readme_model

from kvzip.errors import KVZipError, ProfileError, UsageError
from kvzip.load.hf import load_batch, load_batch_or_prefill, load_cache, load_or_prefill
from kvzip.snapshot import Snapshot
from kvzip.store import Store

IDS = torch.arange(3, 103)[None]
OPTIONS = [
    *({"tokens": wrong} for wrong in ("x", 1.5, 20.0, True, 0, -1)),
    *({"threads": wrong} for wrong in ("x", -1, 1.5)),
    *({"prefill_chunk_size": wrong} for wrong in ("x", 0, 1.5)),
    {"profile": 3},
]
NAMES = [{"revision": 3}, {"revision": "\ud800"}, {"name": 3}]
RAGGED = [[1], [2, 3]]


@pytest.fixture(scope="module")
def model():
    return readme_model(dtype="float32", pad_token_id=0)


@pytest.fixture(scope="module")
def document(model):
    return readme_document(model, IDS)


@pytest.mark.parametrize("options", OPTIONS + NAMES, ids=str)
@pytest.mark.parametrize("stored", [True, False])
def test_load_or_prefill(model, document, stored, options):
    with pytest.raises((UsageError, ProfileError), match=f"(?i){next(iter(options))}"):
        load_or_prefill(document if stored else None, model, IDS, **options)


@pytest.mark.parametrize("options", [*OPTIONS, {"device": "foo"}, {"device": "meta"}], ids=str)
def test_load_cache(model, document, options):
    for prompt in (IDS, None):
        with pytest.raises((UsageError, ProfileError), match=f"(?i){next(iter(options))}"):
            load_cache(document, model.config, prompt=prompt, **options)


def test_what_is_no_source_and_no_prompt(model, document, tmp_path):
    for source in (3, object()):
        with pytest.raises(UsageError):
            load_or_prefill(source, model, IDS)
    assert load_or_prefill(tmp_path / "none", model, IDS).get_seq_length() == 0
    for prompt in (RAGGED, None, "abc", [1.5], []):
        with pytest.raises(UsageError, match="prompt"):
            load_or_prefill(document, model, prompt)


def test_batches(model, document):
    for options in ({"threads": -1}, {"profile": 3}, {"device": "foo"}):
        with pytest.raises(KVZipError, match=f"(?i){next(iter(options))}"):
            load_batch([document], model.config, [IDS[0]], **options)
    for options in ({"threads": -1}, {"profile": 3}, *NAMES):
        with pytest.raises(KVZipError, match=f"(?i){next(iter(options))}"):
            load_batch_or_prefill([document], model, [IDS[0]], **options)


@pytest.mark.parametrize(
    "wrong", [None, 3, "a.kvz", b"x", object(), {}, []], ids=lambda w: type(w).__name__
)
def test_batches_of_what_is_none(model, document, tmp_path, wrong):
    store, prompts = Store(tmp_path), [IDS[0]]
    for use in (
        lambda: load_batch(wrong, model.config, prompts),
        lambda: load_batch_or_prefill(wrong, model, prompts),
        lambda: load_batch([document], model.config, wrong),
        lambda: load_batch_or_prefill([document], model, wrong),
        lambda: load_batch_or_prefill(store, model, wrong),
        lambda: load_batch([document], wrong, prompts),
        lambda: load_batch_or_prefill(store, wrong, prompts),
    ):
        with pytest.raises(UsageError):
            use()


def test_what_is_no_source_padding_or_model(model, document):
    for wrong in (3, object()):
        with pytest.raises(UsageError):
            load_batch([wrong], model.config, [IDS[0]])
        with pytest.raises(UsageError):
            load_batch_or_prefill([wrong], model, [IDS[0]])
        with pytest.raises(UsageError, match="is no model"):
            Snapshot.from_cache(document.to_cache(model.config), IDS[:, :-1], wrong)
    for wrong in (None, "0", 1.5, -1, object()):
        with pytest.raises(UsageError, match="pad_token_id"):
            load_batch([document], model.config, [IDS[0]], pad_token_id=wrong)
        with pytest.raises(UsageError, match="pad_token_id"):
            load_batch_or_prefill([document], model, [IDS[0]], pad_token_id=wrong)


def test_stores(tmp_path):
    store = Store(tmp_path)
    asked = {"model": "m", "revision": "r", "dtype": "bf16"}
    for options in ({"revision": None}, {"model": "\ud800"}, {"model": 3}, {"profile": 3}):
        with pytest.raises((UsageError, ProfileError), match=f"(?i){next(iter(options))}"):
            store.find([1, 2, 3], **(asked | options))
    with pytest.raises(UsageError, match="token ids"):
        store.find(RAGGED, **asked)
    for method in (store.open, store.remove):
        with pytest.raises(UsageError, match="key"):
            method(3)
