"""Models that are kept unpacked: made once, right or made anew, whoever else is at it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
import torch

from kvzip.errors import KVZipError
from kvzip.models import load_model
from kvzip.models.unpacked import unpacked


class Maker:
    def __init__(self, content=b"weights" * 1000):
        self.calls, self.content = 0, content

    def __call__(self, folder):
        self.calls += 1
        (folder / "model").write_bytes(self.content)
        (folder / "config").write_bytes(b"{}")


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_is_made_once(tmp_path):
    make = Maker()
    folder = unpacked("sha256:1", "bf16", make, tmp_path / "a" / "b")
    assert (folder / "model").read_bytes() == make.content
    before = held(folder)
    assert unpacked("sha256:1", "bf16", make, tmp_path / "a" / "b") == folder
    assert make.calls == 1
    assert held(folder) == before
    others = {
        unpacked(*key, make, folder.parent) for key in [("sha256:2", "bf16"), ("sha256:1", "fp32")]
    }
    assert len(others | {folder}) == 3
    assert make.calls == 3


def test_other_versions_unpack_anew(tmp_path, monkeypatch):
    make = Maker()
    unpacked("i", "bf16", make, tmp_path)
    monkeypatch.setattr("kvzip.models.unpacked.version", lambda name: "99")
    unpacked("i", "bf16", make, tmp_path)
    assert make.calls == 2


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit of the weights": lambda f: flip(f / "model"),
    "a bit of the small file": lambda f: flip(f / "config"),
    "a bit of the list": lambda f: flip(f / "kvzip.json"),
    "cut": lambda f: os.truncate(f / "model", 100),
    "emptied": lambda f: os.truncate(f / "model", 0),
    "longer": lambda f: (f / "model").write_bytes((f / "model").read_bytes() + b"x"),
    "a file is gone": lambda f: (f / "config").unlink(),
    "the list is gone": lambda f: (f / "kvzip.json").unlink(),
    "the list is no list": lambda f: (f / "kvzip.json").write_text("[]"),
    "a file too many": lambda f: (f / "model.bin").write_bytes(b"other weights"),
    "a folder too many": lambda f: (f / "more").mkdir(),
    "swapped": lambda f: (f / "model").rename(f / "x") and (f / "config").rename(f / "model"),
    "all is gone": lambda f: [path.unlink() for path in f.iterdir()],
    "it is a file": lambda f: [path.unlink() for path in f.iterdir()] and (f.rmdir(), f.touch()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_anew(tmp_path, damage):
    make = Maker()
    folder = unpacked("i", "bf16", make, tmp_path)
    before = held(folder)
    DAMAGES[damage](folder)
    assert unpacked("i", "bf16", make, tmp_path) == folder
    assert make.calls == 2
    assert held(folder) == before
    assert {path.suffix for path in tmp_path.iterdir()} <= {"", ".lock"}
    assert unpacked("i", "bf16", make, tmp_path) == folder
    assert make.calls == 2


def test_a_maker_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_bytes(b"x")
        raise KVZipError("no")

    with pytest.raises(KVZipError, match="no"):
        unpacked("i", "bf16", fail, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    make = Maker()
    unpacked("i", "bf16", make, tmp_path)
    assert make.calls == 1


PROCESS = """
import sys, time
from pathlib import Path
from kvzip.models.unpacked import unpacked
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
def make(made):
    with open(folder / "calls.txt", "a") as calls:
        calls.write("call\\n")
    (made / "model").write_bytes(b"half")
    time.sleep(seconds)
    (made / "model").write_bytes(b"whole")
