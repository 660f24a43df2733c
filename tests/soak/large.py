"""Files beyond 4 GiB, and a part with more than 2^31 numbers: `make large`.

    python tests/soak/large.py --folder /somewhere/with/20/GB

A snapshot of 7 GiB, whose layers are views of a buffer of 250 MB, is saved, encoded, verified, read
in part by path, from memory and by URL, put into a store, found and sealed; all numbers are
compared with those that they were made of. What is read in part lies behind 4 GiB. Then a part of
2^31 + 5,120 numbers goes through the codecs, in blocks and as one block. It takes about 10 GB of
memory and 18 GB of disk at most, and some minutes.
"""

from __future__ import annotations

import argparse
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from servers import serving

import kvzip
from kvzip.errors import CorruptError, UnsupportedError
from kvzip.store import Store
from kvzip.testing.caches import cache_like

HEADS, DIM = 8, 128
LAYERS, TOKENS = 28, 1 << 16
MARK = 1 << 32
ROWS = (1 << 21) + 5
"""Tokens of a part of 8 heads of 128 that has more than 2^31 numbers."""
ORIGIN = kvzip.Origin(model="large", revision="1")


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Raise AssertionError unless all numbers are the same; a head at a time, for memory."""
    assert found.shape == wanted.shape, "another shape"
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one, other), "other numbers"


class LargeFile:
    """A snapshot of so many layers of so many tokens, in files of a folder. `beyond`: they must be
    longer than 4 GiB, and what is read in part lies behind that."""

    def __init__(
        self, folder: Path, layers: int = LAYERS, tokens: int = TOKENS, beyond: bool = True
    ):
        self.folder, self.beyond = folder, beyond
        self.layers, self.tokens = layers, tokens
        rng = np.random.default_rng(0)
        rows = HEADS * tokens + 2 * 777 * layers
        tile = cache_like(rng, "bf16", (1, min(rows, 1 << 15), DIM))[0]
        self._buffer = np.concatenate([tile] * -(-rows // len(tile)))[:rows]
        # One tile differs from the next, so that only their statistics repeat.
        for number, at in enumerate(range(0, rows, len(tile))):
            self._buffer[at : at + len(tile)] ^= np.uint16(number & 0x7F)
        self._ids = rng.integers(0, 50_000, tokens)
        self.snapshot = kvzip.Snapshot.from_arrays(
            [(self.part(i, 0), self.part(i, 1)) for i in range(layers)], "bf16", self._ids, ORIGIN
        )
        self.path, self.saved = folder / "large.kvz", folder / "large.safetensors"

    def part(self, layer: int, which: int) -> np.ndarray:
        """A layer's keys or values: a window of the buffer, each 777 rows behind the one before."""
        first = 777 * (2 * layer + which)
        window = self._buffer[first : first + HEADS * self.tokens]
        return window.reshape(HEADS, self.tokens, DIM)

    def check_layer(self, layer: kvzip.Layer, i: int, tokens: slice = slice(None)) -> None:
        """Compare a layer with what it was made of."""
        for which, found in enumerate((layer.k, layer.v)):
            same(found, self.part(i, which)[:, tokens])

    def check_last(self, reader: kvzip.Reader) -> None:
        """Compare the last layer, and a range of tokens of the last two."""
        last = self.layers - 1
        self.check_layer(reader.layer(last), last)
        rows = reader.index.rows[last, "k"]
        assert not self.beyond or reader.index.offset[rows.start] > MARK, "it lies before 4 GiB"
        first = self.tokens - 70
        found = reader.decode(layers=[last, last - 1], tokens=(first, self.tokens - 3))
        for i, layer in zip((last, last - 1), found.layers, strict=True):
            self.check_layer(layer, i, slice(first, self.tokens - 3))

    def long(self, path: Path) -> None:
        """Raise AssertionError unless a file is beyond 4 GiB."""
        assert not self.beyond or path.stat().st_size > MARK, f"{path.name} is too short"

    # --- steps, in this order ------------------------------------------------------------------

    def save(self) -> None:
        """As a snapshot's file, which is read again from its end."""
        self.snapshot.save(self.saved)
        self.long(self.saved)
        for mmap in (False, True):
            loaded = kvzip.Snapshot.load(self.saved, mmap=mmap)
            self.check_layer(loaded.layers[-1], self.layers - 1)

    def write(self) -> None:
        """As a .kvz file, from the snapshot's file."""
        kvzip.write(self.path, kvzip.Snapshot.load(self.saved), "channel", threads=2)
        self.saved.unlink()
        self.long(self.path)
        kvzip.verify(self.path, threads=2)

    def read(self) -> None:
        """All of it, a layer after the other; then a layer and a range at the end."""
        with kvzip.open(self.path, threads=2) as reader:
            wanted = [([i], (0, self.tokens)) for i in range(self.layers)]
            for i, found in enumerate(reader.in_turn(wanted)):
                self.check_layer(found.layers[0], i)
            self.check_last(reader)
            out = [tuple(np.empty_like(self.part(0, 0)) for _ in range(2))]
            reader.decode(out, layers=[self.layers - 1])
            same(out[0][1], self.part(self.layers - 1, 1))

    def in_memory(self) -> None:
        """Encoded into memory, and read from there."""
        blob = kvzip.encode(self.snapshot, "channel", threads=2)
        with self.path.open("rb") as file:
            for at in range(0, len(blob), 1 << 24):
                assert blob[at : at + (1 << 24)] == file.read(1 << 24), "other bytes than on disk"
        with kvzip.open(blob, threads=2) as reader:
            self.check_last(reader)

    def by_url(self) -> None:
        """From a web server, in ranges."""
        with serving(ranges_of(self.path)) as url, kvzip.open(f"{url}/large.kvz") as reader:
            self.check_last(reader)

    def damage(self) -> None:
        """A bit in the last block: an error of the last layer, and of no other."""
        with self.path.open("r+b") as file:
            with kvzip.open(self.path) as reader:
                at = reader.index.offset[-1] + reader.index.length[-1] - 1
            assert not self.beyond or at > MARK
            file.seek(at)
            [byte] = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 4]))
            file.flush()
            with kvzip.open(self.path) as reader:
                self.check_layer(reader.layer(0), 0)
                try:
                    reader.layer(self.layers - 1)
                except CorruptError as error:
                    assert f"layer {self.layers - 1} v" in str(error), error
                else:
                    raise AssertionError("a damaged block was read")
            file.seek(at)
            file.write(bytes([byte]))

    def store(self) -> None:
        """Put into a store, and found by a prompt that goes on."""
        store = Store(self.folder / "store")
        store.put(self.path)
        prompt = np.concatenate([self._ids, [1, 2, 3]])
        match = store.find(prompt, model="large", revision="1", dtype="bf16")
        assert match is not None and match.tokens == self.tokens, "it is not found"
        self.check_last(match.reader)
        match.reader.close()
        assert store.remove(store.documents()[0].key)

    def seal(self) -> None:
        """With a key."""
        key, sealed = bytes(range(32)), self.folder / "sealed.kvz"
        kvzip.write(sealed, self.snapshot, "channel", threads=2, key=key)
        self.long(sealed)
        with kvzip.open(sealed, key=key, threads=2) as reader:
            self.check_last(reader)
        sealed.unlink()
        self.path.unlink()

    STEPS = (save, write, read, in_memory, by_url, damage, store, seal)


