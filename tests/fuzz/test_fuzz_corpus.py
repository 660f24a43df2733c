"""The fuzzers' targets (`make fuzz`) on their seeds, on seeds that are changed or cut short, and
on what fuzzers found (tests/fuzz/corpus): nothing but a KVZipError comes out."""

from __future__ import annotations

import random
import re

import pytest
from fuzz import run, targets

import kvzip


@pytest.mark.parametrize("target", targets.TARGETS)
def test_nothing_but_our_errors_comes_out(target):
    seeds, draw = targets.seeds(target), random.Random(1)
    assert seeds
    for seed in seeds:
        targets.TARGETS[target](seed)
    for seed in [b"", *seeds]:
        targets.tried(target, seed)
        for _ in range(30 if seed else 0):
            changed = bytearray(seed)
            changed[draw.randrange(len(seed))] = draw.randrange(256)
            targets.tried(target, bytes(changed))
            targets.tried(target, bytes(changed[: draw.randrange(len(seed))]))


@pytest.mark.parametrize("target", run.FILES)
def test_what_is_changed_gets_past_the_checksums(target):
    """They are made true, so that it is the readers and the codecs that meet it."""
    draw, said = random.Random(2), []
    for seed in targets.seeds(target):
        for _ in range(10):
            changed = bytearray(seed)
            changed[draw.randrange(40, len(seed))] ^= 1 << draw.randrange(8)
            try:
                targets.TARGETS[target](bytes(changed))
            except kvzip.KVZipError as error:
                said.append(str(error))
    assert len(said) > 20
    assert [words for words in said if "checksum does not match" in words] == []


@pytest.mark.parametrize("target", targets.TARGETS)
def test_nothing_else_comes_out_of_what_was_found(target):
    kept = [file for folder in run.kept_for(target) for file in folder.glob("*")]
    assert kept
    for file in kept:
        targets.tried(target, file.read_bytes())


def test_what_was_found_is_small_and_names_no_folder_of_a_machine():
    files = [file for file in run.CORPUS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 500_000
    for file in files:
        assert not re.search(rb"/(?:home|root|tmp|work|usr|Users)\b", file.read_bytes()), file
