"""vLLM's connector: keys and values come back to the bit, or are computed.

Where vLLM is not installed, a stand-in for its base classes is used, and always one for its engine:
`standin.py` says what they do. `test_vllm_engine.py` is about vLLM itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import random
import sys
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("obstore")

import standin  # noqa: E402
from standin import BLOCK, HEADS, LAYERS, WORDS, config  # noqa: E402
from support import damaged  # noqa: E402

import kvzip  # noqa: E402
from kvzip.codecs.native.cuda.shim_device import ShimDevice  # noqa: E402
from kvzip.container import Reader  # noqa: E402
from kvzip.errors import (  # noqa: E402
    KVZipError,
    SealError,
    StoreError,
    UnsupportedError,
    UsageError,
)
from kvzip.load.vllm import names, pages  # noqa: E402
from kvzip.snapshot import PartLayout  # noqa: E402
from kvzip.statistics.splits import Cut  # noqa: E402
from kvzip.store import Store  # noqa: E402

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def ours() -> Any:
    if importlib.util.find_spec("vllm"):
        return importlib.import_module("kvzip.load.vllm.connector")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in standin.modules().items():
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("kvzip.load.vllm.connector")


@pytest.fixture
def engine(ours: Any, tmp_path: Any) -> Any:
    """`engine(chunk=..., drafting=..., within=..., **settings)`: one more engine on the same
    store."""

    def make(
        chunk: int = 10**6, drafting: bool = False, within: bool = False, **changes: Any
    ) -> standin.Engine:
        settings = config(tmp_path, **changes)
        return standin.Engine(ours, settings, chunk=chunk, drafting=drafting, within=within)

    return make


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(WORDS), k=tokens)


def warnings(caplog: Any) -> list[str]:
    ours = (r for r in caplog.records if r.name.startswith("kvzip"))
    return [r.getMessage() for r in ours if r.levelno >= logging.WARNING]


def documents(tmp_path: Any) -> list[Any]:
    return sorted(tmp_path.rglob("*.kvz"))


def fill(engine: Any, *prompts: list[int], **changes: Any) -> None:
    first = engine(**changes)
    for ids in prompts:
        first.run(ids)
    first.settle()


# --- vLLM's blocks ---------------------------------------------------------------------------


def place(arrangement: str, part: int, t: int, d: int, tokens: int, dim: int) -> int:
    """Where number d of token t lies within a block's and head's 2 * tokens * dim numbers, as the
    kernels of vLLM 0.32.0 and 0.33.0 compute it."""
    if arrangement == "halves":
        return t * 2 * dim + part * dim + d
    start = part * tokens * dim
    if arrangement == "columns":
        return start + (t * dim + d if part else d * tokens + t)
    if part:
        return start + d // 16 * 16 * tokens + t // 2 * 32 + d % 16 * 2 + t % 2
    return start + t // 16 * 16 * dim + d // 2 * 32 + t % 16 * 2 + d % 2


@pytest.mark.parametrize("arrangement", pages.ARRANGEMENTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
def test_blocks_are_read_and_written_as_the_kernels_order_them(
    arrangement: str, dtype: Any
) -> None:
    tokens, dim, heads = 32, 48, 2
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    low, high = (0, 2**8) if dtype.itemsize == 1 else (-(2**15), 2**15)
    bits = torch.randint(low, high, (5, heads, tokens, 2 * dim), dtype=words)
    cache = bits.view(dtype)
    parts = {"k": (heads, dim), "v": (heads, dim)}
    paged = pages.Pages(cache, arrangement, parts, tokens)
    order = torch.tensor(
        [
            [[place(arrangement, p, t, d, tokens, dim) for d in range(dim)] for t in range(tokens)]
            for p in range(2)
        ]
    )
    picked, count = [3, 1], tokens + 7
    want = bits.view(5, heads, -1)[picked][:, :, order].permute(2, 1, 0, 3, 4)
    for part, held in enumerate(paged.take(picked, count).values()):
        assert torch.equal(held.view(words), want[part].reshape(heads, -1, dim)[:, :count])
    whole = paged.take(picked, 2 * tokens)
    before = bits.clone()
    bits[picked] = 0
    paged.put(picked, whole)
    assert torch.equal(bits, before)
    # Of a block that is not filled to its end the rest stays.
    some = {name: held[:, :count] for name, held in paged.take([0, 2], count).items()}
    paged.put(picked, some)
    again = paged.take(picked, 2 * tokens)
    for name, held in again.items():
        assert torch.equal(held[:, :count].view(words), some[name].view(words))
        assert torch.equal(held[:, count:].view(words), whole[name][:, count:].view(words))


@pytest.mark.parametrize("ndim", [3, 4])
@pytest.mark.parametrize("each", [1, 3])
def test_latents_and_blocks_of_several_pages(ndim: int, each: int) -> None:
    """MLA's cache has one line for each token; a kernel may take a block in several pages."""
    cache = torch.randn(12, 16, 40).to(torch.bfloat16)
    view = cache[:, None] if ndim == 4 else cache
    parts = {"latent": (1, 32), "k_rope": (1, 8)}
    paged = pages.Pages(view, "halves", parts, 16 * each)
    lines = cache.view(12 // each, 16 * each, 40)
    found = paged.take([2, 1], 16 * each + 5)
    want = torch.cat([lines[2], lines[1][:5]])
    assert torch.equal(found["latent"], want[None, :, :32])
    assert torch.equal(found["k_rope"], want[None, :, 32:])
    paged.put([0], {name: part[:, : 16 * each] for name, part in found.items()})
    assert torch.equal(lines[0], lines[2])


def test_other_backends_are_refused() -> None:
    assert pages.arrangement_of("FLASH_ATTN", None, 2) == "halves"
    assert pages.arrangement_of("CPU_ATTN", "amx", 2) == "tiles"
    for backend, isa in (("FLASHINFER", None), ("CPU_ATTN", "neon"), ("CPU_ATTN", None)):
        with pytest.raises(UnsupportedError, match="use one of"):
            pages.arrangement_of(backend, isa, 2)
    with pytest.raises(UnsupportedError, match="amx kernels for numbers of 4 bytes"):
        pages.arrangement_of("CPU_ATTN", "amx", 4)
    parts = {"k": (2, 16), "v": (2, 16)}
    with pytest.raises(UnsupportedError, match="want"):
        pages.Pages(torch.zeros(4, 2, 16, 33), "halves", parts, 16)
    with pytest.raises(UnsupportedError, match="pages of 16 tokens"):
        pages.Pages(torch.zeros(4, 2, 16, 32), "halves", parts, 24)


def test_processors_that_multiply_fp8_order_it_in_their_own_way(monkeypatch: Any) -> None:
    layer = SimpleNamespace(isa="amx")
    assert pages.kernels_of(layer, 1) == "amx"
    asked = lambda: True  # noqa: E731
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(cpu_has_amx_fp8=asked), raising=False)
    assert pages.kernels_of(layer, 2) == "amx"
    with pytest.raises(UnsupportedError, match="its amx_fp8 kernels"):
        pages.arrangement_of("CPU_ATTN", pages.kernels_of(layer, 1), 1)


# --- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "isa"),
    [(d, "vec") for d in (*DTYPES, torch.uint8)] + [(torch.bfloat16, "amx"), (torch.uint8, "amx")],
    ids=str,
)
@pytest.mark.parametrize("tokens", [BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 3])
def test_another_engine_loads_what_one_saved(
    engine: Any, tmp_path: Any, dtype: Any, isa: str, tokens: int
) -> None:
    ids = prompt(tokens)
    told = {"dtype": dtype} | ({"cache_dtype": "fp8"} if dtype == torch.uint8 else {})
    fill(engine, ids, **told, isa=isa)
    [file] = documents(tmp_path)
    assert kvzip.verify(file).header.layout.tokens == tokens
    # A document does not depend on who wrote it.
    [request] = engine(**told, isa="vec").run(ids)
    assert request.loaded == (tokens - 1) // BLOCK * BLOCK


