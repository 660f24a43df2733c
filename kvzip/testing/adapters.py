"""What must hold of anything that keeps a cache and gives it back, as tests: a class that an
adapter's own tests derive from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Protocol

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from kvzip.errors import KVZipError
from kvzip.layout import Origin
from kvzip.snapshot import Snapshot
from kvzip.testing.caches import cache_like, make_snapshot, random_bits
from kvzip.testing.exactness import assert_same


class Adapter(Protocol):
    """What the contract asks for of an adapter: a few lines around an engine's connector."""

    def save(self, snapshot: Snapshot) -> None:
        """Keep a cache; return when it can be found by its token ids and its origin."""

    def load(self, token_ids: NDArray[np.uint32], origin: Origin, dtype: str) -> Snapshot | None:
        """The cache of as many of the first ids as are kept for that model and revision, in order;
        None: there is nothing. What is kept and damaged is a KVZipError, or nothing."""


class AdapterContract:
    """Derive a class from this one whose name begins with "Test", in a test module::

        from kvzip.testing import AdapterContract

        class TestMine(AdapterContract):
            def adapter(self, folder):
                return MyAdapter(folder)

    with an :class:`Adapter`. All that it keeps must lie below `folder`, where the tests damage it;
    another one made for the same folder stands for another process, or the next day.
    """

    dtypes: ClassVar[Sequence[str]] = ("bf16", "fp16", "fp32", "fp8_e4m3fn")
    """The formats of numbers that the adapter keeps."""
    shape: ClassVar[tuple[int, int, int, int]] = (3, 2, 200, 16)
    """Layers, heads, tokens and channels of the caches that are tried."""
    block_tokens: ClassVar[int] = 64
    """A beginning of so many tokens must be found; of fewer it may."""
    damages: ClassVar[int] = 60
    """How many bytes are changed, one at a time."""

    def adapter(self, folder: Path) -> Adapter:
        """An adapter that keeps all below `folder`, which exists."""
        raise NotImplementedError("override `adapter`: see kvzip.testing.AdapterContract")

    def made(self, seed: int, dtype: str = "") -> Snapshot:
        """A cache as the engine would hand it over; by default with some of every bit pattern."""
        maker = random_bits if seed % 2 else cache_like
        return make_snapshot(maker, seed, dtype or self.dtypes[0], *self.shape)

    # --- bit for bit -----------------------------------------------------------------------

    def test_what_is_kept_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        """Of every format, two caches each; from an adapter that did not save them."""
        for dtype in self.dtypes:
            snapshots = [self.made(seed, dtype) for seed in (2, 3)]
            for snapshot in snapshots:
                self.adapter(tmp_path).save(snapshot)
            for snapshot in snapshots:
                found = self._load(tmp_path, snapshot)
                assert found is not None, f"{dtype}: what was saved is not found"
                self._is_beginning(found, snapshot, snapshot.tokens)
                assert found.tokens >= snapshot.tokens - self.block_tokens

    def test_a_longer_prompt_gets_what_it_begins_with(self, tmp_path: Path) -> None:
        """All of it that is kept, and nothing of what departs."""
        snapshot = self.made(4)
        self.adapter(tmp_path).save(snapshot)
        ids = _ids(snapshot)
        for shared in (len(ids), len(ids) - 1, self.block_tokens + 1, self.block_tokens):
            prompt = np.concatenate([ids[:shared], ids[:shared][-9:] ^ 1]).astype(np.uint32)
            found = self.adapter(tmp_path).load(prompt, snapshot.origin, snapshot.dtype)
            assert found is not None, f"{shared} tokens are not found"
            self._is_beginning(found, snapshot, shared)

    # --- never another's -------------------------------------------------------------------

    def test_what_was_never_kept_is_not_found(self, tmp_path: Path) -> None:
        other = self.made(6)
        assert self._load(tmp_path, other) is None, "something is found where nothing is kept"
        self.adapter(tmp_path).save(self.made(4))
        assert self._load(tmp_path, other) is None, "other tokens are found"

    @pytest.mark.parametrize("field", ["model", "revision"])
    def test_what_another_model_computed_is_not_found(self, tmp_path: Path, field: str) -> None:
        snapshot = self.made(4)
        self.adapter(tmp_path).save(snapshot)
        origin = msgspec.structs.replace(snapshot.origin, **{field: "another"})
        found = self.adapter(tmp_path).load(_ids(snapshot), origin, snapshot.dtype)
        assert found is None, f"the cache of another {field} is served"

    def test_many_threads_save_and_load(self, tmp_path: Path) -> None:
        snapshots = [self.made(seed) for seed in range(8, 12)]

        def both(snapshot: Snapshot) -> Snapshot | None:
            self.adapter(tmp_path).save(snapshot)
            return self._load(tmp_path, snapshot)

        with ThreadPoolExecutor(4) as pool:
            for snapshot, found in zip(snapshots * 2, pool.map(both, snapshots * 2), strict=True):
                assert found is not None, "what a thread saved it does not find"
                self._is_beginning(found, snapshot, snapshot.tokens)

    # --- damage ----------------------------------------------------------------------------

    def test_a_changed_byte_never_gives_other_numbers(self, tmp_path: Path) -> None:
        snapshot, kept = self._kept(tmp_path)
        rng = np.random.default_rng(5)
        paths = [path for path, data in kept.items() if data]
        sizes = np.array([len(kept[path]) for path in paths])
        for number in range(self.damages):
            # Every file in its turn, and the large ones besides.
            turn = number if number < len(paths) else rng.choice(len(paths), p=sizes / sizes.sum())
            path = paths[int(turn)]
            data = bytearray(kept[path])
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(data)
            self._nothing_wrong(tmp_path, snapshot)
            _restore(tmp_path, kept)

    def test_what_is_cut_short_or_gone_never_gives_other_numbers(self, tmp_path: Path) -> None:
        snapshot, kept = self._kept(tmp_path)
        for path in sorted(kept, key=lambda path: -len(kept[path]))[: self.damages]:
            for length in {0, len(kept[path]) // 2, max(0, len(kept[path]) - 1)}:
                path.write_bytes(kept[path][:length])
                self._nothing_wrong(tmp_path, snapshot)
                _restore(tmp_path, kept)
            path.unlink()
            self._nothing_wrong(tmp_path, snapshot)
            _restore(tmp_path, kept)

    # --- what these are made of ------------------------------------------------------------

    def _load(self, folder: Path, snapshot: Snapshot) -> Snapshot | None:
        return self.adapter(folder).load(_ids(snapshot), snapshot.origin, snapshot.dtype)

    def _kept(self, folder: Path) -> tuple[Snapshot, dict[Path, bytes]]:
        """A cache that is kept, and all files that the adapter made for it."""
        snapshot = self.made(4)
        self.adapter(folder).save(snapshot)
        kept = _files(folder)
        assert kept, f"nothing lies below {folder}: damage cannot be tried"
        return snapshot, kept

    def _nothing_wrong(self, folder: Path, snapshot: Snapshot) -> None:
        try:
            found = self._load(folder, snapshot)
        except KVZipError:
            return
        if found is not None:
            self._is_beginning(found, snapshot, snapshot.tokens)

    def _is_beginning(self, found: Snapshot, whole: Snapshot, most: int) -> None:
        assert 0 < found.tokens <= most, f"{found.tokens} tokens of {most}"
        pairs = [
            (layer.k[..., : found.tokens, :], layer.v[..., : found.tokens, :])
            for layer in whole.layers
        ]
        assert_same(found, Snapshot.from_arrays(pairs, whole.dtype))


def _ids(snapshot: Snapshot) -> NDArray[np.uint32]:
    assert snapshot.token_ids is not None
    return snapshot.token_ids


def _files(folder: Path) -> dict[Path, Any]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _restore(folder: Path, kept: dict[Path, Any]) -> None:
    """Have below `folder` just these files."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    for path, data in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
