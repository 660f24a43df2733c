"""Progress where there is no terminal: lines that say what is done and how much is left."""

from __future__ import annotations

import io
import os
import re
import time

import pytest
from rich.console import Console

from kvzip.cli import terminal


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def written(monkeypatch):
    sink = io.StringIO()
    console = terminal._Console(file=sink, markup=False, highlight=False)
    monkeypatch.setattr(terminal, "_err", console)
    return lambda: sink.getvalue().splitlines()


@pytest.fixture
def clock():
    return Clock()


def test_a_step_is_a_line_with_the_time_left(written, clock):
    lines = terminal.Lines(clock)
    lines.step("loading")
    clock.now += 10
    lines.step("first", 0.0)
    clock.now += 30
    lines.step("second", 0.25)
    clock.now += 60
    lines.step("third", 0.75)
    lines.step("last", 1.0)
    assert written() == [
        "[0:00] loading",
        "[0:10] first",
        "[0:40] second, about 1:30 left",
        "[1:40] third, about 0:30 left",
        "[1:40] last",
    ]


def test_a_share_that_falls_is_of_work_that_begins(written, clock):
    lines = terminal.Lines(clock)
    for share in (0.0, 0.5):
        lines.step("capturing", share)
        clock.now += 100
    for share in (0.0, 0.0, 0.5):
        lines.step("measuring", share)
        clock.now += 10
    assert written() == [
        "[0:00] capturing",
        "[1:40] capturing, about 1:40 left",
        "[3:20] measuring",
        "[3:30] measuring",
        "[3:40] measuring, about 0:20 left",
    ]


def test_counts_that_take_turns_know_when_each_began(written, clock):
    lines = terminal.Lines(clock)
    for done in range(1, 101):
        for _ in range(6):
            clock.now += 1
            lines.tell("sums", done, 100)
        clock.now += 0.1
        lines.tell("layers", done, 100)
    left = [line for line in written() if "sums: 50 of 100" in line][-1]
    minutes, seconds = re.search(r"about (\d+):(\d+) left", left).groups()
    assert abs(int(minutes) * 60 + int(seconds) - 305) < 15


def test_counts_are_lines_every_few_seconds(written, clock):
    lines = terminal.Lines(clock)
    for done in range(1, 101):
        clock.now += 0.5
        lines.tell("sweep", done, 100)
    found = written()
    assert len(found) == 10  # 50 seconds
    assert found[0] == "[0:05] sweep: 10 of 100, about 0:45 left"
    assert found[-1] == "[0:50] sweep: 100 of 100"


@pytest.mark.parametrize("each", [0.0, 0.02])
@pytest.mark.parametrize("kept", [1, 9, 50])
def test_what_is_kept_from_a_run_before_says_nothing_of_the_time_left(written, clock, kept, each):
    """One by one, or all at once."""
    for counts in (range(1, kept + 1), [kept]):
        lines = terminal.Lines(clock)
        for done in counts:
            clock.now += each
            lines.tell("layers", done, 100)
        for done in range(kept + 1, 100):
            clock.now += 6
            lines.tell("layers", done, 100)
        for line in written()[-(99 - kept) :]:
            done, minutes, seconds = map(
                int, re.findall(r"(\d+) of 100, about (\d+):(\d+)", line)[0]
            )
            assert abs(minutes * 60 + seconds - 6 * (100 - done)) <= 1


def test_what_is_done_at_once_says_nothing(written, clock):
    lines = terminal.Lines(clock)
    for done in range(1, 4):
        lines.tell("encode", done, 3, in_bytes=True)
    assert written() == []


def test_bars_steps_and_signs_are_lines_without_a_terminal(written, monkeypatch):
    monkeypatch.setattr(terminal.Lines, "EVERY", 0.0)
    with terminal.bar("prefill", 3, in_bytes=False) as advance:
        advance(1)
        advance(2)
    with terminal.bar("encode", 4_000_000) as advance:
        advance(1_000_000)
    with terminal.steps() as tell:
        tell("layers", 1, 2)
        tell("layers", 2, 2)
    monkeypatch.setattr(terminal.Lines, "EVERY", 60.0)
    with terminal.working("starting") as step:
        step("a path\nof two lines", 0.5)
    found = [re.sub(r"^\[\d+:\d\d\] |, about .* left$", "", line) for line in written()]
    assert found == [
        "prefill: 1 of 3",
        "prefill: 3 of 3",
        "encode: 1.0 of 4.0 MB",
        "layers: 1 of 2",
        "layers: 2 of 2",
        r"a path\nof two lines",
    ]


def test_what_takes_long_says_what_it_is_before_its_first_step(written, monkeypatch):
    monkeypatch.setattr(terminal.Lines, "EVERY", 0.05)
    with terminal.working("loading a model"):
        deadline = time.monotonic() + 60
        while not written() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert written() == ["[0:00] loading a model"]


def test_a_terminal_has_no_lines(monkeypatch):
    sink = io.StringIO()
    console = Console(file=sink, force_terminal=True, width=80)
    monkeypatch.setattr(terminal, "_err", console)
    with terminal.bar("prefill", 3, in_bytes=False) as advance:
        advance(3)
    with terminal.working("starting") as step:
        step("more", 0.5)
    assert "[0:00]" not in sink.getvalue()


@pytest.mark.parametrize("given, found", [(None, "passive"), ("active", "active")])
def test_threads_that_wait_leave_the_processor_to_others(monkeypatch, given, found):
    from kvzip.cli import main

    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")  # and is set back after the test
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == found
