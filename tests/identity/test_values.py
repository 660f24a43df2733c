"""What modules, hooks and functions bring along counts, wherever it is kept."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pickle
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kvzip  # noqa: E402


@dataclasses.dataclass
class Options:
    factor: Any


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: Any):
        self.factor = factor


FACTOR = 1.0


def closure(factor: Any) -> Any:
    return lambda module, args, out: out * factor


def default(factor: Any) -> Any:
    def hook(module: Any, args: Any, out: Any, by: Any = factor) -> Any:
        return out * by

    return hook


def partial(factor: Any) -> Any:
    return functools.partial(lambda f, module, args, out: out * f, factor)


def method(factor: Any) -> Any:
    class Steering:
        def __init__(self) -> None:
            self.by = {"deep": [{"factor": factor}]}

        def hook(self, module: Any, args: Any, out: Any) -> Any:
            return out * self.by["deep"][0]["factor"]

    return Steering().hook


HUNG = [closure, default, partial, method]
PAIRS = [(0.01, 0.011), (torch.ones(3), 2 * torch.ones(3)), (np.ones(3), 2 * np.ones(3))]


@pytest.mark.parametrize("make", HUNG)
@pytest.mark.parametrize("pair", PAIRS)
def test_what_hooks_and_forwards_bring_along(
    make: Any, pair: tuple[Any, Any], saved: Any, load: Any
) -> None:
    model = load(saved())
    layer = model.model.layers[0]
    for hang in (hooked, replaced):
        found = [hang(layer.mlp, model, make(factor)) for factor in (*pair, copy.deepcopy(pair[0]))]
        assert found[0] == found[2] != found[1]
        assert all(each.startswith("live:") for each in found)


def hooked(module: Any, model: Any, hook: Any) -> str:
    handle = module.register_forward_hook(hook)
    try:
        return kvzip.fingerprint(model)
    finally:
        handle.remove()


def replaced(module: Any, model: Any, hook: Any) -> str:
    own = module.forward
    module.forward = lambda x: hook(module, (x,), own(x))
    try:
        return kvzip.fingerprint(model)
    finally:
        del module.forward


def test_a_global_that_a_hook_uses(saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(saved())
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * FACTOR)
    first = kvzip.fingerprint(model)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert kvzip.fingerprint(model) != first


ATTRIBUTES: list[tuple[Any, Any]] = [
    (1.0, 2.0),
    (np.float32(1), np.float32(2)),
    (np.ones(3), 2 * np.ones(3)),
    (1 + 2j, 2 + 2j),
    (b"x", b"y"),
    (types.SimpleNamespace(s=1.0), types.SimpleNamespace(s=2.0)),
    (Options(1.0), Options(2.0)),
    (Slotted(1.0), Slotted(2.0)),
    (Options(torch.ones(2)), Options(torch.zeros(2))),
    (torch.relu, torch.tanh),
    ({"a": {"b": {"c": {"d": torch.ones(2)}}}}, {"a": {"b": {"c": {"d": torch.zeros(2)}}}}),
]


@pytest.mark.parametrize("name", ["scale", "_scale"])
@pytest.mark.parametrize("pair", ATTRIBUTES)
def test_what_attributes_hold(name: str, pair: tuple[Any, Any], saved: Any, load: Any) -> None:
    model = load(saved())
    module, found = model.model.layers[0].self_attn.q_proj, [kvzip.fingerprint(model)]
    for value in pair:
        setattr(module, name, value)
        found.append(kvzip.fingerprint(model))
    assert len(set(found)) == 3
    assert kvzip.fingerprint(copy.deepcopy(model)) == found[-1]
    setattr(module, name, copy.deepcopy(pair[0]))
    assert kvzip.fingerprint(model) == found[1]


def test_a_tensor_deep_within_that_is_written_to(saved: Any, load: Any) -> None:
    model = load(saved())
    deep = torch.ones(3)
    model.model.layers[0]._deep = {"a": [{"b": Options((deep,))}]}
    first = kvzip.fingerprint(model)
    deep.mul_(2)
    assert kvzip.fingerprint(model) != first


class Scaled(torch.nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self._factor = factor

    def forward(self, x: Any) -> Any:
        return x * self._factor


def test_a_parametrization(saved: Any, load: Any) -> None:
    found = set()
    for factor in (1.1, 1.2, 1.1):
        model = load(saved())
        torch.nn.utils.parametrize.register_parametrization(
            model.model.layers[0].mlp.up_proj, "weight", Scaled(factor)
        )
        found.add(kvzip.fingerprint(model))
    assert len(found) == 2


def test_a_configuration_of_a_module_of_its_own(saved: Any, load: Any) -> None:
    model = load(saved())
    seen = {kvzip.fingerprint(model)}
    attention = model.model.layers[0].self_attn
    for base in (1e4, 1e5):
        attention.config = copy.deepcopy(model.config)
        attention.config.rope_parameters = {"rope_type": "default", "rope_theta": base}
        seen.add(kvzip.fingerprint(model))
    assert len(seen) == 3


def test_what_cannot_be_read_is_equal_to_nothing_else(saved: Any, load: Any) -> None:
    found = []
    for _ in range(2):
        model = load(saved())
        model.model.layers[0].lock = threading.Lock()
        found.append(kvzip.fingerprint(model))
        assert kvzip.fingerprint(model) == found[-1]
    assert found[0] != found[1]


@pytest.mark.parametrize("part", ["embed_tokens", "norm", "layers.0.input_layernorm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_part_in_another_dtype(part: str, dtype: str, saved: Any, load: Any) -> None:
    model = load(saved(dtype=dtype), dtype)
    assert kvzip.fingerprint(model).startswith("sha256:")
    model.model.get_submodule(part).to(torch.float16)
    assert kvzip.fingerprint(model).startswith("live:")


@pytest.mark.parametrize("shape", ["transposed", "strided"])
def test_writes_past_the_counter_where_numbers_do_not_lie_together(
    shape: str, saved: Any, load: Any
) -> None:
    model = load(saved())
    projection = model.model.layers[0].self_attn.q_proj
    own = projection.weight.detach()
    other = own.t().contiguous().t() if shape == "transposed" else own.repeat(1, 2)[:, ::2]
    projection.weight = torch.nn.Parameter(other)
    assert not projection.weight.is_contiguous()
    first, version = kvzip.fingerprint(model), projection.weight._version
    projection.weight.data.mul_(1.5)
    assert projection.weight._version == version
    assert kvzip.fingerprint(model) != first


def pad(model: Any) -> None:
    model.config.pad_token_id = 5


def eos(model: Any) -> None:
    model.config.eos_token_id = 5


def tags(model: Any) -> None:
    model.add_model_tags("x")


def compiled(model: Any) -> None:
    model.forward = torch.compile(model.forward)


def generated(model: Any) -> None:
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, num_beams=2)


def outputs_shown(model: Any) -> None:
    model(torch.tensor([[3, 4, 5]]), output_hidden_states=True)


def another_kernel(model: Any) -> None:
    model.set_attn_implementation("eager")


def trained(model: Any) -> None:
    model.gradient_checkpointing_enable()
    model.train()
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    model.eval()


@pytest.mark.parametrize(
    "change", [pad, eos, tags, compiled, generated, outputs_shown, another_kernel, trained]
)
@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text"])
def test_what_changes_no_key_or_value(kind: str, change: Any, saved: Any, load: Any) -> None:
    folder = saved(kind)
    model = load(folder)
    change(model)
    assert kvzip.fingerprint(model) == kvzip.fingerprint(folder)
    if change not in (compiled, trained, outputs_shown):  # which torch cannot pickle
        assert kvzip.fingerprint(pickle.loads(pickle.dumps(model))) == kvzip.fingerprint(folder)


def test_a_forward_that_was_replaced_and_compiled(saved: Any, load: Any) -> None:
    model = load(saved())
    own = model.forward
    model.forward = torch.compile(lambda *args, **more: own(*args, **more))
    assert kvzip.fingerprint(model).startswith("live:")


def test_a_folder_that_is_moved_away(saved: Any, load: Any, tmp_path: Path) -> None:
    folder = saved()
    model = load(folder)
    first = kvzip.fingerprint(model)
    shutil.move(folder, tmp_path / "elsewhere")
    assert kvzip.fingerprint(model) == first
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert kvzip.fingerprint(model).startswith("live:")


def test_code_says_the_same_in_every_process():
    # Sets have another order with each seed of the hash, and an ellipsis has no attributes.
    names = {f"name{i}" for i in range(8)}
    program = (
        "from kvzip.identity.values import ValueReader\n"
        f"hook = lambda x: x[..., None] if x in {names} else x\n"
        "print(ValueReader({}, frozenset(), str).read(hook, 'hook'))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert "name7" in said[0]
    assert said[0] == said[1]