def ranges_of(path: Path) -> type[BaseHTTPRequestHandler]:
    """What serves one file, whole or in ranges."""
    size = path.stat().st_size

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._start(200, size)

        def do_GET(self) -> None:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first = int(found[1]) if found else 0
            end = min(size, int(found[2]) + 1) if found and found[2] else size
            self._start(206 if found else 200, end - first, f"bytes {first}-{end - 1}/{size}")
            with path.open("rb") as file:
                file.seek(first)
                for at in range(first, end, 1 << 20):
                    self.wfile.write(file.read(min(1 << 20, end - at)))

        def _start(self, status: int, length: int, range_: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"1"')
            if status == 206:
                self.send_header("Content-Range", str(range_))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def large_part(
    folder: Path, codec: str, rows: int = ROWS, whole: bool = False, dtype: str = "fp8_e5m2"
) -> None:
    """A part of 8 x `rows` x 128 numbers through a codec; `whole`: as one block."""
    tile = cache_like(np.random.default_rng(1), dtype, (HEADS, 1 << 12, DIM))
    keys = np.empty((HEADS, rows, DIM), tile.dtype)
    for number, at in enumerate(range(0, rows, 1 << 12)):
        piece = keys[:, at : at + (1 << 12)]
        piece[...] = tile[:, : piece.shape[1]] ^ tile.dtype.type(number & 3)
    values = keys[:1, :, :1]
    path = folder / "part.kvz"
    snapshot = kvzip.Snapshot.from_arrays([(keys, values)], dtype)
    kvzip.write(path, snapshot, codec, threads=2, block_tokens=2**31 - 1 if whole else None)
    with kvzip.open(path, threads=2) as reader:
        first = rows - 1000
        found = reader.tokens(first, rows).layers[0]
        same(found.k, keys[:, first:])
        same(found.v, values[:, first:])
        del found
        same(reader.layer(0).k, keys)
    path.unlink()


@contextmanager
def timed(name: str, tell: Callable[[str], None]):
    """Tell how long it took, and how much memory the process has had at most so far."""
    began = time.monotonic()
    yield
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tell(f"{name}: {time.monotonic() - began:.0f} s, memory up to {most / 1e9:.1f} GB")


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--folder", type=Path, help="where to work; default: a temporary one")
    parse.add_argument("--only", choices=("file", "part"), help="one of the two")
    given = parse.parse_args()

    def tell(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        if given.only != "part":
            large = LargeFile(folder)
            for step in LargeFile.STEPS:
                with timed(f"{large.snapshot.raw_bytes:,} bytes, {step.__name__}", tell):
                    step(large)
            del large
        if given.only != "file":
            for codec in ("raw", "channel", "planes", "zstd"):
                for whole in (False, True):
                    how = "one block" if whole else "blocks"
                    with timed(f"{HEADS * ROWS * DIM:,} numbers, {codec}, {how}", tell):
                        large_part(folder, codec, whole=whole)
            with timed("lz4, blocks, and one block, which is an error", tell):
                large_part(folder, "lz4")
                try:
                    large_part(folder, "lz4", whole=True)
                except UnsupportedError as error:
                    assert "smaller block_tokens" in str(error)
                else:
                    raise AssertionError("lz4 took a block of 2 GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
