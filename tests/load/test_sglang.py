"""Pages of SGLang's HiCache come back bit for bit, or are a miss.

The host pool here is a stand-in: its memory has the shapes of SGLang 0.5.23's pools for multi-head
and latent attention in each of their layouts, and its pages are cut as theirs are;
`test_sglang_controller.py` has the real ones. With SGLang installed (`make test-sglang`, in an
environment of its own) the backend is made by SGLang's own factory and is a subclass of its
`HiCacheStorage`; without, only the methods that its controller calls are here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from servers import failing_server, silent_server  # noqa: E402
from support import rotated  # noqa: E402

import kvzip.load.sglang  # noqa: E402
from kvzip import api  # noqa: E402
from kvzip.errors import KVZipError, SealError, StoreError  # noqa: E402
from kvzip.load.sglang import KvzipStorage, page_of  # noqa: E402

PAGES, TOKENS, LAYERS, HEADS, DIM = 6, 16, 3, 2, 24
LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
PAGE = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text()
[GUIDE] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)  # what the guide says to write
HERE = importlib.util.find_spec("sglang") is not None


class Pool:
    """Memory of a host for keys and values, as SGLang lays it out."""

    def __init__(self, layout: str, dtype: Any, latent: bool = False, layers: int = LAYERS):
        self.layout, self.dtype, self.page_size = layout, dtype, TOKENS
        self.layer_num, self.head_num, self.head_dim = layers, 1 if latent else HEADS, DIM
        self.latent, rows = latent, PAGES * TOKENS
        shape = {
            "layer_first": (layers, rows, self.head_num, DIM),
            "page_first": (rows, layers, self.head_num, DIM),
            "page_first_direct": (PAGES, layers, TOKENS, self.head_num, DIM),
            "page_head": (PAGES, self.head_num, TOKENS, layers, DIM),
        }[layout]
        self.kv_buffer = torch.zeros(shape if latent else (2, *shape), dtype=dtype)

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        rows, page = slice(index, index + TOKENS), index // TOKENS
        ahead = () if self.latent else (slice(None),)
        cut = {"layer_first": (slice(None), rows), "page_first": (rows,)}
        data = self.kv_buffer[(*ahead, *cut.get(self.layout, (slice(page, page + 1),)))]
        return data.flatten() if flat else data

    def set_from_flat_data_page(self, index: int, page: Any) -> None:
        here = self.get_data_page(index, flat=False)
        here.copy_(page.reshape(here.shape))

    def get_dummy_flat_data_page(self) -> Any:
        return torch.zeros_like(self.get_data_page(0))

    def token(self, row: int) -> Any:
        """One token's numbers, in the same order whatever the layout: [(2,) layers, heads, dim]."""
        page, at = divmod(row, TOKENS)
        memory = self.kv_buffer[None] if self.latent else self.kv_buffer
        found = {
            "layer_first": lambda: memory[:, :, row],
            "page_first": lambda: memory[:, row],
            "page_first_direct": lambda: memory[:, page, :, at],
            "page_head": lambda: memory[:, page, :, at].transpose(1, 2),
        }[self.layout]()
        return found.contiguous()

    def fill(self, seed: int = 0) -> Pool:
        generator = torch.Generator().manual_seed(seed)
        for row in range(PAGES * TOKENS):
            numbers = torch.randn(self.token(row).shape, generator=generator).to(self.dtype)
            self.put_token(row, numbers)
        return self

    def put_token(self, row: int, numbers: Any) -> None:
        page, at = divmod(row, TOKENS)
        memory = self.kv_buffer[None] if self.latent else self.kv_buffer
        if self.layout == "layer_first":
            memory[:, :, row] = numbers
        elif self.layout == "page_first":
            memory[:, row] = numbers
        elif self.layout == "page_first_direct":
            memory[:, page, :, at] = numbers
        else:
            memory[:, page, :, at] = numbers.transpose(1, 2)


def config_of(url: Any, **more: Any) -> Any:
    fields = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "model_name": "org/model",
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "extra_config": json.loads(GUIDE) | {"url": str(url), "revision": "r1"},
    }
    extra = fields["extra_config"] | more.pop("extra", {})
    fields |= more | {"extra_config": extra}
    if not HERE:
        return SimpleNamespace(**fields)
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    return HiCacheStorageConfig(**fields)


def backend_of(url: Any, pool: Any, **more: Any) -> Any:
    config = config_of(url, **more)
    if HERE:
        from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
        from sglang.srt.mem_cache.storage import StorageBackendFactory

        made = StorageBackendFactory.create_backend("dynamic", config, pool)
        assert isinstance(made, HiCacheStorage)
    else:
        made = KvzipStorage(config, {})
    made.register_mem_pool_host(pool)
    return made