print((unpacked("i", "bf16", make, folder / "cache") / "model").read_text())
"""


def start(folder, seconds):
    command = [sys.executable, "-c", PROCESS, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_several_processes_one_makes_it(tmp_path):
    running = [start(tmp_path, 0.5) for _ in range(4)]
    assert {process.communicate()[0] for process in running} == {"whole\n"}
    assert (tmp_path / "calls.txt").read_text() == "call\n"


def test_what_a_killed_process_leaves_goes(tmp_path):
    running = start(tmp_path, 600)
    cache = tmp_path / "cache"
    while not (cache.is_dir() and list(cache.glob("*.tmp/model"))):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert list(cache.glob("*.tmp"))
    assert start(tmp_path, 0).communicate()[0] == "whole\n"
    assert not list(cache.glob("*.tmp"))


# --- a model in a package ----------------------------------------------------------------------

WIDTH, LAYERS, HEADS, KV_HEADS, MIDDLE = 64, 2, 4, 2, 96
WORDS = ["<end>", *"abcdefghijklmnopqrstuvwxyz ", "th", "the"]


def write_gguf(path, seed=0):
    """A tiny Llama with packed weights (Q8_0) and a tokenizer of letters."""
    rng = np.random.default_rng(seed)
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("tiny")
    out.add_context_length(512)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(MIDDLE)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_vocab_size(len(WORDS))
    out.add_tokenizer_model("gpt2")
    words = [word.replace(" ", "\u0120") for word in WORDS]
    out.add_token_list(words)
    out.add_token_types([3] + [1] * (len(words) - 1))
    out.add_token_merges(["t h", "th e"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)

    def add(name, rows, columns):
        numbers = rng.normal(0, 0.1, (rows, columns)).astype(np.float32)
        packed = gguf.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
        out.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    add("token_embd.weight", len(words), WIDTH)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_q.weight", WIDTH, WIDTH)
        add(f"blk.{i}.attn_k.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        add(f"blk.{i}.attn_v.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        add(f"blk.{i}.attn_output.weight", WIDTH, WIDTH)
        add(f"blk.{i}.ffn_gate.weight", MIDDLE, WIDTH)
        add(f"blk.{i}.ffn_up.weight", MIDDLE, WIDTH)
        add(f"blk.{i}.ffn_down.weight", WIDTH, MIDDLE)
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{i}.{name}.weight", np.ones(WIDTH, np.float32))
    out.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The file of a model that is installed as the package kvzip_tiny_gguf."""
    folder = tmp_path / "packages" / "kvzip_tiny_gguf"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    write_gguf(folder / "tiny.gguf")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    return folder / "tiny.gguf"


def counted(monkeypatch):
    """How often a GGUF file is parsed from now on."""
    parsed = []
    plain = gguf.GGUFReader

    class Counting(plain):
        def __init__(self, path, *more):
            parsed.append(str(path))
            super().__init__(path, *more)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    return parsed


def assert_alike(one, other):
    mine, its = one.model.state_dict(), other.model.state_dict()
    assert mine.keys() == its.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == its[name].dtype
        assert torch.equal(tensor, its[name]), name
    for (name, buffer), (_, its_buffer) in zip(
        one.model.named_buffers(), other.model.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, its_buffer), name
    assert type(one.model) is type(other.model)
    text = "the quick brown fox jumps over the lazy dog"
    assert one.tokenizer(text).input_ids == other.tokenizer(text).input_ids
    assert one.revision == other.revision


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_package_is_parsed_once_and_stays_what_it_is(package, monkeypatch, tmp_path, dtype):
    parsed = counted(monkeypatch)
    straight = load_model(str(package), dtype)
    assert len(parsed) == 1  # by transformers alone it is three times
    first = load_model("pkg:kvzip_tiny_gguf", dtype)
    assert len(parsed) == 2
    second = load_model("pkg:kvzip_tiny_gguf", dtype)
    assert len(parsed) == 2
    assert_alike(first, straight)
    assert_alike(second, straight)
    assert straight.model.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]


def test_other_bytes_are_another_model(package):
    before = load_model("pkg:kvzip_tiny_gguf")
    write_gguf(package, seed=1)
    after = load_model("pkg:kvzip_tiny_gguf")
    assert before.revision != after.revision
    name = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(before.model.state_dict()[name], after.model.state_dict()[name])
    assert_alike(after, load_model(str(package)))


def test_damaged_weights_are_not_loaded(package, tmp_path):
    load_model("pkg:kvzip_tiny_gguf")
    [path] = (tmp_path / "cache").rglob("model.safetensors")
    flip(path)
    assert_alike(load_model("pkg:kvzip_tiny_gguf"), load_model(str(package)))


def test_without_a_cache_folder_it_loads_all_the_same(package, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    assert_alike(load_model("pkg:kvzip_tiny_gguf"), load_model(str(package)))


def test_a_file_that_is_no_model_is_an_error(package):
    package.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(KVZipError, match="kvzip_tiny_gguf"):
        load_model("pkg:kvzip_tiny_gguf")
    # What transformers calls is itself again.
    assert gguf.GGUFReader.__name__ == "GGUFReader"
    assert not hasattr(gguf.GGUFReader, "cache_info")
