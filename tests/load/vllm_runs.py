"""vLLM in processes of its own, for tests: jobs for `engine.py`, and what comes of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SIZE = 32
"""Tokens of a block, as `engine.py` sets it."""
ENVIRONMENT = os.environ | {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
"""The last lets workers in processes of their own run a function of `engine.py`."""
PLAIN = ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1"}
"""Compiling takes longer than all the rest; the page's example shows that it may be done."""


def words(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, 250), k=count)


def flip(file: Path) -> None:
    """Change a bit of a document's blocks."""
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    file.write_bytes(data)


class Engines:
    """Jobs for `engine.py`, two at a time, each in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, HERE / "engine.py"], env=PLAIN, stdin=subprocess.PIPE, text=True
        )
        self._pool = ThreadPoolExecutor(2)

    def submit(self, folder: Path) -> Future[int]:
        return self._pool.submit(self._run, folder)

    def _run(self, folder: Path) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder / 'job.json'}\n")
        self._process.stdin.flush()
        end = time.monotonic() + 600
        while not (folder / "code").exists():
            assert self._process.poll() is None and time.monotonic() < end, folder
            time.sleep(0.05)
        return int((folder / "code").read_text())

    def close(self) -> None:
        self._process.communicate()
        self._pool.shutdown()


class Run:
    """An engine: begun at once, waited for when it is asked for something. `at_once`: all prompts
    are one batch."""

    def __init__(
        self,
        engines: Engines,
        folder: Path,
        model: Path,
        prompts: Any,
        store: Any = None,
        dtype: str = "bfloat16",
        options: dict[str, Any] | None = None,
        transfer: dict[str, Any] | None = None,
        at_once: bool = False,
        **settings: Any,
    ):
        self.folder, self.prompts = folder, prompts
        folder.mkdir()
        job = {
            "model": str(model),
            "rounds": [prompts] if at_once else [[ids] for ids in prompts],
            "dtype": dtype,
            "options": options or {},
        }
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
                    **settings,
                },
            }
        if transfer is not None:
            job["transfer"] = transfer
        (folder / "job.json").write_text(json.dumps(job))
        self._code = engines.submit(folder)

    @property
    def log(self) -> str:
        found = (self.folder / "log").read_text() if self._code.result() == 0 else None
        assert found is not None, (self.folder / "log").read_text()[-5000:]
        return found

    @property
    def error(self) -> str:
        """What a process said that did not end well."""
        assert self._code.result() != 0
        return (self.folder / "log").read_text()

    @property
    def told(self) -> list[str]:
        """What kvzip warned of, a line each."""
        assert self.log
        return (self.folder / "told").read_text().splitlines()

    def __getitem__(self, number: int) -> dict[str, Any]:
        """What a prompt gave."""
        assert self.log
        rounds = json.loads((self.folder / "result.json").read_text())
        found: dict[str, Any] = [one for each in rounds for one in each][number]
        return found

    def blocks(self, number: int) -> dict[str, Any]:
        """Bytes of the blocks that are full of a prompt, and that no window has left behind: of
        each layer, [blocks, ...]."""
        return dict(np.load(self.folder / f"{number}-0.npz"))

    def computed_as(self, other: Run, number: int, theirs: int) -> bool:
        """Whether a prompt gave the tokens, log-probabilities and blocks that `other` has."""
        names = ("tokens", "logprobs")
        return all(self[number][name] == other[theirs][name] for name in names) and same_blocks(
            self.blocks(number), other.blocks(theirs)
        )


def same_blocks(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether all layers have the same bytes in the last blocks, as many as both have."""
    if a.keys() != b.keys():
        return False
    for name in a:
        count = min(len(a[name]), len(b[name]))
        if not count or not np.array_equal(a[name][-count:], b[name][-count:]):
            return False
    return True
