"""A batch whose documents are damaged, missing or of something else: right tokens, said once."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from servers import DyingStore, silent_server  # noqa: E402
from support import damaged, warnings_of  # noqa: E402

import kvzip  # noqa: E402
from kvzip.load.hf import cache_argument, load_batch, load_batch_or_prefill  # noqa: E402
from kvzip.store import Store  # noqa: E402

LENGTHS = (50, 30, 44)


class Batch:
    """Three prompts, each with a document that it goes on from by nine tokens."""

    def __init__(self, case: Any):
        self.case, whole = case, case.longer(tokens=200)[0]
        self.prompts = [whole[60 * i : 60 * i + n + 9] for i, n in enumerate(LENGTHS)]
        self.documents = [self.document(p[:-9]) for p in self.prompts]
        self.right = self.generate(self.padded())

    def document(self, ids: Any) -> bytes:
        return kvzip.encode(self.snapshot(ids), "planes", block_tokens=8, threads=1)

    def snapshot(self, ids: Any, model: Any = None) -> kvzip.Snapshot:
        cache = transformers.DynamicCache(config=self.case.config)
        cache.activate_past_recording()
        with torch.no_grad():
            self.case.model(ids[None], **cache_argument(cache))
        return kvzip.Snapshot.from_cache(cache, ids, model or self.case.model)

    def padded(self) -> dict[str, Any]:
        return load_batch([None] * 3, self.case.config, self.prompts)

    def load(self, sources: Any, **more: Any) -> dict[str, Any]:
        return load_batch_or_prefill(sources, self.case.model, self.prompts, **more)

    def generate(self, batch: dict[str, Any], **options: Any) -> Any:
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
        return self.case.model.generate(**batch, **options)

    @contextmanager
    def fed(self) -> Any:
        """Shapes of what the model is fed meanwhile, [batch, tokens]."""
        shapes: list[tuple[int, ...]] = []

        def note(model: Any, given: Any, named: Any) -> None:
            shapes.append(tuple((given[0] if given else named["input_ids"]).shape))

        hook = self.case.model.register_forward_pre_hook(note, with_kwargs=True)
        yield shapes
        hook.remove()


def kept(batch: dict[str, Any]) -> int:
    [name] = cache_argument(None)
    return int(batch[name].get_seq_length())


@pytest.fixture
def batch(name: str, tiny: Any) -> Batch:
    return Batch(tiny(name))


def test_nothing_fails(batch: Batch, caplog: Any) -> None:
    found = batch.load(batch.documents)
    assert kept(found) == 49  # one less than could be: its key shows other weights
    with batch.fed() as shapes:
        assert torch.equal(batch.generate(found), batch.right)
    assert shapes == [(3, 10)] + [(3, 1)] * 5
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize(("layer", "part"), [(0, "k"), (2, "v")])
@pytest.mark.drawn(2)
def test_a_damaged_block(batch: Batch, caplog: Any, row: int, layer: int, part: str) -> None:
    """Its row is computed, once and alone; the others are what was loaded."""
    sources = list(batch.documents)
    sources[row] = damaged(sources[row], layer, part)
    line = rf"prompts\[{row}\]: layer {layer} {part}"
    with pytest.raises(kvzip.CorruptError, match=line):
        batch.generate(load_batch(sources, batch.case.config, batch.prompts))
    found = batch.load(sources)  # before `fed`: a hook makes another model of it
    with batch.fed() as shapes:
        assert torch.equal(batch.generate(found), batch.right)
    alone = [shape for shape in shapes if shape[0] == 1]
    assert alone == [(1, LENGTHS[row] - 1), (1, 1)]
    assert len(shapes) == 6 + 2
    [told] = warnings_of(caplog)
    assert f"prompts[{row}]: layer {layer} {part}" in told


def test_every_document_is_damaged(batch: Batch, caplog: Any) -> None:
    sources = [damaged(d, i, "k") for i, d in enumerate(batch.documents)]
    assert torch.equal(batch.generate(batch.load(sources)), batch.right)
    assert [told.split(":")[1].split()[-1] for told in warnings_of(caplog)] == [
        f"prompts[{i}]" for i in range(3)
    ]


def test_what_cannot_be_opened(tiny: Any, tmp_path: Any, caplog: Any) -> None:
    """One of three, in every way: its row alone is computed, the others are loaded."""
    batch = Batch(tiny("llama"))
    whole = batch.snapshot(batch.prompts[1][:-9])
    fewer = kvzip.Snapshot(whole.layers[:3], whole.dtype, whole.token_ids, whole.origin)
    profile = kvzip.Profile({"t": np.arange(3)}, {})
    for source, line in (
        (b"something else", "not a .kvz file"),
        (batch.documents[1][:-1], "cut short"),
        (tmp_path / "nothing.kvz", "No such file"),
        (kvzip.encode(fewer, "raw"), "3 layers, the model 4"),
        (kvzip.encode(tiny("llama", "bfloat16").snapshot, "raw"), "holds torch.bfloat16"),
        (kvzip.encode(whole, "raw", profile), "none was given"),
        (kvzip.encode(whole, "raw", store_token_ids=False), "no token ids"),
        (batch.documents[0], "no prefix in common"),
    ):
        sources = [batch.documents[0], source, batch.documents[2]]
        found = batch.load(sources)
        assert kept(found) == 49
        assert torch.equal(batch.generate(found), batch.right)
        [told] = warnings_of(caplog)
        assert line in told and "prompts[1]" in told
        with pytest.raises((kvzip.KVZipError, OSError), match=r"prompts\[1\]|not all of one dtype"):
            load_batch(sources, batch.case.config, batch.prompts)
    found = batch.load([b"", b"", b""])
    assert kept(found) == 0 and torch.equal(batch.generate(found), batch.right)
    assert len(warnings_of(caplog)) == 3


def test_a_document_that_holds_too_little(tiny: Any, caplog: Any) -> None:
    """A sliding layer holds the end of its document, and another row leaves less of it usable."""
    batch = Batch(tiny("mistral"))
    case = batch.case
    batch.prompts = [case.longer()[0], batch.prompts[1]]
    batch.prompts[1] = torch.cat([batch.prompts[1], batch.prompts[1][:20]])
    batch.right = batch.generate(load_batch([None] * 2, case.config, batch.prompts))
    sources = [case.blob, batch.documents[1]]
    with pytest.raises(kvzip.KVZipError, match=r"prompts\[0\]: layer 0 slides and holds only"):
        load_batch(sources, case.config, batch.prompts)
    found = batch.load(sources)
    assert kept(found) == 29
    assert torch.equal(batch.generate(found), batch.right)
    [told] = warnings_of(caplog)
    assert "prompts[0]: layer 0 slides and holds only" in told


def test_other_weights(batch: Batch, caplog: Any) -> None:
    torch.manual_seed(1)
    other = transformers.AutoModelForCausalLM.from_config(batch.case.config).eval()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    right = other.generate(**batch.padded(), **options)
    # Who names a revision vouches for what is given, and only the witness is left.
    found = load_batch_or_prefill(batch.documents, other, batch.prompts, revision="vouched")
    assert kept(found) == 49
    assert torch.equal(other.generate(**found, **options), right)
    [told] = warnings_of(caplog)
    assert "does not continue" in told


def test_beams_recover(tiny: Any, caplog: Any) -> None:
    batch = Batch(tiny("llama"))
    sources = [damaged(batch.documents[0], 1, "v"), *batch.documents[1:]]
    right = batch.generate(batch.padded(), num_beams=3)
    assert torch.equal(batch.generate(batch.load(sources), num_beams=3), right)
    assert len(warnings_of(caplog)) == 1


def test_wrong_use_is_still_an_error(tiny: Any) -> None:
    batch = Batch(tiny("llama"))
    with pytest.raises(kvzip.KVZipError, match="not the rest"):
        found = batch.load(batch.documents)
        batch.generate(found | {"input_ids": found["input_ids"][:, :-2]})
    with pytest.raises(kvzip.KVZipError, match="does not continue"):
        found = batch.load(batch.documents)
        found["input_ids"][1, 49] = (found["input_ids"][1, 49] - 2) % 61 + 3
        batch.generate(found)
    with pytest.raises(kvzip.KVZipError, match="1 documents for 3 prompts"):
        batch.load(batch.documents[:1])


# --- stores ----------------------------------------------------------------------------------


def stored(batch: Batch, url: str, rows: Any, **more: Any) -> Store:
    store = Store(url, block_tokens=8, **more)
    for row in rows:
        store.put(batch.snapshot(batch.prompts[row][:-9], "tiny"), codec="raw")
    return store


def test_a_store_that_lacks_one(batch: Batch, tmp_path: Any, caplog: Any) -> None:
    """A miss is no failure: computed beside the others, and nothing is said."""
    for rows in ([0, 1, 2], [0, 2], [1], []):
        store = stored(batch, tmp_path / str(rows), rows)
        found = batch.load(store, name="tiny", revision="")
        assert kept(found) == (49 if rows else 0)
        with batch.fed() as shapes:
            assert torch.equal(batch.generate(found), batch.right)
        assert sum(shape[0] == 1 for shape in shapes) == 2 * (3 - len(rows)) * bool(rows)
    assert warnings_of(caplog) == []


def test_a_store_that_dies_on_the_way(
    name: str, tiny: Any, s3: Any, caplog: Any, monkeypatch: Any
) -> None:
    """After the n-th request for bytes, for every n until none fails."""
    batch = Batch(tiny(name))
    store = stored(batch, f"{s3.url}/batch-{name}", range(3), options=s3.options)
    dying = DyingStore(monkeypatch)
    failures = []
    for n in (0, 2, 9, 20, 60, 600):
        dying.left = n
        found = batch.load(store, name="tiny", revision="")
        assert torch.equal(batch.generate(found), batch.right)
        told = warnings_of(caplog)
        assert len(told) <= 3 and all("the store is gone" in line for line in told)
        failures.append(len(told))
    assert min(failures[:4]) > 0 and failures[-1] == 0


def test_a_store_that_is_too_slow(tiny: Any, caplog: Any) -> None:
    batch = Batch(tiny("llama"))
    with silent_server() as url:
        store = Store(url, timeout=0.5, retries=0)
        began = time.monotonic()
        found = batch.load(store, name="tiny", revision="")
        assert time.monotonic() - began < 1.4  # asked once, not for each prompt
    assert torch.equal(batch.generate(found), batch.right)
    [told] = warnings_of(caplog)
    assert "cannot read" in told
