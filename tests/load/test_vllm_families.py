"""Families of models in vLLM itself: layers that slide, of several groups, with latents, cut over
workers. Tokens and bytes of vLLM's blocks are those that it computes without kvzip.

`make test-vllm` runs this after `test_vllm_engine.py`, whose model has full attention. The table of
docs/engines.md is what is seen here.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm_runs import Engines, Run, flip, words

import kvzip
from kvzip import dtypes
from kvzip.load.hf import cache_argument
from kvzip.load.vllm import pages
from kvzip.load.vllm.names import fp8_format

DOCUMENT, UNSEEN = words(0, 300), words(2, 300)
SHARED = 200
OTHER = DOCUMENT[:SHARED] + words(1, 90)
LONGER = DOCUMENT + words(1, 90)
WINDOW = 64
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}


def gemma3() -> Any:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    more = {"num_hidden_layers": 6, "layer_types": kinds, "query_pre_attn_scalar": 64}
    config = transformers.Gemma3TextConfig(**TINY, **more, sliding_window=WINDOW)
    return transformers.Gemma3ForCausalLM(config)


def gemma4(shared: int = 0) -> Any:
    """Full layers have other heads than those that slide; the last `shared` ones no cache."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    more = {"num_hidden_layers": 6, "layer_types": kinds, "num_kv_shared_layers": shared}
    of_tokens = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16}
    heads = {"global_head_dim": 128}
    config = transformers.Gemma4TextConfig(
        **TINY, **more, **of_tokens, **heads, sliding_window=WINDOW
    )
    return transformers.Gemma4ForCausalLM(config)


def gpt_oss() -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    more = {"num_hidden_layers": 4, "layer_types": kinds, "num_local_experts": 4}
    config = transformers.GptOssConfig(**TINY, **more, num_experts_per_tok=2, sliding_window=WINDOW)
    return transformers.GptOssForCausalLM(config)


def mistral() -> Any:
    config = transformers.MistralConfig(**TINY, num_hidden_layers=3, sliding_window=WINDOW)
    return transformers.MistralForCausalLM(config)


def deepseek() -> Any:
    """A latent of 512 numbers and 64 that are rotated: all that vLLM's CPU kernel takes."""
    heads = {"num_key_value_heads": 4, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    groups = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    tiny = {name: value for name, value in TINY.items() if name != "head_dim"}
    config = transformers.DeepseekV2Config(
        **tiny | heads | experts | groups,
        num_hidden_layers=3,
        q_lora_rank=None,
        kv_lora_rank=512,
        v_head_dim=64,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
    )
    return transformers.DeepseekV2ForCausalLM(config)


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY, num_hidden_layers=3))


def mamba2() -> Any:
    sizes = {"state_size": 64, "num_heads": 4, "head_dim": 64, "n_groups": 1, "chunk_size": 64}
    tiny = {name: TINY[name] for name in ("vocab_size", "hidden_size", "initializer_range")}
    config = transformers.Mamba2Config(**tiny, **sizes, num_hidden_layers=3)
    return transformers.Mamba2ForCausalLM(config)


def falcon_h1() -> Any:
    """Attention and states in each layer."""
    sizes = {"mamba_d_ssm": 256, "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_n_groups": 1}
    sizes |= {"mamba_d_state": 64, "mamba_chunk_size": 64}
    return transformers.FalconH1ForCausalLM(
        transformers.FalconH1Config(**TINY, **sizes, num_hidden_layers=3)
    )


def qwen3_next() -> Any:
    """With heads of 128 numbers, which vLLM's CPU kernels take."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = transformers.Qwen3NextConfig(
        **TINY | {"head_dim": 128} | linear | experts,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        shared_expert_intermediate_size=64,
    )
    return transformers.Qwen3NextForCausalLM(config)


class Family(NamedTuple):
    make: Callable[[], Any]
    groups: str
    """vLLM's own word for how it keeps the cache."""
    options: Mapping[str, Any] = MappingProxyType({})
    loads: bool = True
    """Whether vLLM computes a prompt on top of a cache."""
    other: Any = OTHER
    """The prompt that begins as the stored one does."""
    cached: int = SHARED // 32 * 32
    """How many tokens of it are loaded."""


