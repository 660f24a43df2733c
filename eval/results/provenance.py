"""What a measurement was made on and with: every stored result names it."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from kvzip import container
from kvzip.capture import processor_name

PACKAGES = ("kvzip", "numpy", "torch", "transformers", "zstandard", "lz4")


class Machine(msgspec.Struct, frozen=True):
    cpu: str
    cores: int
    """That this process may use."""
    memory_gib: float


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """How a stored result came to be."""

    command: str
    date: str
    machine: Machine
    versions: dict[str, str]


def machine() -> Machine:
    """The machine that this runs on."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(processor_name(), container.thread_count(0), round(pages / 2**30, 1))


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def made_by(command: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """The fields of `Made`, for a result that this process makes now. Beside versions it names how
    bf16 matrices were multiplied, where torch did not do it (:mod:`kvzip.models.products`)."""
    products = sys.modules.get("kvzip.products")  # imported with the first model
    return {
        "command": command,
        "date": now(),
        "machine": machine(),
        "versions": versions(packages) | (products.of_process() if products else {}),
    }
