"""Plain tensors to bytes and back: any axes, formats, memory; bounds; damage."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import cache_like, random_bits

import kvzip
from kvzip.errors import (
    CorruptError,
    FormatError,
    KVZipError,
    ProfileError,
    UnsupportedError,
    UsageError,
)
from kvzip.load import buffers

SIZES = {"l": 2, "h": 3, "t": 5, "d": 4}
ALL_AXES = ("htd", "thd", "td", "dt", "lhtd", "ltd", "tlhd", "dtlh")


def tensor(axes, seed=0, dtype=np.uint16):
    shape = tuple(SIZES[a] for a in axes)
    return np.random.default_rng(seed).integers(0, 1 << 16, shape).astype(dtype)


@pytest.fixture(scope="module")
def profile():
    rng = np.random.default_rng(0)
    pairs = [(cache_like(rng, "bf16", (3, 400, 4)), cache_like(rng, "bf16", (3, 400, 4)))] * 3
    return kvzip.Profile.fit([kvzip.Snapshot.from_arrays(pairs, "bf16")], codec="channel")


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("axes", ALL_AXES)
def test_what_is_decoded_is_what_was_encoded_in_any_axes(axes, paged, profile):
    if paged and "h" not in axes:
        pytest.skip("the profile is of three heads")
    k, v = tensor(axes, 1), tensor(axes, 2)
    more = {"profile": profile, "layer": 1} if paged else {}
    blob = buffers.encode(k, v, axes=axes, dtype="bf16", **more)
    more.pop("layer", None)
    found = buffers.decode(blob, axes=axes, **more)
    assert [np.array_equal(a, b) for a, b in zip(found, (k, v), strict=True)] == [True, True]
    out = (np.zeros_like(k), np.zeros_like(v))
    given_back = buffers.decode(blob, axes=axes, out=out, **more)
    assert np.array_equal(out[0], k) and np.array_equal(out[1], v)
    assert all(np.shares_memory(a, b) for a, b in zip(given_back, out, strict=True))


@pytest.mark.parametrize("paged", [False, True])
def test_the_receiver_may_have_other_axes(paged, profile):
    k, v = tensor("thd", 1), tensor("thd", 2)
    more = {"profile": profile} if paged else {}
    blob = buffers.encode(k, v, axes="thd", dtype="bf16", **more)
    found = buffers.decode(blob, axes="htd", **more)
    assert np.array_equal(found[0], k.transpose(1, 0, 2))
    assert np.array_equal(found[1], v.transpose(1, 0, 2))


@given(
    dtype=st.sampled_from(["bf16", "fp16", "fp32", "fp8_e4m3fn"]),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    codec=st.sampled_from(["channel", "planes", "zstd:level=1", "raw"]),
    seed=st.integers(0, 99),
)
def test_every_number_comes_back_and_no_blob_is_larger_than_its_bound(
    dtype, shape, dims, codec, seed
):
    rng = np.random.default_rng(seed)
    heads, tokens, _ = shape
    k, v = (random_bits(rng, dtype, (heads, tokens, d)) for d in dims)
    blob = buffers.encode(k, v, dtype=dtype, codec=codec)
    assert len(blob) <= buffers.max_size(k.shape, dtype, v.shape, codec=codec)
    for a, b in zip(buffers.decode(blob), (k, v), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("shape", [(16, 8, 128), (256, 8, 128), (16, 1, 576)])
@pytest.mark.parametrize("codec", ["channel", "planes", "zstd", "lz4", "raw"])
def test_a_bound_is_hardly_more_than_the_numbers(shape, codec):
    """As much of it is registered."""
    k = random_bits(np.random.default_rng(1), "bf16", shape)
    bound = buffers.max_size(shape, "bf16", axes="thd", codec=codec)
    assert bound < 2 * k.nbytes * 1.05 + 8192
    out = bytearray(bound)
    blob = buffers.encode(k, k, axes="thd", dtype="bf16", codec=codec, out=out)
    for found in buffers.decode(blob, axes="thd"):
        assert np.array_equal(found, k)


@pytest.mark.parametrize("room", [0, 10**6])
def test_what_a_codec_makes_larger_is_stored_as_it_is(monkeypatch, room):
    k, made = random_bits(np.random.default_rng(1), "bf16", (2, 16, 64)), buffers.api.writer_of

    def grown(snapshot, codec, profile):
        writer, more = made(snapshot, codec, profile), bytes(100000 * (codec.codec_id != "raw"))
        return SimpleNamespace(
            encode=lambda threads: writer.encode(threads) + more,
            write=lambda out, threads: writer.write(out, threads) + out.write(more),
        )

    monkeypatch.setattr(buffers.api, "writer_of", grown)
    bound = buffers.max_size(k.shape, "bf16")
    for out in (None, bytearray(bound + room)):
        blob = buffers.encode(k, k, dtype="bf16", out=out)
        assert len(blob) <= bound
        assert all(np.array_equal(found, k) for found in buffers.decode(blob))


def test_a_page_is_no_larger_than_its_bound(profile):
    for seed in range(5):
        k, v = tensor("ltdh", seed), tensor("ltdh", seed + 9)
        blob = buffers.encode(k, v, axes="ltdh", dtype="bf16", profile=profile)
        assert len(blob) <= buffers.max_size(k.shape, "bf16", axes="ltdh", profile=profile)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e5m2])
def test_torch_tensors_of_any_strides(kind):
    pool = torch.randn(4, 2, 16, 3, 8).to(kind)  # blocks, K and V, tokens, heads, dim
    blob = buffers.encode(pool[1, 0], pool[1, 1], axes="thd")
    target = torch.zeros_like(pool)
    buffers.decode(blob, axes="thd", out=(target[3, 0], target[3, 1]))
    assert torch.equal(target[3].view(torch.uint8), pool[1].view(torch.uint8))
    assert not target[:3].view(torch.uint8).any()


def test_buffers_of_bytes():
    k, v = tensor("thd", 1), tensor("thd", 2)
    blob = buffers.encode(
        k.tobytes(), memoryview(v.tobytes()), axes="thd", dtype="bf16", shape=k.shape
    )
    assert blob == buffers.encode(k, v, axes="thd", dtype="bf16")
    out = bytearray(k.nbytes), memoryview(bytearray(v.nbytes))
    buffers.decode(blob, axes="thd", out=out)
    assert bytes(out[0]) == k.tobytes() and bytes(out[1]) == v.tobytes()


def test_one_tensor_in_place_of_keys_and_values():
    latent = tensor("td", 3)
    blob = buffers.encode(latent, axes="td", dtype="fp16")
    (found,) = buffers.decode(blob, axes="td")
    assert np.array_equal(found, latent)
    assert len(blob) <= buffers.max_size(latent.shape, "fp16", None, axes="td")


@pytest.mark.parametrize("paged", [False, True])
def test_what_lies_behind_a_blob_is_not_looked_at(paged, profile):
    """A mover's buffer is often of a fixed size."""
    k, v = tensor("htd", 1), tensor("htd", 2)
    more = {"profile": profile} if paged else {}
    blob = buffers.encode(k, v, dtype="bf16", **more)
    registered = bytearray(b"\xff" * (len(blob) + 1000))
    registered[: len(blob)] = blob
    found = buffers.decode(registered, **more)
    assert np.array_equal(found[0], k) and np.array_equal(found[1], v)


