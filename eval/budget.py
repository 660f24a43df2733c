"""How much a demo can do in the time that it is given, and how far it has come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvzip.choice.cost import PrefillModel

Step = Callable[..., Any]
"""Called with a few words before each step, and with the share of the work that is done by then, 0
to 1, where it is known: of the whole, or of one part after the other."""
EVERY = 5.0
"""Seconds between two words of a count."""

SIZES = ((2048, 16), (2048, 8), (1024, 16), (1024, 8), (512, 12), (512, 6), (256, 6), (256, 2))
"""Tokens of a document, and documents that are learned from, the most telling first."""
_MARGIN = 1.2
"""How many times as long as was estimated the work may take."""

# Seconds that are not the model's, on two cores of a Zen 3; machines with AVX-512 take less.
_FIXED = 5.0
_LEARN, _LEARN_TOKEN = 25.0, 9e-3
"""To learn a profile of 30 layers, and more for each token that it is learned from."""
_ENCODE_TOKEN = 1.5e-3
"""For each token of a document, to encode and decode it several times with a codec."""


@dataclass(frozen=True)
class Speed:
    """What a model was measured to take on this machine."""

    prefill: PrefillModel
    step_seconds: float
    """For one token after a cache."""


@dataclass(frozen=True)
class Plan:
    """A demo of some size, and what its steps are expected to take."""

    tokens: int
    train: int
    prefill: float
    """Seconds of the prefill of one document."""
    timing: float
    reference: float
    learning: float
    codecs: float

    @property
    def seconds(self) -> float:
        training = self.train * self.prefill
        work = self.timing + self.prefill + self.reference + training + self.learning + self.codecs
        return _FIXED + work


def plan(
    speed: Speed, tokens: int, train: int, lengths: list[int], codecs: int, new_tokens: int
) -> Plan:
    """What a demo of this size is expected to take. `lengths`: those at which the prefill is
    timed, three times each; `train` is 0 where no codec needs a profile."""
    prefill = speed.prefill.seconds
    generating = new_tokens * speed.step_seconds
    return Plan(
        tokens,
        train,
        prefill(tokens),
        3 * sum(map(prefill, lengths)) + prefill(lengths[0]),
        prefill(tokens) + 2 * generating,
        _LEARN + _LEARN_TOKEN * tokens * train if train else 0.0,
        codecs * (generating + _ENCODE_TOKEN * tokens),
    )


def choose(
    budget: float, of_size: Callable[[int, int], Plan], tokens: int | None, train: int | None
) -> Plan:
    """The first of `SIZES` that is expected to end within `budget` seconds, or else the smallest;
    `tokens` and `train` are those that are given, if they are."""
    plans: Iterator[Plan] = (
        of_size(tokens or length, count if train is None else train) for length, count in SIZES
    )
    for found in plans:
        if found.seconds * _MARGIN <= budget:
            break
    return found


class Counts:
    """Tells `step` of what is counted, such as a fit's thousands of regressions, every few seconds
    at most."""

    def __init__(self, step: Step, about: str):
        self._step, self._about = step, about
        self._told = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """So much of it is done."""
        now = time.monotonic()
        if now - self._told >= EVERY:
            self._told = now
            self._step(f"{self._about}, {what}: {done:,} of {total:,}")


class Progress:
    """Tells `step` how much of a plan's work is done."""

    def __init__(self, step: Step):
        self._step, self._told = step, -math.inf
        self._done = self._next = self._whole = self._most = 0.0

    def expect(self, done: float, seconds: float) -> None:
        """Know the whole work from now on: `done` seconds that are over, and so many to come."""
        self._done, self._whole = done, done + seconds

    def __call__(self, what: str, seconds: float = 0.0) -> None:
        """A step begins that is expected to take so many seconds."""
        self._done, self._next = self._done + self._next, seconds
        self._tell(what, self._done)

    def within(self, what: str, done: int, total: int) -> None:
        """So much of a part of the step is done; told every few seconds at most."""
        now = time.monotonic()
        if now - self._told >= EVERY:
            self._tell(f"{what}: {done} of {total}", self._done + self._next * done / max(total, 1))

    def _tell(self, what: str, done: float) -> None:
        self._told = time.monotonic()
        if self._whole:
            self._most = max(self._most, min(done / self._whole, 1.0))
            self._step(what, self._most)
        else:
            self._step(what)
