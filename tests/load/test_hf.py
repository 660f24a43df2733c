"""From a cache to a file and back into a model: equal to never having left memory, or an error."""

from __future__ import annotations

import copy
import gc
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from support import wait_for  # noqa: E402

import kvzip  # noqa: E402
from kvzip.codecs.raw.codec import RawCodec  # noqa: E402
from kvzip.load import loaders  # noqa: E402
from kvzip.load.hf import cache_argument, layer_kinds, load_cache, rope_parameters  # noqa: E402

LINE = "does not continue the cached document"


class Counting(RawCodec):
    """Notes which layers' blocks are decoded, and fails at some."""

    codec_id = "counting"
    seen: list[tuple[int, str, int]] = []  # noqa: RUF012
    broken: int | None = None

    def decode(self, data: Any, out: Any, context: Any) -> None:
        self.seen.append((context.layer, context.part, context.start))
        if context.layer == self.broken:
            raise OSError("the disk is on fire")
        super().decode(data, out, context)

    @classmethod
    def layers(cls) -> set[int]:
        return {layer for layer, _, _ in cls.seen}


@pytest.fixture
def counting(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    # Known for the test only: others look at which codecs there are.
    monkeypatch.setitem(kvzip.codec._registered, "counting", Counting)
    Counting.seen.clear()
    yield lambda case: kvzip.encode(case.snapshot, codec="counting", block_tokens=8, threads=1)
    Counting.broken = None


# --- equal to never having left memory -------------------------------------------------------


@pytest.mark.parametrize("prompt", ["the document", "longer"])
@pytest.mark.drawn(2)
def test_goes_on_as_from_the_cache_in_memory(case: Any, prompt: str) -> None:
    ids = case.ids if prompt == "the document" else case.longer()
    for source in (case.blob, case.snapshot):
        assert case.same(ids, load_cache(source, case.config), case.kept(49))


def test_the_prompt_may_be_the_document(case: Any) -> None:
    cache = load_cache(case.blob, case.config, prompt=case.ids)
    assert cache.get_seq_length() == 49
    assert case.same(case.ids, cache, case.kept(49))


def test_a_longer_prompt_keeps_the_whole_document(case: Any) -> None:
    cache = load_cache(case.blob, case.config, prompt=case.longer())
    assert cache.get_seq_length() == 50
    assert case.same(case.longer(), cache, copy.deepcopy(case.cache))


def test_a_cache_from_memory_needs_no_capture(case: Any) -> None:
    """A sliding layer of it holds one token less, so it goes on only from its end."""
    snapshot = kvzip.Snapshot.from_cache(copy.deepcopy(case.cache), case.ids, case.model)
    blob = kvzip.encode(snapshot, codec="raw", threads=1)
    ids = case.longer()
    assert case.same(ids, load_cache(blob, case.config, prompt=ids), copy.deepcopy(case.cache))
    assert case.same(ids, snapshot.to_cache(case.config), copy.deepcopy(case.cache))
    if any(case.cache.is_sliding):
        with pytest.raises(kvzip.KVZipError, match="pass prompt=, longer than the document"):
            load_cache(blob, case.config)
        with pytest.raises(kvzip.KVZipError, match="pass prompt=, longer than the document"):
            load_cache(blob, case.config, prompt=case.ids)


@pytest.mark.parametrize("shared", [1, 7, 30, 48])
def test_a_prompt_that_leaves_the_document_keeps_what_they_share(
    name: str, tiny: Any, shared: int
) -> None:
    case = tiny(name)
    history = kvzip.Snapshot.from_cache(copy.deepcopy(case.history), case.ids, case.model)
    ids = case.longer()
    ids[0, shared] = (ids[0, shared] - 2) % 61 + 3
    ids = ids[:, : shared + 5]
    cache = load_cache(kvzip.encode(history, codec="planes", threads=1), case.config, prompt=ids)
    assert cache.get_seq_length() == shared
    assert case.same(ids, cache, case.kept(shared))


def test_suffix_alone_with_the_whole_attention_mask(name: str, tiny: Any) -> None:
    case = tiny(name)
    ids = case.longer()
    mask = torch.ones_like(ids)
    for options, kept in (({}, 49), ({"prompt": ids}, 50)):
        cache = load_cache(case.blob, case.config, **options)
        found = case.generate(ids[:, kept:], cache, attention_mask=mask)
        whole = case.generate(ids, load_cache(case.snapshot, case.config, **options))
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_beams_and_several_sequences(name: str, tiny: Any) -> None:
    case = tiny(name)
    ids = case.longer()
    repeated = case.kept(49)
    repeated.batch_repeat_interleave(3)
    expected, _ = case.generate(ids, repeated, num_beams=3)
    assert torch.equal(
        case.generate(ids, load_cache(case.blob, case.config), num_beams=3)[0], expected
    )
    before = load_cache(case.blob, case.config)
    before.batch_repeat_interleave(3)
    assert torch.equal(case.generate(ids, before, num_beams=3)[0], expected)
    options = {"num_return_sequences": 3, "do_sample": True}
    torch.manual_seed(0)
    several, _ = case.generate(ids, load_cache(case.blob, case.config), **options)
    torch.manual_seed(0)
    assert torch.equal(
        several, case.generate(ids, load_cache(case.blob, case.config), **options)[0]
    )
    assert several.shape[0] == 3


def test_a_batch(name: str, tiny: Any) -> None:
    case = tiny(name, "bfloat16", 2)
    assert case.snapshot.layers[0].k.ndim == 4
    ids = case.longer()
    assert case.same(ids, load_cache(case.blob, case.config), case.kept(49))
    assert load_cache(case.blob, case.config, prompt=ids).get_seq_length() == 50
    with pytest.raises(kvzip.KVZipError, match=LINE):  # the rows' order matters
        case.generate(ids.flip(0), load_cache(case.blob, case.config))
    with pytest.raises(kvzip.KVZipError, match="batch"):
        case.generate(ids[:1], load_cache(case.blob, case.config))
    with pytest.raises(kvzip.KVZipError, match="batch of 3"):
        load_cache(case.blob, case.config, prompt=ids[[0, 1, 0]])
    row = load_cache(case.blob, case.config)
    row.batch_select_indices(torch.tensor([1]))
    expected = case.kept(49)
    expected.batch_select_indices(torch.tensor([1]))
    assert case.same(ids[1:], row, expected)


def test_one_document_for_a_batch_of_prompts(tiny: Any) -> None:
    case = tiny("llama")
    ids = torch.cat([case.longer(seed=8), case.longer(seed=9)])
    repeated = case.kept(50)
    repeated.batch_repeat_interleave(2)
    assert case.same(ids, load_cache(case.blob, case.config, prompt=ids), repeated)


def test_copies_and_rollbacks_before_the_first_use(tiny: Any) -> None:
    case = tiny("llama")
    cache = load_cache(case.blob, case.config)
    copied = copy.deepcopy(cache)
    assert case.same(case.ids, cache, copied)
    cache = load_cache(case.blob, case.config)
    cache.crop(-9)
    assert cache.get_seq_length() == 40
    with pytest.raises(kvzip.KVZipError, match=f"{LINE} at position 40"):
        case.generate(case.ids[:, :40], copy.deepcopy(cache))
    assert case.same(case.ids[:, :45], cache, case.kept(40))


def test_what_was_loaded_can_be_stored_again(name: str, tiny: Any) -> None:
    case = tiny(name)
    cache = load_cache(case.blob, case.config)
    with torch.no_grad():
        case.model(case.ids[:, -1:], **cache_argument(cache))
    again = kvzip.Snapshot.from_cache(cache, case.ids, case.model)
    first = kvzip.Snapshot.from_cache(case.cache, case.ids, case.model)
    assert again.layout == first.layout and again.origin == first.origin
    for old, new in zip(first.layers, again.layers, strict=True):
        assert np.array_equal(old.k[:, :-1], new.k[:, :-1])
        assert np.array_equal(old.v[:, :-1], new.v[:, :-1])


# --- the trap --------------------------------------------------------------------------------


def test_the_trap_is_there(tiny: Any) -> None:
    """What transformers does with a cache as long as the prompt: other logits, and no error."""
    case = tiny("llama")
    _, right = case.generate(case.ids, case.kept(49))
    _, wrong = case.generate(case.ids, case.kept(50))
    assert (right - wrong).abs().max() > 0.1


def test_prompts_shorter_than_the_cache(case: Any) -> None:
    """generate feeds ids[:, len(ids) - len(cache):]: all of them, a part, or none."""
    cache = load_cache(case.blob, case.config)
    for length in range(1, 50):
        with pytest.raises(kvzip.KVZipError, match=f"{LINE} at position 49"):
            case.generate(case.ids[:, :length], cache)
    assert case.same(case.ids, cache, case.kept(49))  # an error leaves the cache as it was


def test_text_that_is_not_the_document(case: Any) -> None:
    other = case.longer()
    other[0, 49] = (other[0, 49] - 2) % 61 + 3
    with pytest.raises(kvzip.KVZipError, match=LINE):
        case.generate(other, load_cache(case.blob, case.config))
    with pytest.raises(kvzip.KVZipError, match=LINE):
        case.generate(
            other[:, 49:], load_cache(case.blob, case.config), attention_mask=torch.ones_like(other)
        )


def test_the_right_token_one_position_off(case: Any) -> None:
    """The suffix after the whole document begins with the token that was dropped before it."""
    ids = case.longer()
    ids[0, 50] = ids[0, 49]
    with pytest.raises(kvzip.KVZipError, match=LINE):
        case.generate(
            ids[:, 50:], load_cache(case.blob, case.config), attention_mask=torch.ones_like(ids)
        )


def test_a_suffix_without_its_attention_mask(case: Any) -> None:
    ids = case.longer(tokens=60)
    for length in (1, 5, 48, 49, 50, 60):
        with pytest.raises(kvzip.KVZipError, match=LINE):
            case.generate(ids[:, 49 : 49 + length], load_cache(case.blob, case.config))
    for length in (2, 5, 49, 50, 51, 60):
        prompt = ids[:, : 50 + length]
        cache = load_cache(case.blob, case.config, prompt=prompt)
        with pytest.raises(kvzip.KVZipError, match=f"not the rest|{LINE}"):
            case.generate(prompt[:, cache.get_seq_length() :], cache)


def test_other_ids_than_the_prompt_that_was_promised(name: str, tiny: Any) -> None:
    case = tiny(name)
    for length in (*range(1, 59), 60):
        ids = case.longer(20)
        with pytest.raises(kvzip.KVZipError, match=f"not the rest|{LINE}"):
            case.generate(ids[:, :length], load_cache(case.blob, case.config, prompt=ids[:, :59]))


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_keys_that_do_not_turn_need_the_prompt(tiny: Any, name: str) -> None:
    """A key of BLOOM's first layer says nothing of its position, so prompt= is asked for."""
    case = tiny(name)
    assert {kind.rope for kind in layer_kinds(case.config)} == {None}
    with pytest.raises(kvzip.KVZipError, match="pass prompt="):
        load_cache(case.blob, case.config)
    for ids in (case.ids, case.longer()):
        cache = load_cache(case.blob, case.config, prompt=ids)
        assert case.same(ids, cache, case.kept(min(50, ids.shape[1] - 1)))
        for length in range(1, ids.shape[1]):
            # GPT-2 itself fails at no tokens at all, before it looks at the cache.
            with pytest.raises(
                (kvzip.KVZipError, RuntimeError), match=f"not the rest|{LINE}|of 0 elements"
            ):
                case.generate(ids[:, :length], load_cache(case.blob, case.config, prompt=ids))


def test_arguments(tiny: Any) -> None:
    case = tiny("llama")
    other = case.ids.clone()
    other[0, 0] += 1
    bare = kvzip.encode(case.snapshot, codec="raw", store_token_ids=False, threads=1)
    for source, options, line in (
        (case.blob, {"prompt": other}, "no prefix in common"),
        (case.blob, {"prompt": case.ids[:, :1]}, "nothing can be kept"),
        (case.blob, {"prompt": []}, "must be token ids"),
        (case.blob, {"prompt": "words"}, "must be token ids"),
        (bare, {"prompt": case.ids}, "no token ids"),
        (case.blob, {"tokens": 50}, "from 1 to 49"),
        (case.blob, {"tokens": 0}, "from 1 to 49"),
    ):
        with pytest.raises(kvzip.KVZipError, match=line):
            load_cache(source, case.config, **options)
    assert case.same(case.ids, load_cache(case.blob, case.config, tokens=20), case.kept(20))
    with pytest.raises(kvzip.KVZipError, match=f"{LINE} at position 20"):
        case.generate(case.ids[:, :20], load_cache(case.blob, case.config, tokens=20))


@given(
    document=st.lists(st.integers(0, 2), min_size=2, max_size=8),
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=10),
)
def test_the_prefix_that_is_kept(document: list[int], prompt: list[int]) -> None:
    """The longest shared one that leaves a token; one less where lengths would be ambiguous."""
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=2)
    bits = np.zeros((1, len(document), 2), np.uint16)
    snapshot = kvzip.Snapshot.from_arrays([(bits, bits)], "bf16", document)
    pairs = enumerate(zip(document, prompt, strict=False))
    shorter = min(len(document), len(prompt))
    common = next((i for i, (a, b) in pairs if a != b), shorter)
    count = min(common, len(prompt) - 1)
    if count == 0:
        with pytest.raises(kvzip.KVZipError):
            load_cache(snapshot, config, prompt=prompt)
        return
    found = load_cache(snapshot, config, prompt=prompt).get_seq_length()
    assert found == count - (len(prompt) == 2 * count and count > 1)


