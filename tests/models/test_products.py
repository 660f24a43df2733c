"""bf16 products through fp32: the numbers are those that bf16 products should give, no bit of a row
depends on its neighbours, and whoever leaves them to torch gets torch's."""

from __future__ import annotations

import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import examples, tiny_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kvzip.capture import prefill
from kvzip.codecs import _native
from kvzip.load.hf import cache_argument, snapshot_of_cache
from kvzip.models import load_model, products


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bf16(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def linear(x, w, b=None):
    return functional.linear(x, w.mT.contiguous(), b)


# Each with what it is of the product and what is added to it, all in float64.
OPERATIONS = {
    "linear": (lambda x, w, b: linear(x, w), lambda p, b: p),
    "linear with bias": (linear, lambda p, b: p + b),
    "matmul": (lambda x, w, b: torch.matmul(input=x, other=w), lambda p, b: p),
    "@": (lambda x, w, b: x @ w, lambda p, b: p),
    "mm": (lambda x, w, b: torch.mm(x, mat2=w), lambda p, b: p),
    "Tensor.mm": (lambda x, w, b: x.mm(w), lambda p, b: p),
    "bmm": (lambda x, w, b: torch.bmm(x[None], w[None])[0], lambda p, b: p),
    "addmm": (lambda x, w, b: torch.addmm(b, mat1=x, mat2=w, alpha=0.5), lambda p, b: p / 2 + b),
    "baddbmm": (
        lambda x, w, b: b[None, None].baddbmm(batch1=x[None], batch2=w[None], beta=2)[0],
        lambda p, b: p + 2 * b,
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_numbers_are_the_exact_ones_rounded_once(operation):
    """Of 61,000 sums that are exact in float64 fewer than one in a thousand rounds otherwise, and
    those by one step; torch's own are no better."""
    function, expected = OPERATIONS[operation]
    x, w, b = bf16(61, 300), bf16(300, 1000, seed=1), bf16(1000, seed=2)
    exact = expected(x.double() @ w.double(), b.double())
    want = exact.bfloat16()
    with products.Fp32Products():
        found = function(x, w, b)
    assert found.dtype == torch.bfloat16
    other = found != want
    assert other.float().mean() < 1e-3
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 1e-5).all()
    native = function(x, w, b)
    assert (native != found).float().mean() < 2e-3


def same_bits(a, b):
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@examples(60)
@given(
    rows=st.integers(1, 40),
    first=st.integers(0, 300),
    inside=st.one_of(st.integers(1, 700), st.integers(1, 3000)),
    outside=st.integers(1, 300),
    threads=st.sampled_from([1, 2, 3]),
    others=st.sampled_from([1, 2, 3]),
)
def test_no_bit_of_a_row_depends_on_the_rows_beside_it(
    rows, first, inside, outside, threads, others
):
    """Nor on threads."""
    x, w, b = bf16(first + rows + 37, inside), bf16(inside, outside, seed=1), bf16(outside, seed=2)
    with products.Fp32Products():
        for operation in ("linear with bias", "matmul", "bmm", "addmm"):
            function = OPERATIONS[operation][0]
            torch.set_num_threads(threads)
            alone = function(x[first : first + rows], w, b)
            torch.set_num_threads(others)
            within = function(x, w, b)[first : first + rows]
            assert same_bits(alone, within), operation


SHAPES = [(1, 2, 6, 1), (3, 250, 17, 200), (1, 240, 1024, 192), (2, 7, 2049, 400), (1, 481, 30, 13)]


@pytest.mark.parametrize("instructions", ["scalar", "the best"])
@pytest.mark.parametrize("batch, rows, inner, columns", SHAPES)
def test_no_bit_depends_on_how_numbers_lie(batch, rows, inner, columns, instructions):
    """Blocks of rows, columns and numbers, whole and not; matrices turned, cut out, repeated."""
    x, w = bf16(batch, rows, inner), bf16(batch, inner, columns, seed=1)
    exact = x.double() @ w.double()
    before = _native.simd()
    try:
        if instructions == "scalar":
            assert _native.set_simd("scalar")
        with products.Fp32Products():
            found = x @ w
            wide = torch.nn.functional.pad(x, (3, 5, 1, 0))
            for a in (x, x.mT.contiguous().mT, wide[:, 1:, 3:-5]):
                for b in (w, w.mT.contiguous().mT, torch.stack([w, w], -1)[..., 1]):
                    assert same_bits(a @ b, found)
            assert same_bits((x[:1] @ w)[0], found[0])  # of one for all
            assert same_bits((x @ w[0])[0], found[0])
            assert same_bits(torch.matmul(x[:, None], w[None])[0, 0], found[0])
    finally:
        _native.set_simd(before)
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 1e-3).all()


def test_rounding_is_torchs():
    """Of every number of bf16 by some: subnormals, the largest, infinity, NaN."""
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)[:, None]
    by = torch.tensor([[1.0, 1.0078125, -3.0, 2.0**-40, 2.0**100, torch.inf, 0.0]]).bfloat16()
    with products.Fp32Products():
        found = numbers @ by
    want = (numbers.float() * by.float()).bfloat16()
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


