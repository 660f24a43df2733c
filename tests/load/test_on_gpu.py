"""A transformers cache whose layers a device decodes: the shim here, as if the model were on it."""

from __future__ import annotations

import os
import shutil
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from predictive_profiles import encode, random_profile  # noqa: E402
from support import tiny_documents, tiny_model  # noqa: E402

import kvzip  # noqa: E402
from kvzip import dtypes  # noqa: E402
from kvzip.codecs.native.cuda.nvcomp import FORMS  # noqa: E402
from kvzip.codecs.native.cuda.shim_device import ShimDevice  # noqa: E402
from kvzip.errors import UnsupportedError  # noqa: E402
from kvzip.load import loaders  # noqa: E402
from kvzip.load.hf import load_cache  # noqa: E402
from kvzip.load.recovery import Taken  # noqa: E402


@pytest.fixture
def shim(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if not shutil.which("g++"):
        pytest.skip("the shim needs a C++ compiler")
    if not os.environ.get("KVZIP_CACHE"):
        folder = tmp_path_factory.getbasetemp().parent / "kvzip-cache"
        monkeypatch.setenv("KVZIP_CACHE", str(folder))
    found = ShimDevice(tensors=True)
    monkeypatch.setattr(
        loaders.Loader,
        "_decoder",
        lambda self, reader: found if reader.codec.on_device and found.on else None,
    )
    found.on = True
    return found


@pytest.mark.parametrize("codec", ["channel", "raw", "zstd"])
@pytest.mark.drawn(2)
def test_the_same_as_by_the_cpu(shim: Any, tiny: Any, name: str, codec: str) -> None:
    """Sliding layers too."""
    case = tiny(name, "bfloat16")
    blob = kvzip.encode(case.snapshot, codec, block_tokens=16, threads=1)
    longer, found = case.longer(), []
    for shim.on in (True, False):
        for options in ({"prompt": longer}, {}):
            cache = load_cache(blob, case.config, **options)
            found.append(case.generate(longer, cache))
        assert bool(shim.launched) == (codec != "zstd")
    for (t1, l1), (t2, l2) in zip(found[:2], found[2:], strict=True):
        assert torch.equal(t1, t2) and torch.equal(l1, l2)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text"])
def test_keys_that_a_model_turned(shim: Any, kind: str) -> None:
    """Stored as they were before RoPE; of layers of one frequency and of several."""
    loaded = tiny_model(kind, head_dim=32)
    [document] = tiny_documents(loaded, 1, 300)
    blob = kvzip.encode(document, "channel:keys=before_rope", block_tokens=128, threads=1)
    cache = load_cache(blob, loaded.model.config)
    for layer, expected in zip(cache.layers, document.layers, strict=True):
        for found, part in zip((layer.keys, layer.values), expected, strict=True):
            assert np.array_equal(dtypes.as_bits(found)[0][0], part[:, :299])  # the last is run
    assert "channel_turn" in shim.launched


def test_layers_that_are_predicted_from_each_other(
    shim: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few layers at a time, each decoded once."""
    case = tiny("llama", "bfloat16")
    shapes = [tuple((len(a), a.shape[-1]) for a in layer) for layer in case.snapshot.layers]
    profile = random_profile(1, shapes, group=8, lanes=2, pairs=8, regions=2)
    blob = encode(case.snapshot, profile, monkeypatch, block_tokens=16)
    longer, found = case.longer(), []
    monkeypatch.setattr(loaders, "TOGETHER", 1)
    for shim.on in (True, False):
        cache = load_cache(blob, case.config, profile=profile, prompt=longer)
        found.append(case.generate(longer, cache))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    chains = sum(name.startswith("predictive_chain") for name in shim.launched)
    assert chains == 2 * len(case.snapshot.layers)


def test_damage_is_told_when_it_is_met(shim: Any, tiny: Any) -> None:
    case = tiny("llama", "bfloat16")
    bad = bytearray(kvzip.encode(case.snapshot, "channel", threads=1))
    bad[-70] ^= 1
    with pytest.raises(kvzip.CorruptError, match="layer 3 v"):
        case.generate(case.longer(), load_cache(bytes(bad), case.config, prompt=case.longer()))


def test_a_gpu_that_cannot_decode_leaves_it_to_the_cpu(monkeypatch: Any) -> None:
    """Without kvzip[gpu], or with a codec that has no kernels."""

    def none(spec: Any) -> Any:
        raise UnsupportedError("no CUDA for Python")

    monkeypatch.setattr(loaders, "get_device", none)
    loader = loaders.Loader.__new__(loaders.Loader)
    loader.decoder, loader.device = None, torch.device("cuda")
    snapshot = kvzip.Snapshot.from_arrays([(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))])
    for codec in ("channel", "zstd"):
        with kvzip.open(kvzip.encode(snapshot, codec)) as reader:
            assert loader._decoder(reader) is None
    found = ShimDevice()
    monkeypatch.setattr(loaders, "get_device", lambda spec: found)
    monkeypatch.delenv("KVZIP_NVCOMP", raising=False)
    for codec, library, decodes in (
        ("zstd", FORMS, False),
        ("lz4", None, False),
        ("lz4", FORMS, True),
        ("channel", None, True),
    ):
        stand_in = library and SimpleNamespace(decoder=library.get)
        monkeypatch.setitem(found.cache, "nvcomp", stand_in)
        loader.decoder = None
        with kvzip.open(kvzip.encode(snapshot, codec)) as reader:
            assert loader._decoder(reader) is (found if decodes else None)


def test_torch_knows_who_uses_what_another_thread_made(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor is the allocator's again when it is dropped, for the stream of the thread that
    decodes: so it is told of the stream of the thread that took it."""
    case = tiny("llama", "bfloat16")
    blob = kvzip.encode(case.snapshot, "raw", threads=1)
    told = []

    class Tensor:
        is_cuda, device = True, torch.device("cuda:1")

        def record_stream(self, stream: Any) -> None:
            told.append((self, stream))

    def current(device: Any) -> Any:
        return device, threading.get_ident()

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    with kvzip.open(blob) as reader:
        count = len(reader.layout.layers)
        loader = loaders.Loader(reader, [(0, 8)] * count, 8, None, 1)
        made = [Taken({"k": Tensor(), "v": Tensor()}, (Tensor(), Tensor())) for _ in range(count)]
        monkeypatch.setattr(loader, "_decode", lambda some: {i: made[i] for i in some})
        for i in (0, 1, 1):  # again for a copy of the cache
            told.clear()
            taken = loader.load(i)
            tensors = (*taken.parts.values(), *taken.witness)
            assert told == [(tensor, current(tensor.device)) for tensor in tensors]
        loader.cancel()