# --- the file and the model ------------------------------------------------------------------


def test_a_model_that_the_file_is_not_of(config_of: Any, tiny: Any, counting: Any) -> None:
    for name, changes, line in (
        ("llama", {"num_hidden_layers": 5}, "4 layers, the model 5"),
        ("llama", {"num_key_value_heads": 4}, "KV heads 2, not 4"),
        ("llama", {"head_dim": 8}, "head dimension 16, not 8"),
        ("llama", {"rope_theta": 5e5}, "rope_theta"),
        ("mistral", {"sliding_window": 17}, "sliding window 16, not 17"),
        ("mistral", {"sliding_window": None}, "kind of attention sliding, not full"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 4}, "layer 2 has kind"),
    ):
        blob = counting(tiny(name))
        with pytest.raises(kvzip.KVZipError, match=line):
            load_cache(blob, config_of(name, **changes))
    assert not Counting.seen
    case, other = tiny("llama", "float32"), tiny("llama", "bfloat16")
    with pytest.raises(kvzip.UnsupportedError, match=r"load the model with dtype=torch\.float32"):
        other.generate(case.ids, load_cache(counting(case), other.config))
    assert not Counting.seen


def test_keys_and_values_with_their_axes_in_another_order(tiny: Any) -> None:
    """A document of as many tokens as there are heads has the model's shape, and other numbers."""
    case, layers = tiny("llama"), []
    for layer in case.snapshot.layers:
        parts = {n: np.ascontiguousarray(layer.once(n)[:, :2].swapaxes(0, 1)) for n in ("k", "v")}
        form = case.snapshot.dtype
        layouts = {n: kvzip.PartLayout(form, bits.shape, "thd") for n, bits in parts.items()}
        layers.append(kvzip.Layer(parts, kvzip.LayerLayout(layouts, 2)))
    ids = case.snapshot.token_ids[:2]
    snapshot = kvzip.Snapshot(layers, case.snapshot.dtype, ids, case.snapshot.origin)
    for source in (snapshot, kvzip.encode(snapshot)):
        with pytest.raises(kvzip.KVZipError, match="axes of k thd, not htd"):
            load_cache(source, case.config, prompt=[*ids.tolist(), 1])


