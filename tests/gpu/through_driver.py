"""Run by test_driver.py, with a fake driver: decodes as on a GPU, many pieces at a time."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_nvcomp import FakeNvComp, compiled
from predictive_profiles import encode, random_profile
from support import cache_like, make_snapshot
from test_turned_on_device import kinds, turned

import kvzip
from kvzip import dtypes
from kvzip.codecs.common import device_angles
from kvzip.codecs.common.rotation import ROUNDINGS
from kvzip.codecs.native.cuda import gpu, nvcomp
from kvzip.codecs.native.cuda.arrays import DeviceArray, View, empty
from kvzip.codecs.native.cuda.shim_device import ShimDevice
from kvzip.container import device_targets, on_device, writer
from kvzip.dtypes import get
from kvzip.errors import UnsupportedError


def kernels_by_shim(folder: Path) -> None:
    """What the device loads is a folder of the shim's libraries in place of machine code."""
    shim, load = ShimDevice(), gpu.CudaDevice._function

    def function(device, kernel):
        library = folder / f"{kernel.name}.so"
        if not library.exists():
            library.symlink_to(shim._library(kernel))
        return load(device, kernel)

    gpu.compiled = lambda source, architecture: f"{folder}\0".encode()
    gpu.CudaDevice._function = function


def bits(array: DeviceArray) -> np.ndarray:
    """The numbers, which lie in the host's memory here."""
    kind = array.__cuda_array_interface__
    span = 1 + sum((n - 1) * s for n, s in zip(kind["shape"], kind["strides"], strict=True) if n)
    if not all(kind["shape"]):
        return np.empty(kind["shape"], kind["typestr"])
    memory = (ctypes.c_uint8 * (span + array.itemsize - 1)).from_address(kind["data"][0])
    flat = np.frombuffer(memory, np.uint8)
    strided = np.lib.stride_tricks.as_strided
    return (
        strided(flat.view(), (*kind["shape"], array.itemsize), (*kind["strides"], 1))
        .copy()
        .view(kind["typestr"])[..., 0]
    )


def same(found, snapshot, begin=0, end=None) -> None:
    for mine, layer in zip(found.layers, snapshot.layers, strict=True):
        for array, expected in zip(mine, layer, strict=True):
            assert np.array_equal(bits(array), expected[..., begin:end, :])


