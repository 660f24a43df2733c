"""SGLang's own HiCache controller and host pools on top of the backend: pages or a shorter prefix.

`make test-sglang` installs SGLang 0.5.23 into an environment of its own and runs this on a CPU:
the controller's threads that store pages, look prefixes up and fetch them, its hashes of tokens,
and its pools in the host's memory. What the server's scheduler does between them (it gives a
lookup's hits room in the pool) is done here; the copies between host and accelerator are not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs SGLang: make test-sglang", allow_module_level=True)

import torch
import transformers
from servers import failing_server, silent_server

from kvzip import api

# SGLang imports torchvision for pictures, and pip has it for CUDA only. transformers looks for it
# once, and then does without.
assert transformers.AutoProcessor and transformers.AutoImageProcessor
if importlib.util.find_spec("torchvision") is None:
    for part in ("", ".transforms", ".transforms.functional"):
        sys.modules[f"torchvision{part}"] = MagicMock()

from sglang.srt.managers.cache_controller import HiCacheController  # noqa: E402
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool  # noqa: E402
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.utils import get_storage_hash_str  # noqa: E402
from sglang.srt.runtime_context import get_context, get_parallel  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

PAGE, PAGES, HEADS, DIM, LAYERS = 16, 6, 2, 24, 3
TOKENS = list(range(100, 100 + PAGE * PAGES))
LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
GUIDE = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text()
[SETTINGS] = re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)


class Host:
    """A controller, as a server has one, and its pool."""

    def __init__(
        self,
        url: Any,
        layout: str = "layer_first",
        dtype: Any = torch.bfloat16,
        layers: int = LAYERS,
        model: str = "org/model",
        latent: bool = False,
        model_folder: str | None = None,
        **settings: Any,
    ):
        size = 2 * PAGE * PAGES
        named = {"pin_memory": False, "device_capacity_tokens": size}
        named |= {"start_layer": 0, "end_layer": layers}
        if latent:
            device = MLATokenToKVPool(size, PAGE, dtype, DIM - 8, 8, layers, "cpu", False)
            info, named["target_layer_num"] = device._mla_buffer_info(), layers
            self.pool = MLATokenToKVPoolHost(info, 1.0, 0, PAGE, layout, **named)
        else:
            device = MHATokenToKVPool(
                size, PAGE, dtype, HEADS, DIM, layers, "cpu", False, enable_alt_stream=False
            )
            info = device._mha_buffer_info()
            self.pool = MHATokenToKVPoolHost(info, 1.0, 0, PAGE, layout, **named)
        self.controller = HiCacheController(
            PagedTokenToKVPoolAllocator(size, PAGE, dtype, "cpu", device, False),
            self.pool,
            PAGE,
            None,
            threading.Event(),
            io_backend="direct",
            storage_backend="dynamic",
            prefetch_threshold=PAGE,
            model_name=model,
            storage_backend_extra_config=(
                json.loads(SETTINGS)
                | {"url": str(url), "revision": "r1", "model": model_folder}
                | settings
            ),
        )

    def store(self, seed: int = 0, before: list[str] | None = None) -> list[Any]:
        """Random pages, written by the controller; what they hold. `before`: the pages before."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randn(self.pool.kv_buffer.shape, generator=generator)
        self.pool.kv_buffer.copy_(numbers)
        rows = self.pool.alloc(len(TOKENS))
        hashes = get_storage_hash_str(TOKENS, None, page_size=PAGE)
        self.controller.write_storage(rows, TOKENS, hash_value=hashes, prefix_keys=before)
        done = self.controller.ack_backup_queue.get(timeout=20)
        assert done.completed_tokens == len(TOKENS)
        return self.pages(rows)

    def fetch(self, tokens: Any = TOKENS) -> tuple[int, list[Any]]:
        """How many pages the lookup found, and those that then came."""
        self.controller.prefetch("request", tokens)
        found = self.controller.prefetch_hit_queue.get(timeout=20)
        count = found.storage_hit_count
        if count < PAGE:
            return 0, []
        found.host_indices = self.controller.alloc_prefetch_host_buffers(found, count)
        self.controller.prefetch_buffer.put(found)
        came = 0
        while True:
            ack = self.controller.ack_prefetch_queue.get(timeout=20)
            came = came if ack.completed_tokens is None else ack.completed_tokens
            if ack.completed_req:
                return count // PAGE, self.pages(found.host_indices[:came])

    def pages(self, rows: Any) -> list[Any]:
        """Pages of the pool as [2, layers, heads, tokens, dim] (of latent attention [1, ...]),
        whatever its layout."""
        found = []
        for row in rows[::PAGE].tolist():
            page = self.pool.get_data_page(row, flat=False)
            page = page if len(page) == 2 else page[None]
            axes = {
                "layer_first": (0, 1, 3, 2, 4),
                "page_first": (0, 2, 3, 1, 4),
                "page_first_direct": (0, 1, 3, 2, 4),
                "page_head": (0, 3, 1, 2, 4),
            }[self.pool.layout]
            page = page.squeeze(1) if page.ndim == 6 else page
            found.append(page.permute(axes).contiguous().view(torch.uint8).clone())
        return found


