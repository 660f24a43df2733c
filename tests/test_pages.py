"""Pages: a few tokens, coded with a profile's tables."""

from __future__ import annotations

import struct
import tracemalloc
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import CHANNEL_DTYPES, cache_like, examples, random_bits

import kvzip
from kvzip.errors import (
    CorruptError,
    FormatError,
    KVZipError,
    ProfileError,
    UnsupportedError,
    UsageError,
)
from kvzip.pages import MOST_TOKENS


@cache
def model(maker, dtype, dims=(16, 24)):
    """2,000 tokens' caches of a model of three layers, whose values are wider than their keys."""
    rng = np.random.default_rng(1)
    return [tuple(maker(rng, dtype, (2, 2000, d)) for d in dims) for _ in range(3)]


def learned(dtype="bf16", dims=(16, 24)):
    """A profile of 400 of them."""
    layers = [tuple(x[:, :400] for x in pair) for pair in model(cache_like, dtype, dims)]
    return kvzip.Profile.fit([kvzip.Snapshot.from_arrays(layers, dtype)], codec="channel")


@pytest.fixture(params=CHANNEL_DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def profile():
    return learned()


def numbers(tokens, layers=3, seed=2, maker=cache_like, dtype="bf16"):
    """Others of them, as many as a page holds."""
    begin = 400 + 10 * seed
    whole = model(maker, dtype)[:layers]
    return [tuple(np.array(x[:, begin : begin + tokens]) for x in pair) for pair in whole]


def assert_pairs(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert np.array_equal(x, y)


known = cache(learned)
"""The same, learned once for each format."""


@given(data=st.data())
@examples(40)
def test_any_numbers_come_back_and_are_below_the_bound(dtype, data):
    profile = known(dtype)
    first = data.draw(st.integers(0, 2))
    layers = data.draw(st.integers(1, 3 - first))
    tokens = data.draw(st.sampled_from([1, 2, 15, 16, 17, 64, 128, 130, 256]))
    maker = data.draw(st.sampled_from([cache_like, random_bits]))
    given_ = numbers(tokens, layers, data.draw(st.integers(0, 99)), maker, dtype)
    # In engines' layouts: token-major, and a page of a larger pool.
    lying = data.draw(st.sampled_from([(0, 1, 2), (1, 0, 2), (2, 0, 1)]))
    given_ = [
        tuple(np.ascontiguousarray(x.transpose(lying)).transpose(np.argsort(lying)) for x in pair)
        for pair in given_
    ]
    page = kvzip.encode_page(given_, profile, first=first)
    assert len(page) <= kvzip.max_page_size(profile, tokens, first=first, layers=layers)
    assert len(page) % 16 == 0
    assert_pairs(kvzip.decode_page(page, profile), given_)
    pools = [tuple(np.zeros((5, *x.shape), x.dtype) for x in pair) for pair in given_]
    found = kvzip.decode_page(page, profile, out=[(k[3], v[3]) for k, v in pools])
    assert_pairs(found, given_)
    for k, v in pools:
        assert not k[[0, 1, 2, 4]].any() and not v[[0, 1, 2, 4]].any()


def test_pages_are_smaller_than_the_numbers(profile):
    """Nothing but a few bytes is lost on what a page begins with."""
    for tokens in (16, 64, 256):
        given_ = numbers(tokens)
        raw = sum(x.nbytes for pair in given_ for x in pair)
        assert len(kvzip.encode_page(given_, profile)) < 0.8 * raw
    assert kvzip.max_page_size(profile, 16) == 64 + 6 * 16 + 3 * 2 * 16 * (16 + 24) * 2


def test_a_page_depends_on_nothing_before_it(profile):
    pages = [numbers(32, seed=s) for s in range(4)]
    coded = [kvzip.encode_page(p, profile) for p in pages]
    again = kvzip.Profile(profile.tensors, profile.description)
    assert [kvzip.encode_page(p, again) for p in reversed(pages)] == coded[::-1]
    assert_pairs(kvzip.decode_page(coded[2], learned()), pages[2])


def test_every_truncation_and_flip_is_an_error(profile):
    page = bytearray(kvzip.encode_page(numbers(16, 1), profile, first=1))
    for length in range(len(page)):
        with pytest.raises((CorruptError, FormatError)):
            kvzip.decode_page(page[:length], profile)
    with pytest.raises(CorruptError):
        kvzip.decode_page(page + bytes(16), profile)
    for at in range(8 * len(page)):
        page[at // 8] ^= 1 << at % 8
        with pytest.raises((CorruptError, FormatError, ProfileError, UnsupportedError)):
            kvzip.decode_page(page, profile)
        page[at // 8] ^= 1 << at % 8


def test_what_a_header_says_wrong_is_told(profile):
    """Before the checksum, which may be right: a newer version may use what is zero here."""
    page = kvzip.encode_page(numbers(16, 1), profile)
    for places, what in (
        (range(4), "this is not a page"),
        ([6, 7, *range(20, 24)], "fields that are set"),
        (range(24, 32), "was made with profile"),
    ):
        for at in places:
            wrong = bytearray(page)
            wrong[at] ^= 1
            with pytest.raises((FormatError, ProfileError), match=what):
                kvzip.decode_page(wrong, profile)
    nothing = bytearray(page[:48])
    struct.pack_into("<I", nothing, 12, 0)
    with pytest.raises(CorruptError, match="makes no sense"):
        kvzip.decode_page(nothing, profile)


def test_a_page_that_claims_more_than_its_bytes_can_hold(profile):
    """As many tokens as a page may have, 4 MB, in its header and blocks without a byte."""
    page = bytearray(kvzip.encode_page(numbers(16), profile))
    struct.pack_into("<I", page, 16, MOST_TOKENS)
    lengths = np.zeros(6, "<u4").tobytes()
    short = bytes(page[:40]) + lengths + bytes(-(40 + len(lengths)) % 16)
    tracemalloc.start()
    with pytest.raises(CorruptError, match="claims more than its bytes can hold"):
        kvzip.decode_page(short, profile)
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()


@given(data=st.data())
def test_hostile_pages(profile, data):
    page = bytearray(kvzip.encode_page(numbers(17, 2), profile))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 79), st.integers(0, len(page) - 1)))
        page[at] = data.draw(st.sampled_from([0, 1, 127, 255, page[at] ^ 1]))
    try:
        found = kvzip.decode_page(page, profile)
    except KVZipError:
        return
    assert_pairs(found, numbers(17, 2))


def test_what_makes_no_sense_is_refused(profile):
    given_ = numbers(16)
    page = kvzip.encode_page(given_, profile)
    for wrong in (
        [],
        [given_[0][0]],
        [(given_[0][1], given_[0][0])],
        [(given_[0][0], given_[1][1][:, :15])],
        [(given_[0][0][0], given_[0][1][0])],
        numbers(0),
        None,
        5,
    ):
        with pytest.raises(UsageError):
            kvzip.encode_page(wrong, profile)
    for tokens in (0, -1, MOST_TOKENS + 1, "16", True):
        with pytest.raises(UsageError):
            kvzip.max_page_size(profile, tokens)
    for wrong in ({"first": "0"}, {"first": -1}, {"layers": "2"}, {"layers": 0}):
        with pytest.raises(UsageError):
            kvzip.max_page_size(profile, 16, **wrong)
    for first in (1, 3):
        with pytest.raises(ProfileError, match="3 layers"):
            kvzip.encode_page(given_, profile, first=first)
    for out in (given_[:2], numbers(15), [5, 6, 7], 5):
        with pytest.raises(UsageError):
            kvzip.decode_page(page, profile, out=out)
    fixed = numbers(16)
    fixed[1][1].flags.writeable = False
    with pytest.raises(UsageError):
        kvzip.decode_page(page, profile, out=fixed)
    rows = np.zeros((3, 16, 16), np.uint16)
    twice = [(rows[:2], given_[0][1]), (rows[1:], given_[1][1]), given_[2]]
    with pytest.raises(UsageError, match="same memory twice"):
        kvzip.decode_page(page, profile, out=twice)
    for data in (None, "page", 5, [1, 2], np.frombuffer(page, np.uint8)[::-1]):
        with pytest.raises(UsageError, match="is no page"):
            kvzip.decode_page(data, profile)
    for other in (None, "m.kvprofile", kvzip.Profile({}, {})):
        with pytest.raises(ProfileError):
            kvzip.encode_page(given_, other)
        with pytest.raises(ProfileError):
            kvzip.decode_page(page, other)
    with pytest.raises(ProfileError, match="was made with profile"):
        kvzip.decode_page(page, learned(dims=(24, 16)))
    for foreign in (b"", b"KV", b"PK\3\4" * 100):
        with pytest.raises((FormatError, CorruptError)):
            kvzip.decode_page(foreign, profile)


def test_tensors(profile):
    torch = pytest.importorskip("torch")
    given_ = numbers(16)
    tensors = [
        tuple(torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in pair)
        for pair in given_
    ]
    page = kvzip.encode_page(tensors, profile)
    assert page == kvzip.encode_page(given_, profile)
    out = [tuple(torch.zeros_like(x) for x in pair) for pair in tensors]
    kvzip.decode_page(page, profile, out=out)
    for a, b in zip(out, tensors, strict=True):
        assert all(
            torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(a, b, strict=True)
        )
