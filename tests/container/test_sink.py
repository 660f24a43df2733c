"""A file made in memory that the caller has: the same bytes, nowhere else, or an error."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_same, cache_like, make_snapshot

import kvzip
from kvzip.errors import UsageError
from kvzip.load import buffers

KEY = bytes(range(32))
KINDS = {
    "bytearray": bytearray,
    "numpy": lambda n: np.zeros(n, np.uint8),
    "int8": lambda n: np.zeros(n, np.int8),
    "words": lambda n: np.zeros(-(-n // 4), np.uint32),
    "torch": lambda n: torch.zeros(n, dtype=torch.uint8),
    "memoryview": lambda n: memoryview(bytearray(n)),
    "mmap": lambda n: mmap.mmap(-1, n),
}


@pytest.fixture(scope="module")
def snapshot():
    return make_snapshot(cache_like, 3, "bf16", layers=3, heads=2, tokens=150, dim=16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_in_any_memory(snapshot, kind):
    out = KINDS[kind](kvzip.max_encoded_size(snapshot))
    made = kvzip.encode(snapshot, out=out)
    assert made == kvzip.encode(snapshot)
    where = out.numpy() if kind == "torch" else out
    assert np.shares_memory(np.frombuffer(made, np.uint8), np.frombuffer(where, np.uint8))
    assert_same(kvzip.decode(made), snapshot)


@pytest.mark.parametrize("codec", ["raw", "zstd", "lz4", "planes:mode=bit", "channel"])
@pytest.mark.parametrize("threads", [1, 3])
def test_by_any_codec_and_any_threads(snapshot, codec, threads):
    whole = kvzip.encode(snapshot, codec, block_tokens=32)
    room = np.full(kvzip.max_encoded_size(snapshot, codec, block_tokens=32) + 9, 0xA5, np.uint8)
    made = kvzip.encode(snapshot, codec, None, threads, block_tokens=32, out=room[4:])
    assert made == whole
    # Nothing is written beside it, and what was there before does not show through.
    assert (room[:4] == 0xA5).all() and (room[4 + len(whole) :] == 0xA5).all()


def test_sealed(snapshot):
    pytest.importorskip("cryptography")
    out = bytearray(kvzip.max_encoded_size(snapshot, sealed=True))
    made = kvzip.encode(snapshot, key=KEY, out=out)
    assert len(made) == len(kvzip.encode(snapshot, key=KEY)) <= len(out)
    assert_same(kvzip.decode(made, key=KEY), snapshot)


@given(short=st.integers(1, 4000))
def test_too_small_is_an_error(snapshot, short):
    whole = kvzip.encode(snapshot, "raw")
    exact = bytearray(len(whole))
    assert kvzip.encode(snapshot, "raw", out=exact) == whole
    room = np.full(len(whole), 0xA5, np.uint8)
    with pytest.raises(UsageError, match="max_encoded_size"):
        kvzip.encode(snapshot, "raw", out=room[: len(whole) - short])
    assert (room[len(whole) - short :] == 0xA5).all()


@pytest.mark.parametrize(
    "out",
    [
        bytes(10**6),
        np.zeros((1000, 1000), np.uint8)[:, ::2],
        torch.zeros((1000, 1000), dtype=torch.uint8).T,
        torch.zeros(10**6, dtype=torch.float32),
        torch.zeros(10**6, dtype=torch.uint8, device="meta"),
        5,
        "x",
        [1, 2],
        bytearray(0),
    ],
    ids=["read-only", "gaps", "turned", "floats", "elsewhere", "int", "str", "list", "nothing"],
)
def test_what_is_no_memory_for_it(snapshot, out):
    with pytest.raises(UsageError, match="out"):
        kvzip.encode(snapshot, out=out)


def test_never_into_the_numbers_themselves():
    """A pool of pages: a file may lie between the pages, but not on one."""
    pool = cache_like(np.random.default_rng(0), "bf16", (4, 2, 40, 64))
    before = pool.copy()
    k, v = pool[0, :, :16], pool[2, :, :16]
    snapshot = kvzip.Snapshot.from_arrays([(k, v)], "bf16")
    pages = pool.view(np.uint8).reshape(4, -1)
    for taken in (pages[0], pages[2], pages[1:3].reshape(-1), pages.reshape(-1)):
        with pytest.raises(UsageError, match="numbers"):
            kvzip.encode(snapshot, out=taken)
        with pytest.raises(UsageError, match="numbers"):
            buffers.encode(k, v, dtype="bf16", out=taken)
    assert np.array_equal(pool, before)
    made = kvzip.encode(snapshot, out=pages[1])
    assert made == kvzip.encode(snapshot)
    assert np.array_equal(pool[[0, 2, 3]], before[[0, 2, 3]])


@pytest.mark.parametrize("paged", [False, True])
def test_plain_tensors(paged):
    k, v = (cache_like(np.random.default_rng(i), "bf16", (2, 64, 16)) for i in range(2))
    more = {"dtype": "bf16"}
    if paged:
        known = kvzip.Snapshot.from_arrays([(k, v)], "bf16")
        more["profile"] = kvzip.Profile.fit([known], codec="channel")
    most = buffers.max_size(k.shape, "bf16", profile=more.get("profile"))
    out = torch.zeros(most, dtype=torch.uint8)
    blob = buffers.encode(k, v, **more, out=out)
    assert blob == buffers.encode(k, v, **more)
    # The memory as a whole may be sent: what lies behind the blob is not looked at.
    found = buffers.decode(out.numpy(), profile=more.get("profile"))
    assert np.array_equal(found[0], k) and np.array_equal(found[1], v)
    with pytest.raises(UsageError, match="out has 9 bytes"):
        buffers.encode(k, v, **more, out=bytearray(9))