@pytest.fixture
def host() -> Iterator[Any]:
    """`host(url, layout, ...)`: one more server's."""
    made: list[Host] = []
    with get_parallel().override(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_dcp_rank=0, attn_dcp_size=1
    ):

        def make(*args: Any, **more: Any) -> Host:
            made.append(Host(*args, **more))
            return made[-1]

        yield make
        for one in made:
            one.controller.detach_storage_backend()


def told(caplog: Any) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name == "kvzip.sglang"]
    caplog.clear()
    return found


def same(came: list[Any], pages: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(came, pages, strict=True))


@contextmanager
def one_warning(caplog: Any, line: str) -> Iterator[None]:
    caplog.clear()
    yield
    [found] = told(caplog)
    assert "is computed instead" in found and line in found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_pages_come_back_in_any_layout(
    host: Any, tmp_path: Path, layout: str, other: str, caplog: Any
) -> None:
    pages = host(tmp_path, layout).store()
    for in_place in (0, 1):
        reader = host(tmp_path, other, interface_v1=in_place)
        found, came = reader.fetch()
        assert found == PAGES and same(came, pages)
        found, came = reader.fetch([*TOKENS[: 3 * PAGE], *range(PAGE)])
        assert found == 3 and same(came, pages[:3])  # the prefix that is shared
    files = list(tmp_path.rglob("*.kvz"))
    assert len(files) == PAGES and told(caplog) == []
    assert all(api.verify(file).header.origin.model == "org/model" for file in files)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("other", LAYOUTS[:3])
def test_latent_attention(host: Any, tmp_path: Path, layout: str, other: str) -> None:
    pages = host(tmp_path, layout, latent=True).store()
    for in_place in (0, 1):
        found, came = host(tmp_path, other, latent=True, interface_v1=in_place).fetch()
        assert found == PAGES and same(came, pages)


def test_pages_know_where_they_stand(host: Any, tmp_path: Path) -> None:
    """Where SGLang tells it, and the weights' config what turns keys."""
    config = transformers.LlamaConfig(num_hidden_layers=LAYERS, head_dim=DIM)
    config.save_pretrained(tmp_path / "model")
    model = {"model": "org/model", "model_folder": str(tmp_path / "model")}
    for before, first in ((None, 0), ([], 0), (["a", "b"], 2 * PAGE)):
        folder = tmp_path / str(before)
        pages = host(folder, **model).store(before=before)
        assert same(host(folder).fetch()[1], pages)
        for number in range(PAGES):
            header = api.info(page_file(folder, number)).header
            [layer, *_] = header.layout.layers
            if before is None:
                assert (layer.first, layer.rope, header.origin.rope) == (0, None, ())
            else:
                assert (layer.first, layer.rope) == (first + number * PAGE, 0)
                assert len(header.origin.rope[0]["inv_freq"]) == DIM // 2


def test_pages_in_place_or_flat(host: Any, tmp_path: Path) -> None:
    for in_place in (0, 1):
        pages = host(tmp_path / str(in_place), interface_v1=in_place).store()
        assert same(host(tmp_path / str(in_place)).fetch()[1], pages)


def test_the_pages_command() -> None:
    """SGLang's own parser takes it."""
    [shell] = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    shell = shell.replace("$(cat hicache.json)", "FILE").replace("\\\n", " ")
    words = shlex.split(shell.partition("launch_server")[2])
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    found = parser.parse_args(words)
    assert found.enable_hierarchical_cache and found.hicache_storage_backend == "dynamic"
    assert found.hicache_storage_backend_extra_config == "FILE" and found.page_size == 64


