"""The kernels for GPUs read and write nothing out of bounds, whatever a file holds: through the
shim under AddressSanitizer and UBSan, as `make fuzz TARGETS=native/device` does for long."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest
from gpu import under_sanitizers

KERNELS = {
    "channel": "channel_decode_bf16",
    "predictive": "predict",
    "planes": "merge",
    "raw": "copy",
    "lz4": "check_chunks",
}


@pytest.mark.parametrize("codec", under_sanitizers.CODECS)
@pytest.mark.drawn(4)
def test_no_file_makes_kernels_read_or_write_out_of_bounds(codec, compiled_once):
    """Compiling takes most of the time; what is compiled is kept for the next run."""
    if (environment := under_sanitizers.environment()) is None:
        pytest.skip("no g++, or one without the sanitizers")
    command = [sys.executable, under_sanitizers.__file__, "1", str(random.randrange(1 << 30))]
    done = subprocess.run([*command, codec], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout, done.stderr[-4000:])
    rounds, kernels = re.fullmatch(r"(\d+) rounds (.*)\n", done.stdout).groups()
    assert int(rounds) and KERNELS[codec] in kernels