KEYS = [f"{i:064x}" for i in range(PAGES)]
INDICES = torch.arange(PAGES * TOKENS)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def equal(a: Pool, b: Pool, pages: int = PAGES) -> bool:
    return all(
        torch.equal(a.token(r).view(torch.uint8), b.token(r).view(torch.uint8))
        for r in range(pages * TOKENS)
    )


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.uint8], ids=str)
def test_in_place(tmp_path: Any, layout: str, kind: Any) -> None:
    """What `_page_set_zero_copy` and `_page_get_zero_copy` of the controller call."""
    pool = Pool(layout, kind).fill()
    writer = backend_of(tmp_path, pool)
    assert writer.batch_exists(KEYS) == 0
    assert writer.batch_set_v1(KEYS[:4], INDICES[: 4 * TOKENS]) == [True] * 4
    assert writer.batch_exists(KEYS) == 4 and writer.exists(KEYS[3]) and not writer.exists(KEYS[4])
    other = Pool(layout, kind)
    reader = backend_of(tmp_path, other)
    assert reader.batch_get_v1(KEYS, INDICES) == [True] * 4 + [False] * 2
    assert equal(pool, other, 4)


def test_flat_pages(tmp_path: Any, layout: str) -> None:
    """What `_generic_page_set` and `_generic_page_get` of the controller call."""
    pool = Pool(layout, torch.bfloat16).fill()
    backend = backend_of(tmp_path, pool)
    pages = [pool.get_data_page(i * TOKENS) for i in range(PAGES)]
    assert backend.batch_set(KEYS[:3], pages[:3]) and backend.set(KEYS[3], pages[3])
    dummies = [pool.get_dummy_flat_data_page() for _ in KEYS]
    found = backend.batch_get(KEYS, dummies)
    assert [page is not None for page in found] == [True] * 4 + [False] * 2
    assert all(torch.equal(a, b) for a, b in zip(found[:4], pages, strict=False))
    assert torch.equal(backend.get(KEYS[0], dummies[5]), pages[0])


@pytest.mark.parametrize("other", LAYOUTS)
def test_hosts_of_different_layouts_share_pages(tmp_path: Any, layout: str, other: str) -> None:
    pool, mine = Pool(layout, torch.bfloat16).fill(), Pool(other, torch.bfloat16)
    backend_of(tmp_path, pool).batch_set_v1(KEYS, INDICES)
    backend = backend_of(tmp_path, mine)
    assert backend.batch_get_v1(KEYS, INDICES) == [True] * PAGES
    assert equal(pool, mine)
    mine.kv_buffer.zero_()
    for i, page in enumerate(
        backend.batch_get(KEYS, [mine.get_dummy_flat_data_page() for _ in KEYS])
    ):
        mine.set_from_flat_data_page(i * TOKENS, page)
    assert equal(pool, mine)


