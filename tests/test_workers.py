"""Locks and pools, and what has them, in a process that was forked while a thread was at work."""

from __future__ import annotations

import gzip
import io
from contextlib import contextmanager
from threading import Event, Thread

import numpy as np
import pytest
from support import in_a_fork, make_snapshot, random_bits

import kvzip
from kvzip.workers import Lock


@contextmanager
def at_work(lock):
    """Meanwhile another thread holds the lock."""
    held, done = Event(), Event()

    def hold():
        with lock:
            held.set()
            done.wait(60)

    thread = Thread(target=hold)
    thread.start()
    assert held.wait(60)
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_lock_is_free_in_a_fork_unless_the_fork_holds_it():
    others, own, entered = Lock(), Lock(), []

    def use():
        with others:
            entered.append("others")
        return entered, held_by_another(own)

    with at_work(others), own:
        assert in_a_fork(use) == (["others"], True)
    assert not held_by_another(own)


def held_by_another(lock):
    """Whether a thread would have to wait for it."""
    waiter = Thread(target=lambda: lock.__enter__(), daemon=True)
    waiter.start()
    waiter.join(0.5)
    return waiter.is_alive()


def test_a_file_object_in_memory_is_read_in_a_fork():
    snapshot = make_snapshot(random_bits, 1, "bf16")
    blob = kvzip.encode(snapshot, block_tokens=8)
    with kvzip.open(io.BytesIO(blob)) as reader, at_work(reader._source._lock):
        assert in_a_fork(lambda: reader.decode() == snapshot) is True
    with kvzip.open(io.BytesIO(blob)) as reader:
        assert reader.decode() == snapshot


def test_a_file_object_whose_position_is_shared_raises_in_a_fork(tmp_path):
    snapshot = make_snapshot(random_bits, 1, "bf16")
    with gzip.open(tmp_path / "a.kvz.gz", "wb") as file:
        file.write(kvzip.encode(snapshot, block_tokens=8))
    with gzip.open(tmp_path / "a.kvz.gz") as file, kvzip.open(file) as reader:
        with at_work(reader._source._lock):
            assert in_a_fork(reader.decode) == "UsageError"
        assert reader.decode() == snapshot
    with pytest.raises(kvzip.UsageError, match="closed"):
        reader.decode()


def test_a_file_is_read_in_a_fork(tmp_path):
    snapshot = make_snapshot(random_bits, 1, "bf16")
    kvzip.write(tmp_path / "a.kvz", snapshot, block_tokens=8)
    with (tmp_path / "a.kvz").open("rb") as file, kvzip.open(file) as reader:
        assert in_a_fork(lambda: reader.decode() == snapshot) is True


def test_a_fingerprint_in_a_fork():
    pytest.importorskip("transformers")
    from support import readme_model

    from kvzip.identity import live

    model = readme_model()
    wanted = kvzip.fingerprint(model)
    with at_work(live._lock):
        assert in_a_fork(lambda: kvzip.fingerprint(model)) == wanted


def test_a_cache_is_loaded_and_computed_in_a_fork():
    pytest.importorskip("transformers")
    from kvzip.load.loaders import Loader
    from kvzip.load.recovery import Recovery

    snapshot = make_snapshot(random_bits, 1, "bf16", layers=3)
    loader = Loader(snapshot, [(0, 50)] * 3, 50, None, 1)
    with at_work(loader._lock):
        assert in_a_fork(lambda: tuple(loader.take(2).parts["k"].shape)) == (1, 2, 50, 16)
    recovery = Recovery(lambda: [np.zeros(1)])
    with at_work(recovery._lock):
        assert in_a_fork(lambda: len(recovery.layers())) == 1
