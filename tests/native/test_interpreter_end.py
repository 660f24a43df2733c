"""An interpreter ends as it would, whatever compiled code threads run that it does not wait for."""

from __future__ import annotations

import subprocess
import sys

import pytest

SETTING = """
import threading, time
import numpy as np
from kvzip.codecs import _native

numbers = np.full((1, 8, 1 << 15, 64), 0x3F80, np.uint16)
numbers[..., ::3] = np.arange(1 << 15, dtype=np.uint16)[:, None]
block = bytes(16) + numbers.tobytes()
counts = _native.ChannelCounts(8, 64, 8, 7)
counts.add(numbers[:, :, :100])
tables = _native.ChannelTables(counts.tables(), 8, 64, 8, 7)
model = _native.Rotation(np.ones(32, np.float32))

def decode():
    decoding = _native.ChannelDecoding(2)
    decoding.add(None, block, np.empty_like(numbers))
    decoding.finish()

def work():
    while True:
        one()

def go():
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.1)
"""


@pytest.mark.parametrize(
    "one",
    [
        "_native.xxh3_64(block)",
        "_native.split_bits(numbers.reshape(-1))",
        "tables.encode(numbers)",
        "counts.add(numbers)",
        "model.turn(numbers, 0, 1)",
        "decode()",
    ],
)
def test_threads_that_compute_at_the_end(one: str) -> None:
    code = f"{SETTING}\ndef one():\n    {one}\n\ngo()\n"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
