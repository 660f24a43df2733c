"""Blocks of `channel` as jobs for a GPU (channel.cuh): a warp decodes a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.native.cuda.device import Kernel
from kvzip.errors import CorruptError

_SOURCE, _SPACE = "channel/channel.cuh", "kvzip::channel"
_HEADER = 16  # bytes before the numbers of a block that is stored as it is
_SHARED = 128 * 72 + 2 * (4 * 4 * 128 + 128)
"""`kDecodeSharedBytes` of channel.cuh."""
_JOB = np.dtype(("V", 48))


def decode(work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]) -> None:
    """As :meth:`kvzip.codec.Codec.decode_on_device`."""
    order = np.argsort(blocks["part"], kind="stable")
    blocks = blocks[order]
    starts = np.flatnonzero(np.diff(blocks["part"], prepend=-1))
    for begin, end in zip(starts, [*starts[1:], len(blocks)], strict=True):
        mine = blocks[begin:end]
        part = int(mine[0]["part"])
        form, tables = contexts[part].dtype, contexts[part].tables
        batch, heads, dim = work.shape(part)
        try:
            jobs, raw = _native.channel_jobs(
                tables, mine.view(np.uint8), batch, heads, dim, form.itemsize
            )
            if len(jobs):
                work.tables(part, *_tables(work, tables))
        except ValueError as error:
            raise CorruptError(str(error)) from None
        kernel = Kernel(_SOURCE, f"channel_decode_{form.name}", _SPACE, 32, shared=_SHARED)
        work.run(kernel, jobs.view(_JOB)[:, 0])
        for block in mine[raw].tolist():
            _, address, _, _, first, tokens, _ = block
            strides = heads * tokens * dim, tokens * dim, dim
            work.copy(form.itemsize, address + _HEADER, strides, part, first, tokens)


def _tables(work: Any, tables: Any) -> tuple[int, int]:
    """Where a part's channels and tables will be on the device. There is one shape at least, and
    of a bucket what is its own stands beside what is another's."""
    found = tables.entries()
    entries = np.zeros((max(len(found), 1), 32, 2), np.uint32)
    entries[: len(found)] = found.reshape(-1, 2, 32).swapaxes(1, 2)
    return work.put(tables.channels()), work.put(entries, 256)
