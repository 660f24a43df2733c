"""What libraries note on a module is passed over by its name, but not where a user's own code has
that name."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvzip  # noqa: E402

IDLE_NAMES = ("training", "_cache", "name_or_path", "generation_config")


@pytest.mark.parametrize("name", IDLE_NAMES)
def test_names_that_libraries_use_say_nothing_elsewhere(name: str, saved: Any, load: Any) -> None:
    """In a dictionary, an object, or a module of a user's own."""
    for make in (lambda v: {name: v}, lambda v: types.SimpleNamespace(**{name: v}), own_module):
        found = set()
        for value in (1.0, 2.0):
            model = load(saved())
            held = make(value)
            model.model.layers[0].mlp.register_forward_hook(lambda m, args, out, held=held: out)
            found.add(kvzip.fingerprint(model))
        assert len(found) == 2 or (make is own_module and name == "training")


def own_module(value: Any) -> Any:
    class Own(torch.nn.Module):
        pass

    made = Own()
    for name in IDLE_NAMES:
        object.__setattr__(made, name, value)
    return made


def hook_of(text: str, **more: Any) -> Callable[..., Any]:
    """A hook of a module that is called `notebook_names`, which has these variables."""
    module = types.ModuleType("notebook_names")
    module.__dict__.update(sys=sys, GAIN=1.0, **more)
    sys.modules["notebook_names"] = module
    exec(f"def hook(module, args, out):\n    return out * {text}", module.__dict__)
    return module.__dict__["hook"]  # type: ignore[no-any-return]


def on_module(model: Any) -> None:
    model.model.layers[0].mlp.model_tags = 2.0


def on_config(model: Any) -> None:
    model.config.pad_token_id = 2


def on_generation_config(model: Any) -> None:
    model.generation_config.gain = 2.0


def on_globals(model: Any) -> None:
    sys.modules["notebook_names"].GAIN = 2.0  # type: ignore[attr-defined]


ASKED = {
    "an attribute": ("module.model_tags", on_module),
    "by word": ("getattr(module, 'model_tags')", on_module),
    "of its dictionary": ("vars(module)['model_tags']", on_module),
    "of all": ("sum(v for v in module.__dict__.values() if type(v) is float)", on_module),
    "a setting": ("MODEL[0].config.pad_token_id", on_config),
    "of all settings": ("MODEL[0].config.to_dict()['pad_' + 'token_id']", on_config),
    "a setting of generate": ("MODEL[0].generation_config.gain", on_generation_config),
    "globals": ("globals()['GAIN']", on_globals),
    "a module's": ("getattr(sys.modules['notebook_names'], 'GAIN')", on_globals),
    "text": ("eval('GAIN * 1')", on_globals),
}


@pytest.mark.parametrize("way", ASKED)
@pytest.mark.drawn(2)
def test_names_that_a_hook_uses_count(
    way: str, saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "notebook_names", raising=False)
    text, change = ASKED[way]
    found = []
    for _ in range(2):
        model = load(saved())
        model.config.pad_token_id, model.generation_config.gain = 1, 1.0
        model.model.layers[0].mlp.model_tags = 1.0
        hook = hook_of(text, MODEL=[model])
        model.model.layers[0].mlp.register_forward_hook(hook)
        found += [kvzip.fingerprint(model), kvzip.fingerprint(model)]
        change(model)
        found.append(kvzip.fingerprint(model))
    del sys.modules["notebook_names"]
    assert found[0] == found[1] == found[3] == found[4] != found[2] == found[5]


def test_a_class_attribute_by_word(saved: Any, load: Any) -> None:
    class Wrapped(torch.nn.Module):
        gain = 1.0

        def forward(self, x: Any) -> Any:
            return x * type(self).__dict__["gain"]

    model = load(saved())
    model.model.layers[0].mlp = Wrapped()
    first = kvzip.fingerprint(model)
    Wrapped.gain = 2.0
    assert kvzip.fingerprint(model) != first


@pytest.mark.parametrize("name", ["_original_forward", "_old_forward", "to", "_hook"])
def test_a_users_function_under_a_librarys_name(name: str, saved: Any, load: Any) -> None:
    """Which another function of the user's calls, the same each time."""
    found = set()
    for factor in (2.0, 3.0, 2.0):
        model = load(saved())
        mlp = model.model.layers[0].mlp
        own = eval(f"lambda module, x: type(module).forward(module, x) * {factor}")
        object.__setattr__(mlp, name, types.MethodType(own, mlp))
        mlp.forward = types.MethodType(eval(f"lambda module, x: module.{name}(x)"), mlp)
        found.add(kvzip.fingerprint(model))
    assert len(found | {kvzip.fingerprint(saved())}) == 3


class Gained(torch.Tensor):
    gain = 1.0

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), more: Any = None) -> Any:
        out = super().__torch_function__(function, kinds, args, more or {})
        return out * cls.gain if function is torch.nn.functional.linear else out


def test_a_class_of_tensors(saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(saved())
    seen = {kvzip.fingerprint(model)}
    projection = model.model.layers[0].mlp.up_proj
    weight = projection.weight.detach().as_subclass(Gained)
    projection.weight = torch.nn.Parameter(weight, requires_grad=False)
    seen.add(kvzip.fingerprint(model))
    monkeypatch.setattr(Gained, "gain", 2.0)
    assert len(seen | {kvzip.fingerprint(model)}) == 3
