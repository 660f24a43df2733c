"""Families of models in vLLM itself: layers that slide, of several groups, with latents, cut over
workers. Tokens and bytes of vLLM's blocks are those that it computes without kvzip.

`make test-vllm` runs this after `test_vllm_engine.py`, whose model has full attention. The table of
docs/engines.md is what is seen here.
"""

from __future__ import annotations

import importlib.util
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
from vllm_runs import Engines, Run, flip, words

import kvzip
from kvzip import dtypes
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
    # vLLM's kernels for it on a CPU leave out of attention what a prompt finds in the cache.
    "mla": Family(deepseek, "MLAAttentionSpec", loads=False),
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
FP8 = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
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
