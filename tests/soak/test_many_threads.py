"""`make tsan` and `make free-threaded` (tests/soak/threads.py) for a second, and without either."""

from __future__ import annotations

import pytest
from soak import threads

import kvzip


def test_many_threads_get_what_one_got(tmp_path):
    done = threads.stress(tmp_path, seconds=1, threads=4)
    assert {*done} == {"rounds", *(deed.__name__ for deed in threads.Shared.DEEDS)}


def test_other_bytes_in_one_thread_are_noticed(monkeypatch, tmp_path):
    expected = threads.Expected(tmp_path)
    encode = kvzip.encode

    def wrong(*given, **how):
        return encode(*given, **how)[:-1]

    shared = threads.Shared(expected, tmp_path / "store")
    monkeypatch.setattr(kvzip, "encode", wrong)
    with pytest.raises(AssertionError, match="other bytes") as failed:
        threads.one_round(shared, 0, 2, 100)
    assert "round 0, thread " in failed.value.__notes__[0]
    shared.close()
