"""What modules, hooks and functions bring along counts, wherever it is kept."""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import ctypes
import dataclasses
import datetime
import functools
import pickle
import re
import shutil
import sys
import threading
import types
import weakref
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvzip  # noqa: E402
from kvzip.identity import values  # noqa: E402


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
@pytest.mark.drawn(2)
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


def test_locks_hold_no_numbers(saved: Any, load: Any) -> None:
    found = set()
    for _ in range(2):
        model = load(saved())
        model.model.layers[0].locks = [threading.Lock(), threading.RLock(), threading.Condition()]
        found |= {kvzip.fingerprint(model), kvzip.fingerprint(model)}
    assert len(found) == 1


class Local(threading.local):
    pass


UNREADABLE = {
    "threads": Local,
    "variable": lambda: contextvars.ContextVar("x", default=1.0),
    "iterator": lambda: (x for x in (1.0, 2.0)),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_never_the_same_and_said_once(
    kind: str, saved: Any, load: Any, caplog: Any
) -> None:
    """Nothing would tell that it has changed."""
    model = load(saved())
    model.model.layers[0].mlp.strange = [UNREADABLE[kind]()]
    found = [kvzip.fingerprint(model) for _ in range(3)]
    assert len(set(found)) == 3 and all(map(kvzip.identity.is_fingerprint, found))
    [told] = [r.getMessage() for r in caplog.records if r.name == "kvzip.identity"]
    assert "mlp.strange" in told and "not kept" in told
    del model.model.layers[0].mlp.strange
    assert kvzip.fingerprint(model) == kvzip.fingerprint(saved())


def set_to(index: Any) -> Any:
    return lambda held, value: held.__setitem__(index, value)


WRITTEN_IN_C: dict[str, tuple[Any, Any]] = {
    "array": (lambda: array.array("d", [1.0]), set_to(0)),
    "memory": (lambda: memoryview(bytearray(b"1")), lambda m, v: m.__setitem__(0, int(v))),
    "number": (lambda: ctypes.c_double(1.0), lambda c, v: setattr(c, "value", v)),
    "numbers": (lambda: (ctypes.c_float * 2)(1.0, 1.0), set_to(1)),
    "generator": (lambda: np.random.default_rng(1), lambda g, v: g.random()),
    "bytes": (lambda: bytearray(b"1"), lambda b, v: b.__setitem__(0, int(v))),
    "what a dict gives for all else": (
        lambda: collections.defaultdict(Given(1.0)),
        lambda d, v: setattr(d.default_factory, "factor", v),
    ),
    "a masked number": (
        lambda: np.ma.array([1.0, 2.0], mask=[True, False]),
        lambda a, v: a.mask.__setitem__(1, True),
    ),
    "in a reference": (lambda: Kept(), lambda k, v: setattr(k.of, "factor", v)),
}


@dataclasses.dataclass
class Given:
    factor: Any

    def __call__(self) -> Any:
        return self.factor


class Kept:
    def __init__(self) -> None:
        self.of = Options(1.0)
        self.reference = weakref.ref(self.of)


@pytest.mark.parametrize("kind", WRITTEN_IN_C)
def test_objects_of_classes_written_in_c(kind: str, saved: Any, load: Any) -> None:
    make, change = WRITTEN_IN_C[kind]
    found = []
    for _ in range(2):
        model = load(saved())
        held = make()
        model.model.layers[0].mlp.register_forward_hook(lambda m, args, out, held=held: out)
        found += [kvzip.fingerprint(model), kvzip.fingerprint(model)]
        change(held, 2.0)
        assert kvzip.fingerprint(model) not in found
    assert len(set(found)) == 1


def test_containers_without_bounds_and_factories_say_their_items_alone() -> None:
    """As the fingerprints of documents that are stored have it: locks hold such containers, too."""

    def said(value: Any) -> Any:
        return values.ValueReader({}, lambda module: frozenset(), str).read(value, "x")

    assert said(collections.deque([1.0])) == ["collections.deque", [[1.0]]]
    assert said(collections.deque([1.0], 3)) == ["collections.deque", [[1.0], 3]]
    assert said(collections.defaultdict(None, a=1)) == ["collections.defaultdict", [["('a', 1)"]]]


@pytest.mark.parametrize("value", [re.compile("x"), range(3), Decimal("1.5"), datetime.date.min])
def test_what_never_changes_is_the_same_everywhere(value: Any, saved: Any, load: Any) -> None:
    found = set()
    for _ in range(2):
        model = load(saved())
        model.model.layers[0].kept = pickle.loads(pickle.dumps(value))
        found.add(kvzip.fingerprint(model))
    assert len(found) == 1


@pytest.mark.parametrize("way", ["global", "import", "from", "closure", "deep", "object"])
def test_variables_of_modules_that_a_hook_uses(
    way: str, saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steering, settings = types.ModuleType("steering_test"), types.ModuleType("steering_test.set")
    steering.settings, settings.BY, settings.other, settings.parent = settings, 1.0, 1.0, steering
    monkeypatch.setitem(sys.modules, "steering_test", steering)
    monkeypatch.setitem(sys.modules, "steering_test.set", settings)
    given: dict[str, Any] = {"settings": settings, "steering": steering}
    text = {
        "global": "def hook(m, a, out): return out * settings.BY",
        "import": "def hook(m, a, out):\n    import steering_test.set as s\n    return out * s.BY",
        "from": "def hook(m, a, out):\n    from steering_test.set import BY\n    return out * BY",
        "closure": "def make(kept):\n    return lambda m, a, out: out * kept.BY\n"
        "hook = make(settings)",
        "deep": "def hook(m, a, out): return [steering.settings.parent.settings.BY][0] * out",
        "object": "class Hook:\n    def __init__(self): self.by = settings\n"
        "    def __call__(self, m, a, out): return out * self.by.BY\nhook = Hook()",
    }[way]
    exec(text, given)
    model = load(saved())
    model.model.layers[0].mlp.register_forward_hook(given["hook"])
    first = kvzip.fingerprint(model)
    if way != "object":  # where nothing tells which are used
        settings.other = 2.0
    assert kvzip.fingerprint(model) == first
    settings.BY = 2.0
    assert kvzip.fingerprint(model) != first


@pytest.mark.parametrize("value", [1.5, "x", [1.5], Options(1.5), torch.ones(2)])
@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "input_layernorm.weight"])
def test_attributes_of_parameters(name: str, value: Any, saved: Any, load: Any) -> None:
    model = load(saved())
    seen = {kvzip.fingerprint(model)}
    weight = model.model.layers[1].get_parameter(name)
    weight.gain = value
    seen.add(kvzip.fingerprint(model))
    weight.gain = 2.5
    assert len(seen | {kvzip.fingerprint(model)}) == 3
    weight._is_hf_initialized = True
    del weight.gain
    assert kvzip.fingerprint(model) == kvzip.fingerprint(saved())


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


