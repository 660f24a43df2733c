"""Encoding on a device: the bytes that the CPU writes."""

from __future__ import annotations

import copy
import pickle
import weakref

import numpy as np
import pytest
import torch
from support import cache_like, make_snapshot, random_bits
from test_turned_on_device import SHAPES, kinds, turned

import kvzip
from kvzip import dtypes
from kvzip.benchmarks import gpu as gpu_bench
from kvzip.codec import Context, get_codec
from kvzip.codecs.channel import gpu_encoding
from kvzip.codecs.channel.blocks import CODED, RAW, UNTURNED
from kvzip.codecs.common import device_angles
from kvzip.codecs.common.rotation import ROUNDINGS
from kvzip.codecs.native.cuda.device import MemoryFullError
from kvzip.codecs.native.cuda.encoding import MOST_ROOMS, Numbers
from kvzip.codecs.native.cuda.shim_device import ShimDevice
from kvzip.codecs.native.cuda.work import Target
from kvzip.container import writer
from kvzip.dtypes import DeviceBits
from kvzip.snapshot import Layer, Origin, Snapshot

DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2", "fp8_e5m2fnuz")


def numbers(form, shape, seed, escapes=0, constants=False):
    """Numbers whose exponents differ from channel to channel; some are far from all others."""
    random = np.random.default_rng(seed)
    wide = random.standard_normal(shape).astype(np.float32)
    wide *= np.exp2(random.integers(-4, 3, (1, shape[1], 1, shape[3]))).astype(np.float32)
    if escapes:
        far = random.random(shape) < 1 / escapes
        wide[far] *= np.exp2(random.integers(-12, 12, int(far.sum()))).astype(np.float32)
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(
        form.name, form.name.replace("fp8", "float8")
    )
    tensor = torch.from_numpy(wide).to(getattr(torch, name))
    bits = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[form.itemsize]).numpy()
    bits = bits.view(f"u{form.itemsize}").copy()
    if constants:
        bits[..., ::3] = bits[:1, :, :1, ::3]
    return bits


# --- a part --------------------------------------------------------------------------------


