"""Chunks of vLLM's CPU pool as objects, and back: bytes as they were, or a miss.

How rows become what is stored, and that it stays within a limit, needs no vLLM. The rest is vLLM's
own engine, scheduler and tiers (`make test-vllm`); the worker that copies from a GPU to the pool,
which vLLM does not make on a CPU, is `copying_spec.py`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("obstore")

import kvzip  # noqa: E402
from kvzip.codec import get_codec  # noqa: E402
from kvzip.errors import CorruptError, KVZipError, UsageError  # noqa: E402
from kvzip.load import chunks  # noqa: E402
from kvzip.load.vllm.bounded import Bounded  # noqa: E402
from kvzip.load.vllm.rows import Rows  # noqa: E402
from kvzip.load.vllm.settings import TierSettings, tier_settings_from  # noqa: E402
from kvzip.snapshot import Origin, Snapshot  # noqa: E402
from kvzip.store.bucket import open_bucket  # noqa: E402

HEADS, DIM, LAYERS, TOKENS = 4, 16, 6, 8
PAGE = (Path(__file__).parent.parent.parent / "docs" / "vllm.md").read_text()
SECRET = bytes(range(1, 33))
RUN = importlib.util.find_spec("vllm") is not None


def snapshot(tokens: int, heads: int = HEADS, dim: int = DIM, layers: int = LAYERS) -> Snapshot:
    """A made-up cache, of channels of different sizes."""
    random = np.random.default_rng(0)
    size = np.exp(random.normal(size=(layers, 2, heads, 1, dim)))
    numbers = torch.from_numpy(random.normal(size=(layers, 2, heads, tokens, dim)) * size)
    pairs = [tuple(layer) for layer in numbers.to(torch.bfloat16)]
    return Snapshot.from_arrays(pairs)


@pytest.fixture(scope="module")
def profile() -> kvzip.Profile:
    return kvzip.Profile.fit([snapshot(500)], codec="channel")


def config(
    layout: str = "LBNHC", workers: int = 1, each: int = 1, groups: int = 1, **changes: Any
) -> Any:
    """vLLM's configuration of the offloading of such a cache."""
    names = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
    told: dict[str, Any] = {
        "worker_kv_bytes_per_block": 4 * DIM * TOKENS * HEADS // workers * LAYERS // groups,
        "groups": [
            SimpleNamespace(tokens_per_block=TOKENS, layer_names=tuple(names[g::groups]))
            for g in range(groups)
        ],
        "kv_cache_layout": layout,
        "canonical_layout": False,
        "cache": SimpleNamespace(blocks_per_chunk=each, tokens_per_hash=TOKENS),
        "model": SimpleNamespace(name="tiny", dtype="bfloat16"),
        "parallel": SimpleNamespace(
            world_size=workers, tp_size=workers, pp_size=1, pcp_size=1, dcp_size=1
        ),
    }
    return SimpleNamespace(**told | changes)


def rows_of(told: Any, profile: kvzip.Profile | None, codec: str = "planes") -> Rows:
    return Rows(told, told.parallel.world_size, profile, get_codec(codec), Origin(revision="r"))


