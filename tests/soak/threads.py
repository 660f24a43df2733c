"""Many threads use the same things at once, and whatever comes out is compared bit for bit.

    python tests/soak/threads.py --seconds 60 --threads 8

Each round makes everything anew (two profiles, an open file of each kind, a store, a snapshot of
which nothing is read yet), and lets all threads go at it at one moment, so that what is built at
its first use is built while others use it. What is right was computed before by one thread. Rounds
take the instruction sets of this processor by turns. Under
ThreadSanitizer (`make tsan`) and under Python without its lock (`make free-threaded`) this is what
runs; `--race` has two threads change one object that is not for two threads, which the sanitizer
must see.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import kvzip
from kvzip import metrics
from kvzip.codecs import _native
from kvzip.load import buffers
from kvzip.selftest import instructions
from kvzip.store import Store
from kvzip.testing.caches import cache_like, nearest_bits, random_bits
from kvzip.testing.exactness import assert_same

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
CODECS = ("raw", "zstd", "lz4", "planes", "planes:mode=bit", "channel")
TOKENS = 200
ORIGIN = kvzip.Origin(model="m", revision="r")


def same(found: Any, wanted: Any) -> None:
    """Raise AssertionError unless two arrays, or two lists of them, have the same bits."""
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one, other), "other numbers"


def made_up(rng: np.random.Generator, maker: Callable[..., Any], dtype: str) -> kvzip.Snapshot:
    """Three layers of any numbers."""
    layers = [tuple(maker(rng, dtype, (2, TOKENS, 24)) for _ in range(2)) for _ in range(3)]
    return kvzip.Snapshot.from_arrays(layers, dtype, rng.integers(0, 999, TOKENS), ORIGIN)


def on_grid(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> Any:
    """bf16 that is fp8 times a power of two for each token."""
    codes = random_bits(rng, "fp8_e4m3fn", shape)
    wide = kvzip.dtypes.to_float64(codes, "fp8_e4m3fn")
    return nearest_bits(wide * 2.0 ** rng.integers(-9, -3, (*shape[:-1], 1)), dtype)


class Case(NamedTuple):
    """A snapshot, how it is encoded, and the bytes that it must become."""

    name: str
    snapshot: kvzip.Snapshot
    codec: str
    profile: str | None
    path: Path
    blob: bytes
    how: dict[str, int]


class Expected:
    """What is right, computed by one thread; in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, rng = folder, np.random.default_rng(0)
        self.profiles = {"predictive": GOLDEN / "predictive.kvprofile"}
        like = made_up(rng, cache_like, "bf16")
        learned = kvzip.Profile.fit([like], codec="channel")
        self.profiles["channel"] = folder / "channel.kvprofile"
        learned.save(self.profiles["channel"])
        self.cases: list[Case] = []
        for codec in CODECS:
            for maker, dtype in ((cache_like, "bf16"), (random_bits, "fp16"), (cache_like, "fp32")):
                self.add(f"{codec}-{maker.__name__}-{dtype}", made_up(rng, maker, dtype), codec)
        self.add("grid", made_up(rng, on_grid, "bf16"), "channel")
        self.add("of-a-profile", like, "channel", "channel")
        for dtype in ("bf16", "fp8_e5m2", "fp32"):
            path = GOLDEN / f"predictive-{dtype}.kvz"
            profile = kvzip.Profile.load(self.profiles["predictive"])
            with kvzip.open(path, profile) as reader:
                tokens, whole = reader.header.block_tokens, reader.decode()
            self.add(f"predicted-{dtype}", whole, "predictive", "predictive", block_tokens=tokens)
        like.save(folder / "doc.safetensors")
        self.like = like
        self.pairs = [tuple(layer.part(name) for name in ("k", "v")) for layer in like.layers]
        self.page = kvzip.encode_page(self.pairs, learned)

    def add(
        self,
        name: str,
        snapshot: kvzip.Snapshot,
        codec: str,
        profile: str | None = None,
        **how: int,
    ) -> None:
        """One more case. It is encoded and decoded here, once."""
        how = how or {"block_tokens": 64}
        known = kvzip.Profile.load(self.profiles[profile]) if profile else None
        blob = kvzip.encode(snapshot, codec, known, 1, **how)
        assert_same(kvzip.decode(blob, known, 1), snapshot)
        path = self.folder / f"{len(self.cases)}.kvz"
        path.write_bytes(blob)
        self.cases.append(Case(name, snapshot, codec, profile, path, blob, how))