FAMILIES = {
    "gemma3": Family(gemma3, "SlidingWindowSpec SlidingWindowSpec FullAttentionSpec"),
    "gemma4": Family(gemma4, "SlidingWindowSpec SlidingWindowSpec FullAttentionSpec"),
    "gemma4 shared": Family(
        lambda: gemma4(shared=2),
        "SlidingWindowSpec SlidingWindowSpec SlidingWindowSpec FullAttentionSpec",
    ),
    "gpt-oss": Family(gpt_oss, "SlidingWindowSpec FullAttentionSpec"),
    "one group": Family(gemma3, "FullAttentionSpec", {"disable_hybrid_kv_cache_manager": True}),
    "mistral": Family(mistral, "SlidingWindowSpec"),
    # vLLM's kernels for it on any CPU leave out of attention what a prompt finds in the cache.
    "mla": Family(
        deepseek, "MLAAttentionSpec", {"attention_config": {"backend": "CPU_MLA"}}, loads=False
    ),
    "mla amx": Family(deepseek, "MLAAttentionSpec", {"attention_config": {"backend": "AMX_MLA"}}),
    # States are good at the end of what was stored only: a prompt that begins with all of it.
    "qwen3-next": Family(
        qwen3_next,
        "MambaSpec MambaSpec MambaSpec FullAttentionSpec",
        other=LONGER,
        cached=288,
    ),
    "ranks": Family(qwen3, "FullAttentionSpec", {"tensor_parallel_size": 2}),
    "fp8": Family(qwen3, "FullAttentionSpec", {"kv_cache_dtype": "fp8"}),
    "fp8 windows": Family(
        gemma3,
        "SlidingWindowSpec SlidingWindowSpec FullAttentionSpec",
        {"kv_cache_dtype": "fp8_e5m2"},
    ),
}
AMX = torch.cpu._is_amx_tile_supported()
FP8 = torch.cpu._is_avx512_supported() or AMX
"""Whether vLLM's CPU build takes fp8 caches on this processor."""


class Runs(NamedTuple):
    family: Family
    plain: Run
    save: Run
    load: Run
    store: Path


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.close()


@pytest.fixture(scope="module", params=FAMILIES)
def runs(request: Any, engines: Engines, tmp_path_factory: Any) -> Runs:
    """An engine without kvzip; one that saves two prompts; and one that finds a document with a
    shared prefix, and the other prompt's damaged."""
    family, root = FAMILIES[request.param], tmp_path_factory.mktemp("runs")
    if "kv_cache_dtype" in family.options and not FP8:
        pytest.skip("vLLM's CPU build wants AVX-512 or AMX for fp8: see the test of its error")
    if request.param == "mla amx" and not AMX:
        pytest.skip("vLLM's kernels for latents that take a cache want AMX")
    torch.manual_seed(0)
    model, store = root / "model", root / "store"
    family.make().to(torch.bfloat16).save_pretrained(model)

    def run(name: str, prompts: Any, url: Any = None) -> Run:
        return Run(engines, root / name, model, prompts, url, options=dict(family.options))

    save = run("save", [DOCUMENT, UNSEEN], store)
    plain = run("plain", [DOCUMENT, UNSEEN, family.other])
    assert save.log
    copied = Path(shutil.copytree(store, root / "store-load"))
    for file in copied.rglob("*.kvz"):
        ids = kvzip.decode(file).token_ids.tolist()
        if ids == UNSEEN[: len(ids)]:
            flip(file)
            if request.param == "ranks":
                break  # the other rank has its part
    return Runs(family, plain, save, run("load", [family.other, UNSEEN], copied), store)


def test_saving_changes_nothing(runs: Runs) -> None:
    assert f"groups: {runs.family.groups}\n" in runs.plain.log
    for number in (0, 1):
        assert runs.save.computed_as(runs.plain, number, number)
    assert not [line for line in runs.save.told if "stored and not loaded" not in line]
    parts = runs.family.options.get("tensor_parallel_size", 1)
    assert len(list(runs.store.rglob("*.kvz"))) == 2 * parts


def test_another_process_loads_a_shared_prefix(runs: Runs) -> None:
    """What is loaded is what vLLM computed, and what it computes on top is the same, too."""
    load, plain = runs.load, runs.plain
    assert load.computed_as(plain, 0, 2)
    assert load[0]["cached"] == (runs.family.cached if runs.family.loads else 0)


def test_a_damaged_document_is_computed(runs: Runs) -> None:
    assert runs.load.computed_as(runs.plain, 1, 1)
    if not runs.family.loads:
        assert [line for line in runs.load.told if "stored and not loaded" in line]
        return
    # A worker in a process of its own says it in the log only.
    lines = [*runs.load.told, *runs.load.log.splitlines()]
    told = [line for line in lines if "is not used" in line]
    assert told and all(re.search(r"\d+ tokens are computed: .*damaged", line) for line in told)


