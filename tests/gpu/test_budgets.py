"""What compilers make of the kernels, without a GPU: that they compile for every architecture, and
registers, spills and instructions a step held to the budgets of budgets.json, so that a kernel that
has become slower shows. `python tests/gpu/test_budgets.py` writes down what they take now.

Three sources take a minute to compile. What they took last is in budgets.json, too, with a hash of
the source, the options and the compiler that it is true of; they are compiled again when any of
these has changed, and with `make test-long`."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from kvzip.codecs.native.cuda.device import SOURCES, source_hash
from kvzip.codecs.native.cuda.gpu import ARCHITECTURES, compiled_anew

BUDGETS = Path(__file__).with_name("budgets.json")
KERNELS = sorted(
    str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.cuh") if "KVZIP_KERNEL(" in
    path.read_text().replace("#define KVZIP_KERNEL(", "")
)  # fmt: skip
STEP_ARCHITECTURE = "sm_90"
STEPS_IN = ("channel/decode.cuh", "predictive/chain.cuh")
SLOW = ("channel/decode.cuh", "channel/encode.cuh", "predictive/chain.cuh")
"""Sources that take a minute to compile, all others seconds."""


class Taken(NamedTuple):
    """What the kernels of a source take on an architecture. `steps` is None where there is no
    nvdisasm."""

    kernels: dict[str, dict[str, int]]
    steps: dict[str, float] | None


def compiled_from(source: str) -> str:
    """A hash of all that the machine code of a source depends on."""
    compiler = metadata.version("nvidia-cuda-nvrtc")
    whole = [source_hash(source), inspect.getsource(compiled_anew), compiler, STEP_ARCHITECTURE]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def known_already() -> dict[str, Taken]:
    """What slow sources took on STEP_ARCHITECTURE, of those that are as they were then."""
    return {
        source: Taken(last["kernels"], last["steps"])
        for source, last in json.loads(BUDGETS.read_text())["last"].items()
        if last["compiled_from"] == compiled_from(source)
    }


def usage(log: str) -> dict[str, dict[str, int]]:
    """Of each kernel, from the assembler's log: registers, and bytes spilled."""
    found: dict[str, dict[str, int]] = {}
    for part in log.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert registers is not None and spilled is not None
        name = part.split("'")[0]
        found[name] = {
            "registers": int(registers[1]),
            "spilled": int(spilled[1]) + int(spilled[2]),
        }
    return found


def disassembler() -> str | None:
    """nvdisasm: on the path, or NVIDIA's package (nvidia-cuda-nvdisasm)."""
    beside = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvdisasm")
    return shutil.which("nvdisasm") or (str(beside) if os.access(beside, os.X_OK) else None)


def loops_of(text: str) -> list[tuple[int, int, list[str]]]:
    """The loops of one kernel's listing: where each begins and ends, and its instructions, those of
    loops inside too."""
    codes: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = re.match(r"(\.L_\S+):", line)
        if label:
            labels[label[1]] = len(codes)
        code = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?(.*?);", line)
        if code:
            codes.append(code[1])
    found = []
    for end, code in enumerate(codes):
        target = re.search(r"^BRA.*?`\((\.L_\S+?)\)", code)
        begin = end + 1 if target is None else labels.get(target[1], end + 1)
        if begin <= end:
            found.append((begin, end, codes[begin : end + 1]))
    return found


def step_instructions(listing: str) -> dict[str, float]:
    """Of each kernel that decodes `channel`: instructions for 32 numbers, in its loop over whole
    strips: of those without a loop inside, that with most shuffles. Each step in it
    votes once, and all vote once more whether there are escapes.

    Of each that decodes `predictive`: the loop over groups, with one copy of what a pair of
    channels takes, in it one of what decodes a number, and all that happens seldom. It is the
    greatest of those that vote twice, for escapes and for words, and shuffle once."""
    found: dict[str, float] = {}

    def count(body: list[str], what: str) -> int:
        return sum(code.startswith(what) for code in body)

    for text in re.split(r"^\.text\.", listing, flags=re.MULTILINE)[1:]:
        name = text.split(":")[0]
        loops = loops_of(text)
        if name.startswith("predictive_chain"):
            found[name] = max(
                len(body)
                for *_, body in loops
                if count(body, "VOTE") == 2 and count(body, "SHFL") == 1
            )
        if not name.startswith("channel_decode"):
            continue
        innermost = [
            body
            for begin, end, body in loops
            if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e, _ in loops)
        ]
        body = max(innermost, key=lambda body: (count(body, "SHFL"), -len(body)))
        found[name] = len(body) / (count(body, "VOTE") - 1)
    return found