def test_weights_that_the_file_is_not_of(tiny: Any) -> None:
    case = tiny("llama")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(case.config).eval()
    with pytest.raises(kvzip.KVZipError, match=LINE):
        cache = load_cache(case.blob, model.config)
        model.generate(case.ids, max_new_tokens=1, **cache_argument(cache))


def test_layers_are_decoded_when_needed_and_the_next_ones_ahead(
    tiny: Any, counting: Any, monkeypatch: Any
) -> None:
    """As many again as the model gets at once."""
    monkeypatch.setattr(loaders, "TOGETHER", 1)
    case = tiny("llama")
    cache = load_cache(counting(case), case.config)
    assert cache.get_seq_length() == 49 and cache.get_mask_sizes(1, 0) == (50, 0)
    assert not Counting.seen
    state = case.history.layers[0].keys[:, :, 49:]
    cache.update(state, state, 0)
    assert wait_for(lambda: Counting.layers() == {0, 1})
    time.sleep(0.05)
    assert Counting.layers() == {0, 1}
    assert torch.equal(cache.layers[1].keys, case.history.layers[1].keys[:, :, :49])
    assert wait_for(lambda: Counting.layers() == {0, 1, 2})
    case.generate(case.ids, load_cache(counting(case), case.config))
    assert len(Counting.seen) == len(set(Counting.seen)) + 3 * 2 * 7  # none twice in one cache