# --- what goes wrong -------------------------------------------------------------------------


def page_file(folder: Path, number: int) -> Path:
    name = get_storage_hash_str(TOKENS, None, page_size=PAGE)[number]
    [file] = folder.rglob(f"{name}*")
    return file


def test_a_damaged_page_ends_the_prefix(host: Any, tmp_path: Path, caplog: Any) -> None:
    """SGLang computes from there; what came before is whole."""
    pages = host(tmp_path).store()
    file = page_file(tmp_path, 2)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    reader = host(tmp_path)
    with one_warning(caplog, "damaged"):
        for known in (PAGES, 2):  # what failed is no hit any more
            found, came = reader.fetch()
            assert found == known and same(came, pages[:2])


@pytest.mark.parametrize("layers", [LAYERS - 1, LAYERS + 1])
def test_a_missing_layer(host: Any, tmp_path: Path, caplog: Any, layers: int) -> None:
    host(tmp_path, layers=layers).store()
    reader = host(tmp_path)
    with one_warning(caplog, f"in {layers} layers, the buffer"):
        assert reader.fetch() == (PAGES, [])


def test_another_model_or_dtype_is_no_hit(host: Any, tmp_path: Path, caplog: Any) -> None:
    pages = host(tmp_path).store()
    for more in ({"model": "org/other"}, {"dtype": torch.float16}):
        assert host(tmp_path, **more).fetch() == (0, [])
        assert len(host(tmp_path, **more).store(1)) == PAGES  # its own beside them
    assert same(host(tmp_path).fetch()[1], pages) and told(caplog) == []


def test_what_the_server_was_told_counts(host: Any, tmp_path: Path, caplog: Any) -> None:
    """Through what SGLang itself says of its arguments, and of weights that it loads later."""
    folders = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
        folders.append(str(tmp_path / name))
    context, store, found = get_context(), tmp_path / "store", {}
    states: dict[str, dict[str, Any]] = {
        "plain": {},
        "quantized": {"quantization": "fp8"},
        "adapter": {"lora_paths": ["x=" + folders[1]]},
        "dummy": {"load_format": "dummy"},
        "draft": {"speculative_draft_model_path": folders[1]},
    }
    for name, state in states.items():
        with context.override_server_args(model_path=folders[0], **state):
            one = host(store, revision=None, model="name")
            assert one.fetch()[0] == 0, name
            found[name] = one.store(len(found))
            assert same(one.fetch()[1], found[name])
    with context.override_server_args(model_path=folders[0]):
        one = host(store, revision=None, model="name")
        assert same(one.fetch()[1], found["plain"])
        for path in (folders[1], folders[0]):  # as `update_weights_from_disk` does
            (tmp_path / "a" / "model.safetensors").write_bytes(b"c")
            context.override("model_runner.update_model_fields", model_path=path)
            assert one.fetch()[0] == 0
    assert not told(caplog)


@pytest.mark.parametrize("formats", [("fp8_e4m3", "fp8_e5m2")])
def test_formats_of_8_bits(host: Any, tmp_path: Path, formats: tuple[str, str]) -> None:
    """SGLang's pools hold them as bytes."""
    dtypes = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    for name in formats:
        with get_context().override_server_args(model_path="org/model", kv_cache_dtype=name):
            one = host(tmp_path, dtype=dtypes[name])
            assert one.pool.dtype == torch.uint8
            assert one.fetch()[0] == 0
            pages = one.store()
            assert same(one.fetch()[1], pages)


@pytest.mark.parametrize("silent", [False, True], ids=["dies", "stalls"])
def test_a_store_that_fails_on_the_way(
    host: Any, tmp_path: Path, caplog: Any, silent: bool
) -> None:
    pages = host(tmp_path).store()
    with failing_server(tmp_path) as server:
        server.fail(page_file(tmp_path, 3).name, 1, silent)  # the lookup is answered
        reader = host(server.url, timeout=0.5, retries=0, workers=8)
        with one_warning(caplog, "cannot read"):
            for _ in range(2):
                found, came = reader.fetch()
                assert same(came, pages[:3]) and found in (PAGES, 3)


def test_a_store_that_does_not_answer(host: Any, caplog: Any) -> None:
    with silent_server() as url, one_warning(caplog, "cannot read"):
        reader = host(url, timeout=0.3, retries=0, workers=8)
        assert reader.fetch() == (0, []) and reader.fetch() == (0, [])
