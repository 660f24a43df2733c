"""`make leaks` (tests/soak/leaks.py) for a few rounds: it notices what a round loses."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys

import pytest
from soak import leaks


def test_a_round_of_everything_comes_back(tmp_path):
    deeds = leaks.Deeds(tmp_path)
    for name in leaks.DEEDS:
        for _ in range(3):
            getattr(deeds, name)()


def test_few_rounds_lose_nothing_large(tmp_path):
    """No object, file or thread, and no buffer. Fewer bytes than these come and go in so few rounds
    while tables fill; `make leaks` tells them apart."""
    deeds = leaks.Deeds(tmp_path)
    light = ("open", "given_up", "load_profile", "snapshot", "find", "damaged")
    grown = leaks.repeat([getattr(deeds, name) for name in light], 45, 15)
    assert {"objects", "files", "threads", "resident"}.isdisjoint(leaks.too_much(grown))
    assert grown["python"] < 2000 and grown["native"] < 4000


@pytest.mark.parametrize("lost", ["python", "native", "files", "objects"])
def test_what_every_round_loses_is_noticed(lost):
    kept, numbers = [], itertools.count(1 << 40)

    def lose():
        if lost == "python":
            kept.append(next(numbers))
        elif lost == "native":
            kept.append(0)
            ctypes.CDLL(None).malloc(64)
        elif lost == "files":
            kept.append(os.open(os.devnull, os.O_RDONLY))
        else:
            kept.append([])

    try:
        assert lost in leaks.too_much(leaks.repeat([lose], 300, 30))
    finally:
        if lost == "files":
            for handle in kept:
                os.close(handle)


def test_a_thread_that_nobody_waits_for_is_no_leak():
    """It holds a profile's tables when the interpreter ends, which is silent."""
    code = """
import threading, time, numpy, kvzip
numbers = numpy.arange(2 * 200 * 16, dtype=numpy.uint16).reshape(2, 200, 16) % 100
profile = kvzip.Profile.fit([kvzip.Snapshot.from_arrays([(numbers,) * 2], "bf16")], codec="channel")
kvzip.encode_page([(numbers,) * 2], profile)
threading.Thread(target=lambda held: time.sleep(100), args=(profile,), daemon=True).start()
assert profile.made["channel"]
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_what_grows_once_is_no_leak():
    """As a module does that a rare error imports, whenever that is."""
    for when in range(35, 300, 30):
        kept, numbers = [], itertools.count()

        def grow(when=when, kept=kept, numbers=numbers):
            if next(numbers) == when:
                kept.append(bytes(2_000_000))

        assert leaks.too_much(leaks.repeat([grow], 300, 30)) == []


def test_what_is_given_back_is_no_leak():
    grown = leaks.repeat([lambda: [bytes(1000) for _ in range(10)]], 4000, 400)
    assert leaks.too_much(grown) == []
