"""LMCache's chunks come back bit for bit, or are a miss.

The first part runs everywhere, on stand-ins for LMCache's memory objects. The second needs LMCache
itself (0.5.6), which `make test-lmcache` installs into an environment of its own without what it
needs on a GPU: the real registry, thread pool, memory and L2 adapter on files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import kvzip  # noqa: E402
from kvzip import api  # noqa: E402
from kvzip.errors import CorruptError, FormatError, KVZipError, SealError, UnsupportedError  # noqa: E402
from kvzip.load import lmcache as ours  # noqa: E402

GUIDE = (Path(__file__).parents[2] / "docs" / "lmcache.md").read_text()
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]
SHAPES = {
    "KV_2LTD": (2, 3, 40, 32),
    "KV_2TD": (2, 40, 32),
    "KV_T2D": (40, 2, 32),
    "KV_MLA_FMT": (1, 3, 40, 33),
    "EC_TD": (40, 32),
    "odd": (7,),
}


def tensor_of(shape: Any, dtype: Any, seed: int = 0) -> Any:
    """Numbers like a cache's where the dtype is one of numbers, any bytes elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    scale = 2.0 ** torch.linspace(-6, 3, shape[-1])
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def same(a: Any, b: Any) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Memory:
    """What the serde uses of LMCache's MemoryObj."""

    def __init__(self, *tensors: Any):
        self.tensors = tensors
        self.metadata = SimpleNamespace(shapes=[t.shape for t in tensors])
        self.byte_array = memoryview(tensors[0].view(torch.uint8).numpy().reshape(-1))

    def get_tensor(self, i: int) -> Any:
        return self.tensors[i]


def buffer(size: int) -> Memory:
    return Memory(torch.full((size,), 0x5A, dtype=torch.uint8))


def there_and_back(codec: Any, tensors: Any) -> tuple[int, int, list[Any]]:
    """Bytes written, their bound, and what comes back."""
    layout = SimpleNamespace(shapes=[t.shape for t in tensors], dtypes=[t.dtype for t in tensors])
    serializer = ours.KvzipSerializer(kvzip.get_codec(codec), 1)
    bound = serializer.estimate_serialized_size(layout)
    stored = buffer(bound)
    used = serializer.serialize(Memory(*tensors), stored, SimpleNamespace(model_name="m"))
    back = [torch.zeros_like(t) for t in tensors]
    ours.KvzipDeserializer(1).deserialize(stored, Memory(*back), None)
    return used, bound, back


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_there_and_back(shape: Any, kind: Any) -> None:
    tensor = tensor_of(shape, kind)
    used, bound, [back] = there_and_back("channel", [tensor])
    assert same(back, tensor) and used <= bound


def test_every_codec(codec: str) -> None:
    tensor = tensor_of(SHAPES["KV_2LTD"], torch.bfloat16)
    assert same(there_and_back(codec, [tensor])[2][0], tensor)


def test_several_tensors_and_any_bits() -> None:
    tensors = [
        torch.randint(0, 256, (2, 2, 16, 64), dtype=torch.uint8).view(torch.bfloat16),
        tensor_of((2, 1, 16, 8), torch.float32),
        tensor_of((16, 2, 8), torch.float8_e5m2),
    ]
    used, bound, back = there_and_back("channel", tensors)
    assert all(map(same, back, tensors)) and used <= bound


@pytest.mark.parametrize("shape", [(2, 8, 256, 256), (1, 8, 256, 576)])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.uint8], ids=str)
def test_the_bound_is_hardly_more_than_the_chunk(codec: str, shape: Any, kind: Any) -> None:
    """LMCache takes as much of its memory for each chunk that it stores or loads, and gives up all
    of them where it has not got it."""
    tensor = tensor_of(shape, kind)
    used, bound, [back] = there_and_back(codec, [tensor])
    assert same(back, tensor) and used <= bound < 1.05 * tensor.nbytes