def test_states_where_prompts_part(engines: Engines, tmp_path: Path) -> None:
    """vLLM keeps states where it sees a second prompt part from the first: a third one, in another
    process, loads what they have in common."""
    torch.manual_seed(0)
    model, store = tmp_path / "model", tmp_path / "store"
    qwen3_next().to(torch.bfloat16).save_pretrained(model)
    first, second, third = (DOCUMENT + words(seed, 320) for seed in (5, 6, 7))
    plain = Run(engines, tmp_path / "plain", model, [first, second, third])
    save = Run(engines, tmp_path / "save", model, [first, second], store)
    assert save.computed_as(plain, 0, 0) and save.computed_as(plain, 1, 1)
    load = Run(engines, tmp_path / "load", model, [third], store)
    assert load[0]["cached"] == plain[2]["cached"] == 288 and load.computed_as(plain, 0, 2)
    held = sorted(len(kvzip.decode(file).token_ids) for file in store.rglob("*.kvz"))
    assert held == [288, 576, 576, 576] and not load.told


@pytest.mark.parametrize(("family", "blocks"), [(qwen3, 21), (gemma3, 28)], ids=["full", "sliding"])
def test_prompts_in_chunks_that_give_way(
    engines: Engines, tmp_path: Path, family: Callable[[], Any], blocks: int
) -> None:
    """Two prompts at once, 48 tokens in a step, and too few blocks for both of them and their
    answers: where all tokens are kept one gives way and goes on later, else it waits. What is
    stored is what an engine with room stores, and with it the answers are the same."""
    torch.manual_seed(0)
    model, prompts = tmp_path / "model", [words(8, 316), words(9, 316)]
    family().to(torch.bfloat16).save_pretrained(model)
    options = {"max_num_batched_tokens": 48, "max_model_len": 352, "enable_prefix_caching": False}

    def run(name: str, blocks: int, url: Path | None = None) -> Run:
        told = options | {"num_gpu_blocks_override": blocks}
        return Run(engines, tmp_path / name, model, prompts, url, options=told, at_once=True)

    plain, save = run("plain", blocks), run("save", blocks, tmp_path / "tight")
    roomy = run("roomy", 100, tmp_path / "roomy")
    assert save.log and roomy.log
    load = run("load", blocks, tmp_path / "tight")

    def gave_way(run: Run) -> float:
        [count] = re.findall(r"^preemptions: (\d+)", run.log, re.MULTILINE)
        return int(count)

    assert [gave_way(each) for each in (plain, save, roomy)] == [family is qwen3] * 2 + [0]
    for n in (0, 1):
        assert save[n] == plain[n] and load[n]["tokens"] == plain[n]["tokens"]
        assert load[n]["cached"] >= 288
    tight, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.kvz")}
        for name in ("tight", "roomy")
    )
    assert len(tight) == 2 and tight == other
    assert not [line for each in (save, roomy, load) for line in each.told]


def test_another_split_recomputes_and_says_so_once(engines: Engines, tmp_path: Path) -> None:
    torch.manual_seed(0)
    qwen3().to(torch.bfloat16).save_pretrained(tmp_path / "model")

    def run(name: str, tensor: int, prompts: Any, url: Any = None) -> Run:
        options = {"tensor_parallel_size": tensor}
        return Run(engines, tmp_path / name, tmp_path / "model", prompts, url, options=options)

    store = tmp_path / "store"
    assert run("two", 2, [DOCUMENT], store).log
    plain, one = run("plain", 1, [DOCUMENT, OTHER]), run("one", 1, [DOCUMENT, OTHER], store)
    assert one[0]["cached"] == 0 and one.computed_as(plain, 0, 0) and one.computed_as(plain, 1, 1)
    [told] = [line for line in one.told if "tensor_parallel_size" in line]
    assert "tensor_parallel_size=2" in told and told.endswith("they are not used")


def scaled(folder: Path, k: float, v: float) -> Path:
    """A checkpoint that says by what keys and values are divided before they are cached."""
    torch.manual_seed(0)
    qwen3().to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for i in range(3):
        weights[f"model.layers.{i}.self_attn.k_scale"] = torch.tensor([k])
        weights[f"model.layers.{i}.self_attn.v_scale"] = torch.tensor([v])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "kv_cache_scheme": scheme | {"symmetric": True},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not FP8, reason="vLLM's CPU build wants AVX-512 or AMX for fp8")