def check(device, room, form, bits, size, pages=0):
    """Every block, its tables and its checksum are what the CPU makes."""
    codec = get_codec("channel")
    context = Context(form, 0, "v", 0, Origin())
    batch, heads, tokens, dim = bits.shape
    signed = torch.from_numpy(bits.view(f"i{form.itemsize}" if form.itemsize > 1 else "u1"))
    if pages:
        count = -(-tokens // pages)
        table = np.random.default_rng(1).permutation(count).astype(np.int32)
        flat, paged = room.tensor((count, batch, heads, pages, dim), form.itemsize)
        for t in range(tokens):
            paged[int(table[t // pages]), :, :, t % pages] = signed[:, :, t].to(room.where)
        strides = (heads * pages * dim, pages * dim, dim)
        target = Target(
            paged.data_ptr(), strides, bits.shape, 0, table, pages, strides[0] * batch, flat
        )
    else:
        flat, whole = room.tensor(bits.shape, form.itemsize)
        whole.copy_(signed)
        target = Target(whole.data_ptr(), whole.stride()[:3], bits.shape, 0, owner=flat)
    if room.where == "cuda":
        torch.cuda.synchronize()
    spans = [(first, min(size, tokens - first)) for first in range(0, tokens, size)]
    part = Numbers(target, lambda begin, end: bits[:, :, begin:end], spans, context)
    (found,) = codec.encode_on_device(device, [part])
    assert found is not None
    assert found.tables == codec.make_tables(bits, context)
    tables = codec.load_tables(memoryview(found.tables), bits.shape, context)
    context = Context(form, 0, "v", 0, Origin(), tables=tables)
    blocks = [bits[:, :, first : first + n] for first, n in spans]
    assert found.blocks == [codec.encode(block, context) for block in blocks]
    assert found.checksums == [kvzip.checksum.of_numbers(block) for block in blocks]
    assert any(block[0] != RAW for block in found.blocks)
    return found


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        # Whole strips: several streams.
        *((dtype, (1, 2, 256, 128), 256) for dtype in ("bf16", "fp32", "fp8_e4m3fn")),
        *((dtype, (1, 1, 300, 64), 128) for dtype in DTYPES),  # the last group is shorter
        *((dtype, (2, 3, 140, 36), 70) for dtype in DTYPES),  # two states a thread
        *((dtype, (1, 2, 150, 80), 24) for dtype in DTYPES),  # one
    ],
)
@pytest.mark.drawn(4)
def test_blocks_are_what_the_cpu_writes(device, room, dtype, shape, size):
    form = dtypes.get(dtype)
    check(device, room, form, numbers(form, shape, 3), size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.drawn(2)
def test_escapes_and_constant_channels(device, shuffled, room, dtype):
    form = dtypes.get(dtype)
    check(device, room, form, numbers(form, (1, 2, 200, 64), 5, escapes=40, constants=True), 128)
    check(shuffled, room, form, numbers(form, (1, 1, 140, 64), 6, escapes=15), 128)


@pytest.mark.parametrize("pages", [16, 10])
def test_from_pages(device, room, pages):
    form = dtypes.get("bf16")
    check(device, room, form, numbers(form, (1, 2, 144, 64), 7), 128, pages)


def test_what_does_not_get_shorter_is_stored_as_it_is(device, room):
    """A block of few numbers, which take less than what begins a coded one."""
    form = dtypes.get("bf16")
    for size, last in ((64, RAW), (131, CODED)):
        found = check(device, room, form, numbers(form, (1, 1, 131, 8), 8), size)
        assert found.blocks[0][0] == CODED and found.blocks[-1][0] == last


def test_too_many_escapes_are_for_the_cpu(device):
    form, codec = dtypes.get("bf16"), get_codec("channel")
    bits = random_bits(np.random.default_rng(0), "bf16", (1, 2, 200, 64))
    target = Target(bits.ctypes.data, (0, 200 * 64, 64), bits.shape, 0, owner=bits)
    if device.kind == "shim":
        part = Numbers(
            target,
            lambda begin, end: bits[:, :, begin:end],
            [(0, 200)],
            Context(form, 0, "v", 0, Origin()),
        )
        assert codec.encode_on_device(device, [part]) == [None]


# --- a snapshot ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def tensors_stay(monkeypatch, room):
    """Where there is no GPU, tensors of the CPU count as lying in the shim's memory."""
    if room.where == "cpu":
        monkeypatch.setattr(dtypes, "on_gpu", lambda tensor: True)


def moved(snapshot, room, order=None):
    """The same snapshot on the device; `order`: how its parts' axes lie in memory."""

    def one(bits, form):
        tensor = dtypes.as_tensor(np.array(bits), form.name)
        if order is not None:
            back = np.argsort(order).tolist()
            tensor = tensor.permute(order).contiguous().permute(back)
        return dtypes.held_bits(tensor.to(room.where))[0]

    layers = []
    for layer in snapshot.layers:
        layout = layer.layout
        parts = {name: one(bits, layout.parts[name].form) for name, bits in layer.parts.items()}
        layers.append(Layer(parts, layout))
    return Snapshot(layers, snapshot.dtype, snapshot.token_ids, snapshot.origin)


def same(device, snapshot, there, codec="channel", profile=None, by_device=None, **options):
    """The file from the device, which is the file from the CPU; `by_device`: how many parts the
    device encoded."""
    expected = kvzip.encode(snapshot, codec, profile, **options)
    done = []
    method = type(get_codec(codec)).encode_on_device

    def counting(self, where, parts):
        found = method(self, where, parts)
        done.extend(one is not None for one in found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_codec(codec)), "encode_on_device", counting)
        found = kvzip.encode(there, codec, profile, device=device, **options)
    assert found == expected
    parts = sum(len(layer.layout.parts) for layer in snapshot.layers)
    assert sum(done) == (parts if by_device is None else by_device)
    return found


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("dim", "pairs"), SHAPES)
@pytest.mark.drawn(4)
def test_keys_before_rope(device, shuffled, room, dim, pairs, rounding):
    heads = 8 if dim < 48 else 2
    snapshot = turned(dim, dim, pairs, rounding, heads, 150)
    there = moved(snapshot, room)
    for where in (device, shuffled):
        blob = same(where, snapshot, there, block_tokens=64)
        assert set(kinds(blob)["k"]) == {UNTURNED}


@pytest.mark.parametrize(("batch", "first"), [(2, 0), (None, 20000), (3, 20000)])
def test_batches_and_positions(device, room, monkeypatch, batch, first):
    monkeypatch.setattr(gpu_encoding, "_PAIRS", 100)
    monkeypatch.setattr(device_angles, "_TOGETHER", 16 * 70)
    snapshot = turned(5, 32, 16, 1, 2, 200, batch, 2, first)
    blob = same(device, snapshot, moved(snapshot, room), block_tokens=60)
    assert set(kinds(blob)["k"]) == {UNTURNED}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.drawn(2)
def test_files(device, room, dtype, monkeypatch):
    """Of several parts together, and one by one; parts that the CPU does among them."""
    random = make_snapshot(random_bits, 1, dtype, layers=1, heads=2, tokens=200, dim=64)
    good = make_snapshot(cache_like, 2, dtype, layers=2, heads=2, tokens=200, dim=64)
    short = make_snapshot(cache_like, 3, dtype, layers=1, heads=2, tokens=200, dim=64)
    snapshot = Snapshot([*good.layers, *random.layers, *short.layers], dtype)
    there = moved(snapshot, room)
    for together in (1, 100_000, 1 << 30):
        monkeypatch.setattr(writer, "_TOGETHER", together)
        for threads in (1, 3):
            expected = kvzip.encode(snapshot, block_tokens=64)
            found = kvzip.encode(there, block_tokens=64, threads=threads, device=device)
            assert found == expected


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 1, 2), None])
def test_any_strides(device, room, order):
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=1, heads=3, tokens=140, dim=64)
    same(device, snapshot, moved(snapshot, room, order), block_tokens=100)