def test_keys_before_rope(tmp_path: Any, layout: str, monkeypatch: Any) -> None:
    """Of pages of which SGLang says where they stand, and of weights that have a config."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(sys.modules[__name__], "TOKENS", 128)
    indices, before = torch.arange(PAGES * TOKENS), KEYS[:2]
    config = transformers.LlamaConfig(
        num_hidden_layers=LAYERS + 1,
        head_dim=DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    config.save_pretrained(tmp_path / "model")
    turned = rotated(1, PAGES * TOKENS, len(before) * TOKENS, 3, LAYERS, HEADS, DIM)
    bits = np.stack([(layer.k, layer.v) for layer in turned.layers], 1)
    pool = Pool(layout, torch.bfloat16)
    pool.start_layer = 1  # as a later stage of a pipeline has it
    for row in range(len(indices)):
        numbers = torch.from_numpy(bits[..., row, :].view(np.int16).copy())
        pool.put_token(row, numbers.view(torch.bfloat16))

    def stored(name: str, told: Any, **extra: Any) -> list[Any]:
        """What is in the files; pages come back, whatever a reader is told."""
        backend = backend_of(tmp_path / name, pool, extra=extra)
        told = SimpleNamespace(prefix_keys=told)
        assert backend.batch_set_v1(KEYS, indices, told) == [True] * PAGES
        other = Pool("layer_first", torch.bfloat16)
        assert all(backend_of(tmp_path / name, other, extra=extra).batch_get_v1(KEYS, indices))
        assert equal(pool, other)
        return [api.info(file) for file in (tmp_path / name).rglob("*.kvz")]

    known = {"model": str(tmp_path / "model")}
    found = stored("before", before, **known)
    assert all(part.before_rope for each in found for part in each.parts if part.part == "k")
    starts = {each.header.layout.layers[0].first for each in found}
    assert starts == {(len(before) + n) * TOKENS for n in range(PAGES)}
    cached = stored("not told", None, **known)
    assert sum(e.encoded_bytes for e in found) < 0.97 * sum(e.encoded_bytes for e in cached)
    elsewhere = stored("elsewhere", before[:1], **known)
    for each in (*cached, *elsewhere, *stored("no config", before, model=str(tmp_path))):
        assert not any(part.before_rope for part in each.parts)


@pytest.mark.parametrize("latent_layout", LAYOUTS[:3])
def test_latent_attention(tmp_path: Any, latent_layout: str) -> None:
    pool = Pool(latent_layout, torch.bfloat16, latent=True).fill()
    first = backend_of(tmp_path, pool, is_mla_model=True, tp_size=2)
    assert first.batch_set_v1(KEYS, INDICES) == [True] * PAGES
    mine = Pool("layer_first", torch.bfloat16, latent=True)
    second = backend_of(tmp_path, mine, is_mla_model=True, tp_rank=1, tp_size=2)
    assert second.batch_get_v1(KEYS, INDICES) == [True] * PAGES  # ranks share what is the same
    assert equal(pool, mine)


def test_pages_are_kvz_files_and_smaller(tmp_path: Any) -> None:
    pool = Pool("layer_first", torch.bfloat16).fill()
    pool.page_size = TOKENS
    assert tuple(page_of(pool.get_data_page(0), pool).shape) == (2, LAYERS, HEADS, TOKENS, DIM)
    backend_of(tmp_path, pool).batch_set_v1(KEYS, INDICES)
    files = list(tmp_path.rglob("*.kvz"))
    assert len(files) == PAGES
    for file in files:
        info = api.verify(file)
        assert info.header.origin.model == "org/model" and len(info.header.layout.layers) == LAYERS


def test_ranks_models_and_dtypes_are_kept_apart(tmp_path: Any) -> None:
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend_of(tmp_path, pool).batch_set_v1(KEYS, INDICES)
    for more in ({"tp_rank": 1, "tp_size": 2}, {"model_name": "org/other"}, {"pp_size": 2}):
        assert backend_of(tmp_path, pool, **more).batch_exists(KEYS) == 0
    half = Pool("layer_first", torch.float16).fill(1)
    backend = backend_of(tmp_path, half)
    assert backend.batch_exists(KEYS) == 0
    assert backend.batch_set_v1(KEYS, INDICES) == [True] * PAGES
    backend.clear()
    assert backend.batch_exists(KEYS) == 0 and not list(tmp_path.rglob("*.kvz"))


@pytest.mark.parametrize("name", ["..", ".", "../..", "a/../../b", "..\\x"])
def test_whatever_a_model_is_called_its_pages_lie_in_the_folder(tmp_path: Any, name: str) -> None:
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend = backend_of(tmp_path / "store", pool, model_name=name)
    assert backend.batch_set_v1(KEYS, INDICES) == [True] * PAGES
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    [folder] = (tmp_path / "store").iterdir()
    assert backend.batch_exists(KEYS) == PAGES and list(folder.rglob("*.kvz"))


def test_a_bucket(s3: Any) -> None:
    pool = Pool("page_first", torch.bfloat16).fill()
    extra = {"options": s3.options}
    backend = backend_of(f"{s3.url}/sglang", pool, extra=extra)
    assert backend.batch_set_v1(KEYS, INDICES) == [True] * PAGES
    mine = Pool("page_first", torch.bfloat16)
    reader = backend_of(f"{s3.url}/sglang", mine, extra=extra)
    assert reader.batch_exists(KEYS) == PAGES
    assert reader.batch_get_v1(KEYS, INDICES) == [True] * PAGES
    assert equal(pool, mine)


@pytest.mark.parametrize("harm", ["damaged", "empty", "cut"])
def test_a_page_that_failed_is_written_anew(tmp_path: Any, harm: str) -> None:
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend = backend_of(tmp_path, pool)
    backend.batch_set_v1(KEYS, INDICES)
    for file in tmp_path.rglob("*.kvz"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes({"damaged": data, "empty": b"", "cut": data[:-9]}[harm])
    for backend in (backend_of(tmp_path, pool), backend):  # noqa: B020 - of another process, or not
        if harm == "empty":
            assert backend.batch_exists(KEYS) == 0
        assert backend.batch_get_v1(KEYS, INDICES) == [False] * PAGES
        assert backend.batch_exists(KEYS) == 0  # until they are stored again
    assert backend.batch_set_v1(KEYS, INDICES) == [True] * PAGES
    other = Pool("layer_first", torch.bfloat16)
    reader = backend_of(tmp_path, other)
    assert reader.batch_exists(KEYS) == PAGES
    assert reader.batch_get_v1(KEYS, INDICES) == [True] * PAGES and equal(pool, other)


@pytest.fixture
def server(monkeypatch: Any) -> dict[str, Any]:
    """What SGLang says of the server in this process, for a test to change."""
    said = {**kvzip.load.sglang._server(), "model_path": "org/model"}
    monkeypatch.setattr("kvzip.load.sglang._server", lambda: said)
    return said


def checkpoint(folder: Path, data: bytes = b"weights") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    return str(folder)


def in_another_thread(do: Any) -> Any:
    """As SGLang stores once it has emptied its caches."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(do).result()