def test_what_would_grow_is_stored_as_it_is(monkeypatch: Any) -> None:
    tensor = tensor_of(SHAPES["KV_2LTD"], torch.uint8)
    encode = kvzip.encode
    grown = lambda s, codec, **more: encode(s, codec, **more) + bytes(20000 * (codec != "raw"))  # noqa: E731
    monkeypatch.setattr(ours.chunks.api, "encode", grown)
    used, bound, [back] = there_and_back("channel", [tensor])
    assert same(back, tensor) and used <= bound


@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=5), kind=st.sampled_from(DTYPES))
def test_any_shape(shape: list[int], kind: Any) -> None:
    tensor = tensor_of(shape, kind, sum(shape))
    if tensor.numel() < 2:
        with pytest.raises(UnsupportedError):
            there_and_back("channel", [tensor])
        return
    used, bound, [back] = there_and_back("channel", [tensor])
    assert same(back, tensor) and used <= bound


def test_what_is_stored_is_smaller_and_a_kvz_file() -> None:
    tensor = tensor_of((2, 4, 256, 128), torch.bfloat16)
    serializer = ours.KvzipSerializer(kvzip.get_codec("channel"), 1)
    stored = buffer(2 * tensor.nbytes)
    key = SimpleNamespace(model_name="org/model")
    used = serializer.serialize(Memory(tensor), stored, key)
    assert used < tensor.nbytes / 1.3
    info = api.verify(bytes(stored.byte_array[:used]))
    assert info.header.origin.model == "org/model" and info.raw_bytes == tensor.nbytes


