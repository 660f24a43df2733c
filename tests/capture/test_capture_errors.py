"""What a model cannot compute, and a folder that holds other captures, is said in a line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from support import tiny_model

import kvzip
from kvzip.capture import Document, capture, prefill
from kvzip.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def llama():
    return tiny_model("Llama")


def positions(count):
    config = transformers.GPT2Config(
        vocab_size=200, n_embd=32, n_layer=2, n_head=2, n_positions=count
    )
    return LoadedModel(transformers.GPT2LMHeadModel(config).eval(), None, "g", "")


def test_a_document_longer_than_the_models_positions():
    loaded = positions(16)
    assert prefill(loaded, np.arange(16)).tokens == 16
    with pytest.raises(kvzip.KVZipError, match="17 tokens, which are more than its 16 positions"):
        prefill(loaded, np.arange(17))


@pytest.mark.parametrize("ids", [[200], [-1], [], [[[1]]], [2**40]])
def test_ids_that_are_none_of_the_models(llama, ids):
    with pytest.raises(kvzip.UsageError, match="token ids"):
        prefill(llama, np.array(ids, np.int64))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_a_model_that_is_no_decoder(kind):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, embedding_size=32, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(kvzip.UnsupportedError, match="is an encoder"):
        prefill(LoadedModel(model, None, "b", ""), np.arange(2, 10))


@pytest.mark.parametrize("device", ["nope", "cpu:x", "meta", "cuda:77", "", "\0"])
def test_devices_that_are_not_there(tmp_path, device):
    with pytest.raises(kvzip.UsageError, match="device"):
        load_model(str(tmp_path), device=device)


@pytest.mark.parametrize("ref", ["pkg:../x", "pkg:", "pkg:a b", "pkg:.", "pkg:os.path", "", "./x"])
def test_references_to_no_model(ref):
    with pytest.raises(kvzip.KVZipError):
        load_model(ref)


@pytest.mark.parametrize("change", ["cut", "empty", "no config", "config", "tokenizer"])
def test_files_of_a_model_that_are_damaged(tmp_path, llama, change):
    llama.model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if change == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif change == "empty":
        weights.write_bytes(b"")
    elif change == "no config":
        config.unlink()
    elif change == "config":
        config.write_text('{"model_type": "llama", "hidden_size": "many"}')
    (tmp_path / "tokenizer.json").write_text("{" if change == "tokenizer" else "{}")
    with pytest.raises(kvzip.KVZipError) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_is_there_already_differs_in_what_is_said(tmp_path, llama):
    document = Document(0, np.arange(20, dtype=np.uint32), "text")
    capture(llama, [document], tmp_path)
    capture(llama, [document], tmp_path)
    other = Document(0, np.arange(1, 21, dtype=np.uint32), "text")
    renamed = LoadedModel(llama.model, None, "another", llama.revision)
    for loaded, given, more, said, unsaid in (
        (llama, other, {}, "document", "dtype"),
        (llama, document, {"dtype": "fp16"}, "dtype (bf16, not fp16)", "document"),
        (llama, document, {"dtype": torch.float16}, "dtype (bf16, not fp16)", "document"),
        (renamed, document, {}, "model (tiny-Llama, not another)", "revision"),
        (renamed, other, {"dtype": "fp8_e5m2"}, "not another) and dtype (bf16", "history"),
    ):
        with pytest.raises(kvzip.UsageError) as caught:
            capture(loaded, [given], tmp_path, **more)
        assert said in str(caught.value)
        assert unsaid not in str(caught.value).replace(str(tmp_path), "")
