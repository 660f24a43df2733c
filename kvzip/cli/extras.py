"""The optional packages of kvzip: which extra brings them, and which of them are missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata

from kvzip.errors import KVZipError

PURPOSE = {
    "hf": "capture, and loading into transformers",
    "demo": "kvzip demo",
    "store": "buckets and URLs (s3://..., https://...)",
    "encryption": "sealed files and stores",
    "metrics": "metrics for Prometheus",
    "gpu": "decoding and encoding on an NVIDIA GPU",
    "nvcomp": "lz4 and zstd on an NVIDIA GPU",
    "eval": "kvzip eval, sweep and report",
    "bench": "other compressors in kvzip bench --peers",
    "ray": "kvzip sweep --ray",
    "testing": "kvzip.testing, tests for your own CI",
}
"""What each extra is for that a user installs."""


def missing(extra: str) -> list[str]:
    """The packages that an extra takes, by itself or by another extra, and that are not
    installed."""
    return [wanted for wanted in _wanted(extra) if not _installed(_name(wanted))]


def require(extra: str) -> None:
    """Raise KVZipError, which names the extra, unless all of its packages are installed."""
    if lacking := missing(extra):
        raise KVZipError(
            f"this command needs more: pip install 'kvzip[{extra}]' ({', '.join(lacking)})"
        )


def extra_with(module: str) -> str:
    """The extra that brings a module, named as its package is; "all" where none does so."""
    top = _plain(module.partition(".")[0])
    for extra in PURPOSE:
        if top in (_plain(_name(wanted)) for wanted in _wanted(extra)):
            return extra
    return "all"


def _wanted(extra: str) -> Iterator[str]:
    for requirement in metadata.requires("kvzip") or []:
        wanted, _, condition = requirement.partition(";")
        if not re.search(rf"extra\s*==\s*['\"]{extra}['\"]", condition):
            continue
        if ours := re.match(r"kvzip\[(.+)\]", wanted.strip()):
            for other in ours[1].split(","):
                yield from _wanted(other.strip())
        else:
            yield wanted.strip()


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    return found[0] if found else requirement


def _plain(name: str) -> str:
    """A package's name as all its spellings have in common."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
