"""What the connector uses of vLLM, for tests where vLLM is not installed.

`modules()` stands in for ``vllm.distributed.kv_transfer.kv_connector.v1.base`` of vLLM 0.32.0 and
0.33.0, with the same constructor and the same handling of metadata. `Engine` does what vLLM's
scheduler and model runner do with a connector, step by step: prompts in chunks, blocks from a pool,
loads before a step's forward pass, layers in order, and requests set back to the first block that
was not loaded; and where layers are of several groups or slide, loads that a request waits for, and
blocks that are given back when a window has slid on, or a state gone on. Its model is a formula:
keys and values follow from a token and its position, states from all tokens.
`test_vllm_engine.py` runs the same connector in vLLM itself.
"""

from __future__ import annotations

import enum
import hashlib
import math
import pickle
import time
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

BLOCK, LAYERS, HEADS, DIM, WORDS = 16, 3, 2, 32, 97
STATES = ((3, 24), torch.bfloat16), ((2, 4, 6), torch.float32)
PAGE = 400
"""Bytes of a block of states, of which the last are padding."""


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class Base:
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        self._connector_metadata = None
        self._vllm_config = vllm_config
        if vllm_config.kv_transfer_config is None:
            raise ValueError("kv_transfer_config must be set for KVConnectorBase_V1")
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._kv_cache_config, self._role = kv_cache_config, role

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None

    def _get_connector_metadata(self) -> Any:
        assert self._connector_metadata is not None
        return self._connector_metadata


class Metadata:
    pass


class SupportsHMA:
    pass


@dataclass
class TransferResults:
    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)


def modules() -> dict[str, ModuleType]:
    """For sys.modules while kvzip.load.vllm is imported."""
    path = "vllm.distributed.kv_transfer.kv_connector.v1.base"
    parts = path.split(".")
    found = {".".join(parts[: i + 1]): ModuleType(parts[i]) for i in range(len(parts))}
    found["vllm"].__version__ = "stand-in"  # type: ignore[attr-defined]
    base: Any = found[path]
    base.KVConnectorBase_V1, base.KVConnectorMetadata, base.KVConnectorRole = Base, Metadata, Role
    base.SupportsHMA, base.KVConnectorTransferResults = SupportsHMA, TransferResults
    return found


def config(url: Any, /, **changes: Any) -> SimpleNamespace:
    """A VllmConfig: settings of kvzip, and under their own names `role`, `policy`, `model`,
    `dtype`, `mamba_cache_mode`, `drafts`, `cache_dtype`, `parallel`, `spec`,
    `windows` (a group of layers for each, None for one of full attention, 0 for one of states),
    `num_blocks`, `layers` (the numbers of those that this worker has), `backend`, `isa`,
    `load_format`, `model_loader_extra_config`, `hf_config` (what of it is changed), and whatever
    else vLLM is told of a model."""
    import transformers

    get = changes.pop
    role, dtype = get("role", "kv_both"), get("dtype", torch.bfloat16)
    spec_name, windows = get("spec", "FullAttentionSpec"), get("windows", [None])
    backend, isa = get("backend", "CPU_ATTN"), get("isa", "vec")
    mode, drafts = get("mamba_cache_mode", "align"), get("drafts", 0)
    transfer = SimpleNamespace(
        is_kv_producer=role != "kv_consumer",
        is_kv_consumer=role != "kv_producer",
        kv_load_failure_policy=get("policy", "recompute"),
    )
    hf_config = transformers.LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        hidden_size=HEADS * DIM,
        head_dim=DIM,
        vocab_size=WORDS,
    )
    names = [f"model.layers.{i}.self_attn.attn" for i in get("layers", range(LAYERS))]

    def group(number: int, window: int | None) -> SimpleNamespace:
        kind = spec_name if window is None else "SlidingWindowSpec" if window else "MambaSpec"
        spec = type(kind, (SimpleNamespace,), {})(
            block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=dtype, sliding_window=window
        )
        if kind == "MambaSpec":
            spec.shapes, spec.dtypes = zip(*STATES, strict=True)
            spec.mamba_cache_mode, spec.num_speculative_blocks = mode, drafts
        return SimpleNamespace(layer_names=names[number :: len(windows)], kv_cache_spec=spec)

    attention = SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: backend), isa=isa)
    names_of_model = ("quantization", "quantization_config", "hf_overrides", "hf_config_path")
    names_of_model += ("model_class_overrides",)
    told = {name: get(name) for name in names_of_model if name in changes}
    hf_config.update(get("hf_config", {}))
    found = SimpleNamespace(
        load_config=SimpleNamespace(
            load_format=get("load_format", "auto"),
            model_loader_extra_config=get("model_loader_extra_config", {}),
        ),
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(**get("parallel", {"tensor_parallel_size": 1})),
        model_config=SimpleNamespace(
            model=get("model", "org/model"), hf_config=hf_config, dtype=dtype, **told
        ),
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(names, attention)),
        cache=SimpleNamespace(
            num_blocks=get("num_blocks", 64),
            kv_cache_groups=[group(n, w) for n, w in enumerate(windows)],
        ),
        cache_config=SimpleNamespace(cache_dtype=get("cache_dtype", "auto")),
    )
    transfer.kv_connector_extra_config = {
        "url": str(url),
        "revision": "r1",
        "block_tokens": BLOCK,
        "min_tokens": BLOCK,
        "threads": 1,
        **changes,
    }
    return found


