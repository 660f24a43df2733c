"""Where a key is named, and what goes wrong there: no message has it in it."""

from __future__ import annotations

import os

import pytest

from kvzip.container.secret_keys import key_from, key_in_file
from kvzip.errors import UsageError

SECRET = bytes(range(1, 33))


@pytest.mark.parametrize(
    "data", [SECRET, SECRET.hex().encode(), f" {SECRET.hex().upper()}\n".encode()]
)
def test_a_key_is_bytes_or_digits(tmp_path, monkeypatch, data):
    (tmp_path / "key").write_bytes(data)
    assert key_in_file(tmp_path / "key").secret == SECRET
    assert key_from(f"file:{tmp_path / 'key'}").secret == SECRET
    if data != SECRET:
        monkeypatch.setenv("A_KEY", data.decode())
        assert key_from("env:A_KEY").secret == SECRET


@pytest.mark.parametrize(
    "named",
    [
        SECRET.hex(),
        f"env:{SECRET.hex()}",
        f"file:{SECRET.hex()}",
        f"hex:{SECRET.hex()}",
        "env:",
        "file:",
        "A_KEY",
        "",
    ],
)
def test_a_key_in_the_place_of_its_name_is_not_shown(named):
    with pytest.raises(UsageError, match="env:NAME or file:PATH") as caught:
        key_from(named)
    assert SECRET.hex() not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"x" * 31, SECRET[:16].hex().encode(), SECRET.hex().encode()[:-1] + b"g"]
)
def test_what_is_no_key_is_not_shown(tmp_path, monkeypatch, data):
    (tmp_path / "key").write_bytes(data)
    monkeypatch.setitem(os.environ, "A_KEY", data.decode())
    for named in (f"file:{tmp_path / 'key'}", "env:A_KEY"):
        with pytest.raises(UsageError, match="holds no key") as caught:
            key_from(named)
        assert not data or data.decode() not in str(caught.value)


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(UsageError, match="no variable 'A_KEY'"):
        key_from("env:A_KEY")
    with pytest.raises(UsageError, match=r"nowhere cannot be read: No such file"):
        key_from(f"file:{tmp_path / 'nowhere'}")
