"""Decoding on a device gives the bits that were encoded, and touches nothing else."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import UNLIKE_PAIRS, cache_like, examples, make_snapshot, random_bits

import kvzip
from kvzip import dtypes
from kvzip.container import on_device
from kvzip.errors import UnsupportedError, UsageError


def bits_of(array):
    """The numbers' bits on the host."""
    if not isinstance(array, torch.Tensor):
        return np.asarray(array)
    array = array.cpu()
    return dtypes.as_bits(array)[0] if array.dtype.is_floating_point else array.numpy()


def assert_layers(found, layers, tokens=None):
    assert len(found.layers) == len(layers)
    for mine, layer in zip(found.layers, layers, strict=True):
        for array, expected in zip(mine, layer, strict=True):
            first = layer.layout.first
            if tokens is not None:
                begin, end = (max(t - first, 0) for t in tokens)
                expected = expected[..., begin:end, :]
            got = bits_of(array)
            assert got.shape == expected.shape
            assert np.array_equal(got.view(expected.dtype), expected)


def mixed(rng, dtype, shape):
    """Numbers like a cache's, some channels constant, some numbers of any bits."""
    out = np.array(cache_like(rng, dtype, shape))
    for channel in range(shape[-1]):
        if rng.random() < 0.1:
            out[..., channel] = out[..., :1, channel] if out.shape[-2] else 0
    rare = rng.random(shape) < 0.002
    out[rare] = random_bits(rng, dtype, shape)[rare]
    return out


@pytest.mark.parametrize(("codec", "dtype"), UNLIKE_PAIRS)
@given(data=st.data())
@examples(2)
def test_any_shape_and_any_bits(device, codec, dtype, data):
    draw = data.draw
    snapshot = make_snapshot(
        draw(st.sampled_from([random_bits, cache_like, mixed])),
        draw(st.integers(0, 2**32)),
        dtype,
        layers=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        tokens=draw(st.integers(0, 200)),
        dim=draw(st.sampled_from([1, 2, 7, 16, 64, 65, 130])),
        batch=draw(st.sampled_from([None, 1, 2])),
    )
    block_tokens = draw(st.sampled_from([16, 100, 1024]))
    blob = kvzip.encode(snapshot, codec, block_tokens=block_tokens, threads=1)
    assert_layers(kvzip.decode(blob, device=device), snapshot.layers)
    begin = draw(st.integers(0, snapshot.tokens))
    span = begin, draw(st.integers(begin, snapshot.tokens))
    part = kvzip.decode(blob, device=device, tokens=span)
    assert_layers(part, snapshot.layers, span)
    assert part.token_ids.shape[-1] == span[1] or not part.layers[0].layout.stored


@pytest.mark.parametrize("codec", ["channel", "raw"])
def test_bytes_that_several_threads_bring(device, monkeypatch, tmp_path, codec):
    """Out of memory, a file and a file object that can only be read."""
    monkeypatch.setattr(on_device, "_SHARE", 1000)
    snapshot = make_snapshot(cache_like, 6, "bf16", layers=2, heads=2, tokens=300, dim=64)
    path = tmp_path / "doc.kvz"
    path.write_bytes(kvzip.encode(snapshot, codec))
    for source in (path.read_bytes(), path, io.BytesIO(path.read_bytes())):
        assert_layers(kvzip.decode(source, device=device), snapshot.layers)


@pytest.mark.parametrize(("codec", "dtype"), UNLIKE_PAIRS)
@pytest.mark.drawn(4)
def test_a_whole_head_of_128_tokens_and_more(device, shuffled, codec, dtype):
    """Where the kernels take their fastest way, beside where they cannot."""
    snapshot = make_snapshot(mixed, 3, dtype, layers=1, heads=2, tokens=390, dim=128)
    blob = kvzip.encode(snapshot, codec, block_tokens=256)
    for where in (device, shuffled):
        assert_layers(kvzip.decode(blob, device=where), snapshot.layers)


