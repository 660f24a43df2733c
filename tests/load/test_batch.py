"""Several documents in one batch, and conversations that go on."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvzip  # noqa: E402
from kvzip.container import blocks  # noqa: E402
from kvzip.load.hf import cache_argument, load_batch, load_cache, load_or_prefill  # noqa: E402
from kvzip.store import Store, remote  # noqa: E402
from kvzip.store.bucket import Bucket, open_url  # noqa: E402


def document(case: Any, ids: Any) -> bytes:
    """The whole history of a document's cache, one row of ids [n]."""
    cache = transformers.DynamicCache(config=case.config)
    cache.activate_past_recording()
    with torch.no_grad():
        case.model(ids[None], **cache_argument(cache))
    return kvzip.encode(
        kvzip.Snapshot.from_cache(cache, ids, case.model), "planes", block_tokens=8, threads=1
    )


def new_tokens(case: Any, batch: dict[str, Any], **options: Any) -> Any:
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return case.generate(asked.pop("input_ids"), cache_in(batch), **asked, **options)[0]


def cache_in(batch: dict[str, Any]) -> Any:
    """The cache of what `load_batch` returns."""
    [name] = cache_argument(None)
    return batch[name]


@pytest.fixture
def texts(case: Any) -> Any:
    """Ids of three texts, 50, 30 and 41 tokens long."""
    whole = case.longer(tokens=200)[0]
    return whole[:50], whole[60:90], whole[100:141]


def padded(prompts: Any) -> dict[str, Any]:
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts]
    )
    return {"input_ids": ids, "attention_mask": mask, **cache_argument(None)}


ASKED = [(9, 9, 9), (1, 20, 3), (0, 40, 7), (12, 1, 60)]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.drawn(2)
def test_documents_of_different_lengths(name: str, tiny: Any, asked: Any) -> None:
    """Tokens as without caches, in the batch and each row alone."""
    case = tiny(name)
    whole = case.longer(tokens=200)[0]
    texts = whole[:50], whole[60:90], whole[100:141]
    tail = case.longer(tokens=300, seed=6)[0, 50:]
    prompts = [
        torch.cat([t, tail[70 * i : 70 * i + n]])
        for i, (t, n) in enumerate(zip(texts, asked))  # noqa: B905
    ]
    batch = load_batch([document(case, t) for t in texts], case.config, prompts)
    past = cache_in(batch)
    kept = past.get_seq_length()
    assert kept == min(
        min(len(t), len(p) - 1) + max(map(len, prompts)) - len(p)
        for t, p in zip(texts, prompts, strict=True)
    )
    right = new_tokens(case, padded(prompts))
    assert torch.equal(new_tokens(case, batch), right)
    for row, prompt in enumerate(prompts):
        alone, _ = case.generate(prompt[None], None)
        assert torch.equal(alone[0], right[row])


def test_what_is_kept_is_what_was_stored(case: Any, texts: Any) -> None:
    """Bit for bit, each row behind its padding; sliding layers their window."""
    prompts = [torch.cat([t, t[:5]]) for t in texts]
    batch = load_batch([document(case, t) for t in texts], case.config, prompts)
    cache, longest = cache_in(batch), max(map(len, prompts))
    for row, text in enumerate(texts):
        alone = load_cache(document(case, text), case.config, prompt=prompts[row])
        assert alone.get_seq_length() == len(text)
        pad = longest - len(prompts[row])
        for mine, other in zip(cache.layers, alone.layers, strict=True):
            held = min(other.keys.shape[2], len(text))
            assert torch.equal(mine.keys[row, :, -held:], other.keys[0])
            assert torch.equal(mine.values[row, :, -held:], other.values[0])
            assert not mine.keys[row, :, : mine.keys.shape[2] - held].any()
            assert mine.keys.shape[2] in (pad + len(text), 15)


def test_rows_without_a_document(name: str, tiny: Any) -> None:
    case = tiny(name)
    ids = case.longer(tokens=60)[0]
    prompts = [ids[:59], ids[70:90], ids[90:93]]
    blob = document(case, case.ids[0])
    for sources, order, kept in (
        ([blob, None, None], (0, 1, 2), 39),
        ([None, None, blob], (1, 2, 0), 39),
        ([None, None, None], (0, 1, 2), 0),
    ):
        asked = [prompts[i] for i in order]
        batch = load_batch(sources, case.config, asked)
        assert cache_in(batch).get_seq_length() == kept
        assert torch.equal(new_tokens(case, batch), new_tokens(case, padded(asked)))


def test_beams(tiny: Any) -> None:
    case = tiny("llama")
    prompts = [case.longer()[0], case.longer()[0, :54]]
    options: dict[str, Any] = {"num_beams": 3}
    right = new_tokens(case, padded(prompts), **options)
    batch = load_batch([case.blob, case.blob], case.config, prompts)
    assert torch.equal(new_tokens(case, batch, **options), right)


