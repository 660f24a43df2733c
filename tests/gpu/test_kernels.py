"""Kernels of their own: checksums of numbers wherever they lie, and what shim.hpp promises."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
import xxhash

from kvzip.codecs.native.cuda.work import BLOCK, Full, Slot, Target, Work, in_pieces


def hashes(device, itemsize, targets, blocks):
    """The checksum of each (part, first token, tokens)."""
    results = device.allocate(8 * len(blocks))
    back = device.pinned(8 * len(blocks))
    slot = Slot(device)
    with device.current():
        slot.grow(1 << 16)
        records = np.zeros(len(blocks), BLOCK)
        records["row"] = np.arange(len(blocks))
        for n, name in enumerate(("part", "first", "tokens")):
            records[name] = [block[n] for block in blocks]
        for _ in range(2):  # the first may find too little scratch memory
            work = Work(slot, results.address, 0)
            for target in targets:
                work.part(target)
            with suppress(Full):
                work.checksums(itemsize, records)
                work.finish()
                break
        stream = device.stream()
        work.start(stream, stream)
        device.download(stream, back.address, results.address, 8 * len(blocks))
        device.synchronize(device.record(stream))
    return back.array.view("<u8").tolist()


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [1, 3, 8, 64])
@pytest.mark.drawn(2)
def test_checksums_of_any_length(device, shuffled, room, itemsize, dim):
    """Every branch of XXH3, in one row of tokens, by heads, and in pages."""
    tokens = 700
    flat, whole = room.tensor((2, tokens, dim), itemsize)
    host = whole.cpu().numpy()
    size = 7
    _, paged = room.tensor((110, 2, size, dim), itemsize)
    pages = np.random.default_rng(0).permutation(110)[:100].astype(np.int32)
    for t in range(tokens):
        paged[int(pages[t // size]), :, t % size] = whole[:, t]
    targets = [
        Target(whole.data_ptr(), (0, tokens * dim, dim), (1, 2, tokens, dim), 0, owner=flat),
        Target(
            paged.data_ptr(),
            (0, size * dim, dim),
            (1, 2, tokens, dim),
            0,
            pages,
            size,
            2 * size * dim,
            paged,
        ),
        Target(whole.data_ptr(), (0, 0, dim), (1, 1, tokens, dim), 0),
    ]
    counts = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 60, 64, 65, 120, 121, 200, 511, 512, 513, 640]
    blocks = [(part, first, n) for part in range(3) for first in (0, 5) for n in counts]
    expected = []
    for part, first, n in blocks:
        heads = host[: 1 if part == 2 else 2, first : first + n]
        expected.append(xxhash.xxh3_64_intdigest(np.ascontiguousarray(heads).tobytes()))
    torch.cuda.synchronize() if room.where == "cuda" else None
    for where in (device, shuffled):
        assert hashes(where, itemsize, targets, blocks) == expected


def test_a_call_of_a_library_has_its_turn(device):
    """After what was to run before, and before what is to run after; whenever it is all done."""
    if device.kind != "shim":
        pytest.skip("asks the shim in which order things ran")
    slot, order = Slot(device), []
    with device.current():
        slot.grow(1 << 16)
        work = Work(slot, 0, 0)
        memory = np.zeros(64, np.uint16)
        part = work.part(Target.packed(memory.ctypes.data, (1, 1, 4, 16), 0))
        numbers = work.put(np.arange(64, dtype=np.uint16))
        work.copy(2, numbers, (64, 64, 16), part, 0, 4)
        work.call(lambda stream: order.append(memory.sum()) or memory.fill(7))
        work.copy(2, numbers, (64, 64, 16), part, 1, 2)
        work.finish()
        work.start(device.stream(), device.stream())
        work.launch(device.stream())
    assert order == [63 * 32] * 2
    assert memory.tolist() == [7] * 16 + [*range(32)] + [7] * 16


def test_jobs_in_pieces_do_each_row_once():
    rng = np.random.default_rng(0)
    kind = np.dtype([("name", "<u4"), ("first_row", "<u4"), ("rows", "<u4")])
    for count in (0, 1, 5):
        jobs = np.zeros(count, kind)
        jobs["name"], jobs["rows"] = np.arange(count), rng.integers(0, 40, count)
        jobs["first_row"] = rng.integers(0, 3, count)
        each = rng.integers(1, 12, count)
        pieces = in_pieces(jobs, each)
        assert (pieces["rows"] > 0).all()
        assert (pieces["rows"] <= each[pieces["name"]]).all()
        done = [(p["name"], p["first_row"] + n) for p in pieces for n in range(p["rows"])]
        wanted = [(j["name"], j["first_row"] + n) for j in jobs for n in range(j["rows"])]
        assert done == wanted