def test_a_model_gets_several_layers_at_once(tiny: Any, counting: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(loaders, "TOGETHER", 3)
    case = tiny("llama")
    cache = load_cache(counting(case), case.config)
    state = case.history.layers[0].keys[:, :, 49:]
    cache.update(state, state, 0)
    assert Counting.layers() >= {0, 1, 2}
    assert case.same(case.ids, load_cache(counting(case), case.config), case.kept(49))


def test_a_cache_that_is_reset_decodes_nothing(tiny: Any, counting: Any) -> None:
    for name in ("llama", "gemma3"):
        case = tiny(name)
        cache = load_cache(counting(case), case.config)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.layers[0].keys is None
        assert case.same(case.longer(), cache, None)
        assert not Counting.seen


def test_only_blocks_that_are_needed_are_decoded(tiny: Any, counting: Any) -> None:
    case = tiny("gemma3")
    history = kvzip.Snapshot.from_cache(copy.deepcopy(case.history), case.ids, case.model)
    blob = kvzip.encode(history, codec="counting", block_tokens=8, threads=1)
    ids = case.longer()
    ids[0, 33] = (ids[0, 33] - 2) % 61 + 3
    case.generate(ids, load_cache(blob, case.config, prompt=ids))
    starts = {layer: set() for layer in range(4)}
    for layer, _, start in Counting.seen:
        starts[layer].add(start)
    assert starts[2] == {0, 8, 16, 24, 32}  # positions 0 to 32
    assert starts[1] == starts[3] == {16, 24, 32}  # and from 18 on in a window of 16


def test_a_damaged_block_raises_where_the_model_runs(tiny: Any, counting: Any) -> None:
    case = tiny("llama")
    blob = bytearray(case.blob)
    blob[-1] ^= 1  # in the last layer, which the worker decodes
    with pytest.raises(kvzip.CorruptError, match="layer 3 v"):
        case.generate(case.ids, load_cache(bytes(blob), case.config))
    blob = counting(case)
    Counting.broken = 2
    with pytest.raises(kvzip.KVZipError, match="layers 0 to 3 cannot be read: the disk is on fire"):
        case.generate(case.ids, load_cache(blob, case.config))
    with pytest.raises(kvzip.CorruptError):
        load_cache(blob[:-1], case.config)
    with pytest.raises(kvzip.FormatError):
        load_cache(b"something else", case.config)


def test_a_file_is_closed_when_it_is_no_longer_needed(tiny: Any, tmp_path: Path) -> None:
    case = tiny("llama")
    path = tmp_path / "doc.kvz"
    path.write_bytes(case.blob)

    def is_open() -> bool:
        gc.collect()
        links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]  # noqa: PTH208
        return any(os.path.exists(n) and os.path.samefile(n, path) for n in links)  # noqa: PTH110, PTH121

    cache = load_cache(path, case.config)
    assert is_open()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        case.generate(case.ids, cache)
        assert wait_for(lambda: not is_open())
    assert not [w for w in caught if w.category is ResourceWarning]  # closed, not collected
    with pytest.raises(kvzip.KVZipError):
        load_cache(path, case.config, tokens=50)
    assert not is_open()
    with kvzip.open(path) as reader:
        assert case.same(case.ids, load_cache(reader, case.config), case.kept(49))
        assert is_open()