def test_other_weights_are_no_hit(tmp_path: Any, server: Any, caplog: Any) -> None:
    """Other checkpoints, adapters, quantisations, weights that are loaded while the server runs."""
    own, other, copy = (
        checkpoint(tmp_path / name, data)
        for name, data in (("a", b"weights"), ("b", b"Weights"), ("copy", b"weights"))
    )
    pool, store = Pool("layer_first", torch.bfloat16).fill(), tmp_path / "store"
    unpinned = {"extra": {"revision": None}}
    server["model_path"] = own
    usual = dict(server)
    backend = backend_of(store, pool, **unpinned)
    states: list[dict[str, Any]] = [
        {},
        {"model_path": other},
        {"quantization": "fp8"},
        {"quantization_param_path": "scales.json"},
        {"load_format": "dummy"},
        {"lora_paths": ["x"]},
        {"lora_paths": [SimpleNamespace(lora_path=other)]},
        {"speculative_draft_model_path": other},
        {"speculative_draft_model_path": own},
        {"weight_version": "7"},
    ]
    for state in states:
        server |= usual | state
        assert backend.batch_exists(KEYS) == 0, state
        in_another_thread(lambda: backend.batch_set_v1(KEYS, INDICES))
        assert backend.batch_exists(KEYS) == PAGES
    for state in states:
        server |= usual | state
        assert backend.batch_exists(KEYS) == PAGES, state
    server |= usual | {"model_path": copy}
    assert backend_of(store, pool, **unpinned).batch_exists(KEYS) == PAGES  # a copy is the same
    assert not caplog.records
    server |= {"model_path": "org/elsewhere"}
    backend_of(store, pool, **unpinned).exists(KEYS[0])
    assert 'set "model"' in caplog.records[0].getMessage()


@pytest.mark.parametrize("how", ["v1", "v2", "flat"])
def test_pages_of_weights_before_are_not_stored_as_of_those_now(
    tmp_path: Any, server: Any, caplog: Any, how: str
) -> None:
    """SGLang takes other weights while pages wait to be stored. It begins another thread to store
    when it empties its caches."""
    own, other = (checkpoint(tmp_path / name, name.encode()) for name in "ab")
    server["model_path"] = own
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend = backend_of(tmp_path / "store", pool, extra={"revision": None})
    backend.register_mem_host_pool_v2(pool, "kv")
    flat = [pool.get_data_page(i) for i in INDICES[::TOKENS].tolist()]

    def store(first: int, last: int) -> bool:
        keys, indices = KEYS[first:last], INDICES[first * TOKENS : last * TOKENS]
        if how == "flat":
            return bool(backend.batch_set(keys, flat[first:last]))
        if how == "v1":
            return all(backend.batch_set_v1(keys, indices))
        transfer = SimpleNamespace(name="kv", keys=keys, host_indices=indices)
        return all(backend.batch_set_v2([transfer])["kv"])

    assert store(0, 2)
    server["model_path"] = other
    assert not store(2, 4) and backend.batch_exists(KEYS[2:]) == 0
    assert "has taken other weights" in caplog.text
    assert in_another_thread(lambda: store(4, 6)) and backend.batch_exists(KEYS[4:]) == 2
    server["model_path"] = own
    assert backend.batch_exists(KEYS) == 2 and backend.batch_exists(KEYS[2:]) == 0


def test_a_checkpoint_that_is_long_to_read_holds_up_nothing(
    tmp_path: Any, server: Any, caplog: Any, monkeypatch: Any
) -> None:
    """SGLang gives its threads 10 seconds to end."""
    read, may_end = kvzip.load.sglang.checkpoint_fingerprint, Event()
    monkeypatch.setattr("kvzip.load.sglang._PATIENCE", 0.2)
    monkeypatch.setattr(
        "kvzip.load.sglang.checkpoint_fingerprint",
        lambda *told: may_end.wait(20) and read(*told),
    )
    server["model_path"] = checkpoint(tmp_path / "a")
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend = backend_of(tmp_path / "store", pool, extra={"revision": None})
    began = time.monotonic()
    assert backend.batch_exists(KEYS) == 0
    assert backend.batch_set_v1(KEYS, INDICES) == [False] * PAGES
    assert backend.batch_get_v1(KEYS, INDICES) == [False] * PAGES
    assert time.monotonic() - began < 5 and "are being read" in caplog.text
    may_end.set()
    while not all(backend.batch_set_v1(KEYS, INDICES)):
        assert time.monotonic() - began < 20
    assert backend.batch_exists(KEYS) == PAGES


@pytest.mark.parametrize("revision", [None, "r1"])
def test_weights_that_are_loaded_from_the_same_folder(
    tmp_path: Any, server: Any, revision: str | None
) -> None:
    """What a folder holds counts from when the server has loaded it, and no sooner."""
    server["model_path"] = checkpoint(tmp_path / "a")
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend = backend_of(tmp_path / "store", pool, extra={"revision": revision})
    assert all(backend.batch_set_v1(KEYS, INDICES))
    checkpoint(tmp_path / "a", b"others")
    assert backend.batch_exists(KEYS) == PAGES
    server["loads"] = 1
    assert backend.batch_exists(KEYS) == 0


def test_what_a_folder_held_when_the_server_began_counts(tmp_path: Any, server: Any) -> None:
    """And not what it holds when the first page is stored."""
    server["model_path"] = checkpoint(tmp_path / "a")
    pool, unpinned = Pool("layer_first", torch.bfloat16).fill(), {"extra": {"revision": None}}
    first, same = (backend_of(tmp_path / "store", pool, **unpinned) for _ in range(2))
    while not all(one._weights._reading[2].done() for one in (first, same)):
        time.sleep(0.01)
    checkpoint(tmp_path / "a", b"others")
    assert all(first.batch_set_v1(KEYS, INDICES)) and same.batch_exists(KEYS) == PAGES
    assert backend_of(tmp_path / "store", pool, **unpinned).batch_exists(KEYS) == 0


