"""Run vLLM's own engine, each time in a process of its own; `test_vllm_engine.py` starts this.

It imports vLLM, which takes longer than what is to be tested, then reads paths of jobs and forks a
process for each. A job names a folder with a model, the dtype, what to pass to LLM besides, and
rounds of prompts (token ids), each generated from at once. Into the job's folder go
``result.json`` (tokens and log-probabilities of every prompt) and ``round-prompt.npz``, the raw
bytes of vLLM's own blocks that are full of the prompt: of each layer, by its name, [blocks, ...],
less those that a window has left behind, or of states the one after all tokens; also
``log``, what the process says, with how its layers are grouped and how often a request gave way to
another, ``told``, what kvzip warns of, and at the end ``code``, the
process's exit status.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig


def forked(folder: Path) -> bool:
    """Whether this is a new process, for the job in `folder`; another one notes how it ends."""
    if os.fork():
        return False
    watched = os.fork()
    if watched:
        code = os.waitstatus_to_exitcode(os.waitpid(watched, 0)[1])
        (folder / "ended").write_text(str(code))
        (folder / "ended").rename(folder / "code")
        os._exit(0)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return True


def bytes_of(worker: Any, blocks: list[list[int]]) -> dict[str, Any]:
    """In a worker: the bytes of blocks, of each group, in its layers' caches."""
    runner = getattr(worker, "worker", worker).model_runner
    context = runner.vllm_config.compilation_config.static_forward_context
    found = {}
    for group, ids in zip(runner.kv_cache_config.kv_cache_groups, blocks, strict=True):
        for layer in group.layer_names:
            held, at = context[layer].kv_cache, torch.tensor(ids, dtype=torch.int64)
            for n, part in enumerate(held if isinstance(held, tuple) else (held,)):
                picked = part[at].contiguous().view(torch.uint8)
                found[f"{layer}.{n}" if n else layer] = picked.numpy()
    return found


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    told = logging.FileHandler(path.parent / "told")
    told.setLevel(logging.WARNING)
    logging.getLogger("kvzip").addHandler(told)
    options = dict(job.get("options", {}))
    if "transfer" in job:
        options["kv_transfer_config"] = KVTransferConfig(**job["transfer"])
    llm = LLM(
        model=job["model"],
        dtype=job.get("dtype", "bfloat16"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        disable_log_stats=False,
        **{"block_size": 32, "max_model_len": 1024} | options,
    )
    core = llm.llm_engine.engine_core.engine_core
    manager = core.scheduler.kv_cache_manager
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    print("groups:", *(type(group.kv_cache_spec).__name__ for group in groups))
    blocks: dict[str, tuple[list[int], ...]] = {}
    free = manager.free

    def noting(request: Any, *args: Any, **kwargs: Any) -> Any:
        ids = manager.get_block_ids(request.request_id)
        if any(ids):
            blocks[request.request_id.split("-")[0]] = ids
        return free(request, *args, **kwargs)

    def held(name: str, count: int) -> dict[str, Any]:
        """The bytes of each layer's blocks that are full of the first `count` tokens."""
        full = []
        for group, ids in zip(groups, blocks[name], strict=True):
            spec = group.kv_cache_spec
            state = type(spec).__name__ == "MambaSpec"
            full.append(
                [i for i in ids if i][-1:]
                if state
                else [i for i in ids[: count // spec.block_size] if i]
            )
        found: list[dict[str, Any]] = llm.collective_rpc(bytes_of, args=(full,))
        if len(found) == 1:
            return found[0]
        return {f"{n}:{layer}": raw for n, each in enumerate(found) for layer, raw in each.items()}

    manager.free = noting
    sampling = SamplingParams(
        temperature=0, max_tokens=8, logprobs=1, detokenize=False, ignore_eos=True
    )
    rounds = []
    for number, prompts in enumerate(job["rounds"]):
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
        found = []
        for i, (ids, output) in enumerate(zip(prompts, outputs, strict=True)):
            np.savez(path.parent / f"{number}-{i}.npz", **held(output.request_id, len(ids)))
            one = output.outputs[0]
            found.append(
                {
                    "tokens": list(one.token_ids),
                    "logprobs": [
                        p[t].logprob for p, t in zip(one.logprobs, one.token_ids, strict=True)
                    ],
                    "cached": output.num_cached_tokens,
                }
            )
        rounds.append(found)
    (path.parent / "result.json").write_text(json.dumps(rounds))
    counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    print("preemptions:", counts["vllm:num_preemptions"])
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    for line in sys.stdin:
        job = Path(line.rstrip())
        if forked(job.parent):
            main(job)
            break
