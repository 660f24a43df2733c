from __future__ import annotations

import json
import runpy
import sys

import msgspec
import numpy as np
import pytest
import torch
from support import assert_same, cache_like, make_snapshot, random_bits

import kvzip
from kvzip import dtypes
from kvzip.errors import CorruptError, FormatError, KVZipError, UsageError
from kvzip.layout import StoredLayout
from kvzip.snapshot import Description


def test_disk_round_trip(tmp_path, dtype):
    snapshot = make_snapshot(random_bits, 1, dtype)
    snapshot.save(tmp_path / "a.safetensors")
    loaded = kvzip.Snapshot.load(tmp_path / "a.safetensors")
    assert_same(snapshot, loaded)
    assert np.array_equal(snapshot.token_ids, loaded.token_ids)
    assert loaded.origin == snapshot.origin
    assert loaded.dtype == dtype


def test_file_is_plain_safetensors(tmp_path, dtype):
    from safetensors.torch import load_file

    snapshot = make_snapshot(cache_like, 2, dtype)
    snapshot.save(tmp_path / "a.safetensors")
    found, held = load_file(tmp_path / "a.safetensors")["layers.1.v"], snapshot.tensors()[1][1]
    assert found.dtype == held.dtype == getattr(torch, dtypes.get(dtype).torch)
    assert torch.equal(found.view(torch.uint8), held.view(torch.uint8))


def test_tensors_and_back(dtype):
    snapshot = make_snapshot(random_bits, 4, dtype, ids=False)
    again = kvzip.Snapshot.from_arrays(snapshot.tensors(), dtype)
    assert_same(snapshot, again)


def test_every_truncation_is_an_error(tmp_path):
    make_snapshot(random_bits, 3, "bf16", layers=1, heads=1, tokens=3, dim=2).save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "b").write_bytes(whole[:length])
        with pytest.raises((CorruptError, FormatError)):
            kvzip.Snapshot.load(tmp_path / "b")


def test_foreign_files_are_named(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="not a snapshot"):
        kvzip.Snapshot.load(tmp_path / "a.safetensors")
    (tmp_path / "b").write_bytes(b"hello, world, this is text")
    with pytest.raises(FormatError):
        kvzip.Snapshot.load(tmp_path / "b")


def test_a_lying_description_is_an_error(tmp_path):
    from safetensors.numpy import save_file

    layout = kvzip.LayerLayout.of_kv((1, 2, 4), (1, 2, 4), "fp16", 2)
    note = msgspec.json.encode(Description(StoredLayout("fp16", (layout,), (0,)))).decode()
    save_file({"layers.0.k": np.zeros((1, 2, 4), np.float16)}, tmp_path / "a", {"kvzip": note})
    with pytest.raises(FormatError, match="missing"):
        kvzip.Snapshot.load(tmp_path / "a")


@pytest.mark.parametrize("shape", [[-2, -3], [-6], [2**70, 0], [2**62, 0], [1] * 99 + [6], [[6]]])
def test_a_shape_of_ids_that_no_array_has_is_an_error(tmp_path, shape):
    saved = make_snapshot(cache_like, 0, "bf16", tokens=6)
    saved.token_ids = np.arange(6, dtype=np.uint32)
    saved.save(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:start]), data[start:]
    header["token_ids"]["shape"] = shape
    if 0 in shape:  # and so no bytes
        for name in header.keys() - {"__metadata__"}:
            header[name]["data_offsets"] = [at - 48 for at in header[name]["data_offsets"]]
        header["token_ids"]["data_offsets"], body = [0, 0], body[48:]
    packed = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(packed).to_bytes(8, "little") + packed + body)
    for mmap in (False, True):
        with pytest.raises(FormatError):
            kvzip.Snapshot.load(tmp_path / "a", mmap=mmap)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError):
        kvzip.Snapshot.from_arrays(
            [(np.zeros((1, 2, 4), np.float16), np.zeros((1, 3, 4), np.float16))]
        )
    with pytest.raises(UsageError, match="heads, tokens, dim"):
        kvzip.Snapshot.from_arrays([(np.zeros((2, 4), np.float16),) * 2])
    with pytest.raises(UsageError, match="at least one layer"):
        kvzip.Snapshot.from_arrays([])


@pytest.mark.parametrize(
    ("missing", "wanted"),
    [
        ("torch", lambda s: s.tensors()),
        ("kvzip.load.hf", lambda s: s.to_cache(None)),
        ("kvzip.load.hf", lambda s: kvzip.Snapshot.from_cache(None)),
        ("transformers.cache_utils", lambda s: runpy.run_module("kvzip.load.hf")),
    ],
    ids=["tensors", "to_cache", "from_cache", "load_cache"],
)
def test_what_needs_torch_names_the_extra_where_it_is_missing(missing, wanted, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(KVZipError, match=r"pip install 'kvzip\[hf\]'"):
        wanted(make_snapshot(cache_like, 1, "bf16"))