def test_numbers_apart_are_for_the_cpu(device, room):
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=1, heads=3, tokens=140, dim=64)
    same(device, snapshot, moved(snapshot, room, (0, 2, 1)), by_device=0)


@pytest.mark.parametrize("keys", ["before_rope", "cached"])
@pytest.mark.parametrize("tokens", [30, 128, 150])
def test_with_a_profile(device, room, keys, tokens):
    """Its tables for keys before RoPE, those as cached, and tables of a part's own."""
    learned = [turned(seed, 32, 16, 2, 2, 300) for seed in (7, 7)]
    profile = kvzip.Profile.fit(learned, codec="channel")
    codec = f"channel:keys={keys}"
    for seed in (7, 8):
        snapshot = turned(seed, 32, 16, 2, 2, 300)
        layers = []
        for layer in snapshot.layers:
            k, v = (np.ascontiguousarray(part[:, :tokens]) for part in layer)
            layout = kvzip.LayerLayout.of_kv(
                k.shape, v.shape, "bf16", tokens, rope=layer.layout.rope
            )
            layers.append(Layer.of_kv(k, v, layout))
        cut = Snapshot(layers, "bf16", origin=snapshot.origin)
        expected = kvzip.encode(cut, codec, profile)
        assert kvzip.encode(moved(cut, room), codec, profile, device=device) == expected
        if seed == 7 and tokens > 30:  # of so few the tables are not always seen to fit
            same(device, cut, moved(cut, room), codec, profile)


def test_too_few_keys_before_rope(device, room):
    """The last tokens say that there are, and the others that there are not."""
    snapshot = turned(9, 32, 16, 1, 2, 400)
    rng = np.random.default_rng(0)
    for layer in snapshot.layers:
        rare = rng.random(layer.k[:, :250].shape) < 0.05
        layer.k[:, :250][rare] ^= 1
    blob = same(device, snapshot, moved(snapshot, room))
    assert UNTURNED not in kinds(blob)["k"]


def test_few_tokens_and_none(device, room):
    for tokens, made in ((0, 0), (1, 0), (128, 0), (129, 4)):
        snapshot = make_snapshot(cache_like, 4, "bf16", layers=2, heads=2, tokens=tokens, dim=64)
        same(device, snapshot, moved(snapshot, room), by_device=made)


@pytest.mark.parametrize("codec", ["raw", "planes", "zstd", "auto"])
def test_other_codecs_copy(device, room, codec):
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=2, heads=2, tokens=140, dim=64)
    expected = kvzip.encode(snapshot, codec)
    assert kvzip.encode(moved(snapshot, room), codec, device=device) == expected


