"""What docs/operations.md says that threads may share."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import assert_same, cache_like

import kvzip
from kvzip.load import buffers
from kvzip.store import Store

GOLDEN = Path(__file__).parent.parent / "golden" / "v1"


def at_once(do, threads=4):
    """Do it in threads at once, each with a number of its own; raise the first error."""
    errors, begin = [], threading.Barrier(threads)

    def run(n):
        try:
            begin.wait()
            do(n)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


def document(seed=0):
    rng = np.random.default_rng(seed)
    pairs = [(cache_like(rng, "bf16", (2, 300, 16)),) * 2 for _ in range(4)]
    origin = kvzip.Origin(model="m", revision="r")
    return kvzip.Snapshot.from_arrays(pairs, "bf16", rng.integers(0, 999, 300), origin)


@pytest.mark.parametrize("codec", ["channel", "planes", "zstd", "raw"])
def test_a_reader(codec, tmp_path):
    snapshot = document()
    kvzip.write(tmp_path / "doc.kvz", snapshot, codec, block_tokens=50)
    with (tmp_path / "doc.kvz").open("rb") as file, kvzip.open(file, threads=2) as reader:

        def read(n):
            rng = np.random.default_rng(n)
            for _ in range(10):
                i, begin = int(rng.integers(4)), int(rng.integers(299))
                assert np.array_equal(reader.layer(i).k, snapshot.layers[i].k)
                part = reader.tokens(begin, 300).layers[i].v
                assert np.array_equal(part, snapshot.layers[i].v[:, begin:])
            reader.verify()

        at_once(read)


class Slow(io.BytesIO):
    """Other threads go on between the seek and the read that belong together."""

    def seek(self, *where):
        found = super().seek(*where)
        time.sleep(1e-4)
        return found


def test_a_reader_of_what_has_one_position():
    snapshot = document()
    blob = kvzip.encode(snapshot, "channel", block_tokens=50)
    with kvzip.open(Slow(blob), threads=2) as reader:

        def read(n):
            for i in np.random.default_rng(n).integers(4, size=5).tolist():
                assert np.array_equal(reader.layer(i).k, snapshot.layers[i].k)

        at_once(read)


def test_a_reader_of_predicted_blocks():
    profile = kvzip.Profile.load(GOLDEN / "predictive.kvprofile")
    path = GOLDEN / "predictive-bf16.kvz"
    whole = kvzip.decode(path, profile)
    with kvzip.open(path, profile) as reader:

        def read(n):
            for i in np.random.default_rng(n).integers(len(whole.layers), size=8).tolist():
                assert np.array_equal(reader.layer(i).k, whole.layers[i].k)

        at_once(read)


def test_a_snapshot_that_is_read_from_a_file(tmp_path):
    snapshot = document()
    snapshot.save(tmp_path / "doc.safetensors")
    loaded = kvzip.Snapshot.load(tmp_path / "doc.safetensors")
    blobs = {}

    def encode(n):
        assert np.array_equal(loaded.layers[n].v, snapshot.layers[n].v)
        blobs[n] = kvzip.encode(loaded, "channel", threads=2)

    at_once(encode)
    assert len({*blobs.values()}) == 1


def test_a_store(tmp_path):
    store, documents = Store(tmp_path, block_tokens=32), [document(n) for n in range(4)]

    def use(n):
        for seed in (n, (n + 1) % 4):
            store.put(documents[seed])
        match = store.find(documents[n].token_ids, model="m", revision="r", dtype="bf16")
        assert match is not None
        at_once(lambda _: assert_same(match.snapshot(), documents[n]), 2)
        match.reader.close()

    at_once(use)
    assert len(store.documents()) == 4


def test_buffers():
    def move(n):
        k, v = (np.random.default_rng(n + i).integers(0, 9, (40, 2, 8)) for i in (0, 9))
        k, v = k.astype(np.uint16), v.astype(np.uint16)
        for _ in range(10):
            found = buffers.decode(buffers.encode(k, v, axes="thd", dtype="bf16"), axes="thd")
            assert np.array_equal(found[0], k) and np.array_equal(found[1], v)

    at_once(move)