def test_a_batch_checks_what_is_fed(tiny: Any) -> None:
    case = tiny("llama")
    ids = case.longer()[0]
    prompts = [ids[:59], ids[:45]]  # the second leaves document to compare with
    batch = load_batch([case.blob, case.blob], case.config, prompts)
    other = batch["input_ids"].clone()
    other[1, 50] = (other[1, 50] - 2) % 61 + 3
    kept = cache_in(batch).get_seq_length()
    with pytest.raises(kvzip.KVZipError, match="does not continue"):
        wrong = batch["input_ids"].clone()
        wrong[1, kept] = (wrong[1, kept] - 2) % 61 + 3
        new_tokens(case, {**copy.deepcopy(batch), "input_ids": wrong})
    with pytest.raises(kvzip.KVZipError, match="not the rest"):
        new_tokens(case, {**copy.deepcopy(batch), "input_ids": batch["input_ids"][:, :-2]})
    for sources, bad, line in (
        ([case.blob], prompts, "1 documents for 2 prompts"),
        ([], [], "0 documents"),
        ([case.blob, tiny("qwen3", "bfloat16").blob], prompts, "not all of one dtype"),
        ([case.blob, case.blob], [ids, ids[9:]], "no prefix in common"),
        ([tiny("llama", "float32", 2).blob, None], prompts, "batch of 1, the file one of 2"),
    ):
        with pytest.raises(kvzip.KVZipError, match=line):
            load_batch(sources, case.config, bad)
    short = tiny("mistral")
    with pytest.raises(kvzip.KVZipError, match="slides and holds only"):
        load_batch([short.blob, None], short.config, [short.longer()[0], ids[:55]])


# --- conversations ---------------------------------------------------------------------------


def test_a_chat_goes_on(case: Any) -> None:
    """Turn after turn on the same cache, as without one."""
    cache = load_cache(case.blob, case.config, prompt=case.longer())
    ids = case.longer()
    for turn in range(3):
        new, _ = case.generate(ids, cache)
        right, _ = case.generate(ids, None)
        assert torch.equal(new, right)
        ids = torch.cat([ids, new, case.longer(tokens=5, seed=20 + turn)[:, 50:]], dim=1)


def test_a_chat_is_stored_and_taken_up_again(name: str, tiny: Any, tmp_path: Any) -> None:
    """By another process, say: what was generated is in the store with the document."""
    case = tiny(name)
    store = Store(tmp_path, block_tokens=8)
    cache = load_cache(case.blob, case.config, prompt=case.longer())
    cache.layers[0].keys  # noqa: B018
    new, _ = case.generate(case.longer(), cache)
    ids = torch.cat([case.longer(), new], dim=1)
    fed = ids[:, : cache.get_seq_length()]  # the last token was never fed
    assert fed.shape[1] == ids.shape[1] - 1
    entry = store.put(kvzip.Snapshot.from_cache(cache, fed, "tiny"), codec="raw")
    assert entry.tokens == fed.shape[1]
    again = torch.cat([ids, case.longer(tokens=4, seed=7)[:, 50:]], dim=1)
    taken = load_or_prefill(store, case.model, again, name="tiny", revision="")
    assert taken.get_seq_length() >= entry.tokens - 1
    assert torch.equal(case.generate(again, taken)[0], case.generate(again, None)[0])


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # a sliding layer has forgotten
def test_crop_and_ask_again(tiny: Any, name: str) -> None:
    """Take back the answer and ask something else."""
    case = tiny(name)
    cache = load_cache(case.blob, case.config, prompt=case.longer())
    case.generate(case.longer(), cache)
    cache.crop(50 - cache.get_seq_length())
    other = case.longer(seed=11)
    assert torch.equal(case.generate(other, cache)[0], case.generate(other, None)[0])


# --- streaming -------------------------------------------------------------------------------


def test_layers_come_over_the_link_once_and_ahead(tiny: Any, s3: Any, monkeypatch: Any) -> None:
    """From a bucket: the bytes of the prefix that is kept, no others, none twice."""
    case = tiny("llama")
    blob = kvzip.encode(case.snapshot, "raw", block_tokens=8, threads=1)
    bucket = Bucket(s3.url, options=s3.options)
    bucket.put("stream/doc.kvz", blob, create=False)
    asked: list[tuple[int, int]] = []
    get = remote.Remote._get

    def note(self: Any, offset: int, length: int) -> Any:
        asked.append((offset, length))
        return get(self, offset, length)

    monkeypatch.setattr(remote.Remote, "_get", note)
    monkeypatch.setattr(blocks, "FIRST_READ", 8192)
    prompt = case.longer()
    prompt[0, 20:] = (prompt[0, 20:] - 2) % 61 + 3  # the first 20 tokens are shared: 3 of 7 blocks
    reader = open_url(f"{s3.url}/stream/doc.kvz", options=s3.options)
    opening = sum(min(length, len(blob) - offset) for offset, length in asked)
    asked.clear()
    cache = load_cache(reader, case.config, prompt=prompt)
    expected = case.kept(20)
    assert case.same(prompt, cache, expected)
    spans = sorted((offset, offset + length) for offset, length in asked)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    fetched = sum(stop - start for start, stop in spans)
    block = 8 * 2 * 16 * 4
    assert fetched <= 4 * 2 * 3 * block and opening < len(blob) / 3