def test_an_adapter_that_was_replaced_is_another(tmp_path: Any, server: Any) -> None:
    server["model_path"] = checkpoint(tmp_path / "a")
    server["lora_paths"] = [SimpleNamespace(lora_path=checkpoint(tmp_path / "adapter"))]
    pool, unpinned = Pool("layer_first", torch.bfloat16).fill(), {"extra": {"revision": None}}
    assert all(backend_of(tmp_path / "store", pool, **unpinned).batch_set_v1(KEYS, INDICES))
    assert backend_of(tmp_path / "store", pool, **unpinned).batch_exists(KEYS) == PAGES
    checkpoint(tmp_path / "adapter", b"others")
    assert backend_of(tmp_path / "store", pool, **unpinned).batch_exists(KEYS) == 0


def test_formats_of_8_bits_are_kept_apart(tmp_path: Any, server: Any, monkeypatch: Any) -> None:
    """SGLang's pools hold fp8 of any kind as uint8."""
    pool = Pool("layer_first", torch.uint8).fill()
    states: list[tuple[dict[str, Any], bool]] = [
        ({"kv_cache_dtype": "fp8_e4m3"}, False),
        ({"kv_cache_dtype": "fp8_e5m2"}, False),
        ({"speculative_draft_kv_cache_dtype": "fp8_e5m2"}, False),
        ({"kv_cache_dtype": "fp8_e4m3"}, True),
    ]
    for said, fnuz in states:
        monkeypatch.setattr("kvzip.load.sglang._fnuz", lambda fnuz=fnuz: fnuz)
        server |= said
        backend = backend_of(tmp_path, pool)
        assert backend.batch_exists(KEYS) == 0, said
        assert all(backend.batch_set_v1(KEYS, INDICES))
        assert backend.batch_exists(KEYS) == PAGES


def test_what_fails_is_a_miss_and_told_once(tmp_path: Any, caplog: Any) -> None:
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend = backend_of(tmp_path / "here", pool)
    backend.batch_set_v1(KEYS, INDICES)
    files = sorted((tmp_path / "here").rglob("*.kvz"))
    for at, file in enumerate(files[:3]):
        data = bytearray(file.read_bytes())
        data[-1 - at] ^= 1
        file.write_bytes(data)
    assert backend.batch_get_v1(KEYS, INDICES) == [False] * 3 + [True] * 3
    assert len([r for r in caplog.records if r.name == "kvzip.sglang"]) == 1
    larger = Pool("layer_first", torch.bfloat16)
    larger.kv_buffer = torch.zeros(2, LAYERS, PAGES * TOKENS, HEADS, 2 * DIM, dtype=torch.bfloat16)
    larger.head_dim = 2 * DIM
    other = backend_of(tmp_path / "here", larger)
    assert other.batch_get_v1(KEYS, INDICES) == [False] * PAGES
    assert not larger.kv_buffer.any()
    fewer = Pool("layer_first", torch.bfloat16, layers=LAYERS - 1)
    caplog.clear()
    other = backend_of(tmp_path / "here", fewer)
    assert other.batch_get_v1(KEYS, INDICES) == [False] * PAGES and not fewer.kv_buffer.any()
    [told] = [r.getMessage() for r in caplog.records if r.name == "kvzip.sglang"]
    assert f"in {LAYERS} layers, the buffer" in told
    with silent_server() as url:
        caplog.clear()
        slow = backend_of(url, pool, extra={"timeout": 0.2, "retries": 0, "workers": 8})
        assert slow.batch_exists(KEYS) == 0
        assert slow.batch_get_v1(KEYS, INDICES) == [False] * PAGES
        assert slow.batch_set_v1(KEYS, INDICES) == [False] * PAGES
        assert len([r for r in caplog.records if r.name == "kvzip.sglang"]) == 1


@pytest.mark.parametrize("silent", [False, True], ids=["dies", "stalls"])
def test_a_store_that_fails_on_the_way(tmp_path: Any, caplog: Any, silent: bool) -> None:
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend_of(tmp_path, pool).batch_set_v1(KEYS, INDICES)
    mine = Pool("layer_first", torch.bfloat16)
    with failing_server(tmp_path) as server:
        for key in KEYS[3:]:
            server.fail(key, 1, silent)
        extra = {"timeout": 0.5, "retries": 0, "workers": 8}
        reader = backend_of(server.url, mine, extra=extra)
        assert reader.batch_exists(KEYS) == PAGES
        assert reader.batch_get_v1(KEYS, INDICES) == [True] * 3 + [False] * 3
    assert equal(pool, mine, 3) and not mine.kv_buffer[:, :, 3 * TOKENS :].any()
    [told] = [r.getMessage() for r in caplog.records if r.name == "kvzip.sglang"]
    assert "cannot read" in told