# --- from a cache ----------------------------------------------------------------------------


def test_what_a_snapshot_notes(tiny: Any) -> None:
    case = tiny("gemma3")
    snapshot = kvzip.Snapshot.from_cache(case.cache, case.ids[0].tolist(), case.model)
    assert snapshot.token_ids is not None and snapshot.token_ids.shape == (50,)
    assert snapshot.tokens == 50 and snapshot.dtype == "fp32"
    assert [layer.k.shape for layer in snapshot.layers] == [(2, 15, 16)] * 2 + [
        (2, 50, 16),
        (2, 15, 16),
    ]
    kinds = [(layer.kind, layer.window) for layer in snapshot.layout.layers]
    assert kinds == [("sliding", 16), ("sliding", 16), ("full", None), ("sliding", 16)]
    assert [layer.rope for layer in snapshot.layout.layers] == [0, 0, 1, 0]
    assert [rope["rope_theta"] for rope in snapshot.origin.rope] == [1e4, 1e6]
    assert snapshot.origin.architecture == "Gemma3ForCausalLM"
    assert set(snapshot.origin.software) == {"torch", "transformers", "device"}
    assert np.array_equal(
        snapshot.layers[2].k, case.cache.layers[2].keys[0].view(torch.int32).numpy().view(np.uint32)
    )
    named = kvzip.Snapshot.from_cache(case.cache, model="some/model")
    assert named.origin.model == "some/model" and named.layout.layers[0].rope is None
    for ids in (case.ids[:, :-1], [[1] * 50] * 2, "words"):
        with pytest.raises(kvzip.KVZipError, match=r"token.ids"):
            kvzip.Snapshot.from_cache(case.cache, ids)


