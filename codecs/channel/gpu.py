"""Blocks of `channel` as jobs for a GPU (decode.cuh): a warp decodes a stream."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.channel.blocks import HEADER
from kvzip.codecs.channel.gpu_rotation import Turning
from kvzip.codecs.channel.profile import fields
from kvzip.codecs.common.rotation import rotation_of
from kvzip.codecs.native.cuda.device import Kernel
from kvzip.codecs.native.cuda.work import Block
from kvzip.errors import CorruptError

_SOURCE, _SPACE = "channel/decode.cuh", "kvzip::channel"
_SHARED = 128 * 72 + 2 * (4 * 4 * 128 + 128)
"""`kDecodeSharedBytes` of decode.cuh."""
_JOB = np.dtype(("V", 48))
KERNELS = {
    (8, 7): "bf16",
    (5, 10): "fp16",
    (8, 23): "fp32",
    (4, 3): "fp8_e4m3fn",
    (5, 2): "fp8_e5m2",
}
"""What kernels are called, by bits of exponent and mantissa."""


def decode(work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]) -> None:
    """As :meth:`kvzip.codec.Codec.decode_on_device`."""
    if not len(blocks):
        return
    blocks = blocks[np.argsort(blocks["part"], kind="stable")]
    rows = list(map(Block._make, blocks.tolist()))
    begins: dict[int, int] = {}
    for block in rows:
        begins.setdefault(block.part, block.first)
    parts = list(begins)
    form = contexts[parts[0]].dtype  # of all, as a GPU decodes only such files
    try:
        jobs, raw, unturned, looked_up, places = _native.channel_jobs(
            [contexts[part].tables for part in parts],
            blocks.view(np.uint8),
            np.array([work.shape(part) for part in parts], np.int64),
            form.itemsize,
        )
    except ValueError as error:
        raise CorruptError(str(error)) from None
    if len(jobs):
        at = work.put(looked_up, 256)
        for part, (channels, tables) in zip(parts, places.tolist(), strict=True):
            if channels >= 0:
                work.tables(part, at + channels, at + tables)
        name = f"channel_decode_{KERNELS[fields(form)]}"
        kernel = Kernel(_SOURCE, name, _SPACE, 32, shared=_SHARED)
        work.run(kernel, jobs.view(_JOB)[:, 0])
    for n in raw:
        work.copy_block(form.itemsize, rows[n], HEADER)
    turning = Turning(work)
    for part, some in groupby(unturned.tolist(), key=lambda found: rows[found[0]].part):
        context, dim = contexts[part], work.shape(part)[2]
        rotation = rotation_of(context, dim)
        if rotation is None or 2 * rotation.pairs > dim:
            raise CorruptError("keys before RoPE, and nothing that says how they are turned")
        start = context.start - begins[part]
        for n, rounding, exceptions in some:
            turning.add(rotation, start, rows[n], rounding, exceptions)
    turning.run()
