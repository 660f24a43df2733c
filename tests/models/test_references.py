"""References to models that cannot be followed: a hub that is silent, a folder that lacks files."""

from __future__ import annotations

import logging
import time
from http.server import BaseHTTPRequestHandler

import pytest

pytest.importorskip("transformers")

import huggingface_hub
import transformers
from servers import serving, silent_server
from support import tiny_model
from tokenizers import Tokenizer, models

import kvzip
from kvzip.models import load_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Sets the hub's address; nothing was downloaded from it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def at(url):
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return at


@pytest.fixture
def answering():
    """A hub that answers every question with a status; yields its address, and a list of which the
    last is that."""
    statuses, asked = [404], []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(statuses[-1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    with serving(Handler) as url:
        yield url, statuses, asked


def save(folder):
    """A tiny model with a tokenizer of words."""
    tiny_model("Llama").model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(
        folder
    )


def save_as_downloaded(tmp_path, name):
    commit = "0" * 40
    kept = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    save(kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)


def fails(ref, caplog):
    """What the error says, which comes within seconds and alone."""
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(kvzip.KVZipError) as caught:
        load_model(ref)
    assert time.monotonic() - began < 20
    assert not caplog.records and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ref", ["nope", "org/nope"])
@pytest.mark.parametrize("how", ["nobody there", "silence", "503", "offline"])
def test_a_hub_that_does_not_answer_is_asked_once(
    hub, answering, caplog, monkeypatch, tmp_path, ref, how
):
    url, statuses, asked = answering
    statuses.append(503)
    if how == "silence":
        with silent_server() as url:
            hub(url)
            said = fails(ref, caplog)
    else:
        hub(url if how == "503" else "http://127.0.0.1:1")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "offline")
        said = fails(ref, caplog)
    assert repr(ref) in said and "no such folder" in said and "hub does not answer" in said
    assert len(asked) == (how == "503")


def test_a_hub_that_has_no_such_model_says_so(hub, answering, caplog):
    hub(answering[0])
    assert "'org/nope' cannot be loaded" in fails("org/nope", caplog)


@pytest.mark.parametrize("how", ["nobody there", "503"])
def test_what_was_downloaded_needs_no_hub(hub, answering, caplog, tmp_path, how):
    url, statuses, asked = answering
    statuses.append(503)
    save_as_downloaded(tmp_path, "org/model")
    hub(url if how == "503" else "http://127.0.0.1:1")
    with caplog.at_level(logging.WARNING):
        loaded = load_model("org/model")
    assert loaded.tokenizer("w3").input_ids == [3] and len(asked) == (how == "503")
    assert not [r for r in caplog.records if r.name.startswith("huggingface_hub")]


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_a_folder_without_a_tokenizer_says_so(tmp_path, caplog, kind):
    """transformers makes an empty tokenizer for some models, and fails for others."""
    more = {"n_embd": 32, "n_head": 4, "n_layer": 2, "bos_token_id": 0, "eos_token_id": 0}
    tiny_model(kind, **(more if kind == "GPT2" else {})).model.save_pretrained(tmp_path / "m")
    said = fails(str(tmp_path / "m"), caplog)
    assert "'" + str(tmp_path / "m") in said and "lacks its tokenizer (tokenizer.json" in said
