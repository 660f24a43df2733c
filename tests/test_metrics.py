"""What happens is counted for who listens, and for nobody else."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest
from support import cache_like

import kvzip
from kvzip import errors, metrics
from kvzip.errors import CorruptError, UsageError
from kvzip.store import Store

OF = {"model": "m", "revision": "r", "dtype": "bf16"}


@pytest.fixture
def events():
    found = []
    stop = metrics.listen(found.append)
    yield found
    stop()


def document(seed=0, tokens=64):
    rng = np.random.default_rng(seed)
    pairs = [(cache_like(rng, "bf16", (2, tokens, 16)),) * 2 for _ in range(2)]
    origin = kvzip.Origin(model="m", revision="r")
    return kvzip.Snapshot.from_arrays(pairs, "bf16", rng.integers(0, 999, tokens), origin)


def total(events, name, **labels):
    return sum(e.value for e in events if e.name == name and e.labels == labels)


def test_every_event_is_one_that_is_written_down(events, tmp_path):
    store = Store(tmp_path, block_tokens=16)
    one = document(1)
    store.put(one)
    store.find(one.token_ids, **OF).snapshot()
    store.find(document(2).token_ids, **OF)
    store.prune(1)
    names = {e.name for e in events}
    assert names == {
        "lookups", "found_tokens", "read_bytes", "decoded_bytes", "decode_seconds",
        "encoded_bytes", "written_bytes", "encode_seconds", "evictions",
    }  # fmt: skip
    for event in events:
        assert set(event.labels) == set(metrics.METRICS[event.name].labels)
        assert event.value >= 0


def test_bytes_are_those_that_were_moved(events):
    snapshot = document()
    blob = kvzip.encode(snapshot, "channel")
    assert total(events, "encoded_bytes", codec="channel") == snapshot.raw_bytes
    assert total(events, "written_bytes", codec="channel") == len(blob)
    kvzip.decode(blob)
    assert total(events, "decoded_bytes", codec="channel") == snapshot.raw_bytes
    assert 0 < total(events, "read_bytes", codec="channel") <= len(blob)
    events.clear()
    kvzip.decode(blob, layers=[1], tokens=(0, 10))
    assert total(events, "decoded_bytes", codec="channel") == 2 * 2 * 10 * 16 * 2
    assert [e.name for e in events].count("decode_seconds") == 1


def test_hits_misses_and_near_misses(events, tmp_path):
    store, one = Store(tmp_path, block_tokens=16), document(1)
    store.put(one)
    assert store.find(one.token_ids, **OF).tokens == 64
    assert store.find(document(2).token_ids, **OF) is None
    assert store.find(one.token_ids, **OF | {"revision": "other"}) is None
    found = [e.labels["result"] for e in events if e.name == "lookups"]
    assert found == ["hit", "miss", "near_miss"]
    assert total(events, "found_tokens", where="store") == 64


def test_a_document_that_is_damaged_is_a_near_miss(events, tmp_path):
    store, one = Store(tmp_path, block_tokens=16), document(1)
    key = store.put(one).key
    path = tmp_path / key.replace("/", "/docs/")
    path = path.with_name(path.name + ".kvz")
    data = bytearray(path.read_bytes())
    data[45] ^= 1
    path.write_bytes(data)
    assert store.find(one.token_ids, **OF) is None
    assert total(events, "lookups", where="store", result="near_miss") == 1


def test_nothing_is_counted_when_nobody_listens():
    found = []
    stop = metrics.listen(found.append)
    stop()
    stop()
    kvzip.decode(kvzip.encode(document()))
    assert not found and not metrics.listening()
    assert not metrics.Timer().wanted


@pytest.mark.quiet
def test_to_count_costs_nothing_when_nobody_listens():
    began = time.perf_counter()
    for _ in range(100_000):
        metrics.count("read_bytes", 1, codec="channel")
    assert time.perf_counter() - began < 0.5  # 5 microseconds a call, of some a block


def test_a_listener_that_fails_is_told_once_and_breaks_nothing(caplog, events):
    def broken(event):
        raise RuntimeError("no room for numbers")

    stop = metrics.listen(broken)
    try:
        with caplog.at_level(logging.WARNING, "kvzip.metrics"):
            snapshot = document()
            assert kvzip.decode(kvzip.encode(snapshot)) == snapshot
    finally:
        stop()
    assert len(caplog.records) == 1 and "no room" in caplog.text
    assert total(events, "decoded_bytes", codec="channel") == snapshot.raw_bytes


def test_listeners_may_come_and_go_in_threads():
    def come_and_go():
        for _ in range(200):
            metrics.listen(lambda event: None)()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        metrics.count("evictions")
    for thread in threads:
        thread.join()
    assert not metrics.listening()
    for wrong in (None, 7):
        with pytest.raises(UsageError):
            metrics.listen(wrong)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CorruptError("x"), "damaged"),
        (errors.FormatError("x"), "damaged"),
        (errors.StoreError("x"), "store"),
        (OSError("x"), "store"),
        (errors.ProfileError("x"), "profile"),
        (errors.SealError("x"), "key"),
        (errors.UnsupportedError("x"), "unsupported"),
        (errors.CancelledError("x"), "cancelled"),
        (errors.WeightsError("x"), "weights"),
        (errors.KVZipError("x"), "other"),
    ],
)
def test_reasons(events, error, reason):
    metrics.recomputed("vllm", error)
    assert events == [("recomputes", 1, {"where": "vllm", "reason": reason})]


def test_prometheus(tmp_path):
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    stop = metrics.prometheus(registry)
    with pytest.raises(UsageError):
        metrics.prometheus(registry)  # the names are taken
    snapshot = document()
    kvzip.decode(kvzip.encode(snapshot))
    metrics.count("evictions", 3)
    value = registry.get_sample_value
    assert value("kvzip_decoded_bytes_total", {"codec": "channel"}) == snapshot.raw_bytes
    assert value("kvzip_decode_seconds_count", {"codec": "channel"}) == 1
    assert value("kvzip_evictions_total") == 3
    text = client.generate_latest(registry).decode()
    for name, metric in metrics.METRICS.items():
        assert f"# HELP kvzip_{name}" in text and metric.words.split(":")[0] in text
    stop()
    assert not metrics.listening() and not client.generate_latest(registry)
    metrics.prometheus(registry)()  # and they are free again
