"""Fuzz what reads files, by atheris, and the codecs' C++ alone: `make fuzz SECONDS=60`.

    python tests/fuzz/run.py --seconds 60 --corpus build/fuzz open decode native/channel

Each target goes on from its seeds, what is in tests/fuzz/corpus, and what earlier runs found in the
folder of `--corpus`. Whatever raises anything but a KVZipError, takes 20 seconds or 2 GB ends the
run with exit code 1, and lies in that folder as `crash-...`: mend it, and put the file into
tests/fuzz/corpus, which `make test` tries. At the end the lines of the product that the inputs
reach are counted, and a line for each target goes into `log.jsonl` there. Targets `native/CODEC`
are the programs of tests/native, under AddressSanitizer and UBSan, which make their own input;
`native/device` has the kernels for GPUs decode through the shim, likewise.

`--keep` moves the log to kept.jsonl, in the repository; `--counts` adds up both. `--shrink` makes
tests/fuzz/corpus of what is there and was found: as few inputs as reach, beyond the seeds, all that
they reach together.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import platform
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
from collections import Counter
from operator import itemgetter
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import runs  # noqa: E402
from gpu import under_sanitizers  # noqa: E402
from native import building  # noqa: E402

READERS = "*/kvzip/*"
"""The files whose lines are counted."""
ROUND = 240
"""Seconds that one process fuzzes. What atheris puts into functions keeps memory, 4 kB an execution
of `session`, so that after a million or two it would be taken for a fault of what is fuzzed."""
LEAST_REACHED = 30
"""Branches that the seeds of any target reach."""
KEPT = HERE / "kept.jsonl"
CORPUS = HERE / "corpus"
FILES = ("open", "decode", "part", "predictive", "device", "chunk")
"""Targets that read the same kind of file, and have each other's inputs."""
NATIVE = [*(f"native/{codec}" for codec in building.SOURCES), "native/device"]
SANITIZED = ["-O1", "-g1", "-fno-sanitize-recover=all", "-fsanitize=address,undefined"]


def is_reader(name: str) -> bool:
    """Whether a file of the product is one that reads what others may have written."""
    return name.startswith(
        ("container/", "codecs/", "load/", "profile", "snapshot", "store/", "tensors", "pages")
    )


def fuzz_one(target: str, program: str, options: list[str]) -> None:
    """Become the fuzzer of one target, which never returns. `program`: what a shell can run to
    become it again, which libFuzzer does when it merges."""
    import atheris
    import targets

    for each in targets.TARGETS:
        targets.seeds(each)  # by which all is imported
    # Not by atheris.instrument_imports, which sees no module of an editable install.
    for found in gc.get_objects():
        if not isinstance(found, types.FunctionType):
            continue
        if str(found.__module__).split(".")[0] in ("kvzip", "targets"):
            atheris.instrument_func(found)
    tried = targets.tried
    atheris.Setup([program, *options], lambda data: tried(target, data))
    atheris.Fuzz()


