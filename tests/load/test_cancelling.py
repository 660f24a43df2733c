"""A load that nobody wants any more ends, with its threads, and says so to who waits for it."""

from __future__ import annotations

import copy
import threading
import time

import numpy as np
import pytest
from servers import failing_server
from support import cache_like, wait_for

import kvzip
from kvzip.container.source import Memory
from kvzip.errors import CancelledError
from kvzip.load.cancelling import cancel
from kvzip.load.hf import load_batch_or_prefill, load_cache, load_or_prefill


class Slow(Memory):
    """A source that waits at each read, once it is told to, until it is let go."""

    def __init__(self, data):
        super().__init__(data)
        self.waiting, self.go, self.slow = threading.Event(), threading.Event(), False
        self.reads = 0

    def read(self, offset, length):
        if self.slow:
            self.reads += 1
            self.waiting.set()
            assert self.go.wait(30)
        return super().read(offset, length)


def kvzip_threads():
    return {t for t in threading.enumerate() if t.name.startswith("kvzip-")}


class Background:
    """Something done in a thread, and the error that it ends with."""

    def __init__(self, do):
        self.error = self.result = None

        def run():
            try:
                self.result = do()
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def end(self, seconds=10):
        self.thread.join(seconds)
        assert not self.thread.is_alive()
        return self.error


def blob(codec="channel", profile=None):
    rng = np.random.default_rng(0)
    pairs = [(cache_like(rng, "bf16", (2, 1000, 32)),) * 2 for _ in range(6)]
    return kvzip.encode(kvzip.Snapshot.from_arrays(pairs, "bf16"), codec, block_tokens=100)


@pytest.mark.parametrize("codec", ["channel", "planes", "raw"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_reader_that_is_cancelled_ends_within_a_block(codec, threads):
    source = Slow(blob(codec))
    with kvzip.open(source, threads=threads) as reader:
        source.slow = True
        decoding = Background(reader.decode)
        assert source.waiting.wait(10)
        reader.cancel()
        source.go.set()
        assert isinstance(decoding.end(), CancelledError)
        assert source.reads <= threads + 1
        for again in (reader.decode, lambda: reader.layer(0), reader.verify):
            with pytest.raises(CancelledError):
                again()
        reader.cancel()  # as often as one wants
    with kvzip.open(blob(codec)) as other:  # only that one
        other.decode()


@pytest.mark.parametrize("announced", [False, True])
def test_requests_to_a_server_are_not_waited_for(tmp_path, announced):
    """The server is silent: without a cancel this would last for the whole timeout."""
    pytest.importorskip("obstore")
    from kvzip.store.bucket import open_url

    rng = np.random.default_rng(0)
    pairs = [(cache_like(rng, "bf16", (4, 4000, 64)),) * 2 for _ in range(4)]
    kvzip.write(tmp_path / "doc.kvz", kvzip.Snapshot.from_arrays(pairs, "bf16"), "raw")
    with failing_server(tmp_path) as server:
        reader = open_url(f"{server.url}/doc.kvz", timeout=60.0, retries=0)
        server.fail("doc", 0, silent=True)
        if announced:
            reader.read_ahead([(0, 4000)] * 4)
        decoding = Background(reader.decode)
        time.sleep(0.2)
        reader.cancel()
        error = decoding.end(5)
        assert isinstance(error, CancelledError) and "doc.kvz" in str(error)
        with pytest.raises(CancelledError):
            reader.decode()


def test_a_lazy_cache_ends_with_its_threads(tiny):
    case = tiny("llama")
    before = kvzip_threads()
    source = Slow(case.blob)
    with kvzip.open(source) as reader:
        cache = load_cache(reader, case.config, prompt=case.longer())
        source.slow = True
        generating = Background(lambda: case.generate(case.longer(), cache))
        assert source.waiting.wait(10)
        ending = Background(lambda: cancel(cache))
        time.sleep(0.1)
        source.go.set()
        assert ending.end() is None
        assert isinstance(generating.end(), CancelledError)
        assert wait_for(lambda: kvzip_threads() <= before)


def test_a_cancelled_load_is_not_computed_instead(tiny, caplog):
    case = tiny("llama")
    cache = load_or_prefill(case.blob, case.model, case.longer())
    cancel(cache)
    with pytest.raises(CancelledError):
        case.generate(case.longer(), cache)
    assert "computed anew" not in caplog.text


def test_batches_and_copies_are_cancelled(tiny):
    case = tiny("llama")
    batch = load_batch_or_prefill(
        [case.blob, case.blob],
        case.model,
        [case.longer(5)[0], case.longer(5, 7)[0]],
        pad_token_id=0,
    )
    past = batch.get("cache", batch.get("past_key_values"))
    cancel(past)
    with pytest.raises(CancelledError):
        case.model.generate(**batch, max_new_tokens=2)
    cache = load_cache(case.blob, case.config, prompt=case.longer())
    other = copy.deepcopy(cache)
    cancel(cache)
    with pytest.raises(CancelledError):
        case.generate(case.longer(), other)


def test_what_is_decoded_stays(tiny):
    case = tiny("llama")
    cache = load_cache(case.blob, case.config, prompt=case.longer())
    keys = cache.layers[0].keys.clone()
    cancel(cache)
    assert (cache.layers[0].keys == keys).all()
    cancel(case.cache)  # of something else: nothing happens
    cancel(object())