def test_damage_and_other_shapes_are_errors() -> None:
    tensor = tensor_of((2, 3, 40, 32), torch.bfloat16)
    serializer = ours.KvzipSerializer(kvzip.get_codec("channel"), 1)
    stored = buffer(2 * tensor.nbytes + 4096)
    used = serializer.serialize(Memory(tensor), stored, None)
    good = bytes(stored.byte_array)
    reader = ours.KvzipDeserializer(1)

    def load(data: bytes, into: Any = tensor) -> None:
        memory = buffer(len(data))
        memory.byte_array[:] = data
        reader.deserialize(memory, Memory(torch.empty_like(into)), None)

    load(good)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, used, 60):
        with pytest.raises((CorruptError, FormatError)):
            load(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
    for length in (0, 7, 39, used // 2, used - 1):
        with pytest.raises((CorruptError, FormatError)):
            load(good[:length])
    for other in (tensor[:, :2], tensor[..., :16], tensor.half(), tensor.view(torch.uint8)):
        with pytest.raises(UnsupportedError, match="the chunk holds"):
            load(good, other.contiguous())
    with pytest.raises(KVZipError, match="too few"):
        serializer.serialize(Memory(tensor), buffer(100), None)


def test_a_codec_with_a_profile_gives_way_to_channel(caplog: Any) -> None:
    serializer = ours.KvzipSerializer(kvzip.get_codec("predictive"), 1)
    assert serializer.codec.codec_id == "channel"
    [told] = [r.getMessage() for r in caplog.records if r.name == "kvzip.lmcache"]
    assert "'predictive'" in told and "channel is used" in told


def test_other_weights_are_a_miss(tmp_path: Path) -> None:
    """By the bytes in the folder that the model's name says, or by what the serde is told."""
    for name, data in (("a", b"weights"), ("b", b"Weights"), ("copy", b"weights")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    tensor = tensor_of((2, 3, 40, 32), torch.bfloat16)

    def load(weights: Any, name: str) -> bool:
        key = SimpleNamespace(model_name=str(tmp_path / "a"))
        stored = buffer(2 * tensor.nbytes + 4096)
        codec = kvzip.get_codec("channel")
        ours.KvzipSerializer(codec, 1).serialize(Memory(tensor), stored, key)
        back = torch.zeros_like(tensor)
        reading = SimpleNamespace(model_name=str(tmp_path / name))
        ours.KvzipDeserializer(1, weights).deserialize(stored, Memory(back), reading)
        return same(back, tensor)

    assert load(None, "a") and load(None, "copy") and load(ours.Weights(str(tmp_path / "a")), "b")
    for weights, name in (
        (None, "b"),
        (ours.Weights(revision="r1"), "a"),
        (ours.Weights(told={"quantization": "fp8"}), "a"),
        (ours.Weights(told={"adapter": "x"}), "a"),
    ):
        with pytest.raises(UnsupportedError, match="of other weights"):
            load(weights, name)


def test_a_chunk_that_failed_is_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    """LMCache's adapter on files never writes what is there; a stand-in for it does the same."""
    made: dict[str, Any] = {}

    class Plain:
        def __init__(self, config: Any):
            pass

        def _key_to_path(self, key: Any) -> Path:
            return tmp_path / key.chunk_hash

        def submit_store_task(self, keys: list[Any], objects: list[Any]) -> None:
            for key, memory in zip(keys, objects, strict=True):
                if not self._key_to_path(key).exists():
                    self._key_to_path(key).write_bytes(memory.byte_array)

    base = "lmcache.v1.distributed.l2_adapters"
    for name, members in (
        ("config", {"register_l2_adapter_type": lambda name, kind: None}),
        ("factory", {"register_l2_adapter_factory": lambda name, make: made.update(make=make)}),
        ("fs_l2_adapter", {"FSL2Adapter": Plain, "FSL2AdapterConfig": object}),
    ):
        monkeypatch.setitem(sys.modules, f"{base}.{name}", SimpleNamespace(**members))
    ours._register_adapter("kvzip_fs")
    adapter = made["make"](None)
    tensor = tensor_of((2, 3, 40, 32), torch.bfloat16)
    key = SimpleNamespace(model_name="m", chunk_hash="c", kv_rank=0)
    serializer = ours.KvzipSerializer(kvzip.get_codec("channel"), 1)
    stored = buffer(2 * tensor.nbytes)
    used = serializer.serialize(Memory(tensor), stored, key)
    chunk = Memory(stored.tensors[0][:used].clone())
    file = tmp_path / "c"

    def read() -> None:
        back = torch.zeros_like(tensor)
        data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        ours.KvzipDeserializer(1).deserialize(Memory(data), Memory(back), key)
        assert same(back, tensor)

    adapter.submit_store_task([key], [chunk])
    read()
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    adapter.submit_store_task([key], [chunk])  # nobody has seen the damage yet
    with pytest.raises(CorruptError):
        read()
    adapter.submit_store_task([key], [chunk])
    read()
    for harm in (b"", good[:-1], b"something else"):
        file.write_bytes(harm)
        adapter.submit_store_task([key], [chunk])
        read()
    changed = file.stat().st_mtime_ns
    adapter.submit_store_task([key], [chunk])
    assert file.stat().st_mtime_ns == changed  # what is whole is left alone


def test_sealed_chunks(monkeypatch: Any) -> None:
    """With a key a chunk comes back under its own name, and nothing of it is in sight; without the
    key, with another one, or under another name it is an error."""
    secret = sealing(monkeypatch)
    tensors = [tensor_of((2, 3, 40, 32), torch.bfloat16), tensor_of((3, 200), torch.float32)]
    layout = SimpleNamespace(shapes=[t.shape for t in tensors], dtypes=[t.dtype for t in tensors])
    name = SimpleNamespace(model_name="m", chunk_hash="c", kv_rank=0)
    key = ours.key_from("env:KVZIP_KEY")
    serializer = ours.KvzipSerializer(kvzip.get_codec("channel"), 1, key=key)
    stored = buffer(serializer.estimate_serialized_size(layout))
    used = serializer.serialize(Memory(*tensors), stored, name)
    data = bytes(stored.byte_array)
    assert data[8:12] == b"\x89KVS" and b"\x89KVZ" not in data and secret not in data

    def load(data: bytes, key: Any = key, name: Any = name) -> bool:
        back = [torch.zeros_like(t) for t in tensors]
        chunk = Memory(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        ours.KvzipDeserializer(1, key=key).deserialize(chunk, Memory(*back), name)
        return all(map(same, back, tensors))

    assert load(data) and load(data[:used])  # a buffer may be longer
    for at in (0, 9, 60, 140, used // 2, used - 1):
        with pytest.raises(KVZipError):
            load(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    for length in (7, 8, 100, used - 1):
        with pytest.raises(KVZipError):
            load(data[:length])
    other = SimpleNamespace(model_name="m", chunk_hash="d", kv_rank=0)
    for wrong in ({"key": None}, {"key": ours.key_from("env:ANOTHER")}, {"name": other}):
        with pytest.raises(SealError) as caught:
            load(data, **wrong)
        assert secret.hex() not in str(caught.value)
    plain = buffer(2 * sum(t.nbytes for t in tensors))
    ours.KvzipSerializer(kvzip.get_codec("channel"), 1).serialize(Memory(*tensors), plain, name)
    with pytest.raises(SealError, match="not sealed"):
        load(bytes(plain.byte_array))


def sealing(monkeypatch: Any) -> bytes:
    """The key that ``env:KVZIP_KEY`` names; ``env:ANOTHER`` names another one."""
    pytest.importorskip("cryptography")
    secret = bytes(range(1, 33))
    monkeypatch.setenv("KVZIP_KEY", secret.hex())
    monkeypatch.setenv("ANOTHER", secret[::-1].hex())
    return secret


# --- the real one ----------------------------------------------------------------------------

real = pytest.mark.skipif(
    importlib.util.find_spec("lmcache") is None, reason="needs LMCache: make test-lmcache"
)


def open_adapter(folder: Any, **serde: Any) -> Any:
    """LMCache's own L2 adapter on files with the serde, and its L1 memory."""
    from lmcache.v1.distributed.config import L1ManagerConfig, L1MemoryManagerConfig
    from lmcache.v1.distributed.l1_manager import L1Manager
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
    from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
    from lmcache.v1.distributed.l2_adapters.serde_wrapper import SerdeL2AdapterWrapper
    from lmcache.v1.distributed.serde import create_serde_processor

    ours.register()
    ours.register()  # a second time does no harm
    [text] = re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)  # what the guide says to write
    given = json.loads(text) | {"base_path": str(folder)}
    given["serde"] |= serde
    parsed = argparse.Namespace(l2_adapter=[json.dumps(given)])
    [config] = parse_args_to_l2_adapters_config(parsed).adapters
    memory = L1Manager(
        L1ManagerConfig(L1MemoryManagerConfig(size_in_bytes=64 << 20, use_lazy=False))
    )
    inner = create_l2_adapter_from_registry(config)
    processor = create_serde_processor(config.serde_config)
    return SerdeL2AdapterWrapper(inner, processor, memory), memory


@pytest.fixture
def adapter(tmp_path: Any) -> Any:
    made = open_adapter(tmp_path)
    yield made
    made[0].close()


def wait(ask: Any) -> Any:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if (found := ask()) not in (None, {}):
            return found
        time.sleep(0.01)
    raise TimeoutError


@real
def test_the_pages_command(tmp_path: Path) -> None:
    """LMCache's own command line, with kvzip registered, knows it."""
    [shell] = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    command = [sys.executable, "-m", "kvzip.load.lmcache", "server", "--help"]
    assert shell.split()[1:4] == command[1:4]
    # Not from here, where `-m` would find the sources before what is installed.
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    wanted = set(re.findall(r"--[\w-]+", shell))
    assert wanted <= set(re.findall(r"--[\w-]+", done.stdout)) and len(wanted) == 3


SHAPE = (2, 4, 256, 128)


def reserve(adapter: Any, tag: str, shape: Any = SHAPE, kind: Any = None, model: str = "") -> Any:
    """Keys of three chunks, and room for them in LMCache's memory."""
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey

    keys = [ObjectKey(bytes([i] * 16), model or "org/model", 0) for i in range(3)]
    layout = MemoryLayoutDesc([torch.Size(shape)], [kind or torch.bfloat16])
    found = adapter[1].reserve_write(keys, [False] * 3, layout, tag)
    return keys, [found[key][1] for key in keys]


def store(adapter: Any, kind: Any = torch.bfloat16) -> tuple[Any, Any, list[Any]]:
    """Keys and memory of three chunks that were stored, and what they held."""
    keys, memory = reserve(adapter, "w", kind=kind)
    tensors = [tensor_of(SHAPE, kind, i) for i in range(3)]
    for one, tensor in zip(memory, tensors, strict=True):
        one.tensor.copy_(tensor)
    task = adapter[0].submit_store_task(keys, memory)
    assert wait(adapter[0].pop_completed_store_tasks)[task].is_successful()
    for one in memory:
        one.tensor.zero_()
    return keys, memory, tensors


def load(adapter: Any, keys: Any, memory: Any) -> list[bool]:
    task = adapter[0].submit_load_task(keys, memory)
    loaded = wait(lambda: adapter[0].query_load_result(task))
    return [loaded.test(i) for i in range(len(keys))]


@real
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_through_lmcache_itself(adapter: Any, tmp_path: Any, kind: Any) -> None:
    keys, memory, tensors = store(adapter, kind)
    files = sorted(tmp_path.rglob("*.data"))
    assert len(files) == 3
    for file in files:
        assert api.verify(file).raw_bytes == tensors[0].nbytes
        assert file.stat().st_size < tensors[0].nbytes
    assert load(adapter, keys, memory) == [True] * 3
    assert all(same(one.tensor, t) for one, t in zip(memory, tensors, strict=True))


@real
@pytest.mark.parametrize("how", ["damaged", "cut", "gone"])
def test_a_chunk_that_fails_is_a_miss_for_lmcache(adapter: Any, tmp_path: Any, how: str) -> None:
    """LMCache gives up a whole task for one of its chunks; asked for alone, the others come."""
    keys, memory, tensors = store(adapter)
    file = sorted(tmp_path.rglob("*.data"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data if how == "damaged" else data[:-100])
    assert not load(adapter, keys, memory)[1]
    for i, right in enumerate((True, False, True)):
        assert load(adapter, keys[i : i + 1], memory[i : i + 1]) == [right]
        assert not right or same(memory[i].tensor, tensors[i])


@real
@pytest.mark.parametrize(
    "other",
    [
        {"shape": (2, 3, 256, 128)},
        {"shape": (2, 4, 256, 64)},
        {"kind": torch.float16},
        {"model": "org/other"},
    ],
    ids=["a layer fewer", "smaller heads", "dtype", "model"],
)
def test_chunks_of_something_else_are_a_miss_for_lmcache(adapter: Any, other: Any) -> None:
    store(adapter)
    assert load(adapter, *reserve(adapter, "r", **other)) == [False] * 3
    assert load(adapter, *reserve(adapter, "same")) == [True] * 3


@real
def test_sealed_through_lmcache_itself(tmp_path: Any, monkeypatch: Any, caplog: Any) -> None:
    """Its adapter on files refuses another key, or none, when it is made."""
    secret = sealing(monkeypatch)
    for file in "sealed", "plain":
        (tmp_path / file).mkdir()
    adapter = open_adapter(tmp_path / "sealed", key_from="env:KVZIP_KEY")
    keys, memory, tensors = store(adapter)
    files = sorted((tmp_path / "sealed").rglob("*.data"))
    assert len(files) == 3 and all(f.read_bytes()[8:12] == b"\x89KVS" for f in files)
    stamps = [f.stat().st_mtime_ns for f in files]
    assert load(adapter, keys, memory) == [True] * 3
    assert all(same(one.tensor, t) for one, t in zip(memory, tensors, strict=True))
    task = adapter[0].submit_store_task(keys, memory)  # what is whole is left alone
    assert wait(adapter[0].pop_completed_store_tasks)[task].is_successful()
    assert stamps == [f.stat().st_mtime_ns for f in files]
    data = files[1].read_bytes()
    files[1].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not load(adapter, keys, memory)[1]
    adapter[0].close()
    for other in ("env:ANOTHER", None):
        with pytest.raises(SealError) as caught:
            open_adapter(tmp_path / "sealed", key_from=other)
        assert secret.hex() not in str(caught.value)
    assert secret.hex() not in caplog.text


GROUPS: dict[int, list[tuple[tuple[int, ...], Any]]] = {
    0: [((2, 2, 64, 128), torch.bfloat16)],  # layers of full attention
    1: [((2, 4, 64, 128), torch.bfloat16)],  # sliding ones
    2: [((1, 3, 64, 576), torch.bfloat16)],  # latents (MLA)
    3: [((1, 3, 64, 132), torch.uint8)],  # an indexer's keys with their scales
    4: [((4, 32, 3), torch.bfloat16), ((4, 8, 16, 16), torch.float32)],  # states of two tensors
    5: [((2, 2, 64, 128), torch.float8_e4m3fn)],
}
"""Object groups of LMCache: what each of its objects holds."""


@real
def test_object_groups(adapter: Any, tmp_path: Any) -> None:
    """A model of several groups of layers: of each chunk an object for each group, with shapes and
    dtypes of its own. What is damaged of one is a miss of that one, and is replaced."""
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey

    def object_of(group: int, tag: str) -> tuple[Any, Any]:
        key = ObjectKey(bytes([7] * 16), "org/model", 0, group)
        shapes = [torch.Size(shape) for shape, _ in GROUPS[group]]
        layout = MemoryLayoutDesc(shapes, [kind for _, kind in GROUPS[group]])
        return key, adapter[1].reserve_write([key], [False], layout, tag)[key][1]

    def put(key: Any, memory: Any) -> None:
        task = adapter[0].submit_store_task([key], [memory])
        assert wait(adapter[0].pop_completed_store_tasks)[task].is_successful()

    held = {group: object_of(group, "w") for group in GROUPS}
    tensors = {
        group: [tensor_of(shape, kind, group + i) for i, (shape, kind) in enumerate(found)]
        for group, found in GROUPS.items()
    }
    for group, (key, memory) in held.items():
        for i, tensor in enumerate(tensors[group]):
            memory.get_tensor(i).copy_(tensor)
        put(key, memory)
    assert len(list(tmp_path.rglob("*.data"))) == len(GROUPS)

    def come(group: int) -> bool:
        key, memory = held[group]
        found = [memory.get_tensor(i) for i in range(len(tensors[group]))]
        for one in found:
            one.zero_()
        [loaded] = load(adapter, [key], [memory])
        assert not loaded or all(map(same, found, tensors[group]))
        return loaded

    assert all(come(group) for group in GROUPS)
    [file] = tmp_path.rglob("*@4@*.data")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert [come(group) for group in GROUPS] == [group != 4 for group in GROUPS]
    key, memory = held[4]
    for i, tensor in enumerate(tensors[4]):
        memory.get_tensor(i).copy_(tensor)
    put(key, memory)
    assert come(4)


@real
def test_as_a_serde_of_several_tensors() -> None:
    """LMCache's newest interface takes a tuple of objects; one of one object is ours."""
    from lmcache.v1.distributed.serde.multi import (
        single_to_multi_deserializer,
        single_to_multi_serializer,
    )

    tensor = tensor_of(SHAPES["KV_2LTD"], torch.bfloat16)
    layout = SimpleNamespace(shapes=[tensor.shape], dtypes=[tensor.dtype])
    writer = single_to_multi_serializer(ours.KvzipSerializer(kvzip.get_codec("channel"), 1))
    reader = single_to_multi_deserializer(ours.KvzipDeserializer(1))
    stored = buffer(writer.estimate_serialized_size((layout,)))
    key = SimpleNamespace(model_name="m")
    assert writer.group_size == reader.group_size == 1
    assert writer.serialize((Memory(tensor),), stored, key) < tensor.nbytes
    back = torch.zeros_like(tensor)
    reader.deserialize(stored, (Memory(back),), key)
    assert same(back, tensor)