ODD: dict[str, Any] = {
    "of 4 bits, transposed": lambda b: b.view(torch.uint4).t(),
    "conjugated": lambda b: b.view(torch.complex64).conj(),
    "negated": lambda b: b.view(torch.complex64).conj().imag,
    "one number, of two apart": lambda b: b.view(torch.bfloat16)[:1, ::2][:, :1],
    "of 16 bytes": lambda b: b.view(torch.complex128),
    "repeated": lambda b: b[:1].expand(3, -1),
    "none": lambda b: b[:0],
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_odd_formats_and_views(kind: str, saved: Any, load: Any) -> None:
    """torch indexes, joins and looks into few of them."""
    found = []
    for factor in (1, 1, 3):
        model = load(saved())
        numbers = (factor * torch.arange(1, 33, dtype=torch.uint8)).reshape(2, 16)
        model.model.layers[0].register_buffer("odd", ODD[kind](numbers))
        found.append(kvzip.fingerprint(model))
    assert found[0] == found[1]
    assert (found[0] != found[2]) == (kind != "none")


@pytest.mark.parametrize(
    "make",
    [
        torch.nn.parameter.UninitializedBuffer,
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.eye(3).to_sparse(),
    ],
)
def test_tensors_that_cannot_be_read(make: Any, saved: Any, load: Any) -> None:
    model = load(saved())
    model.model.layers[0].register_buffer("odd", make())
    with pytest.raises(kvzip.KVZipError, match=r"layers\.0\.odd"):
        kvzip.fingerprint(model)


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


def compiled_in_place(model: Any) -> None:
    model.compile()
    torch.compile(model)


def with_a_static_cache(model: Any) -> None:
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, cache_implementation="static")


def dispatched(model: Any) -> None:
    big_modeling = pytest.importorskip("accelerate.big_modeling")
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    big_modeling.dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)