def covered(target: str, folders: list[Path]) -> dict[str, str]:
    """The share of lines of each reader that a target's inputs reach."""
    script = (
        "import sys, coverage; from pathlib import Path\n"
        f"measured = coverage.Coverage(include=[{READERS!r}], data_file=None); measured.start()\n"
        f"sys.path.insert(0, {str(HERE)!r}); import targets\n"
        "for folder in sys.argv[1:]:\n"
        "    for file in sorted(Path(folder).glob('*')):\n"
        f"        targets.tried({target!r}, file.read_bytes())\n"
        "measured.stop(); measured.report(skip_empty=True)\n"
    )
    command = [sys.executable, "-P", "-c", script, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = re.findall(r"^\S*kvzip/(\S+) .* (\d+%)$", done.stdout, re.MULTILINE)
    return dict(rows)


def folders_of(target: str, corpus: Path) -> list[Path]:
    """Where a target's inputs are: what is found goes into the first."""
    return [corpus / target, *(folder for folder in kept_for(target) if folder.is_dir())]


def kept_for(target: str) -> list[Path]:
    """The folders of the repository with inputs for a target, its own first."""
    others = FILES if target in FILES else ()
    return [CORPUS / name for name in dict.fromkeys([target, *others])]


def write_seeds(target: str, folder: Path) -> set[str]:
    """Write a target's seeds into a folder; their files' names."""
    import targets

    folder.mkdir(parents=True, exist_ok=True)
    seeds = {hashlib.sha256(seed).hexdigest()[:16]: seed for seed in targets.seeds(target)}
    for name, seed in seeds.items():
        (folder / name).write_bytes(seed)
    return set(seeds)


def shrink(target: str, corpus: Path) -> str:
    """Make a target's kept corpus anew: what its seeds, and what is kept for other targets of its
    kind, do not reach. What was said if it failed. What once crashed stays."""
    before = list((CORPUS / target).glob("*"))
    with tempfile.TemporaryDirectory() as scratch:
        merged, again = Path(scratch, "merged"), Path(scratch, "again")
        known = write_seeds(target, merged)
        for folder in kept_for(target)[1:]:
            for file in folder.glob("*"):
                shutil.copyfile(file, merged / file.name)
                known.add(file.name)
        # libFuzzer starts itself again by a shell, which runs no file that is not executable.
        command = shlex.join([sys.executable, str(Path(__file__).resolve()), "--one", target])
        again.write_text(f'#!/bin/sh\nexec {command} "$0" "$@"\n')
        again.chmod(0o755)
        folders = [merged, *(folder for folder in folders_of(target, corpus) if folder.is_dir())]
        done = subprocess.run(
            [again, "-set_cover_merge=1", "-max_len=8192", *folders], capture_output=True, text=True
        )
        found = [file for file in sorted(merged.iterdir()) if file.name not in known]
        if done.returncode or "MERGE-OUTER" not in done.stderr:
            return done.stderr[-3000:]
        for file in before:
            if not file.name.startswith("crash-"):
                file.unlink()
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for file in found:
            name = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            shutil.copyfile(file, CORPUS / target / name)
    kept = list((CORPUS / target).iterdir())
    size = sum(file.stat().st_size for file in kept)
    print(f"{target}: {len(kept)} inputs of {size:,} bytes, before {len(before)}", flush=True)
    return ""


def by_atheris(target: str, corpus: Path, seconds: int) -> tuple[int, str]:
    """Fuzz a target of targets.py; how often it ran, and what was said if it failed."""
    executions, wrong = 0, ""
    for begin in range(0, seconds, ROUND):
        more, wrong = by_one_process(target, corpus, min(ROUND, seconds - begin))
        executions += more
        if wrong:
            break
    return executions, wrong


def by_one_process(target: str, corpus: Path, seconds: int) -> tuple[int, str]:
    """The same within the memory of one process."""
    folders = folders_of(target, corpus)
    write_seeds(target, folders[0])
    command = [sys.executable, __file__, "--one", target, __file__, f"-max_total_time={seconds}"]
    command += ["-timeout=20", "-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1"]
    command += [f"-artifact_prefix={corpus}/{target}-", *map(str, folders)]
    with tempfile.TemporaryDirectory() as scratch:  # libFuzzer ends without Python's own end
        own = os.environ | {"TMPDIR": scratch}
        done = subprocess.run(command, capture_output=True, text=True, env=own)
    said = done.stdout + done.stderr
    counts = re.findall(r"number_of_executed_units: (\d+)", said)
    reached = max(map(int, re.findall(r" cov: (\d+) ", said)), default=0)
    if not done.returncode and reached < LEAST_REACHED:
        return 0, f"the fuzzer saw {reached} branches: it does not see what the product does"
    return int(counts[-1]) if counts else 0, said[-3000:] if done.returncode else ""


def alone(target: str, corpus: Path, seconds: int) -> tuple[int, str]:
    """Run a program of tests/native, likewise; it counts the processor's seconds."""
    codec = target.split("/")[1]
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return 0, "there is no C++ compiler"
    if codec == "device":
        environment = under_sanitizers.environment()
        if environment is None:
            return 0, "g++ has no sanitizers"
        command = [sys.executable, under_sanitizers.__file__]
        environment["KVZIP_CACHE"] = str((corpus / "native").absolute())
    else:
        environment = dict(os.environ)
        processor = building.PROCESSORS.get(platform.machine())
        program = building.fuzzer(compiler, codec, corpus / "native", SANITIZED, processor)
        command = [str(program)]
    command += [str(seconds), str(random.randrange(1 << 30))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    counts = re.match(r"(\d+) rounds", done.stdout)
    failed = f"{command}\n{done.stdout}{done.stderr[-3000:]}" if done.returncode else ""
    return int(counts[1]) if counts else 0, failed


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("targets", nargs="*")
    parse.add_argument("--seconds", type=int, default=60, help="for each target")
    parse.add_argument("--corpus", type=Path, default=Path("build/fuzz"))
    parse.add_argument("--counts", action="store_true", help="only add up the logs")
    parse.add_argument("--keep", action="store_true", help="move the log to the repository")
    parse.add_argument("--shrink", action="store_true", help="make the kept corpus anew")
    parse.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.seconds < 1:
        parse.error("--seconds: at least 1")
    if given.one:
        fuzz_one(given.one[0], given.one[1], given.one[2:])
    log = given.corpus / "log.jsonl"
    if given.keep:
        runs.keep(log, KEPT)
    if given.keep or given.counts:
        show(runs.entries(KEPT, log))
        return 0
    import targets

    if given.shrink:
        wrong = [shrink(target, given.corpus) for target in given.targets or targets.TARGETS]
        print(*filter(None, wrong), sep="\n", end="")
        return int(any(wrong))
    failed = 0
    for target in given.targets or [*targets.TARGETS, *NATIVE]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = alone if target in NATIVE else by_atheris
        executions, wrong = run(target, given.corpus, given.seconds)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        entry = {"target": target, "executions": executions, "seconds": round(spent, 1)}
        runs.add(log, entry | {"good": not wrong} | runs.where())
        print(f"{target}: {executions:,} executions", end="", flush=True)
        if target not in NATIVE:
            lines = covered(target, folders_of(target, given.corpus))
            shares = [f"{name} {share}" for name, share in lines.items() if is_reader(name)]
            print(";", ", ".join(shares), end="")
        print(f"\n{wrong}" if wrong else "", flush=True)
        failed |= bool(wrong)
    return failed


def show(entries: list[runs.Entry]) -> None:
    """The executions of each target, and hours of a processor, of runs that found nothing and were
    not stopped."""
    executions, seconds = Counter(), Counter()
    for entry in filter(itemgetter("good"), entries):
        executions[entry["target"]] += entry["executions"]
        seconds[entry["target"]] += entry["seconds"]
    for target in executions:
        hours = seconds[target] / 3600
        print(f"{target}: {executions[target]:,} executions, {hours:.2f} processor hours")
    print(f"in all: {executions.total():,} executions, {seconds.total() / 3600:.2f} hours")


if __name__ == "__main__":
    sys.exit(main())