def test_layers_in_any_order(device, codec):
    snapshot = make_snapshot(cache_like, 1, "bf16", layers=4, tokens=70)
    blob = kvzip.encode(snapshot, codec, block_tokens=32)
    with kvzip.open(blob) as reader:
        found = reader.decode(layers=[3, 0, 2], device=device)
        seen = []
        reader.decode(device=device, progress=seen.append)
    assert_layers(found, [snapshot.layers[i] for i in (3, 0, 2)])
    assert sum(seen) == snapshot.raw_bytes
    assert found.dtype == "bf16" and found.tokens == 70 and len(found.tensors()) == 3


def test_layers_that_slide(device, codec):
    rng = np.random.default_rng(4)
    layouts = [
        kvzip.LayerLayout.of_kv((2, 90, 16), (2, 90, 8), "fp16", 90),
        kvzip.LayerLayout.of_kv((2, 31, 16), (2, 31, 8), "fp16", 90, "sliding", 32),
    ]
    layers = [
        kvzip.Layer.of_kv(cache_like(rng, "fp16", at.k), cache_like(rng, "fp16", at.v), at)
        for at in layouts
    ]
    snapshot = kvzip.Snapshot(layers, "fp16")
    blob = kvzip.encode(snapshot, codec, block_tokens=16)
    assert_layers(kvzip.decode(blob, device=device), layers)
    assert_layers(kvzip.decode(blob, device=device, tokens=(50, 70)), layers, (50, 70))
    assert_layers(kvzip.decode(blob, device=device, tokens=(61, 90)), layers, (61, 90))


def test_parts_on_a_grid_come_by_the_cpu(device, codec):
    """What a GPU has no kernels for is decoded beside it, and copied."""
    snapshot = make_snapshot(cache_like, 6, "bf16", heads=3, tokens=200, dim=16)
    wide = [
        [bits.astype(np.uint32) << np.uint32(16) for bits in layer] for layer in snapshot.layers
    ]
    held = kvzip.Snapshot.from_arrays(wide, "fp32")
    blob = kvzip.encode(held, codec, block_tokens=64)
    assert kvzip.info(blob).header.grids or codec.startswith("planes")  # it gains nothing by one
    assert_layers(kvzip.decode(blob, device=device), held.layers)
    found = kvzip.decode(blob, device=device, tokens=(30, 130))
    assert_layers(found, held.layers, (30, 130))


def test_other_layers_than_keys_and_values_are_refused(device):
    part = kvzip.PartLayout("fp32", (4, 5), "hd")
    layout = kvzip.LayerLayout({"recurrent": part}, 9, "state", state_length=9)
    layer = kvzip.Layer({"recurrent": np.zeros((4, 5), np.uint32)}, layout)
    blob = kvzip.encode(kvzip.Snapshot([layer], "fp32"), "channel")
    with pytest.raises(kvzip.UnsupportedError, match="keys and values of one format"):
        kvzip.decode(blob, device=device)


@pytest.mark.parametrize(("codec", "dtype"), UNLIKE_PAIRS)
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2)])
@pytest.mark.drawn(2)
def test_into_arrays_of_the_caller(device, room, codec, dtype, axes):
    """Strided ones too; what lies around stays as it was."""
    snapshot = make_snapshot(mixed, 5, dtype, layers=2, heads=3, tokens=140, dim=48)
    blob = kvzip.encode(snapshot, codec, block_tokens=64)
    size = dtypes.get(dtype).itemsize
    for tokens in ((0, 140), (64, 128), (3, 131)):
        held, out, before = [], [], []
        for _ in range(2):
            pair = [room.tensor((3, tokens[1] - tokens[0], 48), size, axes) for _ in range(2)]
            held.append([flat for flat, _ in pair])
            before.append([flat.clone() for flat, _ in pair])
            out.append(tuple(view for _, view in pair))
        found = kvzip.decode(blob, device=device, out=out, tokens=tokens)
        assert all(a is b for a, b in zip(found.layers[0], out[0], strict=True))
        assert_layers(found, snapshot.layers, tokens)
        for flat, old in zip(itertools.chain(*held), itertools.chain(*before), strict=True):
            assert torch.equal(flat[:512], old[:512]) and torch.equal(flat[-512:], old[-512:])


def _apart(room, pages, size, heads, dim, itemsize):
    """[2, pages, tokens, heads, dim], as FlashAttention's in vLLM."""
    flat, cache = room.tensor((2, pages, size, heads, dim), itemsize)
    return flat, cache[0], cache[1]