def formula(ids: list[int], layer: int, part: int, dtype: Any) -> Any:
    """Keys (part 0) or values of a layer, [heads, tokens, dim]."""
    generator = torch.Generator().manual_seed(2 * layer + part)
    table = torch.randn(WORDS, HEADS, DIM, generator=generator)
    turn = torch.linspace(0.5, 2, DIM) * torch.arange(1, len(ids) + 1)[:, None, None] ** 0.5
    found = (table[ids] * turn).transpose(0, 1)
    if dtype == torch.uint8:  # as vLLM calls the numbers of an fp8 cache
        return found.to(torch.float8_e4m3fn).view(dtype)
    return found.to(dtype)


def state_of(ids: list[int], layer: int) -> Any:
    """Bytes of a layer's states after some tokens."""
    seed = hashlib.sha256(repr((layer, ids)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7]))
    need = sum(dtype.itemsize * math.prod(shape) for shape, dtype in STATES)
    return torch.randint(0, 256, (need,), dtype=torch.uint8, generator=generator)


@dataclass
class Request:
    request_id: str
    prompt_token_ids: list[int]
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    cache_salt: str | None = None
    shared_prefix_boundary: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    """Of each group; 0 where a window has left a block behind."""
    computed: int = 0
    loaded: int = 0
    new: bool = True

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt_token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids)

    num_prompt_tokens = num_tokens


