"""Logs of long runs (`make fuzz`, `make soak`): where one ran, a line for each turn, and what is
kept of them in the repository (docs/guarantees.md)."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def where() -> Entry:
    """The commit, the machine and the day, for a log."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    info = Path("/proc/cpuinfo")
    models = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else ())
        if line.startswith("model name")
    ]
    return {
        "commit": commit,
        "machine": f"{platform.machine()}, {models[0] if models else platform.processor()}",
        "python": platform.python_version(),
        "day": datetime.date.today().isoformat(),
    }


def entries(*logs: Path) -> list[Entry]:
    """What logs have so far, without lines of which a killed writer left only the beginning."""
    found = []
    for log in logs:
        for line in log.read_text().splitlines() if log.exists() else []:
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


def add(log: Path, entry: Entry) -> None:
    """Write a line at the end of a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # After a line that was cut off comes another.
    cut = log.exists() and log.read_bytes()[-1:] not in (b"", b"\n")
    with log.open("a") as file:
        file.write("\n" * cut + json.dumps(entry) + "\n")


def keep(log: Path, kept: Path) -> None:
    """Move what a log has to the one in the repository, whose lines are sums: one for each target,
    commit, machine and day. Of ranges, such as rounds, the line has first and last."""
    sums: dict[tuple, Entry] = {}
    for entry in entries(kept, log):
        names = [name for name, value in entry.items() if isinstance(value, (str, bool))]
        total = sums.setdefault(tuple(entry[name] for name in sorted(names)), {})
        for name, value in entry.items():
            if isinstance(value, list):
                first, last = total.get(name, value)
                total[name] = [min(first, value[0]), max(last, value[1])]
            elif name in names:
                total[name] = value
            elif isinstance(value, (int, float)):
                total[name] = round(total.get(name, 0) + value, 1)
    kept.write_text("".join(json.dumps(entry) + "\n" for entry in sums.values()))
    log.unlink(missing_ok=True)
