"""A file in memory behaves as io.BytesIO does, whatever room it was given."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvzip.codecs._native import Output

steps = st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=200)), max_size=12)


@given(capacity=st.integers(0, 400), steps=steps)
def test_as_bytesio(capacity: int, steps: list[tuple[int, bytes]]) -> None:
    ours, theirs = Output(capacity), io.BytesIO()
    for at, data in steps:
        assert ours.seek(at) == theirs.seek(at)
        assert ours.write(data) == theirs.write(data)
        assert ours.tell() == theirs.tell()
    expected = theirs.getvalue()
    taken = ours.take()
    assert type(taken) is bytes and taken == expected
    with pytest.raises(ValueError, match="taken"):
        ours.take()
    with pytest.raises(ValueError, match="taken"):
        ours.write(b"more")


def test_room_of_many_pages() -> None:
    output = Output(16 << 20)
    data = bytes(range(256)) * (1 << 14)
    for _ in range(5):  # more than there was room for
        output.write(memoryview(data))
    assert output.take() == 5 * data
