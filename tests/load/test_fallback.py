"""Whatever happens to what is stored, `generate` gives what it gives without, and says so once."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from servers import DyingStore, failing_server, silent_server  # noqa: E402
from support import damaged, warnings_of  # noqa: E402

import kvzip  # noqa: E402
from kvzip.container import blocks  # noqa: E402
from kvzip.errors import StoreError, UsageError  # noqa: E402
from kvzip.load.documents import StoredDocument  # noqa: E402
from kvzip.load.hf import (  # noqa: E402
    cache_argument,
    load_batch_or_prefill,
    load_cache,
    load_or_prefill,
)
from kvzip.store import Store  # noqa: E402


def tokens_of(case: Any, ids: Any, past: Any, **options: Any) -> Any:
    return case.generate(ids, past, **options)[0]


@pytest.fixture
def right(case: Any) -> Any:
    """What the model gives on its own."""
    return tokens_of(case, case.longer(), None)


# --- nothing fails ---------------------------------------------------------------------------


def test_it_loads(case: Any, right: Any, caplog: Any) -> None:
    cache = load_or_prefill(case.blob, case.model, case.longer())
    assert cache.get_seq_length() == 49
    assert case.same(case.longer(), cache, case.kept(49))
    assert torch.equal(tokens_of(case, case.longer(), None), right)
    assert warnings_of(caplog) == []


def test_from_a_store(case: Any, right: Any, tmp_path: Any, caplog: Any) -> None:
    store = Store(tmp_path, block_tokens=8)
    named = kvzip.Origin(model="tiny", revision="r")
    snapshot = case.snapshot
    store.put(kvzip.Snapshot(snapshot.layers, snapshot.dtype, snapshot.token_ids[:50], named))
    cache = load_or_prefill(store, case.model, case.longer(), name="tiny", revision="r")
    assert cache.get_seq_length() == 49
    assert torch.equal(tokens_of(case, case.longer(), cache), right)
    miss = load_or_prefill(store, case.model, case.longer(), name="tiny", revision="other")
    assert miss.get_seq_length() == 0
    assert torch.equal(tokens_of(case, case.longer(), miss), right)
    assert warnings_of(caplog) == []  # a miss is no failure


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "part"), [(0, "k"), (1, "v"), (3, "v")])
def test_a_damaged_block(name: str, tiny: Any, layer: int, part: str, caplog: Any) -> None:
    """In whichever layer: those before it stay as they were loaded, the rest is computed."""
    case = tiny(name)
    right = tokens_of(case, case.longer(), None)
    blob = damaged(case.blob, layer, part)
    with pytest.raises(kvzip.CorruptError):
        tokens_of(case, case.longer(), load_cache(blob, case.config, prompt=case.longer()))
    cache = load_or_prefill(blob, case.model, case.longer())
    assert cache.get_seq_length() == 49
    assert torch.equal(tokens_of(case, case.longer(), cache), right)
    [told] = warnings_of(caplog)
    assert f"layer {layer} {part}" in told


def test_what_cannot_be_opened(tiny: Any, tmp_path: Any, caplog: Any) -> None:
    case = tiny("llama")
    right = tokens_of(case, case.longer(), None)
    fewer = kvzip.Snapshot(
        case.snapshot.layers[:3], case.snapshot.dtype, case.snapshot.token_ids, case.snapshot.origin
    )
    other = tiny("qwen3", "bfloat16").snapshot
    profile = kvzip.Profile({"t": np.arange(3)}, {})
    for source, line in (
        (b"something else", "not a .kvz file"),
        (case.blob[:-1], "cut short"),
        (tmp_path / "nothing.kvz", "No such file"),
        (kvzip.encode(fewer, "raw"), "3 layers, the model 4"),
        (kvzip.encode(other, "raw"), "holds torch.bfloat16, the model torch.float32"),
        (kvzip.encode(case.snapshot, "raw", profile), "none was given"),
        (kvzip.encode(case.snapshot, "raw", store_token_ids=False), "no token ids"),
    ):
        cache = load_or_prefill(source, case.model, case.longer())
        assert cache.get_seq_length() == 0
        assert torch.equal(tokens_of(case, case.longer(), cache), right)
        [told] = warnings_of(caplog)
        assert line in told
    wrong = kvzip.Profile({"t": np.arange(4)}, {})
    blob = kvzip.encode(case.snapshot, "raw", profile)
    load_or_prefill(blob, case.model, case.longer(), profile=wrong)
    assert "the one given is" in warnings_of(caplog)[0]
    with pytest.raises(kvzip.ProfileError):
        load_cache(blob, case.config)


def test_the_store_has_the_profile(tiny: Any, tmp_path: Any, caplog: Any) -> None:
    """It is fetched where none is given; if it is damaged or gone, the model computes."""
    case = tiny("llama")
    right = tokens_of(case, case.longer(), None)
    profile = kvzip.Profile.fit([case.snapshot])
    entry = Store(tmp_path, block_tokens=8).put(case.snapshot, codec="predictive", profile=profile)
    cache = load_or_prefill(Store(tmp_path), case.model, case.longer())
    assert cache.get_seq_length() == 49
    assert torch.equal(tokens_of(case, case.longer(), cache), right)
    document = StoredDocument(Store(tmp_path), entry.key)
    cache = load_cache(document, case.model.config, prompt=case.longer())
    assert torch.equal(tokens_of(case, case.longer(), cache), right)
    assert not warnings_of(caplog)
    [stored] = tmp_path.rglob("*.kvprofile")
    stored.write_bytes(stored.read_bytes()[:-1])
    cache = load_or_prefill(Store(tmp_path), case.model, case.longer())
    assert cache.get_seq_length() == 0
    assert torch.equal(tokens_of(case, case.longer(), cache), right)
    [told] = warnings_of(caplog)
    assert profile.id in told and "damaged" in told
    stored.unlink()
    cache = load_or_prefill(Store(tmp_path), case.model, case.longer())
    assert cache.get_seq_length() == 0
    with pytest.raises(kvzip.ProfileError, match=profile.id):
        load_cache(StoredDocument(Store(tmp_path), entry.key), case.model.config)


def test_other_weights(name: str, tiny: Any, caplog: Any) -> None:
    """Of the same shapes: what the first layer makes of the next token tells."""
    case = tiny(name)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(case.config).eval()
    for ids in (case.ids, case.longer()):
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        right = model.generate(ids, **options)
        cache = load_or_prefill(case.unpinned, model, ids)
        assert torch.equal(model.generate(ids, **cache_argument(cache), **options), right)
        [told] = warnings_of(caplog)
        assert "does not continue" in told


def test_a_file_that_says_of_which_weights_it_is(tiny: Any, caplog: Any) -> None:
    """Weights that changed by less than any witness can see give an empty cache."""
    case = tiny("llama")
    for source in (case.blob, case.snapshot):
        model = copy.deepcopy(case.model)
        assert load_or_prefill(source, model, case.longer()).get_seq_length() == 49
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1 + 2**-7)
        assert load_or_prefill(source, model, case.longer()).get_seq_length() == 0
        [told] = warnings_of(caplog)
        assert "of other weights" in told and kvzip.fingerprint(model) in told
        given = load_or_prefill(source, model, case.longer(), revision="the caller vouches")
        assert given.get_seq_length() == 49
        batch = load_batch_or_prefill([source, None], model, [case.longer()[0], case.ids[0]])
        [name] = cache_argument(None)
        assert batch[name].get_seq_length() == 0 and len(warnings_of(caplog)) == 1


def test_beams_and_batches_recover(tiny: Any, caplog: Any) -> None:
    case = tiny("llama")
    blob = damaged(case.blob, 2, "v")
    right = tokens_of(case, case.longer(), None, num_beams=3)
    cache = load_or_prefill(blob, case.model, case.longer())
    assert torch.equal(tokens_of(case, case.longer(), cache, num_beams=3), right)
    two = tiny("gemma3", "float32", 2)
    blob = damaged(two.blob, 1, "k")
    right = tokens_of(two, two.longer(), None)
    cache = load_or_prefill(blob, two.model, two.longer())
    assert torch.equal(tokens_of(two, two.longer(), cache), right)
    assert len(warnings_of(caplog)) == 2


def test_wrong_use_is_still_an_error(tiny: Any) -> None:
    """What was promised to be fed is what the computed tokens would be taken from."""
    case = tiny("llama")
    ids = case.longer()
    other = ids.clone()
    other[0, 49:] = (other[0, 49:] - 2) % 61 + 3
    with pytest.raises(kvzip.KVZipError, match="not the rest"):
        case.generate(ids[:, :55], load_or_prefill(case.blob, case.model, ids))
    with pytest.raises(kvzip.KVZipError, match="does not continue"):
        case.generate(other, load_or_prefill(case.blob, case.model, ids))


def test_a_stores_folder_is_no_document(tiny: Any, tmp_path: Any) -> None:
    case = tiny("llama")
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(UsageError, match="give a Store of it"):
            load_or_prefill(folder, case.model, case.longer())


# --- stores that fail ------------------------------------------------------------------------


def stored(case: Any, url: str, **more: Any) -> tuple[Store, Any]:
    """A store with the document, named, in many small requests."""
    store = Store(url, block_tokens=8, **more)
    snapshot = case.snapshot
    named = kvzip.Snapshot(
        snapshot.layers, snapshot.dtype, snapshot.token_ids, kvzip.Origin(model="tiny")
    )
    return store, store.put(kvzip.encode(named, "raw", block_tokens=8))


@pytest.mark.drawn(2)
def test_from_a_bucket_and_over_http(case: Any, right: Any, s3: Any, caplog: Any) -> None:
    prefix = f"fallback-{case.config.model_type}-{case.snapshot.dtype}"
    store, entry = stored(case, f"{s3.url}/{prefix}", options=s3.options)
    space, document = entry.key.split("/")
    path = f"{prefix}/{space}/docs/{document}.kvz"
    for source in (store, Store(f"{s3.http}/{prefix}"), f"{s3.http}/{path}"):
        cache = load_or_prefill(source, case.model, case.longer(), name="tiny", revision="")
        assert cache.get_seq_length() == 49
        assert torch.equal(tokens_of(case, case.longer(), cache), right)
    cache = load_cache(f"{s3.http}/{path}", case.config, prompt=case.longer())
    assert cache.get_seq_length() == 50
    assert case.same(case.longer(), cache, load_cache(case.blob, case.config, prompt=case.longer()))
    with pytest.raises(StoreError, match="there is no"):
        load_cache(f"{s3.http}/{prefix}/nothing.kvz", case.config)
    assert warnings_of(caplog) == []


def test_a_store_that_dies_on_the_way(
    name: str, tiny: Any, s3: Any, caplog: Any, monkeypatch: Any
) -> None:
    """After the n-th request for bytes, for every n until none fails."""
    case = tiny(name)
    right = tokens_of(case, case.longer(), None)
    store, _ = stored(case, f"{s3.url}/dies-{name}", options=s3.options)
    dying = DyingStore(monkeypatch)
    failures = 0
    for n in (0, 1, 2, 5, 12, 30, 200):
        dying.left = n
        cache = load_or_prefill(store, case.model, case.longer(), name="tiny", revision="")
        assert torch.equal(tokens_of(case, case.longer(), cache), right)
        told = warnings_of(caplog)
        assert told == [] or (len(told) == 1 and "the store is gone" in told[0])
        failures += len(told)
    assert failures >= 5 and told == []


def test_a_store_that_is_too_slow(tiny: Any, caplog: Any) -> None:
    case = tiny("llama")
    right = tokens_of(case, case.longer(), None)
    with silent_server() as url:
        store = Store(url, timeout=0.3, retries=0)
        began = time.monotonic()
        cache = load_or_prefill(store, case.model, case.longer(), name="tiny", revision="")
        assert torch.equal(tokens_of(case, case.longer(), cache), right)
        assert time.monotonic() - began < 5
    [told] = warnings_of(caplog)
    assert "cannot read" in told


@pytest.mark.parametrize("silent", [False, True], ids=["dies", "stalls"])
def test_a_server_that_fails_on_the_way(
    tiny: Any, tmp_path: Any, caplog: Any, monkeypatch: Any, silent: bool
) -> None:
    """Once the document is open, by closed connections or by silence."""
    case = tiny("llama")
    right = tokens_of(case, case.longer(), None)
    _, entry = stored(case, str(tmp_path))
    monkeypatch.setattr(blocks, "FIRST_READ", 8192)
    with failing_server(tmp_path) as server:
        server.fail(entry.key.split("/")[1] + ".kvz", 1, silent)
        store = Store(server.url, timeout=1.5, retries=0)
        cache = load_or_prefill(store, case.model, case.longer(), name="tiny", revision="")
        assert cache.get_seq_length() == 49
        began = time.monotonic()
        assert torch.equal(tokens_of(case, case.longer(), cache), right)
        assert time.monotonic() - began < 5
    [told] = warnings_of(caplog)
    assert "cannot read" in told


def test_a_header_that_lies_about_the_model(tiny: Any, caplog: Any) -> None:
    """Another rotation than the model's: refused before anything is decoded."""
    case = tiny("llama")
    right = tokens_of(case, case.longer(), None)
    origin = case.snapshot.origin
    rope = json.loads(json.dumps(origin.rope))
    rope[0]["rope_theta"] = 77.0
    lying = kvzip.Origin(model=origin.model, rope=tuple(rope))
    snapshot = kvzip.Snapshot(
        case.snapshot.layers, case.snapshot.dtype, case.snapshot.token_ids, lying
    )
    cache = load_or_prefill(kvzip.encode(snapshot, "raw"), case.model, case.longer())
    assert torch.equal(tokens_of(case, case.longer(), cache), right)
    assert "rope_theta 77.0" in warnings_of(caplog)[0]
