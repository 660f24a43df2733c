"""Writers that are killed at random: `python crash.py URL OPERATIONS [SEED [OPTIONS-AS-JSON]]`.

Forks writers and readers on one store and kills a writer (SIGKILL) every few milliseconds, until
half as many puts and half as many gets are done. Then every document whose put had returned must
be found, and all that the store has must be whole. Prints what happened as JSON; exit code 1 if
anything was lost or damaged.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np

import kvzip
from kvzip.store import Store

DOCUMENTS, BLOCK, WRITERS, READERS = 400, 16, 3, 2
OF = {"model": "m", "revision": "r", "dtype": "bf16"}


def ids_of(number: int) -> list[int]:
    """Documents in families of four share their first 16 or 32 tokens."""
    return [number // 4] * 16 + [number // 2] * 16 + [number] * 32


@cache
def document(number: int) -> kvzip.Snapshot:
    bits = np.random.default_rng(number).integers(0, 1 << 16, (4, 2, 64, 128), np.uint16)
    layers = [(bits[0], bits[1]), (bits[2], bits[3])]
    return kvzip.Snapshot.from_arrays(layers, "bf16", ids_of(number), kvzip.Origin("m", "r"))


def problem(store: Store, number: int, acknowledged: bool) -> str | None:
    """What is wrong with what the store has for a document's ids."""
    found = store.find(ids_of(number), threads=1, **OF)
    if found is None:
        return f"{number} was acknowledged and is lost" if acknowledged else None
    with found:
        if acknowledged and found.tokens < 64:
            return f"{number} was acknowledged, and {found.tokens} tokens of it are found"
        name = int(found.reader.token_ids[-1])
        same = document(name)
        for i, layer in enumerate(found.snapshot(threads=1).layers):
            for part in ("k", "v"):
                if (layer.part(part) != same.layers[i].part(part)[:, : found.tokens]).any():
                    return f"{number} came back with other numbers"
    return None


class Log:
    """Lines of all processes: a line is written by one call, so it is there or it is not."""

    def __init__(self, path: Path):
        self.path = path
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, *words: object) -> None:
        os.write(self.file, (" ".join(map(str, words)) + "\n").encode())

    def lines(self) -> list[list[str]]:
        return [line.split(" ", 2) for line in self.path.read_text().splitlines()]

    def acknowledged(self) -> set[int]:
        return {int(words[1]) for words in self.lines() if words[0] == "put"}


def write(store: Store, log: Log, rng: random.Random) -> None:
    while True:
        number = rng.randrange(DOCUMENTS)
        log.write("begin", number)
        store.put(document(number), codec="raw", threads=1)
        log.write("put", number)


def read(store: Store, log: Log, rng: random.Random) -> None:
    while True:
        known = log.acknowledged()
        number = rng.choice([rng.randrange(DOCUMENTS), *list(known)[:1]])
        wrong = problem(store, number, number in known)
        log.write("bad" if wrong else "get", number, wrong or "")
        time.sleep(rng.uniform(0, 0.02))


def start(work, url, options, log, seed) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work(Store(url, block_tokens=BLOCK, options=options), log, random.Random(seed))
    except BaseException as error:
        log.write("bad", 0, repr(error))
    os._exit(1)


def main(url: str, operations: int, seed: int = 0, options: str = "{}") -> int:
    with tempfile.TemporaryDirectory(prefix="kvzip-crash-") as folder:
        tempfile.tempdir = folder  # a writer that is killed leaves its file behind
        return run(Log(Path(folder) / "log"), url, operations, seed, json.loads(options))


def run(log: Log, url: str, operations: int, seed: int, given: dict[str, str]) -> int:
    rng = random.Random(seed)
    seeds = iter(range(seed * 1_000_000, sys.maxsize))
    began, kills = time.monotonic(), 0
    writers = [start(write, url, given, log, next(seeds)) for _ in range(WRITERS)]
    readers = [start(read, url, given, log, next(seeds)) for _ in range(READERS)]
    done = 0
    try:
        while done < operations and time.monotonic() - began < 600:
            time.sleep(rng.uniform(0.005, 0.08))
            at = rng.randrange(WRITERS)
            os.kill(writers[at], signal.SIGKILL)
            os.waitpid(writers[at], 0)
            kills += 1
            writers[at] = start(write, url, given, log, next(seeds))
            kinds = [words[0] for words in log.lines()]
            done = 2 * min(kinds.count("put"), kinds.count("get"))
    finally:
        for pid in [*writers, *readers]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    kinds = [words[0] for words in log.lines()]
    store = Store(url, options=given)
    held = log.acknowledged()
    wrong = [words[2] for words in log.lines() if words[0] == "bad"]
    wrong += filter(None, (problem(store, number, number in held) for number in range(DOCUMENTS)))
    for stored in store.documents():
        with store.open(stored.key) as reader:
            reader.check_stored()
    result = {
        "puts": kinds.count("put"),
        "gets": kinds.count("get"),
        "kills": kills,
        "killed_within_a_put": kinds.count("begin") - kinds.count("put"),
        "acknowledged": len(held),
        "in_store": len(store.documents()),
        "wrong": wrong,
        "seconds": time.monotonic() - began,
    }
    print(json.dumps(result))
    return bool(wrong) or done < operations


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *map(int, sys.argv[3:4]), *sys.argv[4:5]))