def test_shapes_that_do_not_fit_are_errors():
    bits = np.zeros((1, 2, 3), np.int16)
    for x, w, out, bias in (
        (bits, bits[:, :, :2], bits[:, :, :2], None),
        (bits, bits, bits, None),
        (np.repeat(bits, 2, 0), bits, np.zeros((1, 2, 2), np.int16), None),
        (bits, bits, np.zeros((1, 2, 2), np.float32), np.zeros(3, np.int16)),
    ):
        with pytest.raises(ValueError):
            _native.multiply_bf16(x, w, np.ascontiguousarray(out), bias, 1)


def test_the_edges_are_torchs():
    """Shapes without numbers, vectors, wrong shapes, an output that is given, NaN that does not
    count."""
    empty, nan = bf16(0, 8), torch.full((5,), torch.nan, dtype=torch.bfloat16)
    x, w = bf16(3, 8), bf16(8, 5)
    with products.Fp32Products():
        assert functional.linear(empty, w.mT).shape == (0, 5)
        assert torch.equal(functional.linear(x[0], w.mT.contiguous()), (x @ w)[0])
        assert torch.matmul(x[0], w).shape == (5,)
        assert torch.matmul(x, w[:, 0]).shape == (3,)
        assert torch.equal(torch.addmm(nan, x, w, beta=0), x @ w)
        out = torch.empty(3, 5, dtype=torch.bfloat16)
        assert torch.mm(x, w, out=out) is out
        assert torch.allclose(out.float(), (x @ w).float(), rtol=0.01)
        for bad in (
            lambda: functional.linear(x, w),
            lambda: torch.bmm(x, w),
            lambda: torch.mm(x[None], w[None]),
            lambda: torch.matmul(x, x),
            lambda: torch.addmm(nan[:2], x, w),
            lambda: functional.linear(x, w.mT.float()),
        ):
            with pytest.raises(RuntimeError):
                bad()


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_gradients_flow(wanted):
    given = bf16(2, 6, 40), bf16(70, 40, seed=1), bf16(70, seed=2)
    leaves = [leaf for leaf, wants in zip(given, wanted, strict=True) if wants]
    for leaf in leaves:
        leaf.requires_grad_()

    def gradients():
        x, w, b = given
        y = functional.linear(x, w, b)
        found = y.square().sum() + (y @ y.mT).sum()
        return torch.autograd.grad(found, leaves) if leaves else ()

    with products.Fp32Products():
        mine = gradients()
    for a, b in zip(mine, gradients(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=0.03, atol=b.abs().max().item() / 50)


def test_whatever_mode_comes_first():
    """Inference mode, no gradients, gradients: in any order, in a thread that is new to them."""
    x, w = bf16(6, 40), bf16(70, 40, seed=1)
    want = functional.linear(x.float(), w.float()).bfloat16()
    for order in itertools.permutations((torch.inference_mode, torch.no_grad, torch.enable_grad)):

        def run(order=order):
            found = []
            for mode in order:
                with mode(), products.Fp32Products():
                    found.append(functional.linear(x, w).clone())
            return found

        with ThreadPoolExecutor(1) as pool:
            assert all(torch.equal(one, want) for one in pool.submit(run).result())


class Bf16Products(TorchDispatchMode):
    """Counts products of bf16 matrices that reach torch's kernels."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "mv", "dot") and any(
            isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args
        ):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


FAMILIES = {
    "Llama": {},
    "Qwen3": {},
    "Gemma3Text": {"sliding_window": 16},
    "Mistral": {"sliding_window": 16},
    "GPT2": {"n_positions": 64, "n_layer": 2, "n_embd": 32, "n_head": 4},
    "Bloom": {"n_layer": 2, "n_head": 4},
}


def bf16_products_of(model, tokens=40):
    with torch.inference_mode(), Bf16Products() as counted:
        model(torch.arange(tokens)[None])
    return counted.found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_product_of_a_model_is_torchs_own(family, attention):
    model = tiny_model(family, **FAMILIES[family]).model
    if attention == "eager":
        model.set_attn_implementation("eager")
    assert bf16_products_of(model)
    products.widen(model)
    products.widen(model)  # twice is once
    assert bf16_products_of(model) == []
    assert bf16_products_of(copy.deepcopy(model)) == []


def test_they_end_with_the_forward_call():
    model = tiny_model("Llama").model
    products.widen(model)
    outside = tiny_model("Llama").model
    for ids in (torch.arange(5)[None], torch.tensor([[10**6]])):  # no such token: an error
        try:
            model(ids)
        except IndexError:
            assert ids.numel() == 1
        assert bf16_products_of(outside)


def test_they_end_with_a_forward_call_that_was_interrupted():
    model, outside = tiny_model("Llama").model, tiny_model("Llama").model
    products.widen(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    for _ in range(2):
        hook = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(torch.arange(5)[None])
        hook.remove()
        assert bf16_products_of(outside)
        assert bf16_products_of(model) == []  # which other calls are not ended by
        assert bf16_products_of(outside)


def test_a_widened_model_can_be_compiled():
    """With torch's own products then."""
    model, ids = tiny_model("Llama").model, torch.arange(9)[None]
    with torch.inference_mode():
        own = model(ids).logits
        products.widen(model)
        assert torch.equal(torch.compile(model, backend="eager")(ids).logits, own)
    assert bf16_products_of(model) == [] and bf16_products_of(tiny_model("Llama").model)


def test_a_continued_cache_has_the_first_layers_bits():
    """What a cache's first key is compared with is computed alone, and within a document."""
    from transformers import DynamicCache

    loaded = tiny_model("Llama", hidden_size=64, intermediate_size=96)
    products.widen(loaded.model)
    ids = torch.arange(45)[None]
    whole = prefill(loaded, ids[0].numpy().astype(np.uint32))
    for cuts in ((44, 45), (1, 2, 5, 45), (30, 33, 45)):
        cache, start = DynamicCache(config=loaded.model.config), 0
        with torch.inference_mode():
            for stop in cuts:
                loaded.model(ids[:, start:stop], **cache_argument(cache))
                start = stop
        parts = snapshot_of_cache(cache, ids, loaded.model)
        assert np.array_equal(parts.layers[0].k, whole.layers[0].k)
        assert np.array_equal(parts.layers[0].v, whole.layers[0].v)


class Words:
    all_special_tokens = ()

    def get_vocab(self):
        return {"word": 4}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [len(word) for word in text.split()]
        return type("", (), {"input_ids": [] if add_special_tokens else ids})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's folder that loads with a tokenizer of word lengths."""
    import transformers

    tiny_model("Llama").model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *given, **more: Words()
    )
    monkeypatch.delenv(products.ENVIRONMENT, raising=False)
    return str(tmp_path / "model")


