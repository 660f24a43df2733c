"""The two ends of a link that is measured, each a process in its own network namespace.

``python -m kvzip.eval.links.processes serve FOLDER ADDRESS`` serves the folder's files through
HTTP, ranges and ETags included. ``python -m kvzip.eval.links.processes read MODEL DTYPE SNAPSHOT
[PROFILE]`` loads a model and does what it is asked, a line of JSON at a time: who has the model
times it, as a user would have it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvzip.errors import KVZipError, extra_told
from kvzip.parsing import from_json
from kvzip.store.bucket import forget_clients, open_url
from kvzip.workers import usable_cores

PORT = 8083
# A model on a CPU that waits for its next layer leaves the cores to the decoder. Left alone, its
# threads spin.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


class End:
    """A process at one end that answers questions; a context manager. Raises KVZipError with what
    it said last, where it fails."""

    def __init__(self, command: Sequence[str]):
        self._command = command

    def __enter__(self) -> End:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            env={**_ENVIRONMENT, **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        return self

    def answer(self) -> dict[str, Any]:
        """The next line that it says."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            told = self._errors.read().decode(errors="replace").strip().splitlines()
            raise KVZipError(f"an end of the link failed: {(told or ['it said nothing'])[-1]}")
        return from_json(line, dict[str, Any])

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a question: `do` names a method of :class:`_Answers`, the rest are its
        arguments."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` tells why
        return self.answer()

    def processor_seconds(self) -> float:
        """What it has used of the processor up to now."""
        return processor_seconds(self._process.pid)

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def processor_seconds(process: int) -> float:
    """What a process has used of the processor, in user and in system mode, all threads
    (clock_getcpuclockid(3)). Raises KVZipError where there is no such process."""
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(process, ctypes.byref(clock)):
        raise KVZipError("an end of the link, or the wire between them, is gone")
    return time.clock_gettime(clock.value)


def serving(folder: str | os.PathLike[str], address: str) -> list[str]:
    """The command that serves a folder; it says one line when it is up."""
    return [sys.executable, "-m", __spec__.name, "serve", str(folder), address]


def reading(
    model: str,
    dtype: str,
    snapshot: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None,
) -> list[str]:
    """The command that loads a model and answers; it says one line when it is ready."""
    more = [] if profile is None else [str(profile)]
    return [sys.executable, "-m", __spec__.name, "read", model, dtype, str(snapshot), *more]


# --- in the processes themselves -----------------------------------------------------------------


def _serve(folder: str, address: str, say: Callable[[dict[str, Any]], None]) -> None:
    with extra_told("links are measured with aiohttp", "eval"):
        from aiohttp import web
    app = web.Application()
    app.router.add_static("/", folder)
    web.run_app(app, host=address, port=PORT, access_log=None, print=lambda *_: say({"port": PORT}))


class _Answers:
    """What can be asked of the end with the model."""

    def __init__(self, model: str, dtype: str, snapshot: str, profile: str | None = None):
        import torch

        from kvzip.identity import fingerprint
        from kvzip.models import load_model
        from kvzip.profile import Profile
        from kvzip.snapshot import Snapshot

        self.snapshot = Snapshot.load(snapshot)
        self.profile = None if profile is None else Profile.load(profile)
        self.model = load_model(model, dtype).model
        ids = np.atleast_2d(np.asarray(self.snapshot.token_ids)).astype(np.int64)
        self.prompt = torch.from_numpy(ids)
        self.warnings = _Warnings()
        logging.getLogger("kvzip.load").addHandler(self.warnings)
        # Everything once, so that nothing is the first of its kind when it is timed.
        fingerprint(self.model)
        self.token = self.step()["token"]
        self.prefill()
        # A million objects that stay: what is collected before each timing need not look at them.
        gc.collect()
        gc.freeze()

    def prefill(self) -> dict[str, Any]:
        """Seconds from the prompt to the first token, and the token."""
        from transformers import DynamicCache

        return self._timed(lambda: DynamicCache(config=self.model.config))

    def step(self) -> dict[str, Any]:
        """The same with the cache in memory, not encoded: what the model itself takes."""
        from kvzip.load.hf import load_cache

        return self._timed(lambda: load_cache(self.snapshot, self.model.config, prompt=self.prompt))

    def load(self, source: str) -> dict[str, Any]:
        """The same with what lies at a path or URL, and whether every byte and the token are those
        of the cache that was encoded."""
        from kvzip.load.hf import load_or_prefill

        self.warnings.told.clear()
        found = self._timed(
            lambda: load_or_prefill(source, self.model, self.prompt, profile=self.profile)
        )
        if self.warnings.told:
            raise KVZipError(f"it was not loaded: {self.warnings.told[0]}")
        cache = found.pop("cache")
        found["exact"] = found["token"] == self.token and self._equal(cache)
        return found

    def layers(self, source: str) -> dict[str, Any]:
        """Seconds to have every layer decoded, one after the other, each ahead of its use, and how
        much of the processor all threads took for it; the model does not run."""
        from kvzip.load.hf import load_cache

        gc.collect()
        used, began = time.process_time(), time.perf_counter()
        cache = load_cache(source, self.model.config, prompt=self.prompt, profile=self.profile)
        for layer in cache.layers:
            _ = layer.keys
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "processor": time.process_time() - used}

    def transfer(self, source: str) -> dict[str, Any]:
        """Seconds to have every byte of it, read as a load reads it, but not decoded; and how much
        of the processor all threads here took for it."""
        gc.collect()
        used, began = time.process_time(), time.perf_counter()
        reader = open_url(source, self.profile)
        reader.read_ahead([(0, reader.layout.tokens)] * len(reader))
        reader.check_stored()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "processor": time.process_time() - used}

    def _timed(self, make: Callable[[], Any]) -> dict[str, Any]:
        import torch

        from kvzip.load.config import cache_argument

        gc.collect()
        with torch.inference_mode():
            used, began = time.process_time(), time.perf_counter()
            cache = make()
            opened = time.perf_counter()
            out = self.model(
                self.prompt[:, cache.get_seq_length() :],
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(cache),
            )
            token = int(out.logits[0, -1].argmax())
            seconds = time.perf_counter() - began
            used = time.process_time() - used
        return {
            "seconds": seconds,
            "processor": used,
            "opening": opened - began,
            "token": token,
            "cache": cache,
        }

    def _equal(self, cache: Any) -> bool:
        """Whether the cache holds the snapshot's bytes, where it holds what the snapshot does; its
        last token is the model's own."""
        from kvzip import dtypes

        for layer, want in zip(cache.layers, self.snapshot.layers, strict=True):
            for mine, bits in zip((layer.keys, layer.values), want, strict=True):
                found, _ = dtypes.as_bits(mine[0, :, :-1])
                held = min(found.shape[-2], bits.shape[-2] - 1)
                if not np.array_equal(found[:, -held:], bits[:, -1 - held : -1]):
                    return False
        return True


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def main(what: str, *rest: str) -> None:
    """Be one of the two ends, as the module's docstring says."""
    # What libraries print is not to come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    if what == "serve":
        _serve(rest[0], rest[1], say)
        return
    end = _Answers(*rest)
    say({"threads": usable_cores()})
    for line in sys.stdin:
        question = from_json(line)
        forget_clients()  # connections are those of a process's first load
        found = getattr(end, question.pop("do"))(**question)
        found.pop("cache", None)
        say(found)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KVZipError as error:
        sys.exit(str(error))
