"""Request traces in the format that Mooncake published (FAST'25, github.com/kvcache-ai/Mooncake).

A trace is JSON Lines, plain, gzip or Zstandard. Each line is one request: ``timestamp``
(milliseconds from the beginning), ``input_length`` and ``output_length`` (tokens), and
``hash_ids``, the ids of the prompt's blocks of 512 tokens, of which the last may be shorter. An id
stands for a block and all that comes before it, so that two prompts with the same id share all
tokens up to there.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from kvzip.errors import CorruptError, FormatError, KVZipError
from kvzip.parsing import from_json

BLOCK_TOKENS = 512
_MOST_LINE = 64 << 20
"""Bytes of one line, against files that are no traces."""


class Request(msgspec.Struct, frozen=True):
    """One line of a trace."""

    timestamp: float
    """Milliseconds."""
    input_length: int
    output_length: int
    hash_ids: list[int]


class Trace(msgspec.Struct, frozen=True):
    """The requests of a trace in the order of their arrival, as columns.

    `seconds`: float64, [requests], when each arrived, the first at 0. `inputs`, `outputs`: int64,
    [requests], tokens. `blocks`: int64, [accesses], the ids of all requests' blocks one after the
    other, numbered anew from 0 in the order of their first appearance; those of request i are
    ``blocks[starts[i]:starts[i + 1]]``.
    """

    name: str
    seconds: NDArray[np.float64]
    inputs: NDArray[np.int64]
    outputs: NDArray[np.int64]
    blocks: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def requests(self) -> int:
        return len(self.seconds)

    @property
    def distinct(self) -> int:
        """How many different blocks there are."""
        return int(self.blocks.max()) + 1 if len(self.blocks) else 0


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace. Raises FormatError, which names the line, for what is no request, KVZipError
    for a file that cannot be read or has no request with a block."""
    requests = []
    for number, line in enumerate(_lines(Path(path)), 1):
        if not line.strip():
            continue
        try:
            request = from_json(line, Request)
        except (CorruptError, FormatError) as error:
            raise FormatError(
                f"{path}, line {number} is no request ({error}): a trace has an object a line with "
                "timestamp, input_length, output_length, hash_ids"
            ) from None
        if (
            not 0 <= request.timestamp < 1e15
            or not 0 <= request.input_length < 2**40
            or not 0 <= request.output_length < 2**40
        ):
            raise FormatError(f"{path}, line {number}: its times or lengths make no sense")
        requests.append(request)
    if not any(request.hash_ids for request in requests):
        raise KVZipError(f"{path}: no request in it has a block")
    requests.sort(key=lambda request: request.timestamp)  # stable: equal times stay in order
    return of_requests(requests, Path(path).name)


def of_requests(requests: list[Request], name: str) -> Trace:
    """The columns of requests that are in the order of their arrival."""
    numbers: dict[int, int] = {}
    blocks = [numbers.setdefault(block, len(numbers)) for r in requests for block in r.hash_ids]
    first = requests[0].timestamp if requests else 0.0
    return Trace(
        name,
        np.array([(r.timestamp - first) / 1e3 for r in requests], np.float64),
        np.array([r.input_length for r in requests], np.int64),
        np.array([r.output_length for r in requests], np.int64),
        np.array(blocks, np.int64),
        np.cumsum([0, *(len(r.hash_ids) for r in requests)]),
    )


def spread(trace: Trace) -> Trace:
    """The trace with requests of one time placed evenly from then until the next time; those of the
    last time over as long as passed before it."""
    times, first, count = np.unique(trace.seconds, return_index=True, return_counts=True)
    if len(times) < 2:
        return trace
    gap = np.append(np.diff(times), times[-1] - times[-2])
    rank = np.arange(trace.requests) - np.repeat(first, count)
    seconds = np.repeat(times, count) + rank * np.repeat(gap / count, count)
    return msgspec.structs.replace(trace, seconds=seconds)


def _lines(path: Path) -> Iterator[bytes]:
    """The file's lines, unpacked, one in memory at a time."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            stream: Any = file
            if magic[:2] == b"\x1f\x8b":
                stream = gzip.GzipFile(fileobj=file)
            elif magic == b"\x28\xb5\x2f\xfd":
                unpacker = zstandard.ZstdDecompressor().decompressobj()
                stream = io.BytesIO(unpacker.decompress(file.read()))
                if not unpacker.eof:
                    raise FormatError(f"{path} is cut short")
            while line := stream.readline(_MOST_LINE + 1):
                if len(line) > _MOST_LINE:
                    raise FormatError(f"{path}: a line is longer than {_MOST_LINE:,} bytes")
                yield line
    except (gzip.BadGzipFile, EOFError, zstandard.ZstdError) as error:
        raise FormatError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise KVZipError(f"{path}: {error.strerror or error}") from None


def synthetic(
    requests: int = 2000,
    seed: int = 0,
    *,
    rate: float = 3.0,
    conversations: int = 200,
    prompts: int = 8,
    turn_blocks: float = 3.0,
) -> Trace:
    """A made-up trace with the shape of conversations, for tests and trials.

    Each request goes on a conversation or begins a new one: its prompt is one of `prompts` system
    prompts (popular in proportion to 1 / rank), then all of the conversation so far, then a new
    turn of `turn_blocks` blocks in the mean. Requests come `rate` a second (Poisson); about
    `conversations` are open at a time.
    """
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, prompts + 1)
    heads = [list(range(100 * i, 100 * i + int(rng.integers(1, 6)))) for i in range(prompts)]
    fresh = 100 * prompts
    open_ones: list[list[int]] = []
    found, now = [], 0.0
    for _ in range(requests):
        now += float(rng.exponential(1e3 / rate))
        if (len(open_ones) < conversations and rng.random() < 0.5) or not open_ones:
            which = int(rng.choice(prompts, p=share / share.sum()))
            open_ones.append(list(heads[which]))
        at = int(rng.integers(len(open_ones)))
        turn = 1 + int(rng.poisson(turn_blocks))
        open_ones[at] = [*open_ones[at], *range(fresh, fresh + turn)]
        fresh += turn
        blocks = open_ones[at]
        last = int(rng.integers(1, BLOCK_TOKENS + 1))
        length = (len(blocks) - 1) * BLOCK_TOKENS + last
        found.append(Request(now, length, int(rng.integers(1, 500)), blocks))
        if rng.random() < 0.1:
            open_ones.pop(at)
    return of_requests(found, f"synthetic:requests={requests},seed={seed}")