class Shared:
    """What all threads of a round use, of which nothing was used yet."""

    def __init__(self, expected: Expected, folder: Path):
        self.expected = expected
        self.profiles = {n: kvzip.Profile.load(path) for n, path in expected.profiles.items()}
        self.readers = [
            kvzip.open(
                (case.path, case.blob, io.BytesIO(case.blob))[n % 3],
                self.profile(case),
                threads=1 + n % 2,
            )
            for n, case in enumerate(expected.cases)
        ]
        self.snapshot = kvzip.Snapshot.load(expected.folder / "doc.safetensors")
        self.store = Store(folder, block_tokens=32, limit_bytes=1 << 20)
        self.events: Counter[str] = Counter()
        self.stop = metrics.listen(lambda event: self.events.update([event.name]))

    def profile(self, case: Case) -> kvzip.Profile | None:
        """The round's profile for a case."""
        return self.profiles[case.profile] if case.profile else None

    def close(self) -> None:
        """End what was opened."""
        self.stop()
        for reader in self.readers:
            reader.close()

    # --- what a thread does: each takes its generator ----------------------------------------

    def case(self, rng: np.random.Generator) -> tuple[int, Case]:
        n = int(rng.integers(len(self.expected.cases)))
        return n, self.expected.cases[n]

    def encode(self, rng: np.random.Generator) -> None:
        _, case = self.case(rng)
        threads = int(rng.integers(1, 4))
        blob = kvzip.encode(case.snapshot, case.codec, self.profile(case), threads, **case.how)
        assert blob == case.blob, f"{case.name}: other bytes"

    def decode(self, rng: np.random.Generator) -> None:
        _, case = self.case(rng)
        threads = int(rng.integers(1, 4))
        assert_same(kvzip.decode(case.blob, self.profile(case), threads), case.snapshot)

    def read(self, rng: np.random.Generator) -> None:
        """Of one open file a layer and a range of tokens."""
        n, case = self.case(rng)
        reader, whole = self.readers[n], case.snapshot
        i = int(rng.integers(len(whole.layers)))
        held = whole.layers[i]
        same(reader.layer(i).parts.values(), held.parts.values())
        first, last = sorted(rng.integers(0, whole.tokens + 1, 2).tolist())
        part = reader.tokens(first, last).layers[i]
        same(part.parts.values(), [array[..., first:last, :] for array in held.parts.values()])

    def verify(self, rng: np.random.Generator) -> None:
        n, _ = self.case(rng)
        reader = self.readers[n]
        reader.verify()
        assert reader.info.encoded_bytes == len(self.expected.cases[n].blob)

    def in_turn(self, rng: np.random.Generator) -> None:
        """Layer after layer."""
        n, case = self.case(rng)
        layers = case.snapshot.layers
        wanted = [([i], (0, case.snapshot.tokens)) for i in range(len(layers))]
        for found, layer in zip(self.readers[n].in_turn(wanted, 2), layers, strict=True):
            same(found.layers[0].parts.values(), layer.parts.values())

    def from_file(self, rng: np.random.Generator) -> None:
        """The numbers of a snapshot that are read when they are first looked at."""
        wanted = self.expected.like.layers
        i = int(rng.integers(len(wanted)))
        same(self.snapshot.layers[i].parts.values(), wanted[i].parts.values())

    def pages(self, rng: np.random.Generator) -> None:
        profile, known = self.profiles["channel"], self.expected
        assert kvzip.encode_page(known.pairs, profile) == known.page, "another page"
        for pair, wanted in zip(kvzip.decode_page(known.page, profile), known.pairs, strict=True):
            same(pair, wanted)

    def put(self, rng: np.random.Generator) -> None:
        """A store of which the threads are the readers and the writers; it evicts, too."""
        _, case = self.case(rng)
        whole, dtype = case.snapshot, case.snapshot.dtype
        if case.profile or whole.token_ids is None or whole.origin != ORIGIN:
            return
        self.store.put(whole, codec=case.codec)
        match = self.store.find(whole.token_ids, model="m", revision="r", dtype=dtype)
        if match is None:
            return  # evicted
        try:
            assert_same(match.snapshot(), whole)
        except kvzip.errors.StoreError:
            pass  # evicted meanwhile
        finally:
            match.reader.close()

    def fill(self, rng: np.random.Generator) -> None:
        """Buffers of an engine."""
        k, v = (rng.integers(0, 1 << 16, (40, 2, 8), np.uint16) for _ in range(2))
        blob = buffers.encode(k, v, axes="thd", dtype="bf16")
        same(buffers.decode(blob, axes="thd"), (k, v))

    def damaged(self, rng: np.random.Generator) -> None:
        """Any bit of a file changed is an error, in whatever thread."""
        _, case = self.case(rng)
        wrong = bytearray(case.blob)
        wrong[int(rng.integers(len(wrong)))] ^= 1 << int(rng.integers(8))
        try:
            found = kvzip.decode(wrong, self.profile(case), 2)
        except kvzip.KVZipError:
            return
        assert_same(found, case.snapshot)  # a bit between the blocks, which is only stored

    DEEDS = (encode, decode, read, verify, in_turn, from_file, pages, put, fill, damaged)