def test_what_is_on_a_grid_is_for_the_cpu(device, room):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, 2, 2, 512, 64, generator=generator)
    narrow = numbers.to(torch.float8_e4m3fn).to(torch.bfloat16)
    snapshot = Snapshot.from_arrays([tuple(pair) for pair in narrow.cpu().unbind()])
    snapshot = Snapshot(
        [Layer(dict(layer.parts), layer.layout) for layer in snapshot.layers], "bf16"
    )
    blob = same(device, snapshot, moved(snapshot, room), by_device=0)
    with kvzip.open(blob) as reader:
        assert reader.header.grids


# --- where the numbers are -----------------------------------------------------------------


def test_tensors_are_not_copied_before_they_are_read(device, room):
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=2, heads=2, tokens=140, dim=64)
    tensors = [[t.to(room.where) for t in pair] for pair in snapshot.tensors()]
    there = Snapshot.from_arrays(tensors, None, snapshot.token_ids, snapshot.origin)
    assert there.layout == snapshot.layout and not there.layers[0].held()
    assert there.layers[0].on_device("k").tensor.data_ptr() == tensors[0][0].data_ptr()
    same(device, snapshot, there)
    assert not there.layers[0].held()
    assert there == snapshot
    assert np.array_equal(there.layers[1].v, snapshot.layers[1].v)
    for row in range(2):
        assert np.array_equal(there.layers[0].lines("k", row, 3, 9), snapshot.layers[0].k[row, 3:9])
    # What was looked at may have been changed, and counts.
    assert there.layers[1].on_device("v") is None
    there.layers[1].v[0, 0, 0] ^= 1
    snapshot.layers[1].v[0, 0, 0] ^= 1
    there.layers[0].k = snapshot.layers[0].k = np.zeros_like(snapshot.layers[0].k)
    same(device, snapshot, there, by_device=2)


def test_threads_look_at_parts_at_once(room):
    """Whatever another thread copies at any time: what was on the device is held then."""
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=1, heads=2, tokens=40, dim=64)
    there = moved(snapshot, room)
    layer = there.layers[0]

    class Looked(DeviceBits):
        @property
        def shape(self):
            layer.part("v")
            return tuple(self.tensor.shape)

    class Missed(dict):
        def get(self, name, default=None):
            found = super().get(name, default)
            layer._put(name, snapshot.layers[0].part(name))
            return found

    k = layer.on_device("k")[0]
    layer._on_device["k"] = Looked(k.tensor, k.form)
    there.check()
    assert layer.on_device("v") is None
    layer._held = Missed(layer._held)
    assert np.array_equal(layer.once("k"), snapshot.layers[0].k)


def test_copies_are_the_hosts(room, tmp_path):
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=1, heads=2, tokens=40, dim=64)
    there = moved(snapshot, room)
    for made in (copy.deepcopy(there), pickle.loads(pickle.dumps(there))):
        assert made == snapshot and made.layers[0].on_device("k") is None
    there.save(tmp_path / "one.safetensors")
    assert Snapshot.load(tmp_path / "one.safetensors") == snapshot
    assert kvzip.encode(there, device="cpu") == kvzip.encode(snapshot)
    for mine, other in zip(there.tensors()[0], snapshot.tensors()[0], strict=True):
        assert torch.equal(mine, other)


def test_batches_are_read_by_rows(room):
    rng = np.random.default_rng(0)
    pair = [cache_like(rng, "bf16", (2, 3, 20, 8)) for _ in range(2)]
    snapshot = Snapshot.from_arrays([pair], "bf16")
    there = moved(snapshot, room, (0, 2, 1, 3))
    for row in range(6):
        got = there.layers[0].lines("v", row, 5, 20)
        assert np.array_equal(got, snapshot.layers[0].v[row // 3, row % 3, 5:])


def test_bits_of_another_shape_are_refused(room):
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=1, heads=2, tokens=40, dim=64)
    there = moved(snapshot, room)
    k = there.layers[0].on_device("k")
    layout = there.layers[0].layout
    for wrong in (k[0, :, :30], DeviceBits(k[0].tensor, dtypes.get("fp16"))):
        with pytest.raises(kvzip.UsageError, match="layer 0: k is not as its layout says"):
            Snapshot([Layer({"k": wrong, "v": snapshot.layers[0].v}, layout)], "bf16")


def test_tensors_of_no_format_are_refused(room):
    for tensor, words in (
        (torch.zeros(2, 3, 4, dtype=torch.complex64), "holds no numbers of ours"),
        (torch.zeros(2, 3, 4, dtype=torch.int16), "say dtype="),
    ):
        with pytest.raises(kvzip.UnsupportedError, match=words):
            Snapshot.from_arrays([(tensor.to(room.where),) * 2])


# --- devices that cannot -------------------------------------------------------------------


def test_where_there_is_no_gpu(room, monkeypatch):
    """By default nobody asks for one."""
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=2, heads=2, tokens=140, dim=64)

    def none(spec):
        raise kvzip.UnsupportedError("a GPU needs CUDA for Python")

    monkeypatch.setattr(writer, "get_device", none)
    for device in (None, "cpu", torch.device("cpu")):
        assert kvzip.encode(moved(snapshot, room), device=device) == kvzip.encode(snapshot)
    with pytest.raises(kvzip.UnsupportedError, match="CUDA for Python"):
        kvzip.encode(snapshot, device="cuda")


