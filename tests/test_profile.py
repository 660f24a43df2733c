"""Profiles as files: what is packed comes back, and a file that lies is refused."""

from __future__ import annotations

import contextlib
import json
import struct

import golden_files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import examples

from kvzip import Profile
from kvzip.errors import ProfileError, UsageError
from kvzip.tensors import TensorFile


def weights(seed: int, shape: tuple[int, ...], spread: float) -> np.ndarray:
    found = np.random.default_rng(seed).normal(0, spread, shape)
    return np.rint(found).clip(-127, 127).astype(np.int8)


@pytest.fixture
def profile() -> Profile:
    tensors = {
        "0.weight": weights(1, (2, 30, 20, 4, 4), 20),
        "0.within": np.tril(weights(2, (96, 96), 20)),
        "0.bias": np.arange(12, dtype=np.int32),
        "nothing": np.zeros((0, 3), np.uint64),
        "same": np.zeros(100_000, np.int16),
        "random": np.random.default_rng(3).integers(0, 256, 5000, np.uint8),
    }
    return Profile(tensors, {"codec": "predictive"})


def test_what_is_packed_comes_back(profile, tmp_path):
    profile.save(tmp_path / "p")
    stored = TensorFile(tmp_path / "p")
    packed = json.loads(stored.metadata["kvprofile"])["packed"]
    # What has no redundancy stays as it is; so does what a small file could claim without end.
    assert sorted(packed) == ["0.weight", "0.within"]
    assert profile.nbytes == (tmp_path / "p").stat().st_size
    assert profile.nbytes < profile.unpacked_bytes - 4000
    found = Profile.load(tmp_path / "p")
    assert found.id == profile.id and found.description == profile.description
    assert list(found.tensors) == list(profile.tensors)
    for name, tensor in profile.tensors.items():
        got = found.tensors[name]
        assert got.dtype == tensor.dtype and np.array_equal(got, tensor)
        assert not got.flags.writeable and not tensor.flags.writeable


@given(data=st.data())
@examples(40)
def test_any_integers(data, tmp_path_factory):
    kind = data.draw(st.sampled_from(["i1", "u1", "<i2", ">u4", "i8", "u8"]))
    shape = data.draw(st.lists(st.integers(0, 40), max_size=3))
    most = data.draw(st.sampled_from([1, 2, 16, 127]))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    tensor = rng.integers(0, most, shape).astype(kind)
    path = tmp_path_factory.mktemp("profile") / "p"
    made = Profile({"t": tensor}, {})
    made.save(path)
    got = Profile.load(path).tensors["t"]
    assert np.array_equal(got, tensor) and got.shape == tensor.shape


def test_the_same_tensors_are_the_same_profile(profile):
    names = list(profile.tensors)
    mixed = {name: profile.tensors[name] for name in reversed(names)}
    assert Profile(mixed, {"codec": "predictive"}).id == profile.id
    with pytest.raises(UsageError, match="packed"):
        Profile(mixed, {"packed": {}})


def test_a_callers_arrays_are_not_the_profiles(profile):
    mine = weights(1, (64, 64), 3)
    made = Profile({"t": mine}, {})
    before = made.tensors["t"].copy()
    mine[...] = 0
    assert np.array_equal(made.tensors["t"], before)


def rewritten(data: bytes, change) -> bytes:
    """The file with another header."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["kvprofile"])
    change(header, about["packed"])
    header["__metadata__"]["kvprofile"] = json.dumps(about)
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


LIES = {
    "more numbers": lambda h, p: p.update({"0.within": ["I8", [96, 97]]}),
    "fewer numbers": lambda h, p: p.update({"0.within": ["I8", [96, 95]]}),
    "numbers without end": lambda h, p: p.update({"0.within": ["I8", [2**20, 2**20]]}),
    "so many that they wrap": lambda h, p: p.update({"0.within": ["I64", [2**61, 96]]}),
    "less than none": lambda h, p: p.update({"0.within": ["I8", [-96, -96]]}),
    "halves": lambda h, p: p.update({"0.within": ["I8", [96.5, 95]]}),
    "truths": lambda h, p: p.update({"0.within": ["I8", [True, 9216]]}),
    "no list": lambda h, p: p.update({"0.within": 3}),
    "no shape": lambda h, p: p.update({"0.within": ["I8"]}),
    "an unknown kind": lambda h, p: p.update({"0.within": ["BF16", [96, 96]]}),
    "a tensor that is not packed": lambda h, p: p.update({"random": ["U8", [5000]]}),
    "a tensor that there is not": lambda h, p: p.update({"other": ["I8", [1]]}),
}


@pytest.mark.parametrize("what", LIES)
def test_lies_about_what_is_packed(profile, tmp_path, what):
    profile.save(tmp_path / "p")
    data = (tmp_path / "p").read_bytes()
    (tmp_path / "same").write_bytes(rewritten(data, lambda h, p: None))
    assert Profile.load(tmp_path / "same").tensors["0.within"].shape == (96, 96)
    (tmp_path / "q").write_bytes(rewritten(data, LIES[what]))
    with pytest.raises(ProfileError, match="not a whole profile"):
        Profile.load(tmp_path / "q")


def test_every_byte_of_packed_tensors_counts(profile, tmp_path):
    """A changed byte is an error, or another profile, which no file of the first one takes."""
    profile.save(tmp_path / "p")
    data = bytearray((tmp_path / "p").read_bytes())
    rng = np.random.default_rng(0)
    for at in [*range(8), *rng.integers(8, len(data), 300)]:
        data[at] ^= 1 << (at % 8)
        (tmp_path / "q").write_bytes(data)
        with contextlib.suppress(ProfileError):
            assert Profile.load(tmp_path / "q").id != profile.id
        data[at] ^= 1 << (at % 8)
    for end in [*range(0, 300, 7), *rng.integers(300, len(data), 50)]:
        (tmp_path / "q").write_bytes(data[:end])
        with pytest.raises(ProfileError):
            Profile.load(tmp_path / "q")


def test_files_without_packed_tensors_are_read():
    """As they were written at first."""
    path = golden_files.NOW / "predictive.kvprofile"
    assert "packed" not in json.loads(TensorFile(path).metadata["kvprofile"])
    assert Profile.load(path).tensors
