"""Finding the grid that numbers are on, if they are on one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.codecs import _native
from kvzip.dtypes import Bits
from kvzip.grids.grid import HALVES, WIDE, Found, Grid, Narrow, Rounding, Wide
from kvzip.grids.narrow import fit, narrow
from kvzip.grids.widen import widen_codes

# Suspicions, as the compiled code numbers them: an axis' bit is the one of channels, twice as much
# for tokens.
_FEW, _EVEN, _HALF = 1, 4, 16
# Every format after those whose values it has too, as far as one has; so the first that holds is
# the one with the fewest bits.
_FEW_SIGNIFICANDS: tuple[Narrow, ...] = (
    "fp4_e2m1",
    "int4",
    "fp8_e5m2",
    "fp8_e4m3fn",
    "fp8_e5m2fnuz",
    "fp8_e4m3fnuz",
)
_EVEN_STEPS: tuple[Narrow, ...] = ("int8",)
_GROUPS = (128, 64, 32, 16)
_PIECES, _PIECE = 64, 64
_OF_GROUP = _native.GRID_SHARE_OF_GROUP
# Of a sample's numbers, and of its pieces at some channels, so many must be on the grid.
_ON_GRID, _PIECES_ON_GRID = 0.97, 0.75
# A grid must save so much of the wide bits, before any codec.
_WORTH = 0.85
# Exceptions that take less than this share of the codes' bytes are not worth another try.
_FEW_EXCEPTIONS = 0.005
# Two roundings in place of one change no more numbers than this share.
_FEW_ROUNDINGS = 0.01


class _Candidate(NamedTuple):
    narrow: Narrow
    group: tuple[int, int]
    channels: tuple[int, int]


def find(bits: Bits, dtype: Any, like: Grid | None = None) -> Found | None:
    """The grid that most numbers of a part are on, or None.

    `bits` is [..., tokens, channels], of any strides, the bits of bf16, fp16 or fp32 as `dtype`
    says; numbers of other formats are on no grid. `like` is tried first: the grid of a part of the
    same kind, such as another layer's. What is found widens to the same bits: that was tried.
    """
    suspected = suspicions(bits, dtype)
    if not suspected:
        return None
    wide = dtypes.get(dtype).name
    # A few tokens are multiples of a step by chance, which the search would see last and late.
    if suspected & 3 * _EVEN == 2 * _EVEN and not _native.grid_may_have_even_channels(bits, wide):
        suspected -= 2 * _EVEN
        if not suspected and like is None:
            return None
    search = _Search(bits, wide)  # type: ignore[arg-type] # a wide one
    found = search.by_scale(suspected, like)
    if found is None and suspected & _HALF:
        found = search.half()
    return found


def suspicions(bits: Bits, dtype: Any) -> int:
    """Which grids a few of the numbers look like; 0 for what is hardly on any. `bits` and `dtype`
    as for :func:`find`."""
    wide = dtypes.get(dtype).name
    if wide not in WIDE or bits.ndim < 2:
        return 0
    found: int = _native.grid_suspicions(bits, wide)
    return found


class _Search:
    """The search in one part."""

    def __init__(self, bits: Bits, wide: Wide):
        self.bits, self.wide = np.ascontiguousarray(bits), wide
        self.rows = math.prod(bits.shape[:-2])
        self.tokens, self.channels = bits.shape[-2:]
        self.cube = self.bits.reshape(self.rows, self.tokens, self.channels)
        self.random = np.random.default_rng(0)

    # --- codes times scales ----------------------------------------------------------------

    def by_scale(self, suspicions: int, like: Grid | None) -> Found | None:
        best: Found | None = None
        for candidates in self._candidates(suspicions, like):
            for candidate in candidates:
                found = self._on_grid(candidate, "once")
                if best is not None and found.nbytes >= best.nbytes:
                    break  # smaller groups will not be better
                best = found
                if _is_enough(best):
                    break
            if best is not None and _is_enough(best):
                break
        if best is None:
            return None
        few = 0 < len(best.positions) <= _FEW_ROUNDINGS * best.codes.size
        if few and best.grid.scale == "fp32" and self.wide != "fp32":
            grid = best.grid
            other = self._on_grid(
                _Candidate(grid.narrow, grid.group, grid.channels), "through_fp32"
            )
            if len(other.positions) < len(best.positions):
                best = other
        return best if best.nbytes <= _WORTH * self.bits.nbytes else None

    def _candidates(self, suspicions: int, like: Grid | None) -> Iterator[Iterator[_Candidate]]:
        """What a sample of the numbers is on: formats of fewer bits first; and of each, groups
        along an axis, large before small."""
        tokens, channels = self.tokens, self.channels
        if like is not None and like.scale is not None and like.wide == self.wide:
            within = like.channels if like.channels[1] <= channels else (0, channels)
            group = (min(like.group[0], tokens), min(like.group[1], within[1] - within[0]))
            yield self._sampled(like.narrow, [group], within)
        for formats, kind in (_FEW_SIGNIFICANDS, _FEW), (_EVEN_STEPS, _EVEN):
            for code in formats:
                axes: list[tuple[list[tuple[int, int]], tuple[int, int]]] = []
                for bit, along_tokens in ((kind, False), (2 * kind, True)):
                    if not suspicions & bit:
                        continue
                    smallest = self._smallest_on(code, along_tokens)
                    if smallest is not None:
                        within = smallest.channels
                        axes.append((self._groups(within, along_tokens), within))
                for _, within in axes[:1]:
                    yield self._sampled(code, [(tokens, within[1] - within[0])], within)
                for groups, within in axes:
                    yield self._sampled(code, groups, within)

    def _smallest_on(self, code: Narrow, along_tokens: bool) -> _Candidate | None:
        """The format with the smallest groups along an axis. Where these are on no such grid,
        larger ones are not; and they say best which channels are on it."""
        least = min(_GROUPS[-1], self.tokens if along_tokens else self.channels)
        group = (least, 1) if along_tokens else (1, least)
        return self._sample_on(code, group, (0, self.channels))

    def _groups(self, within: tuple[int, int], along_tokens: bool) -> list[tuple[int, int]]:
        """Groups along an axis, large before small, all tokens or channels first."""
        whole = self.tokens if along_tokens else within[1] - within[0]
        sizes = dict.fromkeys(n for n in (whole, *_GROUPS) if n <= whole)
        return [(n, 1) if along_tokens else (1, n) for n in sizes]

    def _sampled(
        self, code: Narrow, groups: list[tuple[int, int]], within: tuple[int, int]
    ) -> Iterator[_Candidate]:
        """The candidates among groups of a format, of these channels."""
        for group in groups:
            if (candidate := self._sample_on(code, group, within)) is not None:
                yield candidate

    def _sample_on(
        self, code: Narrow, group: tuple[int, int], within: tuple[int, int]
    ) -> _Candidate | None:
        """The format and group as a candidate, if numbers of some neighbouring channels of these,
        at least half of all that there are, are on such a grid in a sample."""
        begin, end = within
        columns = -(-(end - begin) // group[1])
        sample, column = self._sample(group, within)
        size = sample.shape[-1]
        grid = Grid(self.wide, code, (0, size), "fp32", (1, size))
        share = np.ones(len(sample))
        # Pieces go round the columns. After so many rounds it shows of what is on no such grid that
        # it is on none, whatever the others are.
        enough = (len(sample) // (4 * columns) + 1) * columns
        for pieces in (enough, len(sample)):
            codes, scales = fit(sample[:pieces], grid)
            widened = np.empty_like(sample[:pieces])
            widen_codes(grid, codes, scales, widened)
            share[:pieces] = (widened == sample[:pieces]).mean((1, 2))
            pieces_of = np.bincount(column, None, columns)
            good = np.bincount(column, share >= _OF_GROUP, columns) / pieces_of
            first, last = _longest(good >= _PIECES_ON_GRID)
            start, stop = begin + first * group[1], min(begin + last * group[1], end)
            if 2 * (stop - start) < self.channels:
                return None
        on = (column >= first) & (column < last)
        return _Candidate(code, group, (start, stop)) if share[on].mean() >= _ON_GRID else None

    def _sample(
        self, group: tuple[int, int], within: tuple[int, int]
    ) -> tuple[Bits, NDArray[np.int64]]:
        """Numbers of some groups of these channels, [groups, 1, numbers], and each group's column
        of groups."""
        begin, end = within
        columns = -(-(end - begin) // group[1])
        count = max(_PIECES, 2 * columns)
        column = np.arange(count) % columns
        row = self.random.integers(self.rows, size=count)
        block = self.random.integers(-(-self.tokens // group[0]), size=count)
        size = min(_PIECE, group[0] * group[1])
        if group[0] == 1 or group[1] == 1:
            place = np.arange(size) * (group[0] * group[1]) // size
        else:
            place = self.random.integers(group[0] * group[1], size=size)
        # The last group may be smaller: its last numbers are taken more than once.
        token = np.minimum(block[:, None] * group[0] + place // group[1], self.tokens - 1)
        channel = np.minimum(begin + column[:, None] * group[1] + place % group[1], end - 1)
        return self.cube[row[:, None], token, channel][:, None], column

    def _on_grid(self, candidate: _Candidate, rounding: Rounding) -> Found:
        """Put all numbers on the candidate's grid, those that do not lie on it as exceptions."""
        code, group, channels = candidate
        group = (group[0], min(group[1], channels[1] - channels[0]))
        return narrow(self.bits, Grid(self.wide, code, channels, "fp32", group, rounding))

    # --- halves ------------------------------------------------------------------------------

    def half(self) -> Found | None:
        """The numbers as bf16 or fp16, whichever holds more of them."""
        channels = (0, self.channels)
        found = min(
            (narrow(self.bits, Grid("fp32", name, channels)) for name in HALVES),
            key=lambda one: one.nbytes,
        )
        return found if found.nbytes <= _WORTH * self.bits.nbytes else None


def _is_enough(found: Found) -> bool:
    """Whether hardly anything is left to be gained by another format or group."""
    exceptions = found.positions.nbytes + found.exceptions.nbytes
    return not found.rest.size and exceptions <= _FEW_EXCEPTIONS * found.codes.nbytes


def _longest(flags: NDArray[np.bool_]) -> tuple[int, int]:
    """Begin and end of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False]))))
    if not len(edges):
        return 0, 0
    begins, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - begins))
    return int(begins[longest]), int(ends[longest])