@pytest.mark.parametrize("paged", [False, True])
def test_every_flip_and_every_cut_is_an_error(paged, profile):
    k, v = tensor("htd", 1), tensor("htd", 2)
    more = {"profile": profile} if paged else {}
    blob = buffers.encode(k, v, dtype="bf16", **more)
    for at in range(len(blob)):
        damaged = bytearray(blob)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(KVZipError):
            buffers.decode(damaged, **more)
    for length in range(len(blob)):
        with pytest.raises((CorruptError, FormatError)):
            buffers.decode(blob[:length], **more)


def test_a_page_needs_its_profile(profile):
    blob = buffers.encode(tensor("htd"), tensor("htd"), dtype="bf16", profile=profile)
    with pytest.raises(ProfileError):
        buffers.decode(blob)


def test_arguments_that_do_not_fit(profile):
    k = tensor("htd")
    for axes in ("hd", "ht", "htt", "xtd", "", 3):
        with pytest.raises(UsageError):
            buffers.encode(k, k, axes=axes, dtype="bf16")
    with pytest.raises(UsageError, match="axes"):
        buffers.encode(k, k, axes="lhtd", dtype="bf16")
    with pytest.raises(UsageError, match="dtype= and shape="):
        buffers.encode(k.tobytes(), k.tobytes())
    with pytest.raises(UsageError, match="bytes is no"):
        buffers.encode(b"123", b"123", dtype="bf16", shape=(1, 1, 1))
    with pytest.raises(UnsupportedError):
        buffers.encode(k, k)
    with pytest.raises(UnsupportedError):
        buffers.encode(k, k, dtype="bf16", codec="predictive")
    with pytest.raises(UnsupportedError):
        buffers.encode(k, dtype="bf16", profile=profile)
    blob = buffers.encode(k, k, dtype="bf16")
    for out in ((np.zeros_like(k),), (k[:, :-1], k), (b"", b""), 7, (k.astype("f4"), k)):
        with pytest.raises(KVZipError):
            buffers.decode(blob, out=out)
    frozen = np.zeros_like(k)
    frozen.flags.writeable = False
    with pytest.raises(UsageError):
        buffers.decode(blob, out=(frozen, frozen))
    with pytest.raises(UsageError, match="3 heads"):
        buffers.decode(blob, axes="td")
    both = buffers.encode(tensor("lhtd"), tensor("lhtd"), axes="lhtd", dtype="bf16")
    with pytest.raises(UsageError, match="2 layers"):
        buffers.decode(both)
    for data in (7, "text", None):
        with pytest.raises(UsageError):
            buffers.decode(data)
    with pytest.raises(FormatError):
        buffers.decode(b"something else altogether, and longer than a header is")


def test_errors_name_what_helps():
    k = random_bits(np.random.default_rng(1), "bf16", (1, 2, 9, 16))[0]
    blob = buffers.encode(k, k, dtype="bf16")
    snapshot = kvzip.decode(blob)
    profile = kvzip.Profile.fit([snapshot], codec="channel")
    page = buffers.encode(k, k, dtype="bf16", profile=profile)
    for made, how in ((blob, {}), (page, {"profile": profile})):
        with pytest.raises(UsageError, match=r"buffers\.max_size says"):
            buffers.encode(k, k, dtype="bf16", out=bytearray(len(made) // 2), **how)
        assert len(made) <= buffers.max_size(k.shape, "bf16", **how)
    with pytest.raises(UsageError, match=r"kvzip\.max_encoded_size \(sealed=True\) says"):
        kvzip.encode(snapshot, key=bytes(32), out=bytearray(99))
    with pytest.raises(UnsupportedError, match=r"kvzip\.decode reads it with its key"):
        buffers.decode(kvzip.encode(snapshot, key=bytes(32)))
    with pytest.raises(ProfileError, match="give profile="):
        buffers.decode(page)
