"""Fuzz what reads files, by atheris: `make fuzz SECONDS=60`.

    python tests/fuzz/run.py --seconds 60 --corpus build/fuzz open decode

Each target goes on from its seeds, what is in tests/fuzz/corpus, and what earlier runs found in the
folder of `--corpus`. Whatever raises anything but a KVZipError, takes 20 seconds or 2 GB ends the
run with exit code 1, and lies in that folder as `crash-...`: mend it, and put the file into
tests/fuzz/corpus, which `make test` tries. At the end the lines of the product that the inputs
reach are counted, and a line for each target goes into `log.jsonl` there.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
READERS = "*/kvzip/*"
"""The files whose lines are counted."""


def is_reader(name: str) -> bool:
    """Whether a file of the product is one that reads what others may have written."""
    return name.startswith(("container/", "codecs/", "profile", "snapshot", "tensors", "pages"))


def fuzz_one(target: str, options: list[str]) -> None:
    """Become the fuzzer of one target, which never returns."""
    import atheris

    with atheris.instrument_imports(include=["kvzip", "targets"]):
        import targets
    found = targets.tried
    atheris.Setup([sys.argv[0], *options], lambda data: found(target, data))
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


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("targets", nargs="*")
    parse.add_argument("--seconds", type=int, default=60, help="for each target")
    parse.add_argument("--corpus", type=Path, default=Path("build/fuzz"))
    parse.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parse.parse_args()
    sys.path.insert(0, str(HERE))
    if given.one:
        fuzz_one(given.one[0], given.one[1:])
    import targets

    failed = 0
    for target in given.targets or targets.TARGETS:
        corpus = given.corpus / target
        corpus.mkdir(parents=True, exist_ok=True)
        for seed in targets.seeds(target):
            (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
        kept = [folder for folder in [HERE / "corpus" / target] if folder.is_dir()]
        command = [sys.executable, __file__, "--one", target, f"-max_total_time={given.seconds}"]
        command += ["-timeout=20", "-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1"]
        command += [f"-artifact_prefix={corpus.parent}/{target}-", *map(str, [corpus, *kept])]
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout + done.stderr
        counts = re.findall(r"number_of_executed_units: (\d+)", said)
        lines = covered(target, [corpus, *kept])
        entry = {
            "target": target,
            "executions": int(counts[-1]) if counts else 0,
            "seconds": given.seconds,
            "good": done.returncode == 0,
            "day": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "lines": lines,
        }
        with (given.corpus / "log.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")
        print(f"{target}: {entry['executions']:,} executions", end="; ")
        print(", ".join(f"{name} {share}" for name, share in lines.items() if is_reader(name)))
        if done.returncode:
            failed = 1
            print(said[-3000:])
    return failed


if __name__ == "__main__":
    sys.exit(main())