def prepared(model: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    assert accelerate.Accelerator(cpu=True).prepare(model) is model


@pytest.mark.parametrize(
    "change",
    [
        pad,
        eos,
        tags,
        compiled,
        compiled_in_place,
        generated,
        with_a_static_cache,
        outputs_shown,
        another_kernel,
        trained,
        dispatched,
        prepared,
    ],
)
@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text"])
@pytest.mark.drawn(2)
def test_what_changes_no_key_or_value(kind: str, change: Any, saved: Any, load: Any) -> None:
    folder = saved(kind)
    model = load(folder)
    change(model)
    assert kvzip.fingerprint(model) == kvzip.fingerprint(folder)
    if change in (pad, eos, tags, generated, another_kernel):  # what torch can pickle
        assert kvzip.fingerprint(pickle.loads(pickle.dumps(model))) == kvzip.fingerprint(folder)


def test_a_forward_that_was_replaced_and_compiled(saved: Any, load: Any) -> None:
    model = load(saved())
    own = model.forward
    model.forward = torch.compile(lambda *args, **more: own(*args, **more))
    assert kvzip.fingerprint(model).startswith("live:")


def test_a_forward_that_wraps_what_was_compiled(saved: Any, load: Any) -> None:
    """It says of itself all that what it wraps does."""
    found = set()
    for factor in (2.0, 3.0):
        model = load(saved())
        own = torch.compile(model.forward)
        model.forward = functools.wraps(own)(lambda *a, f=factor, o=own, **more: (f, o(*a, **more)))
        found.add(kvzip.fingerprint(model))
    assert len(found | {kvzip.fingerprint(saved())}) == 3


@pytest.mark.parametrize("how", ["wraps", "no_grad", "partial", "method", "compiled into it"])
@pytest.mark.parametrize("where", ["hook", "forward", "on all modules"])
@pytest.mark.drawn(2)
def test_a_users_function_within_a_librarys(how: str, where: str, saved: Any, load: Any) -> None:
    from transformers.models.llama import modeling_llama as modeling

    found = set()
    for factor in (1.0, 2.0, 2.0):
        model = load(saved())
        mlp = model.model.layers[0].mlp
        own = mlp.forward
        text = f"lambda *args: (own(args[0]), {factor})"
        hook = eval(text, {"own": own})
        if how == "wraps":
            hook = functools.wraps(own)(hook)
        elif how == "no_grad":
            hook = torch.no_grad()(hook)
        elif how == "partial":
            hook = functools.update_wrapper(functools.partial(hook), own)
        elif how == "method":
            hook = types.MethodType(hook, mlp)
        else:  # as if it were of the library's own text
            hook = eval(text, vars(modeling))
        handle = None
        if where == "hook":
            mlp.register_forward_hook(hook)
        elif where == "forward":
            mlp.forward = hook
        else:
            handle = torch.nn.modules.module.register_module_forward_hook(hook)
        try:
            found.add(kvzip.fingerprint(model))
        finally:
            if handle is not None:
                handle.remove()
    assert len(found | {kvzip.fingerprint(saved())}) == 3


@pytest.mark.parametrize("chained", [False, True])
def test_hooks_of_accelerate(chained: bool, saved: Any, load: Any) -> None:
    """A user's own count; the library's, which move tensors, do not, and hide no `forward`."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Steering(hooks.AlignDevicesHook):
        def __init__(self, by: float) -> None:
            super().__init__(execution_device="cpu")
            self.by = by

        def post_forward(self, module: Any, out: Any) -> Any:
            return out * self.by

    wanted, seen = kvzip.fingerprint(saved()), set()
    for by in (1.0, 2.0):
        model = load(saved())
        mlp = model.model.layers[0].mlp
        hooks.add_hook_to_module(mlp, hooks.AlignDevicesHook(execution_device="cpu"))
        assert kvzip.fingerprint(model) == wanted
        hooks.add_hook_to_module(mlp, Steering(by), append=chained)
        seen.add(kvzip.fingerprint(model))
        hooks.add_hook_to_module(mlp, hooks.AlignDevicesHook(execution_device="cpu"))
        mlp._hf_hook.post_forward = lambda module, out, by=by: out * by
        seen.add(kvzip.fingerprint(model))
        del mlp._hf_hook.post_forward
        assert kvzip.fingerprint(model) == wanted
        below = mlp.forward
        mlp.forward = lambda x, below=below, by=by: below(x) * by
        seen.add(kvzip.fingerprint(model))
    assert len(seen | {wanted}) == 7


def test_rope_that_keeps_frequencies_for_long_texts(saved: Any, load: Any) -> None:
    folder = saved()
    config = transformers.AutoConfig.from_pretrained(folder)
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    }
    config.save_pretrained(folder)
    model, wanted = load(folder), kvzip.fingerprint(folder)
    model(torch.arange(3, 20)[None])
    assert hasattr(model.model.rotary_emb, "long_inv_freq")
    assert kvzip.fingerprint(model) == wanted
    model.model.rotary_emb.long_inv_freq *= 2
    assert kvzip.fingerprint(model) != wanted


def test_a_folder_that_is_moved_away(saved: Any, load: Any, tmp_path: Path) -> None:
    folder = saved()
    model = load(folder)
    first = kvzip.fingerprint(model)
    shutil.move(folder, tmp_path / "elsewhere")
    assert kvzip.fingerprint(model) == first
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert kvzip.fingerprint(model).startswith("live:")
