"""What was put into a library after it was imported is seen, and nothing else of a library is."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch.nn.functional as F  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import cache_utils, masking_utils, modeling_rope_utils  # noqa: E402
from transformers.models.gemma import modeling_gemma  # noqa: E402
from transformers.models.glm import modeling_glm  # noqa: E402
from transformers.models.gptj import modeling_gptj  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import kvzip  # noqa: E402
from kvzip.identity.imported import replaced  # noqa: E402


def changed(own: Any) -> Any:
    return lambda *given, **more: own(*given, **more)


class Proxy:
    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


USERS: dict[str, tuple[Any, str, Any]] = {
    "a function of torch's": (F, "silu", changed),
    "one written in C": (F, "linear", changed),
    "attention": (F, "scaled_dot_product_attention", changed),
    "torch itself": (torch, "matmul", changed),
    "a method of tensors": (torch.Tensor, "transpose", changed),
    "one of tensors in Python": (torch.Tensor, "__rsub__", changed),
    "a method of a cache": (cache_utils.DynamicLayer, "update", changed),
    "a class of caches": (
        cache_utils, "DynamicLayer", lambda own: type("DynamicLayer", (own,), {}),
    ),
    "masks": (masking_utils, "create_causal_mask", changed),
    "masks where they are used": (modeling_llama, "create_causal_mask", changed),
    "frequencies": (modeling_rope_utils, "_compute_yarn_parameters", changed),
    "a module": (torch.nn.modules.linear, "F", Proxy),
    "a layer": (torch.nn.Linear, "forward", changed),
    "a call of all modules": (torch.nn.Module, "__call__", changed),
    "arguments": (modeling_llama, "rotate_half", lambda own: functools.partial(own)),
    "a wrapper": (cache_utils.DynamicLayer, "update", lambda own: functools.wraps(own)(
        changed(own))),
}  # fmt: skip
LIBRARIES: dict[str, tuple[Any, str, Any]] = {
    "a function": (modeling_llama, "rotate_half", modeling_gptj.rotate_every_two),
    "one of that name": (modeling_llama, "apply_rotary_pos_emb", modeling_glm.apply_rotary_pos_emb),
    "a method": (modeling_llama.LlamaMLP, "forward", torch.nn.Identity.forward),
    "one of that name of another class": (
        modeling_llama.LlamaRMSNorm,
        "forward",
        modeling_gemma.GemmaRMSNorm.forward,
    ),
    "a function of torch's": (F, "silu", F.gelu),
    "one under an imported name": (
        modeling_llama,
        "create_causal_mask",
        masking_utils.create_sliding_window_causal_mask,
    ),
}
PUT = {f"a user's {what}": given for what, given in USERS.items()} | {
    f"a library's {what}": (place, name, lambda _, other=other: other)
    for what, (place, name, other) in LIBRARIES.items()
}


@pytest.mark.parametrize("place, name, make", PUT.values(), ids=PUT)
@pytest.mark.drawn(2)
def test_what_is_put_into_a_library(
    place: Any, name: str, make: Any, saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved()
    model, wanted = load(folder), kvzip.fingerprint(folder)
    own = getattr(place, name)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, make(own))
        other = kvzip.fingerprint(model)
        assert other.startswith("live:") and kvzip.fingerprint(model) == other
    assert kvzip.fingerprint(model) == wanted


def test_code_that_is_put_into_a_function(
    saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved()
    model, wanted = load(folder), kvzip.fingerprint(folder)
    with monkeypatch.context() as patch:
        code = modeling_gptj.rotate_every_two.__code__
        patch.setattr(modeling_llama.rotate_half, "__code__", code)
        assert kvzip.fingerprint(model).startswith("live:")
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.apply_rotary_pos_emb, "__defaults__", (2,))
        assert kvzip.fingerprint(model).startswith("live:")
    with monkeypatch.context() as patch:
        patch.delattr(modeling_llama.LlamaMLP, "forward")
        assert kvzip.fingerprint(model).startswith("live:")
    assert kvzip.fingerprint(model) == wanted


@pytest.mark.parametrize("kind", [TorchFunctionMode, TorchDispatchMode])
def test_modes_of_torch(kind: Any, saved: Any, load: Any) -> None:
    class Mode(kind):  # type: ignore[misc]
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def __torch_function__(self, function: Any, kinds: Any, args: Any, more: Any = None) -> Any:
            return function(*args, **(more or {}))

        __torch_dispatch__ = __torch_function__

    model, seen = load(saved()), set()
    for by in (1.0, 2.0, 1.0):
        with Mode(by):
            seen.add(kvzip.fingerprint(model))
    seen.add(kvzip.fingerprint(model))
    assert len(seen) == 3 and kvzip.fingerprint(saved()) in seen
    with torch.device("cpu"):  # torch's own
        assert kvzip.fingerprint(model) == kvzip.fingerprint(saved())


def test_autocast(saved: Any, load: Any) -> None:
    model, seen = load(saved(dtype="float32"), "float32"), []
    for context in (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autocast("cpu", dtype=torch.float16),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        with context:
            seen.append(kvzip.fingerprint(model))
    assert len(set(seen)) == 3 and seen[2] == seen[3] == kvzip.fingerprint(saved(dtype="float32"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kvzip.fingerprint(model) == seen[0]


def test_arguments_of_attention(saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = transformers.AttentionInterface
    own, folder = registry()["sdpa"], saved()
    monkeypatch.setattr(registry, "_global_mapping", dict(registry._global_mapping))
    seen = {kvzip.fingerprint(folder)}
    for other in (functools.partial(own, is_causal=False), functools.partial(own, is_causal=True),
                  modeling_llama.eager_attention_forward):  # fmt: skip
        registry.register("sdpa", other)
        seen.add(kvzip.fingerprint(load(folder)))
    assert len(seen) == 4


def test_libraries_are_what_was_imported() -> None:
    """Of all kinds of models that are imported here; else none would be its checkpoint."""
    kinds = ("gemma3", "gpt_oss", "mixtral", "deepseek_v3", "mamba", "t5", "whisper", "qwen3_next")
    modules = [f"transformers.models.{kind}.modeling_{kind}" for kind in kinds]
    for module in modules:
        pytest.importorskip(module)
    names = [*modules, "transformers.modeling_utils", "torch.nn.modules.module", "torch"]
    names += [f"torch.nn.modules.{name}" for name in ("linear", "conv", "activation", "container")]
    assert replaced(names) == []


def test_layers_of_torchs_own_are_what_was_imported() -> None:
    """Modules that hold a class of another one's beside their own of the same name, too."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    homes = {kind.__module__ for kind in vars(torch.nn).values() if isinstance(kind, type)}
    assert replaced({*homes, "torch.nn.attention.flex_attention"}) == []  # it has named tuples
    norm = torch.nn.LayerNorm(4)
    assert kvzip.fingerprint(norm) == kvzip.fingerprint(norm)


def test_a_module_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.made_up")
    module.__dict__["own"] = F.silu
    monkeypatch.setitem(__import__("sys").modules, "torch.made_up", module)
    assert replaced(["torch.made_up", "torch.not_there"]) == []