def slow(monkeypatch, is_slow=True):
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not is_slow, raising=False
    )


def test_who_gets_them(folder, monkeypatch):
    """bf16 models on processors without such products, unless they are left to torch."""
    slow(monkeypatch, False)
    assert not products.widened(load_model(folder).model)
    assert products.widened(load_model(folder, native_bf16=False).model)
    slow(monkeypatch)
    assert products.widened(load_model(folder).model)
    assert not products.widened(load_model(folder, native_bf16=True).model)
    assert not products.widened(load_model(folder, "fp32").model)
    monkeypatch.setenv(products.ENVIRONMENT, "1")
    assert not products.widened(load_model(folder).model)


@pytest.mark.parametrize("native", [False, True])
def test_what_is_stored_names_them(folder, tmp_path, monkeypatch, capsys, native):
    import kvzip
    from kvzip.cli import main

    slow(monkeypatch)
    monkeypatch.setenv(products.ENVIRONMENT, "0")  # and is set back after the test
    (tmp_path / "text").write_text("a bb ccc dddd " * 20)
    command = ["capture", "--model", folder, "--text", str(tmp_path / "text"), "--tokens", "40"]
    command += ["--docs", "0", "-o", str(tmp_path), "--json", *["--native-bf16"] * native]
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 0
    [path] = json.loads(capsys.readouterr().out)["files"]
    snapshot = kvzip.Snapshot.load(path)
    assert ("bf16_products" in snapshot.origin.software) is not native
    assert kvzip.decode(kvzip.encode(snapshot)).origin == snapshot.origin


def test_results_name_them(monkeypatch):
    from kvzip.eval.results.provenance import made_by

    monkeypatch.setattr(products, "_any_widened", False)
    assert "bf16_products" not in made_by("x")["versions"]
    products.widen(tiny_model("Llama").model)
    assert made_by("x")["versions"]["bf16_products"] == products.FP32
