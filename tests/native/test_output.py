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


@pytest.mark.parametrize("at", [(1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_no_position_is_beyond_what_can_be_counted(at: int) -> None:
    output = Output(100)
    output.write(b"before")
    output.seek(at)
    assert output.write(b"") == 0
    with pytest.raises(OverflowError, match="more bytes than"):
        output.write(b"more")
    assert output.take() == b"before"


@pytest.mark.parametrize("room", [100, 4096, 1 << 20, 5 << 20, 9 << 20])
@pytest.mark.parametrize("unused", [0, 1, 0.03, 0.5, 0.99])
def test_what_is_taken_has_its_own_length(room: int, unused: float) -> None:
    data = bytes(range(1, 251)) * (room // 250 + 1)
    data = data[: max(0, room - (unused if unused == 1 else int(unused * room)))]
    output = Output(room)
    output.write(data)
    taken = output.take()
    assert taken == data and len(taken) == len(data) and hash(taken) == hash(data)
    assert taken + b"x" == data + b"x" and taken.decode("latin1").encode("latin1") == data


def test_room_of_many_pages() -> None:
    output = Output(16 << 20)
    data = bytes(range(256)) * (1 << 14)
    for _ in range(5):  # more than there was room for
        output.write(memoryview(data))
    assert output.take() == 5 * data