def filled(
    told: Any, cache: Snapshot, group: int = 0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A row as vLLM's workers fill it from a cache, and which of its bytes are padding."""
    workers, each = told.parallel.world_size, told.cache.blocks_per_chunk
    layers = [int(re.findall(r"\d+", name)[0]) for name in told.groups[group].layer_names]
    cell = told.worker_kv_bytes_per_block * each
    row = np.full(-(-workers * cell // 4096) * 4096, 0xA5, np.uint8)
    mine = HEADS // workers
    for worker in range(workers):
        heads, parts = slice(worker * mine, (worker + 1) * mine), []
        for i in layers:
            held = np.concatenate([cache.layers[i].k[heads], cache.layers[i].v[heads]], -1)
            blocks = held.reshape(mine, each, TOKENS, 2 * DIM).swapaxes(0, 1)
            parts.append(blocks if "HN" in told.kv_cache_layout else blocks.swapaxes(1, 2))
        stacked = np.stack(parts, 0 if told.kv_cache_layout.startswith("L") else 1)
        row[worker * cell : (worker + 1) * cell] = np.frombuffer(stacked.tobytes(), np.uint8)
    return row, np.arange(len(row)) >= workers * cell


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
@pytest.mark.parametrize(("workers", "each"), [(1, 1), (2, 3), (4, 1)])
def test_a_row_becomes_a_page_and_comes_back(
    profile: kvzip.Profile, layout: str, workers: int, each: int
) -> None:
    told = config(layout, workers, each)
    rows, cache = rows_of(told, profile), snapshot(TOKENS * each)
    assert rows.makes_pages, rows.why_no_pages
    row, padding = filled(told, cache)
    data = rows.encode(row, 0)
    # It is the page of the model's own numbers, whatever the layout and the split.
    assert data == kvzip.encode_page([(x.k, x.v) for x in cache.layers], profile)
    again = np.zeros_like(row)
    rows.decode(data, again, 0)
    assert np.array_equal(again[~padding], row[~padding]) and not again[padding].any()


def test_groups_have_pages_of_their_own_layers(profile: kvzip.Profile) -> None:
    told = config(groups=2, each=2)
    rows, cache = rows_of(told, profile), snapshot(2 * TOKENS)
    for group in range(2):
        row, padding = filled(told, cache, group)
        data, again = rows.encode(row, group), np.zeros_like(row)
        rows.decode(data, again, group)
        assert np.array_equal(again[~padding], row[~padding])
        with pytest.raises(CorruptError, match="other layers"):
            rows.decode(data, again, 1 - group)
        with pytest.raises(CorruptError, match="more is stored"):
            rows.decode(data + data, again, group)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "fp8", "fp8_ds_mla"])
def test_without_a_profile_any_row_comes_back(dtype: str) -> None:
    told = config(model=SimpleNamespace(name="tiny", dtype=dtype))
    rows, random = rows_of(told, None), np.random.default_rng(0)
    row = random.integers(0, 256, 3 * 4096, np.uint8)
    again = np.zeros_like(row)
    rows.decode(rows.encode(row, 0), again, 0)
    assert np.array_equal(again, row)


def test_numbers_compress_either_way(profile: kvzip.Profile) -> None:
    told = config(each=16)
    row, _ = filled(told, snapshot(16 * TOKENS))
    plain, paged = (len(rows_of(told, p).encode(row, 0)) for p in (None, profile))
    assert paged < plain < len(row)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kv_cache_layout": "LHBNC"}, "the order LHBNC is not known"),
        ({"canonical_layout": True}, "canonical_layout of LBNHC"),
        ({"worker_kv_bytes_per_block": 4096}, "of another cache"),
        ({"model": SimpleNamespace(name="tiny", dtype="float16")}, "bf16 and the cache of float16"),
    ],
)
def test_what_a_profile_does_not_describe_still_comes_back(
    profile: kvzip.Profile, changes: dict[str, Any], why: str
) -> None:
    rows = rows_of(config(**changes), profile)
    assert not rows.makes_pages and why in rows.why_no_pages
    row = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    again = np.zeros_like(row)
    rows.decode(rows.encode(row, 0), again, 0)
    assert np.array_equal(again, row)