def test_scales_are_the_checkpoints(engines: Engines, tmp_path: Path) -> None:
    """A document holds what vLLM holds: numbers divided by the scales. With other scales it is no
    hit."""
    model, other = scaled(tmp_path / "model", 0.5, 0.25), scaled(tmp_path / "other", 0.25, 0.25)
    assert Run(engines, tmp_path / "save", model, [DOCUMENT], tmp_path / "s").log
    [file] = (tmp_path / "s").rglob("*.kvz")
    plain = Run(engines, tmp_path / "plain", model, [DOCUMENT, OTHER])
    load = Run(engines, tmp_path / "load", model, [OTHER], tmp_path / "s")
    missed = Run(engines, tmp_path / "missed", other, [DOCUMENT], tmp_path / "s")
    torch.manual_seed(0)
    reference = qwen3().to(torch.bfloat16).float()
    cache = transformers.DynamicCache(config=reference.config)
    with torch.no_grad():
        reference(torch.tensor([DOCUMENT]), **cache_argument(cache))
    for (k, v), layer in zip(kvzip.decode(file).tensors(), cache.layers, strict=True):
        for ours, scale, theirs in ((k, 0.5, layer.keys[0]), (v, 0.25, layer.values[0])):
            assert ours.dtype == torch.float8_e4m3fn
            assert (ours.float() * scale - theirs).norm() < 0.15 * theirs.norm()
    assert load[0]["cached"] == 192 and load.computed_as(plain, 0, 1)
    assert missed[0]["cached"] == 0 and missed.log


@pytest.mark.parametrize("name", ["auto", *(["fp8", "fp8_e5m2"] if FP8 else [])])
@pytest.mark.parametrize("isa", ["vec", "amx"])
def test_numbers_lie_where_vllms_kernels_put_them(isa: str, name: str) -> None:
    """What vLLM's own operation writes into a cache is what is taken out of it."""
    from vllm import _custom_ops

    dtype = getattr(torch, dtypes.get(fp8_format(name) or "bf16").torch)
    heads, dim, size, tokens = 2, 64, 32, 70
    held = torch.uint8 if dtype.itemsize == 1 else dtype
    cache = torch.zeros(4, heads, size, 2 * dim, dtype=held)
    written = [(torch.rand(tokens, heads, dim) + 1).to(dtype) for _ in range(2)]
    _custom_ops.cpu_attn_reshape_and_cache(
        *(part.to(torch.bfloat16) for part in written),
        *cache.view(4, heads, 2 * size, dim).chunk(2, 2),
        torch.arange(tokens) + size,
        isa,
        kv_cache_dtype=name,
    )
    kernels = pages.kernels_of(SimpleNamespace(isa=isa), held.itemsize)
    arrangement = pages.arrangement_of("CPU_ATTN", kernels, held.itemsize)
    parts = {"k": (heads, dim), "v": (heads, dim)}
    taken = pages.Pages(cache, arrangement, parts, size).take([1, 2, 3], tokens)
    for part, wanted in zip(taken.values(), written, strict=True):
        assert torch.equal(part.view(dtype).float(), wanted.transpose(0, 1).float())


# --- what this build of vLLM cannot run ------------------------------------------------------


def test_fp8_is_what_the_build_takes(engines: Engines, tmp_path: Path) -> None:
    """vLLM's CPU build wants AVX-512 or AMX for it, and heads of 32, 64, 96, ... numbers."""
    config = transformers.Qwen3Config(**TINY | {"head_dim": 80}, num_hidden_layers=3)
    model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    options = {"kv_cache_dtype": "fp8"}
    build = Run(engines, tmp_path / "run", tmp_path / "model", [DOCUMENT], options=options)
    needs = "FP8 KV cache on CPU requires x86 with AVX-512 or AMX"
    wanted = "FP8 KV cache requires head_size divisible by 32 on CPU" if FP8 else needs
    assert wanted in build.error


def test_mamba2_is_what_the_build_computes(engines: Engines, tmp_path: Path) -> None:
    """Where vLLM keeps states at blocks' ends, its CPU build fails by itself; where it does not,
    kvzip says at the start that there is nothing to store."""
    mamba2().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    options = {"enable_prefix_caching": True}
    build = Run(engines, tmp_path / "run", tmp_path / "model", [DOCUMENT], options=options)
    ours = Run(engines, tmp_path / "ours", tmp_path / "model", [DOCUMENT], tmp_path / "s")
    assert "is out of bounds for dimension 0 with size 1" in build.error
    assert "set enable_prefix_caching=True" in ours.error


@pytest.mark.parametrize("caching", [False, True])
def test_falcon_h1_is_what_the_build_computes(
    engines: Engines, tmp_path: Path, caching: bool
) -> None:
    """With prefix caching, without which vLLM keeps no state at a block's end, its CPU build fails
    by itself; kvzip says at the start that a layer has two caches."""
    torch.manual_seed(0)
    falcon_h1().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    options = {"enable_prefix_caching": caching}
    build = Run(engines, tmp_path / "run", tmp_path / "model", [DOCUMENT], options=options)
    where = tmp_path / "s"
    ours = Run(engines, tmp_path / "ours", tmp_path / "model", [DOCUMENT], where, options=options)
    if caching:
        assert "is out of bounds for dimension 0 with size 1" in build.error
    else:
        assert build.log
    assert "several caches of a layer are not handled" in ours.error