FP8: dict[str, Any] = {"dtype": torch.uint8, "cache_dtype": "fp8"}
E5M2 = {"cache_dtype": "fp8_e5m2"}


def test_a_document_of_fp8_holds_the_engines_numbers(engine: Any, tmp_path: Any) -> None:
    ids = prompt(80)
    fill(engine, ids, **FP8)
    [file] = documents(tmp_path)
    for i, (k, v) in enumerate(kvzip.decode(file).tensors()):
        assert k.dtype == v.dtype == torch.float8_e4m3fn
        for part, held in enumerate((k, v)):
            assert torch.equal(held.view(torch.uint8), standin.formula(ids, i, part, torch.uint8))


def test_which_fp8_it_is_counts(engine: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """Not the other format, nor that of the same name on AMD's MI300, nor numbers whose scale
    nobody told."""
    ids = prompt(80)
    fill(engine, ids, **FP8)
    assert engine(**FP8 | {"cache_dtype": "fp8_e4m3"}).run(ids)[0].loaded == 64
    [file] = documents(tmp_path)
    unscaled = kvzip.Origin(model="org/model", revision="r1")
    made = kvzip.decode(file)
    found = kvzip.Snapshot(made.layers, made.dtype, made.token_ids, unscaled)
    alone = tmp_path / "alone"
    Store(alone, block_tokens=BLOCK).put(found)
    assert engine(**FP8, url=str(alone), role="kv_consumer").run(ids)[0].loaded == 0
    assert engine(**FP8 | E5M2, role="kv_consumer").run(ids)[0].loaded == 0
    fill(engine, ids, **FP8 | E5M2)
    monkeypatch.setattr(names, "_fnuz", lambda: True)
    fill(engine, ids, **FP8)
    files = (f for f in documents(tmp_path) if alone not in f.parents)
    forms = sorted(kvzip.info(f).header.layout.dtype for f in files)
    assert forms == ["fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2"]
    with pytest.raises(UnsupportedError, match="fp8_e5m2"):
        engine(**FP8 | E5M2)


def settings_of(engine: Any, tmp_path: Any, codec: str) -> dict[str, Any]:
    """What an engine is told to store with a codec; of one that needs a profile, learned from a
    document of the same cache."""
    settings: dict[str, Any] = {"codec": codec}
    if codec == "predictive":
        fill(engine, prompt(80, 1))
        [file] = documents(tmp_path)
        kvzip.Profile.fit([kvzip.decode(file)]).save(tmp_path / "m.kvprofile")
        settings["profile"] = str(tmp_path / "m.kvprofile")
    return settings


@pytest.mark.parametrize("codec", ["raw", "zstd", "channel", "predictive"])
def test_any_codec(engine: Any, tmp_path: Any, codec: str) -> None:
    settings = settings_of(engine, tmp_path, codec)
    ids = prompt(80)
    fill(engine, ids, **settings)
    assert any(kvzip.info(f).header.codec["id"] == codec for f in documents(tmp_path))
    assert engine(**settings).run(ids)[0].loaded == 64


@pytest.fixture
def shim(monkeypatch: Any) -> ShimDevice:
    """What decodes where vLLM's cache would be on a GPU."""
    device = ShimDevice(tensors=True)
    monkeypatch.setattr("kvzip.load.vllm.worker.get_device", lambda _: device)
    return device


@pytest.mark.parametrize("more", [{}, {"windows": [None, 40, 40]}], ids=["full", "windows"])
@pytest.mark.parametrize("codec", ["raw", "zstd", "channel", "predictive"])
def test_a_device_decodes(
    engine: Any, tmp_path: Any, shim: ShimDevice, codec: str, more: dict[str, Any]
) -> None:
    """The same keys and values, whatever decodes them: in the step, and with windows beside it."""
    settings = settings_of(engine, tmp_path, codec) | more
    ids = prompt(80)
    fill(engine, ids, **settings)
    for local in (0, 32):
        assert engine(**settings, decode_on="gpu").run(ids, local=local)[0].loaded == 64 - local
    assert shim.launched if codec != "zstd" else not shim.launched


@pytest.mark.parametrize("codec", ["raw", "channel", "predictive"])
def test_a_device_writes_blocks_itself(
    engine: Any, tmp_path: Any, shim: ShimDevice, monkeypatch: Any, codec: str
) -> None:
    """Where the numbers of a head lie side by side in them, and the load comes before the step:
    several layers together."""
    settings = settings_of(engine, tmp_path, codec)
    settings |= {"windows": [None, 40, 40], "backend": "FLASH_ATTN"}
    ids = prompt(80)
    fill(engine, ids, **settings)
    monkeypatch.setattr("kvzip.load.vllm.worker.Worker._put", None)
    for local in (0, 32):
        second = engine(**settings, decode_on="gpu")
        assert second.run(ids, local=local)[0].loaded == 64 - local
    assert shim.launched


@pytest.mark.parametrize("decode_on", ["cpu", "gpu"])
@pytest.mark.parametrize("backend", ["CPU_ATTN", "FLASH_ATTN"])
def test_blocks_are_written_when_what_the_engine_began_is_done(
    engine: Any, shim: ShimDevice, monkeypatch: Any, decode_on: str, backend: str
) -> None:
    """On a GPU it may run still, and use them for the request that had them before."""
    ids, windows = prompt(80), [None, 40, 40]
    fill(engine, ids, windows=windows, backend=backend)
    second = engine(windows=windows, backend=backend, decode_on=decode_on)
    before = [cache.clone() for cache in second.caches.values()]
    waited: list[bool] = []

    def synchronize() -> None:
        time.sleep(0.1)
        now = second.caches.values()
        waited.append(all(map(torch.equal, map(_bytes, now), map(_bytes, before))))

    began = SimpleNamespace(synchronize=synchronize)
    monkeypatch.setattr("kvzip.load.vllm.pages.reached", lambda where: began)
    assert second.run(ids)[0].loaded == 64
    assert waited == [True]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("decode_on", ["cpu", "gpu"])
@pytest.mark.parametrize("late", ["open", "decode"])
def test_what_comes_late_is_written_nowhere(
    engine: Any, tmp_path: Any, shim: ShimDevice, monkeypatch: Any, decode_on: str, late: str
) -> None:
    """Layers that come when a step has given them up: vLLM's blocks are another request's then."""
    ids = prompt(80)
    fill(engine, ids, backend="FLASH_ATTN")
    second = engine(timeout=0.2, decode_on=decode_on, backend="FLASH_ATTN")
    done = threading.Event()

    def slow(function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            time.sleep(0.6)
            try:
                return function(*arguments, **options)
            finally:
                done.set()

        return run

    if late == "open":
        store = second.worker._worker._store
        monkeypatch.setattr(store, "open", slow(store.open))
    else:
        monkeypatch.setattr(Reader, "decode", slow(Reader.decode))
    second.free = second.free[:6]  # so that they are used again at once
    second.run(ids)
    other = standin.Request("x", prompt(90, 5))
    second._admit(other, 0)
    second._compute(other, 0, 90)
    done.wait(10)  # where the machine is so busy that none has begun in time, none comes late
    time.sleep(0.3)
    second._check(other)


@pytest.mark.parametrize("backend", ["CPU_ATTN", "FLASH_ATTN"])
def test_damage_that_a_device_tells_of(
    engine: Any, tmp_path: Any, shim: ShimDevice, caplog: Any, backend: str
) -> None:
    ids = prompt(80)
    fill(engine, ids, backend=backend)
    [file] = documents(tmp_path)
    damage(file)
    second = engine(decode_on="gpu", backend=backend)
    [request] = second.run(ids)  # which checks all keys and values
    assert request.loaded == 64 and second.steps == 2
    [told] = warnings(caplog)
    assert file.stem in told and "damaged" in told


def stored_by(engine: Any, folder: Any, ids: list[int], **settings: Any) -> dict[str, bytes]:
    """The documents that an engine stores of a prompt, by their names."""
    fill(engine, ids, url=str(folder), **settings)
    return {file.name: file.read_bytes() for file in documents(folder)}


@pytest.fixture
def beside_the_cache(monkeypatch: Any, shim: ShimDevice) -> ShimDevice:
    """What encodes where vLLM's cache would be on a GPU, as would be what is copied of it."""
    monkeypatch.setattr("kvzip.dtypes.on_gpu", lambda tensor: True)
    return shim


@pytest.mark.parametrize(
    ("codec", "more", "by_device"),
    [
        ("channel", {}, True),
        ("channel", {"windows": [None, 40, 40], "chunk": 100}, True),
        ("channel", {"windows": [None, 0, 40]}, True),
        ("channel", {"dtype": torch.float16, "backend": "FLASH_ATTN"}, True),
        ("channel", {"dtype": torch.uint8, "cache_dtype": "fp8", "isa": "vec"}, True),
        ("predictive", {}, False),
        ("raw", {}, False),
    ],
)
def test_a_device_encodes(
    engine: Any,
    tmp_path: Any,
    beside_the_cache: ShimDevice,
    codec: str,
    more: dict[str, Any],
    by_device: bool,
) -> None:
    """The same documents, whatever encodes them."""
    settings, ids = settings_of(engine, tmp_path, codec) | more, prompt(300)
    wanted = stored_by(engine, tmp_path / "cpu", ids, **settings)
    assert wanted and not beside_the_cache.launched
    found = stored_by(engine, tmp_path / "gpu", ids, **settings, encode_on="gpu")
    assert found == wanted and bool(beside_the_cache.launched) == by_device


def test_where_a_device_has_no_memory_for_copies_the_cpu_encodes(
    engine: Any, tmp_path: Any, shim: ShimDevice, monkeypatch: Any
) -> None:
    wanted = stored_by(engine, tmp_path / "cpu", prompt(300))
    saves = sys.modules["kvzip.load.vllm.saving"].Saves
    taken, left = saves._taken, iter([True, True, False])

    def full(*arguments: Any) -> Any:
        if not next(left, True):
            raise torch.OutOfMemoryError
        return taken(*arguments)

    monkeypatch.setattr(saves, "_taken", full)
    assert stored_by(engine, tmp_path / "gpu", prompt(300), encode_on="gpu") == wanted
    assert next(left, None) is None and not shim.launched


def test_what_cannot_be_copied_is_not_stored(
    engine: Any, tmp_path: Any, caplog: Any, monkeypatch: Any
) -> None:
    """A prompt is computed whatever becomes of its copy."""

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    first = engine()
    with monkeypatch.context() as patch:
        patch.setattr("kvzip.load.vllm.saving.Saves._taken", full)
        first.run(prompt(80, 1), prompt(80, 2))
    first.run(prompt(80, 3))
    first.settle()
    assert warnings(caplog) == ["prompts are not stored: no memory"]
    assert len(documents(tmp_path)) == 1 and first.worker._worker._saves._pending == 0


def test_a_profile_of_another_cache_gives_way_to_channel(
    engine: Any, tmp_path: Any, caplog: Any
) -> None:
    """As that of a whole model does where a worker has some of its heads or layers."""
    fill(engine, prompt(80, 1))
    [file] = documents(tmp_path)
    whole = kvzip.decode(file)
    other = kvzip.Snapshot(whole.layers[:2], "bf16", whole.token_ids)
    kvzip.Profile.fit([other]).save(tmp_path / "m.kvprofile")
    settings = {"codec": "predictive", "profile": str(tmp_path / "m.kvprofile")}
    first = engine(**settings)
    first.run(prompt(80, 2), prompt(80, 3))
    first.settle()
    [told] = warnings(caplog)
    assert "channel is used" in told
    assert [kvzip.info(f).header.codec["id"] for f in documents(tmp_path)] == ["channel"] * 3
    assert engine(**settings).run(prompt(80, 2))[0].loaded == 64


@pytest.mark.parametrize("shared", [0, 1, 15, 16, 17, 40, 64, 79])
@pytest.mark.parametrize("local", [0, 32])
def test_a_shared_prefix_is_used_in_whole_blocks(engine: Any, shared: int, local: int) -> None:
    ids = prompt(80)
    fill(engine, ids)
    other = ids[:shared] + [(i + 1) % WORDS for i in ids[shared:]] + prompt(9)
    [request] = engine().run(other, local=local)
    assert request.loaded == max(0, shared // BLOCK * BLOCK - local)


def test_prompts_in_chunks_and_batches(engine: Any, tmp_path: Any) -> None:
    prompts = [prompt(n, n) for n in (100, 70, 33, 16)]
    first = engine(chunk=24)
    assert [r.loaded for r in first.run(*prompts)] == [0] * 4
    first.settle()
    assert len(documents(tmp_path)) == 4
    assert [r.loaded for r in engine(chunk=24).run(*prompts)] == [96, 64, 32, 0]


def test_a_document_of_transformers_is_found(engine: Any, ours: Any, tmp_path: Any) -> None:
    """`kvzip put` and vLLM meet in model, revision and dtype."""
    ids = prompt(70)
    layers = [
        tuple(standin.formula(ids, i, part, torch.bfloat16) for part in (0, 1))
        for i in range(LAYERS)
    ]
    origin = kvzip.Origin(model="org/model", revision="r1")
    snapshot = kvzip.Snapshot.from_arrays(layers, token_ids=ids, origin=origin)
    Store(tmp_path, block_tokens=BLOCK).put(snapshot)
    assert engine().run(ids)[0].loaded == 64


def test_only_what_is_asked_for(engine: Any, tmp_path: Any) -> None:
    ids = prompt(80)
    fill(engine, ids, role="kv_consumer")
    assert not documents(tmp_path)
    fill(engine, ids, role="kv_producer")
    assert len(documents(tmp_path)) == 1
    assert engine(role="kv_producer").run(ids)[0].loaded == 0
    assert engine(role="kv_consumer").run(ids)[0].loaded == 64


@pytest.mark.parametrize(
    "more",
    [{"lora_request": object()}, {"mm_features": [1]}, {"cache_salt": "s"}, {"prompt_embeds": 1}],
    ids=lambda more: next(iter(more)),
)
def test_what_is_more_than_tokens_is_left_alone(engine: Any, tmp_path: Any, more: Any) -> None:
    ids = prompt(80)
    first = engine()
    first.run(ids, **more)
    first.settle()
    assert not documents(tmp_path)
    fill(engine, ids)
    assert engine().run(ids, **more)[0].loaded == 0


def test_a_conversation_is_stored_when_it_has_grown_by_a_third(engine: Any, tmp_path: Any) -> None:
    ids = prompt(400)
    for turn in range(100, 401, 20):
        fill(engine, ids[:turn])
    sizes = sorted(kvzip.info(f).header.layout.tokens for f in documents(tmp_path))
    assert sizes == [100, 140, 200, 280, 380]
    fill(engine, prompt(BLOCK, 3), min_tokens=BLOCK + 1)
    assert len(documents(tmp_path)) == len(sizes)


# --- layers of several groups, and windows ---------------------------------------------------

WINDOWS = {"hybrid": [None, 40, 40], "two": [40, None], "sliding": [40]}


@pytest.fixture(params=WINDOWS.values(), ids=WINDOWS)
def windows(request: pytest.FixtureRequest) -> list[int | None]:
    return list(request.param)


def held(file: Any) -> list[int]:
    """How many tokens each layer of a document holds."""
    return [layer.stored for layer in kvzip.info(file).header.layout.layers]


@pytest.mark.parametrize("tokens", [BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 3, 12 * BLOCK])
def test_windows_there_and_back(engine: Any, tmp_path: Any, windows: Any, tokens: int) -> None:
    """A prompt that is computed in one step is stored whole; of it comes what is needed."""
    ids = prompt(tokens)
    fill(engine, ids, windows=windows)
    [file] = documents(tmp_path)
    assert held(file) == [tokens] * LAYERS
    assert engine(windows=windows).run(ids)[0].loaded == (tokens - 1) // BLOCK * BLOCK
    assert engine().run(ids)[0].loaded == (tokens - 1) // BLOCK * BLOCK  # where all is one group


@pytest.mark.parametrize("shared", [0, 15, 16, 40, 64, 79])
@pytest.mark.parametrize("local", [0, 32])
@pytest.mark.drawn(2)
def test_a_shared_prefix_with_windows(engine: Any, windows: Any, shared: int, local: int) -> None:
    ids = prompt(80)
    fill(engine, ids, windows=windows)
    other = ids[:shared] + [(i + 1) % WORDS for i in ids[shared:]] + prompt(9)
    [request] = engine(windows=windows).run(other, local=local)
    assert request.loaded == max(0, shared // BLOCK * BLOCK - local)


def test_what_a_window_has_left_behind_is_not_stored(
    engine: Any, tmp_path: Any, windows: Any
) -> None:
    """In chunks: vLLM has given blocks back before the prompt is done, and others may have them."""
    ids, other = prompt(150), prompt(140, 1)
    first = engine(chunk=48, windows=windows)
    first.run(ids, other)
    first.settle()
    for file in documents(tmp_path):
        count = kvzip.info(file).header.layout.tokens
        # The last step began at 144 of 150, and at 96 of 140.
        begun = 144 if count == 150 else 96
        sliding = count - (begun - 40 + 1) // BLOCK * BLOCK
        want = [windows[i % len(windows)] for i in range(LAYERS)]
        assert held(file) == [count if window is None else sliding for window in want]
        for i, pair in enumerate(kvzip.decode(file).tensors()):
            for part, numbers in enumerate(pair):
                whole = standin.formula(ids if count == 150 else other, i, part, torch.bfloat16)
                assert torch.equal(numbers, whole[:, -numbers.shape[1] :])
    again = engine(windows=windows)
    assert [r.loaded for r in again.run(ids, other)] == [144, 128]
    # What a shorter prompt needs is not there: it is computed.
    assert engine(windows=windows).run(ids[:90] + prompt(9, 2))[0].loaded == 0


@pytest.mark.parametrize("local", [0, 32])
@pytest.mark.parametrize("how", ["damaged", "gone", "other"])
def test_a_load_that_a_request_waits_for_fails(
    engine: Any, tmp_path: Any, caplog: Any, windows: Any, how: str, local: int
) -> None:
    ids = prompt(80)
    fill(engine, ids, windows=windows)
    [file] = documents(tmp_path)
    good = file.read_bytes()
    second = engine(windows=windows)
    if how == "damaged":
        damage(file)
    elif how == "other":
        whole = kvzip.decode(file)
        kvzip.write(file, kvzip.Snapshot(whole.layers[:2], "bf16", ids, whole.origin))
    else:
        start = second.worker.start_load_kv

        def late(context: Any) -> None:
            file.unlink(missing_ok=True)
            start(context)

        second.worker.start_load_kv = late
    [request] = second.run(ids, local=local)  # which checks all keys and values
    assert request.loaded == 64 - local
    [told] = warnings(caplog)
    assert file.stem in told and f"{64 - local} tokens are computed" in told
    assert {"damaged": "damaged", "gone": "no document", "other": "the engine has"}[how] in told
    second.worker.start_load_kv = type(second.worker).start_load_kv.__get__(second.worker)
    second.settle()
    assert file.read_bytes() == good
    assert engine(windows=windows).run(ids)[0].loaded == 64


# --- ranks -----------------------------------------------------------------------------------


def ranks(
    engine: Any, tensor: int, monkeypatch: Any, ours: Any, pipeline: int = 1, **changes: Any
) -> list[Any]:
    """Engines of the ranks of one server, each with the layers of its stage."""
    made = []
    split = importlib.import_module("kvzip.load.vllm.split").Split
    parallel = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    for rank in range(tensor * pipeline):
        monkeypatch.setattr(split, "own_part", lambda self, rank=rank: (rank, True))
        layers = Cut(tensor, pipeline).stage(LAYERS, rank // tensor)
        made.append(engine(parallel=parallel, layers=layers, **changes))
    return made


def test_ranks_store_their_parts_and_load_them(
    engine: Any, tmp_path: Any, ours: Any, monkeypatch: Any, caplog: Any
) -> None:
    ids = prompt(80)
    for one in ranks(engine, 2, monkeypatch, ours):
        assert one.run(ids)[0].loaded == 0
        one.settle()
    assert len(documents(tmp_path)) == 2
    caplog.clear()
    for one in ranks(engine, 2, monkeypatch, ours):
        assert one.run(ids)[0].loaded == 64
    assert not warnings(caplog)
    for other in (1, 4):  # another split finds nothing, and says so once
        caplog.clear()
        one = ranks(engine, other, monkeypatch, ours, role="kv_consumer")[0]
        assert [one.run(ids)[0].loaded for _ in range(2)] == [0, 0]
        [told] = [line for line in warnings(caplog) if "tensor_parallel_size" in line]
        assert f"this engine has tensor_parallel_size={other}" in told


@pytest.mark.parametrize("tensor", [1, 2])
def test_stages_store_their_layers_and_load_them(
    engine: Any, tmp_path: Any, ours: Any, monkeypatch: Any, caplog: Any, tensor: int
) -> None:
    ids, count = prompt(80), 2 * tensor
    for one in ranks(engine, tensor, monkeypatch, ours, pipeline=2):
        assert one.run(ids)[0].loaded == 0
        one.settle()
    stored = [len(kvzip.decode(file).layers) for file in documents(tmp_path)]
    assert sorted(stored) == sorted([2, 1] * tensor)
    caplog.clear()
    for one in ranks(engine, tensor, monkeypatch, ours, pipeline=2):
        assert one.run(ids)[0].loaded == 64
    assert not warnings(caplog) and len(documents(tmp_path)) == count
    caplog.clear()
    # Another split finds nothing, and says so; it does not store what it would find the next time.
    one = ranks(engine, tensor, monkeypatch, ours, role="kv_consumer")[0]
    assert [one.run(ids)[0].loaded for _ in range(2)] == [0, 0]
    [told] = [line for line in warnings(caplog) if "pipeline_parallel_size" in line]
    assert "pipeline_parallel_size=2, and this engine has" in told


def test_parts_are_stored_with_their_own_profiles(
    engine: Any, tmp_path: Any, ours: Any, monkeypatch: Any, caplog: Any
) -> None:
    """Those of ``kvzip fit --split`` beside the one that is named; else channel, said once."""
    ids, named = prompt(80), tmp_path / "p" / "m.kvprofile"
    for one in ranks(engine, 2, monkeypatch, ours):
        one.run(ids)
        one.settle()
    parts = [kvzip.decode(file) for file in documents(tmp_path)]
    named.parent.mkdir()
    whole = kvzip.Snapshot.from_arrays(
        [
            tuple(np.concatenate(bits) for bits in zip(*layers, strict=True))
            for layers in zip(*(part.layers for part in parts), strict=True)
        ],
        "bf16",
        parts[0].token_ids,
    )
    kvzip.Profile.fit([whole]).save(named)
    told: dict[str, Any] = {"codec": "predictive", "profile": str(named)}
    caplog.clear()
    for made, codec in ((False, "channel"), (True, "predictive")):
        url = tmp_path / codec
        if made:
            for n in range(2):
                kvzip.Profile.fit([parts[n]]).save(Cut(2).path(named, n))
        for one in ranks(engine, 2, monkeypatch, ours, url=str(url), **told):
            one.run(ids)
            one.run(prompt(80, 1))
            one.settle()
        infos = [kvzip.info(file) for file in documents(url)]
        assert {info.header.codec["id"] for info in infos} == {codec} and len(infos) == 4
        words = [line for line in warnings(caplog) if "channel is used" in line]
        assert len(words) == (0 if made else 2)  # each rank once
        caplog.clear()
        for one in ranks(engine, 2, monkeypatch, ours, url=str(url), **told):
            assert one.run(ids)[0].loaded == 64


def test_a_part_that_is_not_there_is_a_miss(
    engine: Any, tmp_path: Any, ours: Any, monkeypatch: Any
) -> None:
    ids = prompt(80)
    first = ranks(engine, 2, monkeypatch, ours)[0]
    first.run(ids)
    first.settle()
    assert len(documents(tmp_path)) == 1
    assert [one.run(ids)[0].loaded for one in ranks(engine, 2, monkeypatch, ours)] == [0, 0]


# --- states ---


@pytest.mark.parametrize("windows", [[0], [None, 0], [0, 40, None]], ids=str)
@pytest.mark.parametrize(("chunk", "within"), [(10**6, False), (20, False), (10**6, True)])
def test_states_are_loaded_at_the_end_of_what_was_stored(
    engine: Any, tmp_path: Any, caplog: Any, windows: Any, chunk: int, within: bool
) -> None:
    """A prompt is stored up to the last block that is full and can be loaded, where vLLM keeps the
    states; one that begins with all of that is a hit, one that leaves before it is a miss."""
    ids, how = prompt(75), {"windows": windows, "chunk": chunk, "within": within}
    fill(engine, ids, prompt(90, 1), **how)
    assert sorted(len(kvzip.decode(d).token_ids) for d in documents(tmp_path)) == [64, 80]
    for loaded, asked in ((64, ids), (64, ids[:64] + prompt(40, 2)), (0, ids[:60] + prompt(40, 3))):
        [request] = engine(**how).run(asked)
        assert request.loaded == loaded
    [request] = engine(**how).run(ids, local=32)
    assert request.loaded == 32
    batch = engine(windows=windows, within=within).run(ids, prompt(90, 1), prompt(50, 4))
    assert [request.loaded for request in batch] == [64, 80, 0]
    assert not warnings(caplog)


@pytest.mark.parametrize("windows", [[0], [None, 0]], ids=str)
def test_what_prompts_have_in_common_is_stored_besides(
    engine: Any, tmp_path: Any, windows: Any
) -> None:
    """Where vLLM has seen two prompts part, it keeps the states, and a third one is a hit."""
    shared = prompt(50)
    first = engine(windows=windows)
    first.run(shared + prompt(40, 1))
    first.run(shared + prompt(40, 2), shared_prefix_boundary=48)
    first.settle()
    assert sorted(len(kvzip.decode(d).token_ids) for d in documents(tmp_path)) == [48, 80, 80]
    second = engine(windows=windows)
    [request] = second.run(shared + prompt(40, 3), shared_prefix_boundary=48)
    assert request.loaded == 48  # and is not stored again
    second.settle()
    assert len(documents(tmp_path)) == 4


@pytest.mark.parametrize("windows", [[0], [None, 0]], ids=str)
def test_damaged_states_are_computed(engine: Any, tmp_path: Any, caplog: Any, windows: Any) -> None:
    ids = prompt(75)
    fill(engine, ids, windows=windows)
    [file] = documents(tmp_path)
    good = file.read_bytes()
    with kvzip.open(good) as reader:
        layers = reader.layout.layers
    for i, layer in enumerate(layers):
        file.write_bytes(damaged(good, i, next(iter(layer.parts))))
        second = engine(windows=windows)
        assert second.run(ids)[0].loaded == 64  # and computed anew, which the engine has checked
        second.settle()
        assert file.read_bytes() == good
    assert len(warnings(caplog)) == LAYERS


def test_states_of_transformers_are_not_taken_for_vllms(engine: Any) -> None:
    """They have other shapes, and are found under another revision."""
    plain, states = engine(), engine(windows=[None, 0])
    revisions = [e.scheduler._scheduler._origin.revision for e in (plain, states)]
    assert revisions[0] == "r1" and revisions[1].startswith("r1+")


@pytest.mark.parametrize("padding", [0, 7])
def test_states_lie_side_by_side_in_a_block(padding: int) -> None:
    parts = {
        "state_0": PartLayout("bf16", (3, 5), "rd"),
        "state_1": PartLayout("fp32", (2, 3, 4), "hrd"),
    }
    need = sum(part.nbytes for part in parts.values())
    cache = torch.randint(-128, 128, (4, 1, 1, need + padding), dtype=torch.int8)
    before = cache.clone()
    paged = pages.StatePages(cache, parts)
    taken = paged.take([1, 2], 99)
    raw = cache[2, 0, 0].view(torch.uint8)
    conv = raw[: parts["state_0"].nbytes].clone().view(torch.bfloat16).view(3, 5)
    assert torch.equal(taken["state_0"].view(torch.int16), conv.view(torch.int16))
    assert taken["state_1"].shape == (2, 3, 4) and taken["state_1"].dtype == torch.float32
    paged.put([3, 0], taken)
    assert torch.equal(cache[0, ..., :need], before[2, ..., :need])
    assert torch.equal(cache[0, ..., need:], before[0, ..., need:])
    assert torch.equal(cache[1:], before[1:])
    with pytest.raises(UnsupportedError, match="want"):
        pages.StatePages(cache[..., : need - 1], parts)


# --- encrypted ---


def test_a_sealed_store(engine: Any, tmp_path: Any, monkeypatch: Any, caplog: Any) -> None:
    """With a key documents come back, damage is computed, and nothing is in sight; another key, or
    none, is an error at the start."""
    pytest.importorskip("cryptography")
    secret = bytes(range(1, 33))
    monkeypatch.setenv("KVZIP_KEY", secret.hex())
    (tmp_path / "another").write_text(secret[::-1].hex())
    ids, sealed = prompt(70), {"key_from": "env:KVZIP_KEY"}
    fill(engine, ids, **sealed)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "another"]
    for path in files:
        data = path.read_bytes()
        assert not data or (data.startswith(b"\x89KVS") and b"org/model" not in data)
        assert "docs" not in path.parts
    assert engine(**sealed).run(ids)[0].loaded == 64
    for other in (None, f"file:{tmp_path / 'another'}"):
        with pytest.raises(SealError) as caught:
            engine(key_from=other)
        assert secret.hex() not in str(caught.value)
    with pytest.raises(UsageError, match="no variable 'NOWHERE'"):
        engine(key_from="env:NOWHERE")
    assert not warnings(caplog)
    document = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(document.read_bytes())
    data[len(data) // 2] ^= 1
    document.write_bytes(data)
    assert engine(**sealed).run(ids)[0].loaded in (0, 64)  # which computed what it did not load
    assert warnings(caplog) and secret.hex() not in caplog.text


# --- what goes wrong -------------------------------------------------------------------------


def damage(file: Any) -> None:
    """Other numbers in the middle of the blocks; header and index stay whole."""
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("local", [0, 32])
def test_a_damaged_document_is_computed_and_written_anew(
    engine: Any, tmp_path: Any, caplog: Any, local: int, drafting: bool
) -> None:
    ids = prompt(80)
    fill(engine, ids)
    [file] = documents(tmp_path)
    good = file.read_bytes()
    damage(file)
    second = engine(drafting=drafting)
    [request] = second.run(ids, local=local)  # which checks all keys and values
    assert request.loaded == 64 - local and second.steps == 2
    [told] = warnings(caplog)
    assert file.stem in told and "damaged" in told and f"{64 - local} tokens are computed" in told
    second.settle()
    assert file.read_bytes() == good
    assert engine().run(ids)[0].loaded == 64


def test_a_damaged_document_that_stays_is_passed_over(
    engine: Any, tmp_path: Any, caplog: Any
) -> None:
    ids = prompt(80)
    fill(engine, ids)
    damage(documents(tmp_path)[0])
    second = engine(role="kv_consumer")
    assert [second.run(ids)[0].loaded for _ in range(3)] == [64, 0, 0]
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("how", ["gone", "cut", "other"])
def test_a_document_that_changes_after_the_lookup(
    engine: Any, tmp_path: Any, caplog: Any, monkeypatch: Any, how: str
) -> None:
    ids = prompt(80)
    fill(engine, ids, prompt(80, 1))
    second = engine()
    start = second.worker.start_load_kv

    def late(context: Any) -> None:
        for file in documents(tmp_path):
            if how == "gone":
                file.unlink()
            elif how == "cut":
                file.write_bytes(file.read_bytes()[:-100])
            else:
                short = [(torch.zeros(HEADS, 80, 8, dtype=torch.bfloat16),) * 2] * LAYERS
                origin = kvzip.decode(file).origin
                kvzip.write(file, kvzip.Snapshot.from_arrays(short, origin=origin))
        start(context)

    monkeypatch.setattr(second.worker, "start_load_kv", late)
    assert second.run(ids)[0].loaded == 64
    [told] = warnings(caplog)
    assert {"gone": "no document", "cut": "cut short", "other": "the engine has"}[how] in told


@pytest.mark.parametrize("drafting", [False, True])
def test_a_failed_load_spoils_nothing_else(
    engine: Any, tmp_path: Any, monkeypatch: Any, drafting: bool
) -> None:
    """What a step computed from blocks that were not loaded is never stored."""
    bad, good, new = prompt(80, 1), prompt(80, 2), prompt(80, 3)
    fill(engine, bad)
    [file] = documents(tmp_path)
    damage(file)
    fill(engine, good)
    second = engine(drafting=drafting)
    store, stored = second.worker._worker._store, []
    put = store.put
    monkeypatch.setattr(store, "put", lambda s, **more: [stored.append(s), put(s, **more)])
    requests = second.run(bad + prompt(40, 4), good, new)
    assert [r.loaded for r in requests] == [80, 64, 0]
    second.settle()
    assert sorted(s.tokens for s in stored) == [80, 120]
    for snapshot in stored:
        for i, pair in enumerate(snapshot.tensors()):
            for part, held in enumerate(pair):
                ids = snapshot.token_ids.tolist()
                assert torch.equal(held, standin.formula(ids, i, part, torch.bfloat16))
    third = engine()
    for ids, loaded in ((bad + prompt(40, 4), 112), (good, 64), (new, 64)):
        assert third.run(ids)[0].loaded == loaded  # and is right, which `run` checks


def test_other_weights_models_and_dtypes_are_no_hit(engine: Any) -> None:
    ids = prompt(80)
    fill(engine, ids)
    assert engine().run(ids)[0].loaded == 64
    for changes in ({"revision": "r2"}, {"model": "org/other"}, {"dtype": torch.float16}):
        assert engine(**changes).run(ids)[0].loaded == 0


def test_another_profile_is_no_hit(engine: Any, tmp_path: Any) -> None:
    ids = prompt(80)
    fill(engine, prompt(80, 1), prompt(64, 2))
    for name, file in zip("ab", documents(tmp_path), strict=True):
        kvzip.Profile.fit([kvzip.decode(file)]).save(tmp_path / f"{name}.kvprofile")
    mine, other = ({"profile": str(tmp_path / f"{name}.kvprofile")} for name in "ab")
    fill(engine, ids, codec="predictive", **mine)
    assert engine(**mine).run(ids)[0].loaded == 64
    assert engine(**other).run(ids)[0].loaded == 0


def test_a_profile_comes_from_the_store(engine: Any, tmp_path: Any) -> None:
    """To load it need not be named; to store, by its SHA-256."""
    ids, more = prompt(80), prompt(96, 3)
    fill(engine, prompt(80, 1))
    [file] = documents(tmp_path)
    profile = kvzip.Profile.fit([kvzip.decode(file)])
    profile.save(tmp_path / "m.kvprofile")
    fill(engine, ids, codec="predictive", profile=str(tmp_path / "m.kvprofile"))
    (tmp_path / "m.kvprofile").unlink()
    assert engine().run(ids)[0].loaded == 64
    fill(engine, more, codec="predictive", profile=profile.id)
    assert engine().run(more)[0].loaded == 80
    with pytest.raises(kvzip.ProfileError, match="0" * 64):
        engine(codec="predictive", profile="0" * 64)
    [stored] = tmp_path.rglob(f"{profile.id}.kvprofile")
    stored.unlink()
    assert engine().run(ids)[0].loaded == 0


def test_a_missing_layer_inside(engine: Any, tmp_path: Any, caplog: Any) -> None:
    ids = prompt(80)
    fill(engine, ids)
    [file] = documents(tmp_path)
    good = kvzip.decode(file)
    kvzip.write(file, kvzip.Snapshot(good.layers[:2], "bf16", good.token_ids, good.origin))
    second = engine()
    assert second.run(ids)[0].loaded == 64  # and then computed, which `run` checks
    [told] = warnings(caplog)
    assert "2 layers of bf16" in told and "64 tokens are computed" in told
    second.settle()
    assert engine().run(ids)[0].loaded == 64 and len(warnings(caplog)) == 1  # written anew


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_is_not_of_this_place_is_not_found_and_is_written_anew(
    engine: Any, tmp_path: Any, dtype: str
) -> None:
    ids = prompt(80)
    fill(engine, ids)
    [file] = documents(tmp_path)
    good = kvzip.decode(file)
    origin = {"bf16": kvzip.Origin(), "fp16": good.origin}[dtype]
    kvzip.write(file, kvzip.Snapshot(good.layers, dtype, good.token_ids, origin))
    second = engine()
    assert second.run(ids)[0].loaded == 0
    second.settle()
    assert engine().run(ids)[0].loaded == 64


def test_a_store_that_does_not_answer(engine: Any, caplog: Any, monkeypatch: Any) -> None:
    def find(*args: Any, **kwargs: Any) -> Any:
        raise StoreError("cannot read: timed out")

    second = engine()
    monkeypatch.setattr(second.scheduler._scheduler._store, "find", find)
    assert [second.run(prompt(80, i))[0].loaded for i in range(3)] == [0, 0, 0]
    assert warnings(caplog) == ["prompts are computed: cannot read: timed out"]


class Asking:
    """vLLM's questions about requests that wait, one by one."""

    def __init__(self, engine: Any):
        self.planner = engine.scheduler._planner

    def answer(self, request: Any) -> int | None:
        """How many tokens can be loaded, when its lookup is over; None: ask again."""
        end = time.monotonic() + 5
        while (found := self.planner.matched(request, 0)) is None and time.monotonic() < end:
            if (asked := self.planner._lookups.get(request.request_id)) and asked[1].done():
                break
            time.sleep(0.01)
        return found

    def give_blocks(self, request: Any, tokens: int) -> None:
        request.blocks = [[*range(1, 6)]] * len(self.planner._engine.groups)
        taken = SimpleNamespace(get_block_ids=lambda: tuple(request.blocks))
        self.planner.allocated(request, taken, tokens)

    def schedule(self, request: Any) -> None:
        new = SimpleNamespace(
            req_id=request.request_id, num_computed_tokens=64, block_ids=tuple(request.blocks)
        )
        self.planner.plan(
            SimpleNamespace(
                scheduled_new_reqs=[new],
                scheduled_cached_reqs=SimpleNamespace(req_ids=[], resumed_req_ids=set()),
                num_scheduled_tokens={request.request_id: 1},
            )
        )


@pytest.mark.parametrize(("blocks", "together"), [(28, True), (27, False)])
def test_loads_hold_no_blocks_that_others_wait_for(
    engine: Any, blocks: int, together: bool
) -> None:
    """Two prompts of 80 tokens with a window need 14 blocks each, and one is nobody's."""
    ids = [prompt(80, seed) for seed in (1, 2)]
    fill(engine, *ids, windows=[None, 24])
    asking = Asking(engine(windows=[None, 24], num_blocks=blocks + 1))
    first, second = (standin.Request(str(n), each) for n, each in enumerate(ids))
    assert asking.answer(first) == 64
    asking.give_blocks(first, 64)
    assert asking.answer(second) == (64 if together else None)
    asking.schedule(first)
    assert asking.answer(second) == 64


def test_no_load_begins_behind_a_request_without_blocks(engine: Any, monkeypatch: Any) -> None:
    """vLLM would not look at the second one while the first does not fit."""
    ids = [prompt(80, seed) for seed in (1, 2)]
    fill(engine, *ids, windows=[None, 24])
    asking = Asking(engine(windows=[None, 24]))
    first, second = (standin.Request(str(n), each) for n, each in enumerate(ids))
    store, may_go_on = asking.planner._store, threading.Event()
    find = store.find

    def slowly(token_ids: Any, **told: Any) -> Any:
        assert token_ids.tolist() != ids[0] or may_go_on.wait(5)
        return find(token_ids, **told)

    monkeypatch.setattr(store, "find", slowly)
    assert asking.planner.matched(first, 0) is None
    assert asking.answer(second) is None
    may_go_on.set()
    assert asking.answer(first) == 64 and asking.answer(second) is None
    asking.give_blocks(first, 64)
    assert asking.answer(second) == 64
    asking.give_blocks(second, 64)
    # One that is given up is in nobody's way.
    third = standin.Request("3", ids[0])
    may_go_on.clear()
    assert asking.planner.matched(third, 0) is None
    fourth = standin.Request("4", ids[1])
    assert asking.answer(fourth) is None
    asking.planner.finished("3")
    assert asking.answer(fourth) == 64
    may_go_on.set()


def test_a_slow_lookup_holds_up_nothing(engine: Any, caplog: Any, monkeypatch: Any) -> None:
    ids = prompt(80)
    fill(engine, ids)
    second = engine(timeout=5.0)
    store = second.scheduler._scheduler._store
    find = store.find

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return find(*args, **kwargs)

    monkeypatch.setattr(store, "find", slowly)
    assert second.run(ids)[0].loaded == 64 and second.waited > 2
    third = engine(timeout=0.05)
    monkeypatch.setattr(third.scheduler._scheduler._store, "find", slowly)
    assert third.run(ids)[0].loaded == 0
    assert len(warnings(caplog)) == 1 and "slow" in warnings(caplog)[0]


def test_a_store_that_is_slow_and_then_fails(engine: Any, caplog: Any, monkeypatch: Any) -> None:
    """One trouble, one warning."""

    def find(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        raise StoreError("cannot read: timed out")

    second = engine(timeout=0.05)
    monkeypatch.setattr(second.scheduler._scheduler._store, "find", find)
    for i in range(3):
        assert second.run(prompt(80, i))[0].loaded == 0
        time.sleep(0.1)
    assert len(warnings(caplog)) == 1


def test_layers_that_come_too_late_are_computed(engine: Any, caplog: Any, monkeypatch: Any) -> None:
    ids = prompt(80)
    fill(engine, ids)
    second = engine(timeout=0.2)
    store = second.worker._worker._store
    monkeypatch.setattr(store, "open", lambda *a, **k: time.sleep(1.0))
    begun = time.monotonic()
    assert second.run(ids)[0].loaded == 64
    assert time.monotonic() - begun < 0.9 and "within 0.2 s" in warnings(caplog)[0]


def test_layers_that_are_in_place_are_let_go(engine: Any, monkeypatch: Any) -> None:
    """A step holds no more of a document than what is decoded ahead, however long it is."""
    ids = prompt(80)
    fill(engine, ids)
    second = engine()
    worker = second.worker._worker
    put, seen = worker._put, list[Any]()

    def watched(load: Any, i: int, parts: Any) -> None:
        assert not any(part() is not None for part in seen)
        seen.extend(map(weakref.ref, parts.values()))
        put(load, i, parts)

    monkeypatch.setattr(worker, "_put", watched)
    assert second.run(ids)[0].loaded == 64
    assert len(seen) == 2 * standin.LAYERS


def test_a_store_that_takes_nothing(engine: Any, caplog: Any, monkeypatch: Any) -> None:
    def put(*args: Any, **kwargs: Any) -> Any:
        raise StoreError("cannot write: full")

    first = engine()
    monkeypatch.setattr(first.worker._worker._store, "put", put)
    for i in range(3):
        first.run(prompt(80, i))
    first.settle()
    assert warnings(caplog) == ["prompts are not stored: cannot write: full"]
    assert first.worker._worker._saves._pending == 0


def test_memory_for_what_waits_is_bounded(engine: Any, tmp_path: Any, caplog: Any) -> None:
    token = 2 * HEADS * standin.DIM * 2 * LAYERS
    first = engine(pending_bytes=100 * token)
    first.run(prompt(90, 1), prompt(90, 2))
    first.settle()
    assert len(documents(tmp_path)) == 1 and "not all are stored" in warnings(caplog)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"decode_context_parallel_size": 2}}, "decode_context_parallel_size"),
        ({"spec": "CrossAttentionSpec"}, "CrossAttentionSpec"),
        ({"windows": [None, 0], "mamba_cache_mode": "none"}, "enable_prefix_caching=True"),
        ({"windows": [None, 0], "drafts": 1}, "draft models are refused"),
        ({"dtype": torch.uint8}, "kv_cache_dtype='auto'"),
        ({"dtype": torch.uint8, "cache_dtype": "fp8", "isa": "neon"}, "its neon kernels"),
        ({"codecs": "raw"}, "codecs"),
        ({"decode_on": "gpu"}, "decode_on is gpu, and vLLM's cache is on cpu"),
        ({"encode_on": "gpu"}, "encode_on is gpu, and vLLM's cache is on cpu"),
        ({"revision": None}, "set revision"),
        ({"backend": "FLASHINFER"}, "FLASHINFER"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_said_at_the_start(engine: Any, changes: Any, message: str) -> None:
    with pytest.raises(KVZipError, match=message):
        engine(**changes)


def test_vllms_default_for_failed_loads_is_warned_of(engine: Any, caplog: Any) -> None:
    engine(policy="fail")
    assert 'kv_load_failure_policy="recompute"' in warnings(caplog)[0]


def test_weights_in_a_folder_are_known_by_their_hash(engine: Any, tmp_path: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    ids = prompt(80)
    fill(engine, ids, model=str(folder), revision=None)
    assert engine(model=str(folder), revision=None).run(ids)[0].loaded == 64
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert engine(model=str(folder), revision=None).run(ids)[0].loaded == 0


def test_what_vllm_is_told_to_change_is_no_hit(engine: Any) -> None:
    """Quantised in loading, other settings, weights of another kind in the same folder."""
    ids = prompt(80)
    told: list[dict[str, Any]] = [
        {},
        {"quantization": "fp8"},
        {"quantization": "awq"},
        {"quantization_config": {"linear": "fp8_per_tensor"}},
        {"quantization_config": {"linear": "fp8_per_block"}},
        {"hf_overrides": {"rope_theta": 7.0}},
        {"hf_overrides": lambda config: config, "hf_config": {"initializer_range": 0.7}},
        {"hf_config_path": "elsewhere", "hf_config": {"initializer_range": 0.8}},
        {"model_class_overrides": {"LlamaForCausalLM": "mine:Llama"}},
        {"model_loader_extra_config": {"pattern": "b"}},
        {"load_format": "pt"},
    ]
    for changes in told:
        assert engine(**changes).run(ids)[0].loaded == 0
        fill(engine, ids, **changes)
        if callable(changes.get("hf_overrides")):  # what it makes of the config counts
            changes |= {"hf_overrides": lambda config: config.copy()}
        assert engine(**changes).run(ids)[0].loaded == 64


def test_weights_that_are_set_while_it_runs(engine: Any) -> None:
    """vLLM tells the connector to reset; nothing from before is found, nor found elsewhere."""
    ids, new = prompt(80), prompt(80, 1)
    fill(engine, ids)
    running = engine()
    assert running.scheduler.reset_cache() is True and running.worker.reset_cache() is None
    assert running.run(ids)[0].loaded == 0
    running.run(new)
    running.worker._mover._saves._writer.submit(int).result()  # all is written
    assert running.run(ids)[0].loaded == 64 and running.run(new)[0].loaded == 64
    assert engine().run(ids)[0].loaded == 64 and engine().run(new)[0].loaded == 0


def test_a_checkpoint_has_one_name_in_every_engine(engine: Any, tmp_path: Any, ours: Any) -> None:
    """A document that transformers' side stored under the fingerprint is found by path or copy."""
    ids = prompt(80)
    found = []
    for name in ("model", "copy"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_bytes(b"{}")
        fill(engine, ids, model=str(folder), revision=None)
        found.append(kvzip.fingerprint(folder))
    assert len(set(found)) == 1 and len(documents(tmp_path)) == 1
    [document] = documents(tmp_path)
    assert kvzip.info(document).header.origin.revision == found[0]


def test_a_document_is_closed_where_nobody_says_what_decodes_it(
    ours: Any, monkeypatch: Any
) -> None:
    """A wrong setting makes every load a miss, and leaves no file open."""
    loading = importlib.import_module("kvzip.load.vllm.loading")
    closed = []
    reader = SimpleNamespace(codec=kvzip.get_codec("zstd"))
    document = SimpleNamespace(source=reader, close=lambda: closed.append(reader))
    monkeypatch.setenv("KVZIP_NVCOMP", "yes")
    with pytest.raises(UsageError, match="KVZIP_NVCOMP"):
        loading.LayersOf(None, None, document, SimpleNamespace(kind="cuda"))
    assert closed == [reader]


# --- steps that are planned before the last one's end is known ------------------------------


class Ahead:
    """An engine that plans steps before it has seen what became of those before, as vLLM does by
    default (async scheduling)."""

    def __init__(self, engine: Any):
        self.engine, self.seen = engine, set[str]()

    def admit(self, ids: list[int], blocks: list[int] | None = None, local: int = 0) -> Any:
        """A request whose first `local` tokens are in blocks that vLLM has."""
        engine = self.engine
        request = standin.Request(f"r{engine.count}", ids)
        engine.count += 1
        request.loaded, _ = engine._ask(request, local)
        need = -(-len(ids) // standin.BLOCK)
        kept = (blocks or [])[: local // standin.BLOCK]
        request.blocks = [kept + engine.free[: need - len(kept)]]
        engine.free = engine.free[need - len(kept) :]
        request.computed = local + request.loaded
        engine._allocated(request, request.loaded)
        return request

    def plan(self, request: Any, tokens: int) -> Any:
        """The next step, in which so many tokens of a request are computed."""
        name, new = request.request_id, request.request_id not in self.seen
        self.seen.add(name)
        told = {"req_id": name, "block_ids": tuple(request.blocks)}
        first = [SimpleNamespace(**told, num_computed_tokens=request.computed)]
        output = SimpleNamespace(
            scheduled_new_reqs=first if new else [],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[] if new else [name],
                resumed_req_ids=set(),
                new_block_ids=[None],
                num_computed_tokens=[request.computed],
            ),
            num_scheduled_tokens={name: tokens},
        )
        request.computed += tokens
        return self.engine.scheduler.build_connector_meta(output)

    def run(self, step: Any) -> set[int]:
        """Run a step; which blocks it did not load."""
        worker = self.engine.worker
        worker.bind_connector_metadata(step)
        worker.start_load_kv(None)
        for name in self.engine.caches:
            worker.wait_for_layer_load(name)
        worker.wait_for_save()
        found: set[int] = worker.get_block_ids_with_load_errors()
        worker.clear_connector_metadata()
        return found

    def tell(self, blocks: set[int]) -> None:
        told = SimpleNamespace(invalid_block_ids=blocks, finished_recving=None)
        self.engine.scheduler.update_connector_output(told)


def test_a_step_that_was_planned_before_a_load_failed_stores_nothing(
    engine: Any, tmp_path: Any
) -> None:
    """Neither of the request itself, nor of another that has begun on its blocks."""
    ids = prompt(64)
    fill(engine, ids)
    damage(documents(tmp_path)[0])
    second = Ahead(engine())
    one = second.admit(ids + prompt(64, 1))
    assert one.loaded == 64
    steps = [second.plan(one, 16), second.plan(one, 48)]
    other = second.admit(ids + prompt(64, 2), one.blocks[0], 64)
    steps.append(second.plan(other, 64))
    assert [len(step.saves) for step in steps] == [0, 1, 1]
    failed = [second.run(step) for step in steps]
    assert failed[0] and not failed[1] and not failed[2]
    for request, blocks in zip((one, other), failed, strict=False):
        second.tell(blocks)
        request.computed = 0
    for request in (one, other):  # which computes it, and stores it then
        second.engine._compute(request, 0, 128)
        step = second.plan(request, 128)
        assert len(step.saves) == 1
        second.run(step)
    second.engine.settle()
    assert len(documents(tmp_path)) == 3
    third = engine()
    for request in (one, other):
        assert third.run(request.prompt_token_ids)[0].loaded == 112  # and is right


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_what_rests_on_loads_of_other_workers_is_stored_when_they_are_known(
    engine: Any, tmp_path: Any, ours: Any, monkeypatch: Any, tensor: int, pipeline: int
) -> None:
    """A worker does not see that another one's load has failed."""
    ids = prompt(64)
    for one in ranks(engine, tensor, monkeypatch, ours, pipeline=pipeline):
        one.run(ids)
        one.settle()
    second = Ahead(ranks(engine, tensor, monkeypatch, ours, pipeline=pipeline)[0])
    request = second.admit(ids + prompt(64, 1))
    assert request.loaded == 64
    known = 2 if pipeline == 1 else 3  # steps that vLLM may have begun before it knows
    stored = [second.plan(request, 64 if n == 0 else 1).saves for n in range(known + 1)]
    assert [len(saves) for saves in stored] == [0] * known + [1]
    new = second.admit(prompt(64, 3))
    assert len(second.plan(new, 64).saves) == 1  # which rests on none
