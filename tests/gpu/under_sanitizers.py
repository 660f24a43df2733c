"""The kernels for GPUs under AddressSanitizer and UBSan, through the shim, on good files and on
damaged ones: `python under_sanitizers.py SECONDS SEED [CODEC...]`.

Each is decoded by the CPU, too, and the same numbers come out, or an error of both. Prints how
many rounds there were. Python itself is built without the sanitizers, so they are loaded first.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODECS = ("channel", "predictive", "planes", "raw", "lz4")
FLAGS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def environment() -> dict[str, str] | None:
    """In which Python runs with the sanitizers; None where there are none."""
    if not shutil.which("g++"):
        return None
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    command = ["g++", *(f"-print-file-name={name}" for name in names)]
    found = [
        subprocess.run([*command[:1], word], capture_output=True, text=True).stdout.strip()
        for word in command[1:]
    ]
    if not all(Path(path).is_absolute() for path in found):
        return None
    # Python leaves memory to the system at its end, and allocates by a way of its own.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    return os.environ | {"LD_PRELOAD": " ".join(found), **options}


def main(seconds: float, seed: int, codecs: list[str]) -> None:
    import numpy as np
    from fake_nvcomp import FakeNvComp, compiled

    import kvzip
    from kvzip.benchmarks.predictable import predictable
    from kvzip.codecs.native.cuda.device import Memory
    from kvzip.codecs.native.cuda.shim_device import ShimDevice
    from kvzip.testing import cache_like, make_snapshot, reseal

    class Sanitized(ShimDevice):
        """Its memory ends where it says: what lies behind is the sanitizer's."""

        def allocate(self, size: int) -> Memory:
            spare = np.full(size + 255, 0xA5, np.uint8)
            at = -spare.ctypes.data % 256
            whole = np.full(at + size, 0xA5, np.uint8)
            if -whole.ctypes.data % 256 != at:
                return super().allocate(size)
            return Memory(whole.ctypes.data + at, size, whole)

    def outcome(blob: bytes, profile: kvzip.Profile | None, **how: object) -> object:
        try:
            found = kvzip.decode(blob, profile, threads=1, **how)
        except kvzip.KVZipError as error:
            return type(error), str(error)
        return [np.asarray(part).tobytes() for layer in found.layers for part in layer]

    draw, device, rounds = random.Random(seed), Sanitized(seed=seed, flags=FLAGS), 0
    if "lz4" in codecs:
        with tempfile.TemporaryDirectory() as folder:
            device.cache["nvcomp"] = FakeNvComp(compiled(Path(folder)))
    predicted, learned = predictable(3, 2, 16, 70)
    end = time.monotonic() + seconds
    while time.monotonic() < end or rounds < len(codecs):
        codec = codecs[rounds % len(codecs)]
        profile = None
        if codec == "predictive":
            snapshot, profile = predicted, learned
        else:
            size = draw.choice((1, 7, 40, 130)), draw.choice((5, 16, 64))
            dtype = draw.choice(("bf16", "fp8_e4m3fn", "fp32")) if codec != "channel" else "bf16"
            snapshot = make_snapshot(cache_like, draw.randrange(1 << 30), dtype, 1, 2, *size)
        blob = kvzip.encode(snapshot, codec, profile, block_tokens=48, threads=1)
        assert outcome(blob, profile, device=device) == outcome(blob, profile)
        for _ in range(10):
            changed = bytearray(blob)
            for _ in range(draw.randrange(1, 4)):
                changed[draw.randrange(len(blob) // 3, len(blob))] = draw.randrange(256)
            bad = reseal(changed)
            told, expected = outcome(bad, profile, device=device), outcome(bad, profile)
            # Of several damages one is told, and not always the same.
            both_tell = isinstance(told, tuple) and isinstance(expected, tuple)
            assert told == expected or both_tell, (codec, told, expected)
        rounds += 1
    print(f"{rounds} rounds", *sorted({*device.launched}))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or [*CODECS])
