"""Do the same many times, and see that memory does not grow: `make leaks`.

    python tests/soak/leaks.py --rounds 10000 decode open

Each round does everything that is named (all of `DEEDS` by default) once, with damaged input among
it. After a warm-up, what Python has allocated (tracemalloc), what the C library has (mallinfo2, in
which numpy and the C++ allocate), what the system says is in memory, and files, threads and objects
that are open or alive are measured now and then, and none may go on growing, but for so many bytes
that no round could lose one of anything.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import os
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import kvzip
from kvzip.container.source import Memory
from kvzip.store import Store
from kvzip.testing.caches import cache_like
from kvzip.testing.exactness import assert_same

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
TOKENS = 64
MOST = {"python": 8.0, "native": 24.0, "objects": 0.1, "files": 0.0, "threads": 0.0}
"""How much each may grow a round. Python's smallest allocation has 16 bytes, the C library's 32."""
RESIDENT = 8 << 20
"""How many bytes of memory in use may grow in all: a heap is never full to the brim."""
SAMPLES = 30


class _Info(ctypes.Structure):
    """The C library's struct mallinfo2."""

    _fields_ = [(f"other_{i}", ctypes.c_size_t) for i in range(4)] + [
        ("hblkhd", ctypes.c_size_t),
        ("other_5", ctypes.c_size_t),
        ("other_6", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("other_8", ctypes.c_size_t),
        ("other_9", ctypes.c_size_t),
    ]


_mallinfo = ctypes.CDLL(None).mallinfo2
_mallinfo.restype = _Info


def _allocated() -> int:
    """Bytes that the C library has handed out."""
    info = _mallinfo()
    return int(info.uordblks + info.hblkhd)


def measured() -> dict[str, int]:
    """What there is now, once all that nobody holds is gone."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "python": tracemalloc.get_traced_memory()[0],
        "native": _allocated(),
        "resident": resident,
        "objects": len(gc.get_objects()),
        "files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": threading.active_count(),
    }


class Deeds:
    """What a round does: each function of it whose name has no line in front."""

    def __init__(self, folder: Path):
        rng = np.random.default_rng(0)
        layers = [
            tuple(cache_like(rng, "bf16", (2, TOKENS, 16)) for _ in range(2)) for _ in range(2)
        ]
        origin = kvzip.Origin(model="m", revision="r")
        self._ids = rng.integers(0, 999, TOKENS)
        self._snapshot = kvzip.Snapshot.from_arrays(layers, "bf16", self._ids, origin)
        self._snapshot.save(folder / "doc.safetensors")
        self._profile = kvzip.Profile.fit([self._snapshot], codec="channel")
        self._profile.save(folder / "channel.kvprofile")
        self._predicted = kvzip.Profile.load(GOLDEN / "predictive.kvprofile")
        self._codecs = ("raw", "zstd", "lz4", "planes", "channel")
        self._blobs = [kvzip.encode(self._snapshot, codec) for codec in self._codecs]
        self._blobs.append((GOLDEN / "predictive-bf16.kvz").read_bytes())
        self._whole = kvzip.decode(self._blobs[-1], self._predicted)
        self._wanted = [self._snapshot for _ in self._codecs] + [self._whole]
        self._folder, self._rng = folder, rng
        (folder / "doc.kvz").write_bytes(self._blobs[-2])
        self._page = kvzip.encode_page(layers, self._profile)
        self._layers = layers
        self._store = Store(folder / "store", block_tokens=16)
        self._store.put(self._snapshot)

    def encode(self) -> None:
        codec = int(self._rng.integers(len(self._codecs)))
        assert kvzip.encode(self._snapshot, self._codecs[codec], threads=2) == self._blobs[codec]

    def encode_predicted(self) -> None:
        kvzip.encode(self._whole, "predictive", self._predicted)

    def decode(self) -> None:
        n = int(self._rng.integers(len(self._blobs)))
        assert_same(kvzip.decode(self._blobs[n], self._predicted, threads=2), self._wanted[n])

    def open(self) -> None:
        """A path, bytes, a file object; a layer and a range of each."""
        for given in (self._folder / "doc.kvz", self._blobs[-2], io.BytesIO(self._blobs[-2])):
            with kvzip.open(given, threads=2) as reader:
                assert np.array_equal(reader.layer(1).k, self._snapshot.layers[1].k)
                first = int(self._rng.integers(TOKENS))
                found = reader.tokens(first, TOKENS).layers[0].v
                assert np.array_equal(found, self._snapshot.layers[0].v[:, first:])
                assert len(list(reader.in_turn([([0], (0, 9)), ([1], (0, 9))]))) == 2

    def given_up(self) -> None:
        """A reader that is neither read nor closed, and a generator that is left."""
        kvzip.open(Memory(self._blobs[-2]))
        next(kvzip.open(self._blobs[-2]).in_turn([([0], (0, 9)), ([1], (0, 9))]))

    def load_profile(self) -> None:
        """A profile, what is built of it, and a page by it."""
        profile = kvzip.Profile.load(self._folder / "channel.kvprofile")
        assert kvzip.encode_page(self._layers, profile) == self._page
        kvzip.decode_page(self._page, profile)
        profile = kvzip.Profile.load(GOLDEN / "predictive.kvprofile")
        kvzip.decode(self._blobs[-1], profile)

    def snapshot(self) -> None:
        assert_same(kvzip.Snapshot.load(self._folder / "doc.safetensors"), self._snapshot)

    def find(self) -> None:
        match = self._store.find(self._ids, model="m", revision="r", dtype="bf16")
        assert match is not None
        assert_same(match.snapshot(), self._snapshot)
        match.reader.close()

    def damaged(self) -> None:
        """Bits changed, cut short, and another profile; each is an error."""
        n = int(self._rng.integers(len(self._blobs)))
        wrong = bytearray(self._blobs[n])
        wrong[int(self._rng.integers(len(wrong)))] ^= 1 << int(self._rng.integers(8))
        self._fails(wrong, wanted=self._wanted[n])
        self._fails(self._blobs[n][: int(self._rng.integers(len(wrong)))])
        self._fails(self._blobs[-1], self._profile)
        page = bytearray(self._page)
        page[int(self._rng.integers(len(page)))] ^= 1
        try:
            kvzip.decode_page(page, self._profile)
        except kvzip.KVZipError:
            return
        raise AssertionError("a damaged page was read")

    def _fails(
        self,
        blob: Any,
        profile: kvzip.Profile | None = None,
        wanted: kvzip.Snapshot | None = None,
    ) -> None:
        try:
            found = kvzip.decode(blob, profile or self._predicted)
        except kvzip.KVZipError:
            return
        # LZ4 has several ways to say the same numbers.
        assert wanted is not None, "what is damaged was read"
        assert_same(found, wanted)


DEEDS = tuple(name for name in vars(Deeds) if not name.startswith("_"))


def repeat(
    do: Sequence[Callable[[], None]],
    rounds: int,
    warm: int,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Rounds of all of it; how much each measure grew a round after the first `warm` of them, and
    "resident" in all. A leak grows all the time: what counts is the third of the rounds that grew
    least, so that a table which doubles, and what is imported by a rare error, are none. In a third
    it is the median of the growth between all pairs of measurements (Theil and Sen)."""
    tracemalloc.start()
    try:
        names, step = [*measured()], max(1, (rounds - warm) // SAMPLES)
        found = np.zeros((len(range(warm, rounds, step)), len(names)))  # it does not grow, either
        for number in range(rounds):
            for deed in do:
                deed()
            if number >= warm and (number - warm) % step == 0:
                now = measured()
                found[(number - warm) // step] = [*now.values()]
                tell(f"round {number:,}: " + ", ".join(f"{k} {v:,}" for k, v in now.items()))
    finally:
        tracemalloc.stop()
    slopes = [growth(third) / step for third in np.array_split(found, 3)]
    grown = np.min(slopes, axis=0)
    by_name = dict(zip(names, grown.tolist(), strict=True))
    return by_name | {"resident": by_name["resident"] * (rounds - warm)}


def growth(found: np.ndarray) -> np.ndarray:
    """How much each column grows from one row to the next."""
    earlier, later = np.triu_indices(len(found), 1)
    return np.median((found[later] - found[earlier]) / (later - earlier)[:, None], axis=0)


def too_much(grown: dict[str, float]) -> list[str]:
    """What grew more than it may."""
    found = [name for name, most in MOST.items() if grown[name] > most]
    return found + ["resident"] * (grown["resident"] > RESIDENT)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("deeds", nargs="*", help=", ".join(DEEDS))
    parse.add_argument("--rounds", type=int, default=10_000)
    given = parse.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        deeds = Deeds(Path(folder))
        do = [getattr(deeds, name) for name in given.deeds or DEEDS]
        # Even the last of what is seen for the first time comes within a thousand rounds, or two.
        warm = max(given.rounds // 10, min(given.rounds // 3, 1000))
        grown = repeat(do, given.rounds, warm, lambda line: print(line, flush=True))
    seconds = time.monotonic() - began
    print(
        f"{given.rounds:,} rounds of {len(do)} deeds in {seconds:.0f} s; grown in the end, a round:"
    )
    print(", ".join(f"{name} {by:,.3f}" for name, by in grown.items() if name != "resident"),
          f"; resident memory {grown['resident']:,.0f} bytes in all", sep="")  # fmt: skip
    wrong = too_much(grown)
    if wrong:
        print(f"there is a leak: {', '.join(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