class Engine:
    """One worker's engine with room for `blocks` blocks; `chunk` tokens of a request in a step.
    `drafting`: it asks what was not loaded before what a step saves is copied, as vLLM's runners do
    where they draft tokens in between (of 0.32.0 one of two, of 0.33.0 both). `within`: states are
    kept at a position that a step goes beyond, as some kernels for GPUs do (in 0.32.0 Mamba 2 and
    KDA, in 0.33.0 Qwen3-Next's, too); else a step ends there."""

    def __init__(
        self,
        connector: Any,
        settings: Any,
        blocks: int = 64,
        chunk: int = 10**6,
        drafting: bool = False,
        within: bool = False,
    ):
        self.groups = settings.cache.kv_cache_groups
        dtype = self.groups[0].kv_cache_spec.dtype
        role = connector.KVConnectorRole
        make = connector.KvzipConnector
        self.scheduler = make(settings, role.SCHEDULER, settings.cache)
        self.worker = make(settings, role.WORKER, settings.cache)
        shape = (blocks, HEADS, BLOCK, 2 * DIM)
        self.group_of = {
            name: n for n, group in enumerate(self.groups) for name in group.layer_names
        }
        self.caches = {
            name: torch.full((blocks, 1, 1, PAGE), 7, dtype=torch.int8)
            if self.keeps_states(self.group_of[name])
            else torch.full(shape, 7.0, dtype=dtype)
            for name in sorted(self.group_of)
        }
        self.worker.register_kv_caches(self.caches)
        self.dtype, self.chunk, self.free = dtype, chunk, list(range(1, blocks))
        self.drafting, self.within = drafting, within
        self.count = self.steps = self.waited = 0

    def keeps_states(self, group: int) -> bool:
        return type(self.groups[group].kv_cache_spec).__name__ == "MambaSpec"

    def state(self, request: Request, i: int, count: int) -> Any:
        """The bytes that layer i has for a state after `count` tokens."""
        block = self.blocks_of(request, i)[(count - 1) // BLOCK]
        page = list(self.caches.values())[i][block, 0, 0].view(torch.uint8)
        return page[: len(state_of([], 0))]

    def pages(self, i: int) -> Any:
        return self.worker._worker._pages[i]

    def blocks_of(self, request: Request, i: int) -> list[int]:
        return request.blocks[self.group_of[list(self.caches)[i]]]

    def first(self, i: int, position: int) -> int:
        """The first token that layer i still has when a request goes on at `position`."""
        group = self.group_of[list(self.caches)[i]]
        if self.keeps_states(group):
            return max(0, position - 1) // BLOCK * BLOCK
        window = self.groups[group].kv_cache_spec.sliding_window
        return 0 if window is None else max(0, position - window + 1) // BLOCK * BLOCK

    def run(self, *prompts: list[int], local: int = 0, **more: Any) -> list[Request]:
        """Compute prompts in one batch; the first `local` tokens are in vLLM's own prefix cache.

        Raises AssertionError unless the cache then holds what the model computes.
        """
        requests = [Request(f"{self.count + i}", list(p), **more) for i, p in enumerate(prompts)]
        self.count += len(requests)
        for request in requests:
            self._admit(request, local)
        while any(r.computed < r.num_tokens for r in requests):
            self._step(requests)
        for request in requests:
            self.scheduler.request_finished_all_groups(request, tuple(request.blocks))
            self._check(request)
            for ids in request.blocks:
                self.free += filter(None, ids)
        return requests

    def _ask(self, request: Request, local: int) -> tuple[int, bool]:
        while True:
            found, later = self.scheduler.get_num_new_matched_tokens(request, local)
            if found is not None:
                assert later == (found > 0 and self.waits)
                return found, later
            self.waited += 1
            time.sleep(0.01)

    @property
    def waits(self) -> bool:
        """Whether requests wait for their loads: what failed in a step could not be told."""
        specs = [group.kv_cache_spec for group in self.groups]
        states = any(map(self.keeps_states, range(len(self.groups))))
        return states or len(specs) > 1 or specs[0].sliding_window is not None

    def _admit(self, request: Request, local: int) -> None:
        found, later = self._ask(request, local)
        need = -(-request.num_tokens // BLOCK)
        for _ in self.groups:
            request.blocks.append(self.free[:need])
            self.free = self.free[need:]
        request.loaded, request.computed = found, local + found
        self._compute(request, 0, local)
        self._give_back(request)
        self._allocated(request, found)
        if later:
            done, failed = self._wait(request)
            assert done == {request.request_id}
            if failed:
                assert failed == done
                request.computed = 0
                for ids in request.blocks:  # allocated again
                    for at, block in enumerate(ids):
                        ids[at] = block or self.free.pop(0)
                again, later = self._ask(request, 0)
                assert again == 0
            self._allocated(request, 0)

    def _allocated(self, request: Request, external: int) -> None:
        taken = SimpleNamespace(get_block_ids=lambda: tuple(request.blocks))
        self.scheduler.update_state_after_alloc(request, taken, external)

    def _give_back(self, request: Request) -> None:
        """Free the blocks that windows have left behind at the tokens computed so far."""
        for n, group in enumerate(self.groups):
            i = list(self.caches).index(group.layer_names[0])
            for at in range(self.first(i, request.computed) // BLOCK):
                if block := request.blocks[n][at]:
                    request.blocks[n][at] = 0
                    self.free.append(block)

    def _wait(self, request: Request) -> tuple[set[str], set[str]]:
        """Steps without a forward pass until a load is done."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            output = SimpleNamespace(
                scheduled_new_reqs=[],
                scheduled_cached_reqs=SimpleNamespace(req_ids=[], resumed_req_ids=set()),
                num_scheduled_tokens={},
            )
            metadata = pickle.loads(pickle.dumps(self.scheduler.build_connector_meta(output)))
            self.worker.bind_connector_metadata(metadata)
            self.worker.start_load_kv(None)
            self.worker.wait_for_save()
            found = self.worker.get_transfer_results(set())
            assert not self.worker.get_block_ids_with_load_errors()
            self.worker.clear_connector_metadata()
            told = SimpleNamespace(
                invalid_block_ids=set(),
                finished_recving=found.finished_recving,
                failed_recving=found.failed_recving,
            )
            self.scheduler.update_connector_output(told)
            if found.finished_recving:
                return found.finished_recving, found.failed_recving
            time.sleep(0.01)
        raise TimeoutError

    def _compute(
        self, request: Request, start: int, stop: int, layer: int | None = None, off: bool = False
    ) -> None:
        """Write keys and values of positions start to stop into the request's blocks; other ones
        (`off`) when they rest on tokens before that are not in the cache."""
        size = -(-request.num_tokens // BLOCK) * BLOCK
        for i in range(len(self.caches)) if layer is None else [layer]:
            if self.keeps_states(self.group_of[list(self.caches)[i]]):
                if start < stop:
                    new = state_of(request.prompt_token_ids[:stop], i)
                    self.state(request, i, stop)[:] = new ^ int(off)
                continue
            blocks = self.blocks_of(request, i)
            parts = self.pages(i).take(blocks, size)
            for part, held in enumerate(parts.values()):
                new = formula(request.prompt_token_ids, i, part, self.dtype)
                held[:, start:stop] = new[:, start:stop] + int(off)
            self.pages(i).put(blocks, parts)

    def _step(self, requests: list[Request]) -> None:
        self.steps += 1
        work = {r.request_id: min(self.chunk, r.num_tokens - r.computed) for r in requests}
        work = {name: count or 1 for name, count in work.items()}  # done ones generate
        offers: dict[str, list[tuple[int, int, int]]] = {}
        kept: dict[str, int] = {}
        for r in requests:
            self._give_back(r)
            end = (r.num_tokens - 1) // BLOCK * BLOCK  # where vLLM keeps states
            if r.computed < r.shared_prefix_boundary:
                end = r.shared_prefix_boundary
            if any(map(self.keeps_states, range(len(self.groups)))) and r.computed < end:
                if not self.within:
                    work[r.request_id] = min(work[r.request_id], end - r.computed)
                if r.computed + work[r.request_id] >= end:
                    kept[r.request_id] = end
                    offers[r.request_id] = [
                        (n, ids[end // BLOCK - 1], end)
                        for n, ids in enumerate(r.blocks)
                        if self.keeps_states(n)
                    ]
        new, old = [r for r in requests if r.new], [r for r in requests if not r.new]
        output = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=r.request_id,
                    block_ids=tuple(map(list, r.blocks)),
                    num_computed_tokens=r.computed,
                )
                for r in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r.request_id for r in old],
                resumed_req_ids=set(),
                new_block_ids=[None for _ in old],
                num_computed_tokens=[r.computed for r in old],
            ),
            num_scheduled_tokens=work,
            kv_connector_block_state=SimpleNamespace(boundary_state_offloads=offers),
        )
        metadata = pickle.loads(pickle.dumps(self.scheduler.build_connector_meta(output)))
        worker = self.worker
        worker.bind_connector_metadata(metadata)
        worker.start_load_kv(None)
        for i, (name, cache) in enumerate(self.caches.items()):
            worker.wait_for_layer_load(name)
            for r in requests:
                stop = min(r.computed + work[r.request_id], r.num_tokens)
                off = not self._holds(r, i, r.computed)
                for end in sorted({kept.get(r.request_id, stop), stop}):
                    self._compute(r, r.computed, end, i, off)
            worker.save_kv_layer(name, cache, None)
        if not self.drafting:
            worker.wait_for_save()
        invalid = worker.get_block_ids_with_load_errors()
        if self.drafting:
            worker.wait_for_save()
        worker.clear_connector_metadata()
        for r in requests:
            r.new = False
            ids = r.blocks[0][: -(-r.computed // BLOCK)]
            bad = [i for i, b in enumerate(ids) if b in invalid]
            done = min(r.computed + work[r.request_id], r.num_tokens)
            r.computed = bad[0] * BLOCK if bad else done
        self.scheduler.update_connector_output(
            SimpleNamespace(invalid_block_ids=invalid, finished_recving=None)
        )

    def _holds(self, request: Request, i: int, count: int) -> bool:
        """Whether layer i of the cache holds what the model computes for the first tokens, or for
        those that a window has not left behind, or after them all."""
        if self.keeps_states(self.group_of[list(self.caches)[i]]):
            wanted = state_of(request.prompt_token_ids[:count], i)
            return not count or torch.equal(self.state(request, i, count), wanted)
        found = self.pages(i).take(self.blocks_of(request, i), count).values()
        first = self.first(i, count)
        ids = request.prompt_token_ids[:count]
        return all(
            torch.equal(held[:, first:], formula(ids, i, part, self.dtype)[:, first:])
            for part, held in enumerate(found)
        )

    def _check(self, request: Request) -> None:
        for i in range(len(self.caches)):
            assert self._holds(request, i, request.num_tokens), f"layer {i}: other numbers"

    def settle(self) -> None:
        """Return when all that was copied out is stored."""
        self.worker.shutdown()
        self.scheduler.shutdown()