def test_what_lies_on_another_device_is_for_the_cpu(device, room, monkeypatch):
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=2, heads=2, tokens=140, dim=64)
    monkeypatch.setattr(type(device), "holds", lambda self, tensor: False)
    same(device, snapshot, moved(snapshot, room), by_device=0)


def test_into_files_and_memory(device, room, tmp_path):
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=2, heads=2, tokens=300, dim=64)
    there, expected = moved(snapshot, room), kvzip.encode(snapshot)
    done = []
    kvzip.write(tmp_path / "a.kvz", there, device=device, progress=done.append)
    assert (tmp_path / "a.kvz").read_bytes() == expected and sum(done) == snapshot.raw_bytes
    store = kvzip.store.Store(tmp_path / "store")
    store.put(there, device=device)
    (path,) = (tmp_path / "store").rglob("*.kvz")
    assert path.read_bytes() == expected and not there.layers[0].held()
    memory = bytearray(kvzip.max_encoded_size(there))
    assert kvzip.encode(there, device=device, out=memory) == expected


def test_few_encodings_go_on_beside_each_other(room, monkeypatch):
    """However many threads there are: each takes memory of the device."""
    device = ShimDevice()
    monkeypatch.setattr(writer, "_TOGETHER", 1)
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=6, heads=1, tokens=140, dim=64)
    monkeypatch.setattr(dtypes, "on_gpu", lambda tensor: True)
    there = Snapshot.from_arrays(snapshot.tensors(), None, snapshot.token_ids, snapshot.origin)
    assert kvzip.encode(there, threads=8, device=device) == kvzip.encode(snapshot)
    assert 1 <= len(device.cache["rooms"]) <= MOST_ROOMS


def test_a_part_goes_by_pieces(device, room, monkeypatch):
    """Where its streams take more than there is to be room for; blocks as they are among them."""
    snapshot = turned(5, 32, 16, 1, 2, 300)
    snapshot.layers[0].v[:, 130:150] = np.random.default_rng(0).integers(0, 1 << 16, (2, 20, 32))
    there = moved(snapshot, room)
    for most in (1, 20_000, 50_000):
        monkeypatch.setattr(gpu_encoding, "_ROOMS", most)
        assert kvzip.encode(there, block_tokens=10, device=device) == kvzip.encode(
            snapshot, block_tokens=10
        )


def test_constants_alone(device, room):
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=2, heads=2, tokens=140, dim=64)
    for layer in snapshot.layers:
        layer.k[:] = layer.k[:, :1]
        layer.v[:] = 7
    # Values that are all one number are on a grid, too.
    same(device, snapshot, moved(snapshot, room), block_tokens=60, by_device=2)


def test_without_memory_the_cpu_goes_on(room, monkeypatch):
    """Whatever was under way, and at any step."""
    device = ShimDevice()
    monkeypatch.setattr(dtypes, "on_gpu", lambda tensor: True)
    snapshot = turned(5, 32, 16, 1, 2, 200)
    there = Snapshot(
        [
            Layer({n: dtypes.held_bits(t)[0] for n, t in zip("kv", pair, strict=True)}, one.layout)
            for pair, one in zip(snapshot.tensors(), snapshot.layers, strict=True)
        ],
        "bf16",
        origin=snapshot.origin,
    )
    expected, allocate = kvzip.encode(snapshot), device.allocate
    left = [0]

    def allocating(size):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryFullError("GPU 0 has no memory left")
        return allocate(size)

    monkeypatch.setattr(device, "allocate", allocating)
    for count in range(40):
        device.cache.clear()
        left[0] = count
        assert kvzip.encode(there, device=device) == expected
    assert left[0] >= 0, "at last there is enough"