def compiled(source: str, architecture: str) -> Taken:
    """What NVRTC makes of a source, and of STEP_ARCHITECTURE's code the instructions of a step."""
    code, log = compiled_anew(source, architecture)
    steps: dict[str, float] | None = {}
    if source in STEPS_IN and architecture == STEP_ARCHITECTURE:
        program = disassembler()
        steps = None if program is None else step_instructions(listing(program, code))
    return Taken(usage(log), steps)


def listing(program: str, code: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        command = [program, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measured(
    architectures: Sequence[str] = ARCHITECTURES, known: Mapping[str, Taken] | None = None
) -> dict[tuple[str, str], Taken]:
    """What the kernels of each source take on each architecture. `known` is not compiled: what
    sources take on STEP_ARCHITECTURE."""
    import cuda.core  # noqa: F401 - once, before threads do at the same time

    found = {(source, STEP_ARCHITECTURE): taken for source, taken in (known or {}).items()}
    jobs = [(source, architecture) for source in KERNELS for architecture in architectures]
    jobs = [job for job in jobs if job not in found]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found |= dict(zip(jobs, pool.map(lambda job: compiled(*job), jobs), strict=True))
    return found


def by_architecture(
    taken: Mapping[tuple[str, str], Taken],
) -> dict[str, dict[str, dict[str, int]]]:
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (_, architecture), (kernels, _) in taken.items():
        found.setdefault(architecture, {}).update(kernels)
    return found


def all_steps(taken: Mapping[tuple[str, str], Taken]) -> dict[str, float] | None:
    found: dict[str, float] = {}
    for source in STEPS_IN:
        steps = taken[source, STEP_ARCHITECTURE].steps
        if steps is None:
            return None
        found |= steps
    return found


# One architecture is compiled with every run of the tests, all of them with `make test-long`.
@pytest.fixture(
    scope="module",
    params=[(STEP_ARCHITECTURE,), pytest.param(ARCHITECTURES, marks=pytest.mark.long)],
    ids=[STEP_ARCHITECTURE, "all"],
)
def architectures(request):
    return request.param


@pytest.fixture(scope="module")
def taken(architectures):
    pytest.importorskip("cuda.core", reason="NVRTC (kvzip[gpu]) is not installed")
    return measured(architectures, known_already() if len(architectures) == 1 else None)


def test_every_kernel_compiles(taken, architectures):
    budgets = json.loads(BUDGETS.read_text())
    found = by_architecture(taken)
    assert set(found) == set(architectures)
    for kernels in found.values():
        assert set(kernels) == set(budgets["kernels"])


def test_registers_and_spills_are_within_their_budgets(taken):
    budgets = json.loads(BUDGETS.read_text())["kernels"]
    over = [
        f"{architecture} {name}: {what} {count}, budget {budgets[name][what]}"
        for architecture, kernels in by_architecture(taken).items()
        for name, use in kernels.items()
        for what, count in use.items()
        if count > budgets[name][what]
    ]
    assert not over


def test_instructions_of_a_step_are_within_their_budget(taken):
    steps = all_steps(taken)
    if steps is None:
        pytest.skip("nvdisasm (nvidia-cuda-nvdisasm) is not installed")
    budgets = json.loads(BUDGETS.read_text())["step"]
    assert set(steps) == set(budgets)
    assert {name: n for name, n in steps.items() if n > budgets[name]} == {}


def main() -> None:
    taken = measured()
    kernels: dict[str, dict[str, int]] = {}
    for use in by_architecture(taken).values():
        for name, counts in use.items():
            mine = kernels.setdefault(name, {})
            for what, count in counts.items():
                mine[what] = max(mine.get(what, 0), count)
    written = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    written["kernels"] = dict(sorted(kernels.items()))
    steps = all_steps(taken)
    if steps is not None:
        written["step"] = {name: round(n + 0.05, 1) for name, n in sorted(steps.items())}
        written["last"] = {
            source: {"compiled_from": compiled_from(source)}
            | taken[source, STEP_ARCHITECTURE]._asdict()
            for source in SLOW
        }
    BUDGETS.write_text(json.dumps(written, indent=1) + "\n")
    json.dump({"step": steps}, sys.stdout)


if __name__ == "__main__":
    main()
