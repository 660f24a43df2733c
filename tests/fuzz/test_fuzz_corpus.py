"""The fuzzers' targets (`make fuzz`) on their seeds, on seeds that are changed or cut short, and
on what a fuzzer once failed on: nothing but a KVZipError comes out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz import targets

CORPUS = Path(__file__).with_name("corpus")


@pytest.mark.parametrize("target", targets.TARGETS)
def test_nothing_but_our_errors_comes_out(target):
    seeds, draw = targets.seeds(target), random.Random(1)
    assert seeds
    for seed in seeds:
        targets.TARGETS[target](seed)
    for seed in [b"", *seeds, *(file.read_bytes() for file in CORPUS.glob(f"{target}/*"))]:
        targets.tried(target, seed)
        for _ in range(30 if seed else 0):
            changed = bytearray(seed)
            changed[draw.randrange(len(seed))] = draw.randrange(256)
            targets.tried(target, bytes(changed))
            targets.tried(target, bytes(changed[: draw.randrange(len(seed))]))