def stress(folder: Path, seconds: float, threads: int, deeds: int = 12) -> Counter[str]:
    """Rounds for so many seconds; how often each thing was done. Raises the first error, with the
    round and the thread that it is of."""
    expected = Expected(folder)
    done: Counter[str] = Counter()
    before, sets = _native.simd(), instructions()
    end, number = time.monotonic() + seconds, 0
    try:
        while not number or time.monotonic() < end:
            _native.set_simd(sets[-1 - number % len(sets)])
            shared = Shared(expected, folder / f"store-{number % 2}")
            try:
                done += one_round(shared, number, threads, deeds)
            finally:
                shared.close()
            number += 1
    finally:
        _native.set_simd(before)
    done["rounds"] = number
    return done


def one_round(shared: Shared, number: int, threads: int, deeds: int) -> Counter[str]:
    """All threads at once, each with so many deeds; how often each was done."""
    begin = threading.Barrier(threads)
    done: list[Counter[str]] = [Counter() for _ in range(threads)]
    failed: list[BaseException] = []

    def work(n: int) -> None:
        rng = np.random.default_rng([number, n])
        begin.wait()
        for _ in range(deeds):
            deed = Shared.DEEDS[rng.integers(len(Shared.DEEDS))]
            try:
                deed(shared, rng)
            except BaseException as error:
                error.add_note(f"round {number}, thread {n}, {deed.__name__}")
                failed.append(error)
                return
            done[n][deed.__name__] += 1

    in_threads(work, threads)
    if failed:
        raise failed[0]
    return sum(done, Counter())


def in_threads(do: Callable[[int], object], threads: int) -> None:
    """Call it in so many threads, each with its number; return when all are done."""
    running = [threading.Thread(target=do, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def race() -> None:
    """Two threads add to one object's counts, which is for one thread."""
    counts = _native.ChannelCounts(2, 64, 8, 7)
    numbers = random_bits(np.random.default_rng(0), "bf16", (1, 2, 20_000, 64))
    in_threads(lambda _: counts.add(numbers), 2)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--seconds", type=float, default=60)
    parse.add_argument("--threads", type=int, default=8)
    parse.add_argument("--race", action="store_true")
    parse.add_argument("--free", action="store_true", help="only without Python's lock")
    given = parse.parse_args()
    if given.race:
        race()
        return 0
    lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    if given.free and lock:
        raise SystemExit("this Python has its lock, or something imported has switched it on")
    with tempfile.TemporaryDirectory() as folder:
        done = stress(Path(folder), given.seconds, given.threads)
    rounds = done.pop("rounds")
    print(f"{rounds} rounds of {given.threads} threads, {done.total():,} calls, none wrong; "
          f"Python {sys.version.split()[0]} {'with' if lock else 'without'} its lock; "
          f"{', '.join(instructions())}")  # fmt: skip
    print(", ".join(f"{name} {count:,}" for name, count in sorted(done.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
