"""What every codec must do, as tests: a class that a codec's own tests derive from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvzip
from kvzip import PartLayout, checksum, dtypes
from kvzip.codec import Codec, Coded, Context, get_codec
from kvzip.errors import KVZipError
from kvzip.parsing import from_json
from kvzip.testing.caches import cache_like, make_snapshot, random_bits
from kvzip.testing.damage import first_stored, reseal
from kvzip.testing.exactness import assert_same

UNLIKE_DTYPES = ("fp8_e5m2", "bf16", "fp32", "fp64")
"""A format of each size."""


class CodecContract:
    """Derive a class from this one whose name begins with "Test", in a test module::

        from kvzip.testing import CodecContract

        class TestMine(CodecContract):
            codecs = ["mine", "mine:level=9"]

    and pytest runs every test here for each codec and format of numbers. The codecs are found by
    name, so the tests hold for what a user of the distribution gets.
    """

    codecs: ClassVar[Sequence[str]] = ()
    """Names of codecs, with settings if they have any, as :func:`kvzip.get_codec` takes them."""
    dtypes: ClassVar[Sequence[str]] = dtypes.NAMES
    """The formats of numbers. What a codec does not take, its `fallback` stores."""
    unlike_dtypes: ClassVar[Sequence[str]] = UNLIKE_DTYPES
    """Formats that the codec treats differently from each other: tried with more examples."""
    most_growth: ClassVar[float] = 1.001
    """By what factor random bits may grow, beside 2,000 bytes of the file itself."""
    least_ratio: ClassVar[float] = 15.0
    """The ratio that numbers reach which never change; 0: the codec does not promise any."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        try:
            for spec in cls.codecs:
                get_codec(spec)
        except KVZipError as error:  # once, not in each of hundreds of tests
            raise pytest.Collector.CollectError(f"{cls.__name__}: {error}") from None

        def one_of(params: Sequence[str]) -> Any:
            @pytest.fixture(params=params)
            def given(self: CodecContract, request: pytest.FixtureRequest) -> Any:
                return request.param

            return given

        # Of the class, so that they come before fixtures of the same names in a conftest.py.
        cls.codec = one_of(cls.codecs)  # type: ignore[attr-defined]
        cls.dtype = one_of(cls.dtypes)  # type: ignore[attr-defined]
        cls.unlike_dtype = one_of(cls.unlike_dtypes)  # type: ignore[attr-defined]

    def profile(self, codec: str, snapshot: kvzip.Snapshot) -> kvzip.Profile | None:
        """The profile with which `codec` is to code a snapshot of this layout. Override it for a
        codec that needs one; whatever it was learned from, all bits must come back."""
        return None

    def round_trip(self, snapshot: kvzip.Snapshot, codec: str, **how: Any) -> bytes:
        """The file of a snapshot, after it was seen to come back bit for bit."""
        profile = self.profile(codec, snapshot)
        blob: bytes = kvzip.encode(snapshot, codec, profile, **how)
        assert_same(snapshot, kvzip.decode(blob, profile, how.get("threads", 0)))
        return blob

    def examples(self, count: int, dtype: str) -> int:
        """How many examples are tried of a format, where `count` are of each that is unlike."""
        return count if dtype in self.unlike_dtypes else count // 10

    # --- bit for bit -----------------------------------------------------------------------

    def test_round_trip_of_any_bits(self, codec: str, dtype: str) -> None:
        """Any bits, any shape, K and V unlike each other, batches, any block length."""

        @given(data=st.data())
        @settings(max_examples=self.examples(30, dtype), deadline=None)
        def round_trip(data: Any) -> None:
            draw = data.draw
            snapshot = make_snapshot(
                draw(st.sampled_from([random_bits, cache_like])),
                draw(st.integers(0, 2**32)),
                dtype,
                layers=draw(st.integers(1, 3)),
                heads=draw(st.integers(1, 4)),
                tokens=draw(st.integers(0, 300)),
                dim=draw(st.sampled_from([1, 2, 7, 16, 63, 64, 65, 80, 130])),
                batch=draw(st.sampled_from([None, 1, 3])),
            )
            block_tokens = draw(st.sampled_from([1, 7, 64, 129, 1024]))
            if snapshot.tokens > 40 * block_tokens:
                block_tokens = 64
            blob = self.round_trip(snapshot, codec, block_tokens=block_tokens, threads=1)
            for known in (snapshot, snapshot.layout):
                assert len(blob) <= kvzip.max_encoded_size(known, codec, block_tokens=block_tokens)

        round_trip()

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)])
    def test_many_blocks_at_once_are_each_alone(
        self, codec: str, dtype: str, axes: tuple[int, ...], threads: int
    ) -> None:
        """Blocks of several parts, in any layout; checksums are those of numbers in C order."""
        form, made = dtypes.get(dtype), kvzip.get_codec(codec)
        if made.needs_profile or not made.independent:
            pytest.skip("blocks of this codec are not decoded alone")
        while not made.takes(PartLayout(dtype, (2, 9, 64), "htd"), "full", "k"):
            assert made.fallback is not None
            made = kvzip.get_codec(made.fallback)
        rng = np.random.default_rng(9)
        blocks, numbers = [], []
        for layer, shape in enumerate([(2, 3, 150, 16), (1, 1, 7, 80), (2, 3, 150, 16)]):
            context = Context(form, layer, "k", 0, kvzip.Origin())
            whole = cache_like(rng, dtype, shape)
            tables = made.make_tables(whole, context)
            loaded = made.load_tables(memoryview(tables), shape, context)
            context = msgspec.structs.replace(context, tables=loaded)
            for block in (whole, random_bits(rng, dtype, shape)):
                if made.verbatim:
                    assert made.encode(block, context) == block.tobytes()
                lying = [shape[a] for a in axes]
                out = np.zeros(lying, form.uint).transpose(np.argsort(axes))
                blocks.append(Coded(memoryview(made.encode(block, context)), out, context))
                numbers.append(block)
        found = made.decode_many(blocks, threads)
        assert found == [checksum.of_bytes(block.tobytes()) for block in numbers]
        for coded, expected in zip(blocks, numbers, strict=True):
            assert np.array_equal(coded.out, expected)
        assert made.decode_many([], threads) == []
        blocks[3].data = blocks[3].data[:-1]
        with pytest.raises(kvzip.CorruptError):
            made.decode_many(blocks, threads)

    def test_a_part_without_channels(self, codec: str, dtype: str) -> None:
        """Some engines keep one of the two alone."""
        rng = np.random.default_rng(1)
        k, v = (random_bits(rng, dtype, (2, 9, dim)) for dim in (8, 0))
        self.round_trip(kvzip.Snapshot.from_arrays([(k, v), (v, k)], dtype), codec)

    def test_unequal_parts_and_layers(self, codec: str) -> None:
        rng = np.random.default_rng(5)
        shapes = [((2, 9, 8), (2, 9, 24)), ((1, 9, 64), (1, 9, 64)), ((3, 200, 16), (3, 200, 1))]
        layers = [(random_bits(rng, "bf16", k), random_bits(rng, "bf16", v)) for k, v in shapes]
        self.round_trip(kvzip.Snapshot.from_arrays(layers, "bf16"), codec, block_tokens=64)

    @pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
    def test_any_strides_in_and_out(self, codec: str, axes: tuple[int, ...]) -> None:
        """An engine's layout is a view: [tokens, heads, dim] and worse, both ways, without a
        cast; and what is given stays as it was."""
        shape = [2, 150, 16]
        stored = cache_like(np.random.default_rng(6), "bf16", shape)
        lying = np.ascontiguousarray(stored.transpose(axes)).transpose(np.argsort(axes))
        assert np.array_equal(lying, stored)
        snapshot = kvzip.Snapshot.from_arrays([(lying, lying)], "bf16")
        profile = self.profile(codec, snapshot)
        blob = kvzip.encode(snapshot, codec, profile, block_tokens=64)
        assert np.array_equal(lying, stored)
        plain = kvzip.Snapshot.from_arrays([(stored, stored)], "bf16")
        assert blob == kvzip.encode(plain, codec, profile, block_tokens=64)
        out = np.zeros([shape[a] for a in axes], np.uint16).transpose(np.argsort(axes))
        decoded = kvzip.decode(blob, profile, out=[(out, np.zeros_like(out))])
        assert np.shares_memory(decoded.layers[0].k, out)
        assert np.array_equal(out, stored)

    # --- the same everywhere ---------------------------------------------------------------

    def test_the_same_bytes_whatever_the_threads(self, codec: str, dtype: str) -> None:
        snapshot = make_snapshot(cache_like, 7, dtype, layers=4, tokens=300)
        one = self.round_trip(snapshot, codec, block_tokens=64, threads=1)
        assert one == self.round_trip(snapshot, codec, block_tokens=64, threads=5)

    def test_one_object_serves_all_threads(self, codec: str) -> None:
        """A codec holds settings and no state: what one cache leaves behind changes no other."""
        made = kvzip.get_codec(codec)
        snapshots = [make_snapshot(cache_like, seed, "bf16", tokens=90) for seed in range(4)]
        profiles = [self.profile(codec, snapshot) for snapshot in snapshots]

        def coded(snapshot: kvzip.Snapshot, profile: kvzip.Profile | None) -> bytes:
            return kvzip.encode(snapshot, made, profile, threads=1)

        alone = [coded(*pair) for pair in zip(snapshots, profiles, strict=True)]
        with ThreadPoolExecutor(4) as pool:
            beside = list(pool.map(coded, snapshots * 3, profiles * 3))
        assert beside == alone * 3

    def test_its_name_and_settings_make_it_again(self, codec: str) -> None:
        """A file names its codec by these."""
        made = kvzip.get_codec(codec)
        assert isinstance(made, Codec)
        config = from_json(msgspec.json.encode(made.get_config()))
        for again in (kvzip.get_codec(made.spec), kvzip.get_codec(config)):
            assert again == made and hash(again) == hash(made)

    def test_settings_that_make_no_sense_are_told(self, codec: str) -> None:
        """Who names a codec may give it any: another error than a KVZipError would be told as a
        bug of the codec. `__init__` is the place to look, where any exception becomes one."""
        config = kvzip.get_codec(codec).get_config()
        snapshot = make_snapshot(cache_like, 5, "bf16", layers=1, tokens=30)
        for name in config.keys() - {"id"}:
            for value in (-1, 1000, "none"):
                try:
                    made = kvzip.get_codec({**config, name: value})
                    profile = self.profile(codec, snapshot)
                    blob = kvzip.encode(snapshot, made, profile)
                except KVZipError:
                    continue
                assert_same(snapshot, kvzip.decode(blob, profile))

    # --- sizes -----------------------------------------------------------------------------

    @pytest.mark.parametrize("pattern", [0, 1, -1])
    def test_channels_that_never_change_cost_next_to_nothing(
        self, codec: str, dtype: str, pattern: int
    ) -> None:
        uint = dtypes.get(dtype).uint
        number = np.array([pattern]).astype(uint)[0]
        same = np.full((2, 3000, 16), number, uint)
        snapshot = kvzip.Snapshot.from_arrays([(same, same)], dtype)
        blob = self.round_trip(snapshot, codec)
        assert self.least_ratio * len(blob) < snapshot.raw_bytes

    def test_random_bits_grow_by_next_to_nothing(self, codec: str, dtype: str) -> None:
        snapshot = make_snapshot(
            random_bits, 8, dtype, layers=1, heads=8, tokens=1024, dim=128, ids=False
        )
        blob = kvzip.encode(snapshot, codec, self.profile(codec, snapshot))
        assert len(blob) < snapshot.raw_bytes * self.most_growth + 2000

    # --- hostile bytes ---------------------------------------------------------------------

    def test_hostile_blocks_never_give_wrong_numbers(self, codec: str, unlike_dtype: str) -> None:
        """Damage behind true checksums: the decoder itself meets it."""
        snapshot = make_snapshot(cache_like, 12, unlike_dtype, layers=1, tokens=150, dim=9)
        profile = self.profile(codec, snapshot)
        whole = kvzip.encode(snapshot, codec, profile, block_tokens=140, threads=1)
        first, last = first_stored(whole), len(whole) - 1

        @given(data=st.data())
        @settings(max_examples=100, deadline=None)
        def hostile(data: Any) -> None:
            blob = bytearray(whole)
            for _ in range(data.draw(st.integers(1, 3))):
                # Near the start of the tables or of a block lie the counts.
                near = st.integers(first, min(last, first + 40))
                at = data.draw(st.one_of(st.integers(first, last), near))
                blob[at] = data.draw(st.integers(0, 255))
            try:
                decoded = kvzip.decode(reseal(blob), profile, threads=1)
            except kvzip.KVZipError:
                return
            assert_same(decoded, snapshot)

        hostile()
