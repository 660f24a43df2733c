"""What a measurement was made on and with: every stored result names it."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from kvzip.capture import processor_name
from kvzip.workers import machine_memory, thread_count

PACKAGES = ("kvzip", "numpy", "torch", "transformers", "zstandard", "lz4")
_CACHE_SIZES = "/sys/devices/system/cpu/cpu0/cache/index*/size"
# By the first letters of their names in /proc/cpuinfo: x86's vectors and bit fields, ARM's vectors.
_SIMD = ("ssse3", "sse4", "avx", "bmi", "gfni", "asimd", "sve")


class Machine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A computer, as far as speeds depend on it. What was not noted is left out of files."""

    cpu: str
    cores: int
    """That the measuring process may use."""
    memory_gib: float
    cache_mib: float | None = None
    """The largest cache that a core sees."""
    simd: list[str] = []
    """The vector extensions that the processor offers, as the system names them."""


def machine() -> Machine:
    """The machine that this runs on."""
    return Machine(
        cpu=processor_name(),
        cores=thread_count(0),
        memory_gib=round(machine_memory() / 2**30, 1),
        cache_mib=cache_bytes() / 2**20,
        simd=list(_simd()),
    )


@cache
def cache_bytes() -> int:
    """Bytes of the largest cache of a processor core, 32 MiB where the system does not tell."""
    sizes = [p.read_text().strip() for p in Path("/").glob(_CACHE_SIZES.lstrip("/"))]
    known = [int(s[:-1]) << 10 for s in sizes if s.endswith("K")]
    return max(known, default=32 << 20)


@cache
def _simd() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    fields = (line.partition(":") for line in lines)
    named = (
        text.split() for key, _, text in fields if key.strip().lower() in ("flags", "features")
    )
    return tuple(sorted({flag for flags in named for flag in flags if flag.startswith(_SIMD)}))


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def made_by(command: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """The fields of :class:`~kvzip.eval.results.base.Result`, for a result that this process makes
    now. Beside versions it names how bf16 matrices were multiplied, where torch did not do it
    (:mod:`kvzip.models.products`)."""
    products = sys.modules.get("kvzip.models.products")  # imported with the first model
    return {
        "command": command,
        "date": now(),
        "machine": machine(),
        "versions": versions(packages) | (products.of_process() if products else {}),
    }