def test_what_is_looked_at_leaves_the_device(room):
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=1, heads=2, tokens=40, dim=64)
    there = moved(snapshot, room)
    there.tensors()
    assert there.layers[0].on_device("k") is not None
    kept = [weakref.ref(there.layers[0]._on_device[name].tensor) for name in "kv"]
    assert there.layers[0].k is there.layers[0].k
    there.layers[0].v = snapshot.layers[0].v
    assert not any(one() is not None for one in kept)


def test_arrays_of_too_few_axes_are_refused(room):
    for shape in ((), (5,), (5, 6)):
        tensor = torch.zeros(shape, dtype=torch.bfloat16).to(room.where)
        for given in (tensor, tensor.cpu()):
            with pytest.raises(kvzip.UsageError, match="want \\[heads, tokens, dim\\]"):
                Snapshot.from_arrays([(given, given)])


@pytest.mark.parametrize("seed", range(120))
@pytest.mark.drawn(6)
def test_any_snapshot(device, shuffled, room, seed):
    """Of any format, shape and numbers, strange ones among them; any RoPE; with profiles."""
    rng = np.random.default_rng(seed)
    tokens, heads = int(rng.choice([1, 127, 129, 200, 333])), int(rng.integers(1, 4))
    batch = None if rng.random() < 0.7 else int(rng.integers(1, 3))
    if rng.random() < 0.6:
        dim = 2 * int(rng.integers(1, 40))
        pairs, first = int(rng.integers(1, dim // 2 + 1)), int(rng.choice([0, 77, 1 << 20]))
        exceptions = float(rng.choice([0, 0.002, 0.0098, 0.0102]))
        snapshot = turned(
            seed, dim, pairs, int(rng.choice(ROUNDINGS)), heads, tokens, batch, 2, first, exceptions
        )
    else:
        dtype, dim = str(rng.choice(DTYPES)), int(rng.integers(1, 80))
        shape = (*(() if batch is None else (batch,)), heads, tokens, dim)
        layers = [[cache_like(rng, dtype, shape) for _ in range(2)] for _ in range(2)]
        snapshot = Snapshot.from_arrays(layers, dtype)
    for layer in snapshot.layers:
        for bits in layer:
            strange = rng.random(bits.shape) < rng.choice([0, 0.001, 0.02])
            bits[strange] = random_bits(rng, snapshot.dtype, bits.shape)[strange]
    last = snapshot.layers[0].k.ndim - 1
    order = [*rng.permutation(last).tolist(), last]
    options = {"block_tokens": int(rng.choice([1, 16, 100, 1000]))}
    if tokens > 1 and rng.random() < 0.4:
        options["profile"] = kvzip.Profile.fit([snapshot], codec="channel")
    codec = f"channel:keys={rng.choice(['before_rope', 'cached'])}"
    where = shuffled if seed % 2 else device
    found = kvzip.encode(moved(snapshot, room, order), codec, device=where, **options)
    assert found == kvzip.encode(snapshot, codec, **options)


def test_what_the_benchmark_measures(device, room):
    """Each of its rows is of kernels that run, and what they give is compared."""
    snapshot = make_snapshot(cache_like, 4, "bf16", layers=2, heads=2, tokens=200, dim=64)
    snapshot = Snapshot(snapshot.layers, "bf16")
    blob = kvzip.encode(snapshot)
    rows = list(gpu_bench.encoding_rows(device, moved(snapshot, room), snapshot, blob, 2))
    assert len(rows) == 3
    assert all(raw == snapshot.raw_bytes and min(seconds) > 0 for _, raw, seconds in rows)
    with pytest.raises(AssertionError, match="another file"):
        list(gpu_bench.encoding_rows(device, moved(snapshot, room), snapshot, blob[:-1], 2))
    with kvzip.open(blob) as reader:
        launch = gpu_bench.kernels_only(device, reader)
    before = len(getattr(device, "launched", ()))
    launch()
    assert device.kind != "shim" or len(device.launched) > before