def test_settings(tmp_path: Any, caplog: Any) -> None:
    pool = Pool("layer_first", torch.bfloat16)
    with pytest.raises(KVZipError, match="missing required field `url`"):
        KvzipStorage(SimpleNamespace(extra_config={}), {})
    wrong = {"workers": [0, "many", 1.5], "timeout": ["soon"], "retries": ["x"], "codec": [5, "no"]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(KVZipError):
                backend_of(tmp_path, pool, extra={"url": "s3://bucket/prefix", name: value})
    with pytest.raises(KVZipError, match="key_form"):
        backend_of(tmp_path, pool, extra={"key_form": "env:NAME"})
    caplog.clear()
    backend = backend_of(tmp_path, pool, extra={"codec": "predictive"})
    assert backend.codec.codec_id == "channel"
    [told] = [r.getMessage() for r in caplog.records if r.name == "kvzip.sglang"]
    assert "'predictive'" in told and "channel is used" in told


def test_sealed_pages(tmp_path: Any, monkeypatch: Any, caplog: Any) -> None:
    """With a key pages come back, are written anew where they are damaged, and nothing is in sight;
    another key, or none, is an error at the start."""
    pytest.importorskip("cryptography")
    secret = bytes(range(1, 33))
    monkeypatch.setenv("KVZIP_KEY", secret.hex())
    monkeypatch.setenv("ANOTHER", secret[::-1].hex())
    sealed = {"key_from": "env:KVZIP_KEY"}
    mine = Pool("page_first", torch.bfloat16).fill()
    assert all(backend_of(tmp_path, mine, extra=sealed).batch_set_v1(KEYS, INDICES))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == PAGES + 1  # and what proves the key
    for path in files:
        data = path.read_bytes()
        assert data.startswith(b"\x89KVS") and secret not in data and b"org/model" not in data
        assert not any(key in str(path) for key in KEYS)
    theirs = Pool("page_first", torch.bfloat16)
    reader = backend_of(tmp_path, theirs, extra=sealed)
    assert reader.batch_exists(KEYS) == PAGES and all(reader.batch_get_v1(KEYS, INDICES))
    assert equal(theirs, mine)
    damaged = max(files, key=lambda path: path.stat().st_size)
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert sorted(reader.batch_get_v1(KEYS, INDICES)) == [False] + [True] * (PAGES - 1)
    assert all(backend_of(tmp_path, mine, extra=sealed).batch_set_v1(KEYS, INDICES))
    for other in ("env:ANOTHER", None):
        with pytest.raises(SealError) as caught:
            backend_of(tmp_path, mine, extra={"key_from": other})
        assert secret.hex() not in str(caught.value)
    assert secret.hex() not in caplog.text


@pytest.mark.skipif(not HERE, reason="needs SGLang: make test-sglang")
def test_several_pools(tmp_path: Any) -> None:
    """The v2 interface, against what SGLang's own backend on files answers."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, PoolHitPolicy, PoolTransfer

    pool, state = (Pool(name, torch.bfloat16).fill() for name in ("layer_first", "page_first"))
    config = config_of(tmp_path / "ours")
    ours, theirs = backend_of(tmp_path / "ours", pool), HiCacheFile(config, str(tmp_path / "file"))
    for backend in (ours, theirs):
        for name, registered in (("kv", pool), ("swa", state)):
            backend.register_mem_host_pool_v2(registered, name)

    def transfer(name: str, pages: Any, policy: Any = PoolHitPolicy.ALL_PAGES) -> Any:
        rows = torch.cat([INDICES[p * TOKENS : (p + 1) * TOKENS] for p in pages])
        return PoolTransfer(
            name, host_indices=rows, keys=[KEYS[p] for p in pages], hit_policy=policy
        )

    for backend in (ours, theirs):
        done = backend.batch_set_v2([transfer("kv", range(5)), transfer("swa", [0, 1, 3, 4])])
        assert done == {"kv": [True] * 5, "swa": [True] * 4}
    for policy in (PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES):
        for window in ([4], [3, 4], [2, 3, 4]):
            asked = [transfer("swa", window, policy)]
            assert ours.batch_exists_v2(KEYS, asked) == theirs.batch_exists_v2(KEYS, asked)
    before = state.kv_buffer.clone()
    state.kv_buffer.zero_()
    assert ours.batch_get_v2([transfer("swa", [0, 1, 2, 3])]) == {"swa": [True, True, False, True]}
    rows = [r for p in (0, 1, 3) for r in range(p * TOKENS, (p + 1) * TOKENS)]
    assert torch.equal(state.kv_buffer[:, rows], before[:, rows])


class Indexer(Pool):
    """An indexer's keys with their scales, as SGLang's pool for sparse attention has them."""

    def __init__(self, layout: str, wide: int = 40):
        super().__init__(layout, torch.uint8, latent=True)
        self.head_num = self.head_dim = 0
        first = layout == "layer_first"
        shape = (LAYERS, PAGES, wide) if first else (PAGES, LAYERS, 1, wide)
        self.kv_buffer = torch.zeros(shape, dtype=torch.uint8)

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        page = slice(index // TOKENS, index // TOKENS + 1)
        first = self.layout == "layer_first"
        data = self.kv_buffer[:, page] if first else self.kv_buffer[page]
        return data.flatten() if flat else data


class Keys(Pool):
    """Keys alone, of heads, as SGLang's pool has them where values are the keys."""

    def __init__(self, layout: str):
        super().__init__(layout, torch.bfloat16, latent=True)
        rows = PAGES * TOKENS
        sizes = (LAYERS, rows) if layout == "layer_first" else (rows, LAYERS)
        self.kv_buffer = torch.zeros(*sizes, HEADS, DIM, dtype=torch.bfloat16)
        self.head_num = HEADS


class States(Pool):
    """Mamba's states: several tensors of a slot, which are copied together into a page."""

    def __init__(self, layout: str = "page_first"):
        super().__init__(layout, torch.bfloat16)
        self.page_size, self.layer_num = 1, 0
        self.parts = [
            torch.zeros(PAGES, LAYERS, 2, 8, dtype=torch.float32),
            torch.zeros(PAGES, LAYERS, 24, dtype=torch.bfloat16),
        ]

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        return torch.cat([p[index].contiguous().view(torch.uint8).flatten() for p in self.parts])

    def set_from_flat_data_page(self, index: int, page: Any) -> None:
        at = 0
        for part in self.parts:
            count = part[index].numel() * part.element_size()
            part[index] = page[at : at + count].clone().view(part.dtype).view(part[index].shape)
            at += count


def fill(pool: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    for part in getattr(pool, "parts", [pool.kv_buffer]):
        bits = part.view(torch.uint8)
        bits.copy_(torch.randint(0, 256, bits.shape, dtype=torch.uint8, generator=generator))
    return pool


def pages_of(pool: Any) -> list[Any]:
    return [pool.get_data_page(i * pool.page_size).view(torch.uint8) for i in range(PAGES)]


OTHERS = {
    "indexer": (lambda: Indexer("layer_first"), lambda: Indexer("page_first")),
    "keys": (lambda: Keys("layer_first"), lambda: Keys("layer_first")),
    "states": (States, lambda: States("page_first_direct")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_pools_of_hybrid_models(tmp_path: Any, name: str) -> None:
    """Beside keys and values there are others, whose pages come back into the host's memory, and
    are stored again once they have failed."""
    writer, reader = (make() for make in OTHERS[name])
    fill(writer)
    indices = torch.arange(PAGES * writer.page_size)
    first, second = backend_of(tmp_path, writer), backend_of(tmp_path, reader)
    for backend, pool in ((first, writer), (second, reader)):
        backend.register_mem_host_pool_v2(pool, name)
    transfer = SimpleNamespace(name=name, keys=KEYS, host_indices=indices)
    assert first.batch_set_v2([transfer]) == {name: [True] * PAGES}
    files = sorted(tmp_path.rglob("*.kvz"))
    data = bytearray(files[2].read_bytes())
    data[-1] ^= 1
    files[2].write_bytes(data)
    for right in ([i != 2 for i in range(PAGES)], [True] * PAGES):
        assert second.batch_get_v2([transfer]) == {name: right}
        for one, other, good in zip(pages_of(reader), pages_of(writer), right, strict=True):
            assert not good or torch.equal(one, other)
        # The host computes what is missing, and stores all again: only what failed is written.
        second.registered_pools[name] = writer
        assert second.batch_set_v2([transfer]) == {name: [True] * PAGES}
        second.registered_pools[name] = reader


def test_keys_alone_in_any_layout(tmp_path: Any) -> None:
    writer, reader = fill(Keys("layer_first")), Keys("page_first")
    for pool, do in ((writer, "batch_set_v1"), (reader, "batch_get_v1")):
        assert getattr(backend_of(tmp_path, pool), do)(KEYS, INDICES) == [True] * PAGES
    bits = writer.kv_buffer.view(torch.uint8).transpose(0, 1)
    assert torch.equal(bits, reader.kv_buffer.view(torch.uint8))


def test_a_pool_is_not_taken_for_another_that_is_gone(tmp_path: Any, monkeypatch: Any) -> None:
    """Python gives a new object the number of one that is gone. What was a view of the first may be
    a copy of the second, and must be put back."""
    pool = fill(Pool("layer_first", torch.bfloat16))
    states, backend = fill(States()), backend_of(tmp_path, pool)
    monkeypatch.setattr("kvzip.load.sglang.id", lambda _: 7, raising=False)
    for name, one in (("kv", pool), ("mamba", states)):
        backend.register_mem_host_pool_v2(one, name)
        indices = torch.arange(PAGES * one.page_size)
        transfer = SimpleNamespace(name=name, keys=KEYS, host_indices=indices)
        before = [page.clone() for page in pages_of(one)]
        assert all(backend.batch_set_v2([transfer])[name])
        for part in getattr(one, "parts", [one.kv_buffer]):
            part.zero_()
        assert all(backend.batch_get_v2([transfer])[name])
        assert all(map(torch.equal, before, pages_of(one)))


def test_a_pool_that_has_no_pages_is_a_miss(tmp_path: Any, caplog: Any) -> None:
    """SGLang's pools of packed formats raise; its thread must not end."""

    class Packed(Pool):
        def get_data_page(self, index: int, flat: bool = True) -> Any:
            raise NotImplementedError("no flat pages yet")

    backend = backend_of(tmp_path, Packed("layer_first", torch.uint8))
    assert backend.batch_set_v1(KEYS, INDICES) == [False] * PAGES
    assert backend.batch_get_v1(KEYS, INDICES) == [False] * PAGES
    told = [r.getMessage() for r in caplog.records if r.name == "kvzip.sglang"]
    assert len(told) == 1 and "no flat pages yet" in told[0]


@dataclasses.dataclass
class Result:
    """SGLang's `PoolTransferResult`."""

    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None


@pytest.mark.parametrize("policy", ["all_pages", "block_groups", "of tomorrow"])
def test_how_a_second_pool_limits_what_is_restored(
    tmp_path: Any, monkeypatch: Any, caplog: Any, policy: str
) -> None:
    """A pool of "block_groups" never does, says SGLang; one of an unknown policy leaves nothing,
    and no policy raises: that would end SGLang's thread."""
    if not HERE:
        module = ModuleType("sglang.srt.mem_cache.hicache_storage")
        module.PoolTransferResult = Result  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend = backend_of(tmp_path, pool)
    for name in ("kv", "more"):
        backend.register_mem_host_pool_v2(pool, name)
    assert all(backend.batch_set_v1(KEYS[:5], INDICES[: 5 * TOKENS]))
    stored = SimpleNamespace(name="more", keys=KEYS[:2], host_indices=INDICES[: 2 * TOKENS])
    assert backend.batch_set_v2([stored]) == {"more": [True] * 2}

    stored.hit_policy = policy
    backend.batch_exists_v2(KEYS, [stored])
    found = backend.batch_exists_v2(KEYS, [stored])
    pages = {"all_pages": 2, "block_groups": 5, "of tomorrow": 0}[policy]
    assert found.kv_hit_pages == pages
    assert found.restorable_prefix_pages == list(range(1, pages + 1))
    hits = {"kv": 5, "more": 2} if policy == "all_pages" else {"kv": 5}
    assert found.extra_pool_hit_pages == hits
    told = [r.getMessage() for r in caplog.records if r.name == "kvzip.sglang"]
    assert len(told) == (policy == "of tomorrow") and all("of tomorrow" in line for line in told)


def test_a_lookup_ends_at_the_first_page_that_is_missing(tmp_path: Any, monkeypatch: Any) -> None:
    """A prompt has thousands of pages, and most are not there."""
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend, asked = backend_of(tmp_path, pool), []
    assert all(backend.batch_set_v1(KEYS[:2], INDICES[: 2 * TOKENS]))
    head = backend.bucket.head

    def slow(path: str) -> Any:
        asked.append(path)
        time.sleep(0.01)
        return head(path)

    monkeypatch.setattr(backend.bucket, "head", slow)
    assert backend.batch_exists([*KEYS[:2], *map(str, range(1000))]) == 2
    assert len(asked) < 50


def test_a_store_that_fails_is_asked_once_for_pages_together(
    tmp_path: Any, monkeypatch: Any
) -> None:
    """SGLang gives its threads 10 seconds to end: one that does not answer may not take the time of
    each page."""
    pool = Pool("layer_first", torch.bfloat16).fill()
    backend, asked = backend_of(tmp_path, pool, extra={"workers": 1}), []

    def gone(*_: object, **__: object) -> Any:
        asked.append(1)
        raise StoreError("no answer")

    for name in ("get", "head"):
        monkeypatch.setattr(backend.bucket, name, gone)
    flat = [pool.get_dummy_flat_data_page() for _ in KEYS]
    for ask in (
        lambda: backend.batch_get_v1(KEYS, INDICES) == [False] * PAGES,
        lambda: backend.batch_set_v1(KEYS, INDICES) == [False] * PAGES,
        lambda: backend.batch_get(KEYS, flat) == [None] * PAGES,
        lambda: backend.batch_set(KEYS, flat) is False,
        lambda: backend.batch_exists(KEYS) == 0,
    ):
        asked.clear()
        assert ask()
        assert len(asked) <= 2


def test_a_draft_of_heads_beside_latents(tmp_path: Any, caplog: Any) -> None:
    """Ranks hold the same latents, and different heads of a draft model: none loads another's."""
    latents, draft = Pool("page_first", torch.bfloat16, latent=True), Pool("page_first", torch.half)
    del latents.head_num  # as SGLang's has none
    draft.fill()
    ranks = []
    for rank in range(2):
        ranks.append(backend_of(tmp_path, latents, is_mla_model=True, tp_rank=rank, tp_size=2))
        for name, pool in (("kv", latents), ("draft", draft)):
            ranks[-1].register_mem_host_pool_v2(pool, name)
    transfers = [
        SimpleNamespace(name=name, keys=KEYS, host_indices=INDICES) for name in ("kv", "draft")
    ]
    right = {"kv": [True] * PAGES, "draft": [True] * PAGES}
    assert ranks[0].batch_set_v2(transfers) == right == ranks[0].batch_get_v2(transfers)
    assert ranks[1].batch_get_v2(transfers) == right | {"draft": [False] * PAGES}
    assert "the pool draft" in caplog.text