def _side_by_side(room, pages, size, heads, dim, itemsize):
    """[pages, 2, tokens, heads, dim], as FlashInfer's."""
    flat, cache = room.tensor((pages, 2, size, heads, dim), itemsize)
    return flat, cache[:, 0], cache[:, 1]


def _by_head(room, pages, size, heads, dim, itemsize):
    """[pages, 2, heads, tokens, dim]."""
    flat, cache = room.tensor((pages, 2, heads, size, dim), itemsize)
    return flat, cache[:, 0].transpose(1, 2), cache[:, 1].transpose(1, 2)


def _halves(room, pages, size, heads, dim, itemsize):
    """[pages, heads, tokens, 2 dim]: a token's key, then its value."""
    flat, cache = room.tensor((pages, heads, size, 2 * dim), itemsize)
    cache = cache.transpose(1, 2)
    return flat, cache[..., :dim], cache[..., dim:]


@pytest.mark.parametrize("arrangement", [_apart, _side_by_side, _by_head, _halves])
@pytest.mark.parametrize("size", [1, 7, 16, 128])
@pytest.mark.drawn(2)
def test_into_pages(device, room, codec, arrangement, size):
    """Of engines' caches, in any layout: only the pages of the table are written, and of the last
    one only what is held."""
    rng = np.random.default_rng(size)
    heads, dim, tokens = 2, 64, 150
    snapshot = make_snapshot(mixed, 8, "bf16", layers=1, heads=heads, tokens=tokens, dim=dim)
    blob = kvzip.encode(snapshot, codec, block_tokens=128)
    for span in ((0, tokens), (0, 128), (20, 141)):
        count = -(-tokens // size)
        table = rng.permutation(count + 5)[:count]
        flat, k, v = arrangement(room, count + 5, size, heads, dim, 2)
        expected = flat.clone()
        _, ek, ev = expected, *_same_views(expected, flat, k, v)
        for part, target in zip(snapshot.layers[0], (ek, ev), strict=True):
            for t in range(*span):
                row = torch.from_numpy(part[:, t].view(np.int16)).to(target.device)
                target[int(table[t // size]), t % size] = row
        kvzip.decode(blob, device=device, out=[(k, v)], pages=table, tokens=span)
        assert torch.equal(flat, expected)


def _same_views(other, flat, *views):
    """The views of `flat` as they would be of `other`."""
    return [other.as_strided(v.shape, v.stride(), v.storage_offset()) for v in views]


def test_a_batch_into_pages(device, room, codec):
    snapshot = make_snapshot(cache_like, 9, "fp16", layers=1, heads=2, tokens=40, dim=16, batch=2)
    blob = kvzip.encode(snapshot, codec, block_tokens=16)
    _, k, v = _apart(room, 8, 16, 2, 16, 2)
    table = [[5, 0, 3], [1, 7, 2]]
    kvzip.decode(blob, device=device, out=[(k, v)], pages=torch.tensor(table))
    for part, found in zip(snapshot.layers[0], (k, v), strict=True):
        for b in range(2):
            rows = torch.cat([found[page] for page in table[b]])[:40].transpose(0, 1)
            assert np.array_equal(rows.cpu().numpy().view(np.uint16), part[b])


def test_wrong_use_is_told(device, room):
    snapshot = make_snapshot(cache_like, 1, "bf16", layers=1, heads=2, tokens=40, dim=16)
    blob = kvzip.encode(snapshot, "raw", block_tokens=16)
    _, k, v = _apart(room, 4, 16, 2, 16, 2)

    def decode(**options):
        return kvzip.decode(blob, device=device, **options)

    for pages, said in (
        ([0, 1], "too few"),
        ([0, 1, 4], "page 4"),
        ([0, 1, 1], "twice"),
        ([0, -1, 1], "below 0"),
        ([[0, 1, 2], [0, 1, 3]], "2 rows"),
        ([0.5, 1, 2], "page number"),
        ([[0, 1, 2], [3]], "pages: "),
    ):
        with pytest.raises(UsageError, match=said):
            decode(out=[(k, v)], pages=pages)
    with pytest.raises(UsageError, match="only with out="):
        decode(pages=[0, 1, 2])
    with pytest.raises(UsageError, match="only with device="):
        kvzip.decode(blob, pages=[0, 1, 2])
    with pytest.raises(UsageError, match="has shape"):
        decode(out=[(k, v)])
    with pytest.raises(UsageError, match="same memory"):
        decode(out=[(k, k)], pages=[0, 1, 2])
    with pytest.raises(UsageError, match="2 layers"):
        decode(out=[(k, v), (k, v)])
    with pytest.raises(UsageError, match="has shape"):
        decode(out=[(k.transpose(1, 2), v.transpose(1, 2))], pages=[0, 1, 2])
    with pytest.raises(UnsupportedError, match="cannot hold"):
        decode(out=[(k.to(torch.int32), v)], pages=[0, 1, 2])
    with pytest.raises(UnsupportedError, match="side by side"):
        decode(out=[(k.transpose(2, 3), v)], pages=[0, 1, 2])
    with pytest.raises(UsageError, match="same memory"):
        decode(out=[(k[:1].expand(4, -1, -1, -1), v)], pages=[0, 1, 2])
    with pytest.raises(UnsupportedError, match="fp16"):
        decode(out=[(k.view(torch.float16), v)], pages=[0, 1, 2])
    with pytest.raises(UsageError, match="not within"):
        decode(tokens=(0, 41))


def test_tensors_without_plain_bits_are_refused(device, room):
    """What is written to them would be read as other numbers."""
    for dtype, kind in (("bf16", None), ("fp64", torch.complex64), ("fp8_e5m2", torch.bool)):
        snapshot = make_snapshot(cache_like, 1, dtype, layers=1, heads=2, tokens=40, dim=16)
        blob = kvzip.encode(snapshot, "raw")
        if kind is None:
            out = torch._neg_view(torch.zeros(2, 40, 16, dtype=torch.bfloat16, device=room.where))
        else:
            out = torch.zeros(2, 40, 16, dtype=kind, device=room.where)
        with pytest.raises(kvzip.KVZipError, match=r"negative view|holds no numbers of ours"):
            kvzip.decode(blob, device=device, out=[(out, torch.empty_like(out))])
        assert not out.any()


def test_arrays_to_decode_into_lie_apart(device, room):
    snapshot = make_snapshot(cache_like, 1, "bf16", layers=1, heads=2, tokens=40, dim=16)
    blob = kvzip.encode(snapshot)
    flat = torch.zeros(2 * 2 * 40 * 16, dtype=torch.int16, device=room.where)
    first, second = flat.view(2, 2, 40, 16)
    turned = flat.view(2, 40, 2, 16).permute(2, 0, 1, 3)  # each in the other's gaps
    for good in ((first, second), tuple(turned)):
        found = kvzip.decode(blob, device=device, out=[good])
        assert_layers(found, snapshot.layers)
    shifted = flat[8 : 8 + first.numel()].view(2, 40, 16)
    for bad in ((first, first), (first, shifted), (first[:1].expand(2, 40, 16), second)):
        flat.zero_()
        with pytest.raises(UsageError, match="same memory twice"):
            kvzip.decode(blob, device=device, out=[bad])
        assert not flat.any()


def test_a_mapping_by_the_names_of_parts(device, room):
    snapshot = make_snapshot(cache_like, 1, "bf16", layers=2, heads=2, tokens=40, dim=16)
    blob = kvzip.encode(snapshot)
    room_for = torch.zeros(2, 2, 2, 40, 16, dtype=torch.int16, device=room.where)
    out = [{"v": v, "k": k} for k, v in room_for]
    found = kvzip.decode(blob, device=device, out=out)
    assert_layers(found, snapshot.layers)
    assert found.layers[1].k is out[1]["k"]


def test_without_a_gpu_that_is_told():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    blob = kvzip.encode(make_snapshot(cache_like, 1, "bf16"), "raw")
    with pytest.raises(UnsupportedError, match=r"GPU|NVIDIA|CUDA"):
        kvzip.decode(blob, device="cuda")
    with pytest.raises(UnsupportedError, match="tpu"):
        kvzip.decode(blob, device="tpu")
    for cpu in ("cpu", "cpu:0", torch.device("cpu", 0)):
        assert kvzip.decode(blob, device=cpu).tokens == 50
