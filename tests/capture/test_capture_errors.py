"""What a model cannot compute, and a folder that holds other captures, is said in a line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from command import run_json
from safetensors.torch import load_file, save_file
from support import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

import kvzip
from kvzip.capture import Document, capture, prefill
from kvzip.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def llama():
    return tiny_model("Llama")


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


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


def bert(**sizes):
    return transformers.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, pad_token_id=0, **sizes,
    )  # fmt: skip


REFUSED = {
    # model, what is done to its folder, kind of error, what is said
    "an encoder": (lambda: transformers.BertLMHeadModel(bert()), None, "unsupported",
                   "is an encoder"),
    "an encoder without a head": (lambda: transformers.BertModel(bert()), None, "unsupported",
                                  "BertModel is an encoder"),
    "too few positions": (lambda: positions(16).model, None, "usage",
                          "20 tokens, which are more than its 16 positions"),
    "no weights": (lambda: tiny_model("Llama").model, "gone", "usage", "no file named model.s"),
    "a tensor less": (lambda: tiny_model("Llama").model, "less", "usage",
                      "model.layers.1.mlp.up_proj.weight"),
    "a tensor more": (lambda: tiny_model("Llama").model, "more", "usage", "of_nothing"),
    "a shard less": (lambda: tiny_model("Llama").model, "shard", "usage",
                     "model-00002-of-00003.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_command_refuses(tmp_path, capsys, case):
    """In a line, and with --json as an object; no snapshot is left."""
    make, damage, kind, said = REFUSED[case]
    model, folder = make(), tmp_path / "model"
    shards = {"max_shard_size": 40_000} if damage == "shard" else {}
    model.save_pretrained(folder, **shards)
    tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    if damage == "gone":
        weights.unlink()
    elif damage == "shard":
        sorted(folder.glob("model-*.safetensors"))[1].unlink()
    elif damage:
        tensors = load_file(weights)
        if damage == "less":
            del tensors["model.layers.1.mlp.up_proj.weight"]
        else:
            tensors["of_nothing"] = torch.ones(3)
        save_file(tensors, weights, {"format": "pt"})
    (tmp_path / "text").write_text(" ".join(f"w{i % 190 + 2}" for i in range(100)))
    command = ["capture", "--model", folder, "--text", tmp_path / "text", "--tokens", 20]
    command += ["--docs", "0:1", "-o", tmp_path / "out"]
    found_code, found = run_json(capsys, *command)
    assert (found_code, found["exit"], found["kind"]) == (2, 2, kind)
    assert said in found["error"] and "\n" not in found["error"]
    assert not list(tmp_path.glob("out/*.safetensors"))