def layers_need_each_other(draw: random.Random) -> None:
    """Of `predictive`, whose steps wait for each other from piece to piece, and need much shared
    memory, some more than others."""
    dims = [32, 12, 12, 12]
    shapes = [((2, dim), (2, dim)) for dim in dims]
    profile = random_profile(1, shapes, group=64, lanes=16, pairs=4, regions=2, tables=(2,))
    rng = np.random.default_rng(1)
    layers = [[cache_like(rng, "bf16", (2, 70, dim)) for _ in range(2)] for dim in dims]
    snapshot = kvzip.Snapshot.from_arrays(layers, "bf16", rng.integers(0, 300, 70))
    blob = encode(snapshot, profile, pytest.MonkeyPatch(), {(1, "v")}, block_tokens=32)
    for on_device.PIECE in (1, 4000):
        same(kvzip.decode(blob, profile, device="cuda"), snapshot)
    with kvzip.open(blob, profile) as reader:
        for layers in ([0, 1], [2], [3]):
            found = reader.decode(layers=layers, device="cuda")
            same(found, kvzip.Snapshot([snapshot.layers[i] for i in layers], "bf16"))
    bad = bytearray(blob)
    bad[draw.randrange(len(blob) // 2, len(blob) - 100)] ^= 4
    told = []
    for options in ({}, {"device": "cuda"}):
        with pytest.raises(kvzip.CorruptError) as error:
            kvzip.decode(bytes(bad), profile, threads=1, **options)
        told.append(str(error.value))
    assert told[0] == told[1]


def keys_are_turned(device: gpu.CudaDevice, draw: random.Random) -> None:
    """By angles that are brought when they are needed, and dropped soon."""
    snapshot = turned(draw.randrange(1000), 32, 16, draw.choice(ROUNDINGS), tokens=180, layers=4)
    blob = kvzip.encode(snapshot, "channel:keys=before_rope", block_tokens=32)
    assert 3 in kinds(blob)["k"]
    for on_device.PIECE in (1, 20000):
        for device_angles._TOGETHER in (16 * 20, 16 * 1000):
            device_angles._KEPT_BYTES = draw.choice([0, 5000, 64 << 20])
            device.cache.pop("angles", None)
            same(kvzip.decode(blob, device="cuda"), snapshot)
            same(kvzip.decode(blob, device="cuda", tokens=(20, 170)), snapshot, 20, 170)


def on_the_device(snapshot: kvzip.Snapshot) -> kvzip.Snapshot:
    """The same as if its numbers lay in a GPU's memory."""
    there = kvzip.Snapshot.from_arrays(snapshot.tensors())
    layers = [
        kvzip.Layer({name: mine.on_device(name)[0] for name in "kv"}, layer.layout)
        for mine, layer in zip(there.layers, snapshot.layers, strict=True)
    ]
    return kvzip.Snapshot(layers, "bf16", snapshot.token_ids, snapshot.origin)


def parts_are_encoded(device: gpu.CudaDevice, draw: random.Random) -> None:
    """Several together, with keys before RoPE to be found first; again and again in the same
    memory, which is the host's here."""
    dtypes.on_gpu = lambda tensor: True
    gpu.CudaDevice.holds = lambda device, tensor: True
    streams = set[int]()
    for n in range(4):
        snapshot = turned(n, 32, 16, draw.choice(ROUNDINGS), tokens=150 + 20 * n, layers=3)
        there = on_the_device(snapshot)
        writer._TOGETHER = draw.choice([1, 20000, 1 << 20])
        for threads in (1, 3):
            found = kvzip.encode(there, block_tokens=64, threads=threads, device="cuda")
            assert found == kvzip.encode(snapshot, block_tokens=64)
        gc.collect()
        streams.add(ctypes.CDLL(os.environ["KVZIP_FAKE_DRIVER"]).fake_streams())
    assert 3 in kinds(found)["k"]
    assert len(streams) == 1, "those of a room go with it"
    # No block is smaller coded: nothing comes back.
    snapshot = make_snapshot(cache_like, 1, "bf16", layers=1, heads=1, tokens=200, dim=8)
    found = kvzip.encode(on_the_device(snapshot), block_tokens=1, device="cuda")
    assert found == kvzip.encode(snapshot, block_tokens=1)
    assert device.cache["rooms"], "the device did it"


def a_library_decodes(library: FakeNvComp, draw: random.Random) -> None:
    """What it is told is copied before it looks, and what it writes is copied after. Where it fails
    in the middle, nothing that was begun is left when the CPU has done it all."""
    driver = ctypes.CDLL(os.environ["KVZIP_FAKE_DRIVER"])
    for codec in ("lz4", "zstd", "planes"):
        snapshot = make_snapshot(cache_like, 7, "bf16", layers=6, heads=2, tokens=180, dim=64)
        blob = kvzip.encode(snapshot, codec, block_tokens=32)
        # The largest first: what frees memory to have more of it waits for all.
        for piece in (1 << 24, 1, draw.choice([3000, 20000])):
            on_device.PIECE = piece
            library.decoded.clear()
            same(kvzip.decode(blob, device="cuda"), snapshot)
            assert library.decoded
            same(kvzip.decode(blob, device="cuda", tokens=(20, 170)), snapshot, 20, 170)
            told: list[int] = []

            def progress(
                size: int, told: list[int] = told, last: int = draw.randrange(2, 8)
            ) -> None:
                told.append(size)
                if len(told) == last:
                    library.set(status=1000)
                    on_device.PIECE = 1 << 24

            with kvzip.open(blob) as reader:
                same(reader.decode(device="cuda", progress=progress), snapshot)
            assert not driver.fake_pending() and sum(told) == snapshot.raw_bytes
            library.set()


class Array:
    """Somebody's array of a layer's keys or values."""

    def __init__(self, address: int, like: Any, **more: Any):
        self.__cuda_array_interface__ = {
            "shape": like.shape,
            "typestr": like.dtype.str,
            "data": (address, False),
            "version": 3,
        } | more


def drained(device: gpu.CudaDevice) -> None:
    """All has run that was put into streams."""
    with device.current():
        device._driver.cuCtxSynchronize()


def what_others_still_write_comes_before(device: gpu.CudaDevice) -> None:
    """Memory that is cleared in streams which this thread has not waited for: of new arrays, in
    torch's current one, whatever stream a caller names; of a caller's, in that which they name."""
    snapshot = make_snapshot(cache_like, 1, "bf16", layers=4, heads=2, tokens=80, dim=64)
    blob = kvzip.encode(snapshot, "channel", block_tokens=32)
    with device.current():
        theirs, beside = device.stream(), device.stream()
    current = device.stream_of(None)

    def used_before(stream: Any, memory: DeviceArray) -> None:
        size = int(np.prod(memory.shape)) * memory.itemsize
        for at in range(0, size, 64):  # many, so that some come late if they may
            device.clear(stream, memory.address + at, min(64, size - at))

    def made(*arguments: Any) -> tuple[DeviceArray, View]:
        array, view = empty(*arguments)
        used_before(current, array)
        return array, view

    device_targets.empty = made
    found = kvzip.decode(blob, device="cuda", stream=theirs)
    device_targets.empty = empty
    drained(device)
    same(found, snapshot)
    assert device.stream_of(theirs) is theirs
    out = []
    with device.current():
        for layer in snapshot.layers:
            pair = [empty(device, part.shape, get("bf16"))[0] for part in layer]
            for array in pair:
                used_before(beside, array)
            out.append(pair)
    given = [
        [Array(a.address, part, stream=int(beside)) for a, part in zip(pair, layer, strict=True)]
        for pair, layer in zip(out, snapshot.layers, strict=True)
    ]
    kvzip.decode(blob, device="cuda", out=given)
    drained(device)
    for pair, layer in zip(out, snapshot.layers, strict=True):
        for array, expected in zip(pair, layer, strict=True):
            assert np.array_equal(bits(array), expected)


def memory_that_is_not_the_devices_is_refused(device: gpu.CudaDevice) -> None:
    """Before a kernel writes to it, after which none would run any more."""
    snapshot = make_snapshot(cache_like, 1, "bf16", layers=1, heads=2, tokens=20, dim=64)
    blob, [layer] = kvzip.encode(snapshot, "raw"), snapshot.layers
    there, size = ctypes.c_void_p(), layer.k.nbytes
    ctypes.CDLL(os.environ["KVZIP_FAKE_DRIVER"]).fake_elsewhere(
        ctypes.byref(there), ctypes.c_size_t(size)
    )
    with device.current():
        mine, pinned = device.allocate(size), device.pinned(size)
    pageable = np.zeros(size, np.uint8)
    assert there.value is not None
    fixed = Array(mine.address, layer.k, data=(mine.address, True))
    for other in (
        fixed,
        Array(there.value, layer.k),
        Array(pageable.ctypes.data, layer.k),
        layer.k,  # numpy's, by DLPack
    ):
        try:
            kvzip.decode(blob, device="cuda", out=[(other, Array(mine.address, layer.v))])
        except UnsupportedError as error:
            assert "must not be written" in str(error) if other is fixed else "not " in str(error)
        else:
            raise AssertionError("it was written to")
    out = Array(mine.address, layer.k), Array(pinned.address, layer.v)
    kvzip.decode(blob, device="cuda", out=[out])
    assert np.array_equal(pinned.array.view("<u2").reshape(layer.v.shape), layer.v)
    with device.current():
        assert device.is_pinned(pinned.address, size)
        assert not device.is_pinned(pinned.address, size + 1)


def memory_is_given_back_in_any_thread(device: gpu.CudaDevice) -> None:
    """Python finds what nobody holds any more where it likes: in a thread, too, that one which has
    the device's lock waits for."""
    with device.current():
        held = [device.allocate(100), device.pinned(100), device.record(device.stream())]
        other = threading.Thread(target=held.clear, daemon=True)
        other.start()
        other.join(20)
        assert not other.is_alive(), "it waits for the lock"


def a_forked_process_is_told(device: gpu.CudaDevice) -> None:
    """At once, though a thread that was not taken along had the lock."""
    locked, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with device.current():
            locked.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    child = os.fork()
    if not child:
        told = []
        for use in (lambda: gpu.cuda_device(0), lambda: device.current().__enter__()):
            try:
                use()
            except UnsupportedError as error:
                told.append("forked" in str(error))
        os._exit(0 if told == [True, True] else 1)
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        threading.Event().wait(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    go_on.set()
    thread.join()
    assert ended and not status, "the child"


def main(folder: str, seed: str) -> None:
    kernels_by_shim(Path(folder))
    draw = random.Random(seed)
    library = FakeNvComp(compiled(Path(folder)))
    nvcomp.installed = lambda: (library, "")
    os.environ[nvcomp.ENVIRONMENT] = "off"
    device = gpu.cuda_device()
    for n in range(6):
        on_device.PIECE = draw.choice([1, 3000, 20000, 1 << 24])
        codec = ["channel", "planes", "raw", "channel", "zstd", "channel"][n]
        snapshot = make_snapshot(cache_like, n, "bf16", layers=4, heads=2, tokens=180, dim=64)
        blob = kvzip.encode(snapshot, codec, block_tokens=32)
        same(kvzip.decode(blob, device="cuda"), snapshot)
        same(kvzip.decode(blob, device="cuda:0", tokens=(20, 170)), snapshot, 20, 170)
        with device.current():
            pinned = device.pinned(len(blob))
        pinned.array[:] = np.frombuffer(blob, np.uint8)
        same(kvzip.decode(memoryview(pinned.array), device="cuda"), snapshot)
        with device.current():
            caches = [empty(device, (2, 14, 16, 2, 64), get("bf16"))[0] for _ in range(4)]
        out = []
        for cache in caches:
            k, v = (
                DeviceArray(cache, cache.address + i * 14 * 16 * 128 * 2, *_page_shape(), 2)
                for i in range(2)
            )
            out.append((k, v))
        pages = draw.sample(range(14), 12)
        kvzip.decode(blob, device="cuda", out=out, pages=pages)
        for pair, layer in zip(out, snapshot.layers, strict=True):
            for cache, expected in zip(pair, layer, strict=True):
                rows = np.concatenate([bits(cache)[page] for page in pages])[:180]
                assert np.array_equal(rows.swapaxes(0, 1), expected)
        if codec == "channel":
            bad = bytearray(blob)
            bad[-100] ^= 4
            try:
                kvzip.decode(bytes(bad), device="cuda")
            except kvzip.CorruptError as error:
                assert "layer 3 v" in str(error)
            else:
                raise AssertionError("damage was not seen")
    assert not library.decoded
    os.environ[nvcomp.ENVIRONMENT] = nvcomp.TRUSTED
    a_library_decodes(library, draw)
    layers_need_each_other(draw)
    keys_are_turned(device, draw)
    what_others_still_write_comes_before(device)
    memory_that_is_not_the_devices_is_refused(device)
    memory_is_given_back_in_any_thread(device)
    a_forked_process_is_told(device)
    parts_are_encoded(device, draw)
    try:
        kvzip.decode(blob, device="cuda:1")
    except kvzip.UnsupportedError as error:
        assert "no GPU number 1" in str(error)
    print("well")


def _page_shape():
    return (14, 16, 2, 64), (16 * 128, 128, 64, 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