@pytest.mark.parametrize("paged", [True, False])
def test_damage_is_an_error(profile: kvzip.Profile, paged: bool) -> None:
    told = config()
    rows = rows_of(told, profile if paged else None)
    row, _ = filled(told, snapshot(TOKENS))
    data = rows.encode(row, 0)
    places = np.random.default_rng(0).choice(len(data), 40, replace=False)
    for place in [*places.tolist(), 0, len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(KVZipError):
            rows.decode(bytes(damaged), np.zeros_like(row), 0)
    for cut in (0, 3, len(data) // 2, len(data) - 1):
        with pytest.raises(KVZipError):
            rows.decode(data[:cut], np.zeros_like(row), 0)


# --- the limit -------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    objects = open_bucket(tmp_path, make=True)
    objects.put("else/where", b"x" * 5000)
    bounded = Bounded(objects, "tier", 10_000)

    def there() -> set[str]:
        return {meta.path.rpartition("/")[2] for meta in objects.under("tier")}

    for name in "abcdefghij":
        bounded.put(f"tier/{name}", b"y" * 900)
    assert there() == set("abcdefghij")
    assert bounded.get("tier/a", 1000) and bounded.get("tier/c", 1000)
    bounded.use("tier/d")
    for name in "klmn":
        bounded.put(f"tier/{name}", b"y" * 900)
    kept = there()
    assert {"a", "c", "d", *"klmn"} <= kept and not {"b", "e"} & kept
    total = sum(meta.size for meta in objects.under("tier"))
    assert total <= 10_000 and bounded.get("tier/b", 1000) is None and objects.get("else/where")
    with pytest.raises(UsageError, match="above the limit"):
        bounded.put("tier/o", bytes(10_001))


@pytest.mark.parametrize("codec", ["raw", "zstd", "planes", "channel", "lz4"])
def test_chunks_of_megabytes_come_back(tmp_path: Path, codec: str) -> None:
    rows = rows_of(config(), None, codec)
    row = np.random.default_rng(0).integers(0, 256, 5 << 20, np.uint8)
    bounded = Bounded(open_bucket(tmp_path, make=True), "tier", None)
    bounded.put("tier/a", rows.encode(row, 0))
    stored = bounded.get("tier/a", chunks.most_stored(row.nbytes))
    assert stored is not None and len(stored) > 4 << 20
    back = np.zeros_like(row)
    rows.decode(stored, back, 0)
    assert np.array_equal(back, row)


def test_what_others_wrote_counts(tmp_path: Path) -> None:
    objects = open_bucket(tmp_path, make=True)
    for n in range(20):
        objects.put(f"tier/old{n}", b"z" * 1000)
        os.utime(tmp_path / f"tier/old{n}", (1000 + n, 1000 + n))
    Bounded(objects, "tier", 10_000).put("tier/new", b"y" * 1000)
    left = {meta.path.rpartition("/")[2] for meta in objects.under("tier")}
    assert "new" in left and "old19" in left and "old0" not in left and len(left) <= 10


# --- vLLM itself -----------------------------------------------------------------------------


def test_wrong_settings_are_named() -> None:
    with pytest.raises(KVZipError, match=r"secondary_tiers: .*limit_byte"):
        tier_settings_from({"url": "x", "limit_byte": 3})


def tier_json() -> dict[str, Any]:
    """The page's configuration."""
    [text] = re.findall(r"```json\n([^`]*KvzipTier[^`]*)```", PAGE)
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.skipif(not RUN, reason="needs vLLM: make test-vllm")
@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_formats_of_one_name_are_kept_apart(tmp_path: Path, monkeypatch: Any, dtype: str) -> None:
    """AMD's MI300 has another fp8, which vLLM calls by the same name."""
    from kvzip.load.vllm.tier import KvzipTier

    told = config(model=SimpleNamespace(name="tiny", dtype=dtype))
    spec, places = SimpleNamespace(config=told, replicated_layout=False), set[str]()
    for fnuz in (False, True):
        monkeypatch.setattr("kvzip.load.vllm.names._fnuz", lambda fnuz=fnuz: fnuz)
        pool = memoryview(np.zeros((2, 4096), np.uint8))
        tier = KvzipTier(spec, pool, "kvzip", url=str(tmp_path), revision="r")
        places.add(tier._path(b"key" + bytes(8)))
        tier.shutdown()
    assert len(places) == 2


def test_the_page_has_all_settings() -> None:
    [tier] = tier_json()["kv_connector_extra_config"]["secondary_tiers"]
    for name in ("type", "module_path"):
        tier.pop(name)
    assert tier_settings_from(tier).limit_bytes
    [_, table] = PAGE.split("| of the tier |")
    known = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert known == set(TierSettings.__struct_fields__) | {"locality"}


def tier_transfer(url: Any, tier: Any = (), each: int = 2) -> dict[str, Any]:
    """The page's configuration with a folder of its own, chunks of `each` blocks, and the worker
    that stands in for vLLM's."""
    transfer = tier_json()
    transfer["kv_connector_extra_config"] |= {
        "spec_name": "CopyingSpec",
        "spec_module_path": "copying_spec",
        "cpu_bytes_to_use": 1 << 24,
        "blocks_per_chunk": each,
    }
    [found] = transfer["kv_connector_extra_config"]["secondary_tiers"]
    found |= {"url": str(url), **dict(tier)}
    return transfer


@pytest.fixture(scope="module")
def engines() -> Iterator[Any]:
    if not RUN:
        pytest.skip("needs vLLM: make test-vllm")
    from vllm_runs import Engines

    made = Engines()
    yield made
    made.close()


@pytest.fixture(scope="module")
def runs(engines: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """Engines without kvzip, and on one tier after the other."""
    from test_vllm_engine import DOCUMENT, OTHER, UNSEEN, make_model
    from vllm_runs import Run

    root = tmp_path_factory.mktemp("tier")
    model = make_model(root / "made", 0)
    other = make_model(root / "made-other", 1)
    named = root / "p.kvprofile"
    kvzip.Profile.fit([snapshot(500, 2, 64, 4)], codec="channel").save(named)

    def run(name: str, prompts: Any, model: Path = model, url: Any = None, **more: Any) -> Run:
        transfer = None if url is None else tier_transfer(url, more.pop("tier", {}))
        return Run(engines, root / name, model, prompts, transfer=transfer, **more)

    found: dict[str, Any] = {"plain": run("plain", [DOCUMENT, OTHER, *UNSEEN])}
    paged = {"profile": str(named)}
    found["save"] = run("save", [DOCUMENT], url=root / "a")
    found["save-pages"] = run("save-pages", [DOCUMENT], url=root / "b", tier=paged)
    assert found["save"].log and found["save-pages"].log
    found["load"] = run("load", [OTHER], url=root / "a")
    found["load-pages"] = run("load-pages", [OTHER], url=root / "b", tier=paged)
    found["model"] = run("model", [DOCUMENT], other, url=root / "a")
    assert found["load"].log and found["load-pages"].log and found["model"].log
    found["objects"] = {f: f.read_bytes() for f in chunks_of(root / "b")}
    for file in found["objects"]:
        data = bytearray(file.read_bytes())
        data[len(data) * 3 // 4] ^= 1
        file.write_bytes(data)
    found["damaged"] = run("damaged", [DOCUMENT, DOCUMENT], url=root / "b", tier=paged)
    key = {"key_from": f"file:{root / 'key'}"}
    (root / "key").write_bytes(SECRET)
    assert run("save-sealed", [DOCUMENT], url=root / "c", tier=key).log
    found["load-sealed"] = run("load-sealed", [OTHER], url=root / "c", tier=key)
    found["no-key"] = run("no-key", [OTHER], url=root / "c")
    gone = {"url": "s3://nowhere/x", "timeout": 1, "retries": 0, "revision": "r"}
    gone["options"] = {
        "endpoint": "http://127.0.0.1:9",
        "access_key_id": "a",
        "secret_access_key": "b",
        "region": "r",
    }
    found["gone"] = run("gone", [DOCUMENT], url="", tier=gone)
    found["root"] = root
    assert found["damaged"].log and found["gone"].log
    return found


def chunks_of(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "about.json"]


@pytest.mark.parametrize(("name", "each", "cached"), [("gemma3", 2, 256), ("qwen3-next", 1, 288)])
def test_a_tier_behind_several_groups(
    engines: Any, tmp_path: Path, name: str, each: int, cached: int
) -> None:
    """A prompt that begins with all of a stored one is loaded, to the end of a whole chunk: there
    vLLM keeps windows and states. At shorter beginnings it keeps them where it is told to."""
    from test_vllm_families import DOCUMENT, FAMILIES, LONGER, OTHER
    from vllm_runs import Run

    torch.manual_seed(0)
    model = tmp_path / "model"
    FAMILIES[name].make().to(torch.bfloat16).save_pretrained(model)

    def run(name: str, prompts: Any, folder: str = "", every: int = 0) -> Run:
        transfer = tier_transfer(tmp_path / folder, each=each) if folder else None
        options = {"prefix_cache_retention_interval": every}
        return Run(engines, tmp_path / name, model, prompts, options=options, transfer=transfer)

    plain, save = run("plain", [DOCUMENT, LONGER]), run("save", [DOCUMENT], "a")
    assert save.computed_as(plain, 0, 0)
    load = run("load", [LONGER], "a")
    if name == "gemma3":  # a block of the other's states is longer than what is shared
        often, save = run("often", [DOCUMENT, OTHER], every=64), run("save-64", [DOCUMENT], "b", 64)
        assert save.log
        short = run("short", [OTHER], "b", 64)
        assert short[0]["cached"] == 192 and short.computed_as(often, 0, 1)
    assert load[0]["cached"] == cached and load.computed_as(plain, 0, 1) and not load.told


@pytest.mark.parametrize("name", ["save", "save-pages", "gone"])
def test_storing_changes_nothing(runs: dict[str, Any], name: str) -> None:
    assert runs[name][0]["cached"] == 0 and runs[name].computed_as(runs["plain"], 0, 0)


def test_sealed_chunks(runs: dict[str, Any]) -> None:
    """With the key they are loaded; without it vLLM does not start."""
    load = runs["load-sealed"]
    assert load[0]["cached"] == 192 and load.computed_as(runs["plain"], 0, 1) and not load.told
    files = chunks_of(runs["root"] / "c")
    assert len(files) >= 5 and all(f.read_bytes().startswith(b"\x89KVS") for f in files)
    assert "is a sealed store: give its key" in runs["no-key"].error
    assert SECRET.hex() not in load.log + runs["no-key"].error


@pytest.mark.parametrize(("name", "folder"), [("load", "a"), ("load-pages", "b")])
def test_another_process_loads_what_is_stored(runs: dict[str, Any], name: str, folder: str) -> None:
    """Whole chunks of the shared beginning, as vLLM's own cache has them, and then computed."""
    assert runs[name][0]["cached"] == runs["plain"][1]["cached"] == 192
    assert runs[name].computed_as(runs["plain"], 0, 1)
    assert not runs[name].told
    first = b"KVZP" if folder == "b" else b"\x89KVZ"
    # Of folder a, the other model's lie beside these.
    files = chunks_of(runs["root"] / folder)
    rows = 64 * 4 * 2 * 64 * 2 * 2
    assert len(files) >= 4 and all(f.read_bytes().startswith(first) for f in files)
    assert sum(f.stat().st_size for f in files) < 0.85 * rows * len(files)


def test_another_model_finds_nothing(runs: dict[str, Any]) -> None:
    assert runs["model"][0]["cached"] == 0
    abouts = [json.loads(f.read_text()) for f in (runs["root"] / "a").rglob("about.json")]
    assert len({about["revision"] for about in abouts}) == len(abouts) == 2


def test_damaged_chunks_are_computed_and_written_anew(runs: dict[str, Any]) -> None:
    damaged = runs["damaged"]
    assert damaged[0]["cached"] == 0 and damaged.computed_as(runs["plain"], 0, 0)
    [told] = damaged.told
    assert "is not used, and is computed" in told
    again = {f: f.read_bytes() for f in chunks_of(runs["root"] / "b")}
    stored = {f: data for f, data in runs["objects"].items() if again[f] == data}
    assert len(stored) >= math.floor(300 / 64)


def test_a_store_that_is_gone_is_told_once(runs: dict[str, Any]) -> None:
    assert {line.partition(":")[0] for line in runs["gone"].told} == {
        "chunks are not stored",
        "chunks are computed",
    }
    assert len(runs["gone"].told) == 2