def test_layers_that_turn_only_here_and_there(config_of: Any) -> None:
    config = transformers.SmolLM3Config(num_hidden_layers=4)
    assert [kind.rope for kind in layer_kinds(config)] == [0, 0, 0, None]
    config = transformers.Cohere2Config(num_hidden_layers=4)
    assert [kind.rope for kind in layer_kinds(config)] == [0, 0, 0, None]
    assert rope_parameters(config_of("llama")) == ({"rope_theta": 1e4, "rope_type": "default"},)


def test_other_layers_are_refused_by_name(tiny: Any, config_of: Any) -> None:
    from transformers import cache_utils as kinds

    class Another(kinds.DynamicLayer):
        pass

    case = tiny("llama")
    cache = kinds.Cache(layers=[case.cache.layers[0], Another()])
    with pytest.raises(kvzip.UnsupportedError, match=r"layer 1 .* Another"):
        kvzip.Snapshot.from_cache(cache)
    for layer in (
        kinds.LinearAttentionLayer(),
        kinds.LinearAttentionAndFullAttentionLayer(),
        kinds.StaticLayer(64),
        kinds.DynamicIndexedLayer(),
    ):
        cache = kinds.Cache(layers=[case.cache.layers[0], layer])
        with pytest.raises(kvzip.UnsupportedError, match=r"layer 1 .* is empty"):
            kvzip.Snapshot.from_cache(cache)
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(kvzip.KVZipError, match="layer 0 has kind of attention full, not state"):
        load_cache(case.blob, config)
    config = transformers.RwkvConfig(num_hidden_layers=4)
    with pytest.raises(kvzip.UnsupportedError, match="takes as `state=`, and no cache"):
        load_cache(case.blob, config)
    for cache in (tuple(case.cache), None):
        with pytest.raises(kvzip.UnsupportedError, match=type(cache).__name__):
            kvzip.Snapshot.from_cache(cache)
    both = transformers.EncoderDecoderCache(case.cache, transformers.DynamicCache())
    for cache in (both, transformers.DynamicCache(), transformers.DynamicCache(config=case.config)):
        with pytest.raises(kvzip.UnsupportedError, match="run a forward pass first"):
            kvzip.Snapshot.from_cache(cache)
