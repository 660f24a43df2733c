"""A user's own code counts in a model's fingerprint, wherever it was put; what computes nothing
does not, and libraries are known by their names."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import kvzip  # noqa: E402

pytestmark = pytest.mark.first

SDPA = transformers.AttentionInterface()["sdpa"]


def defined(text: str, monkeypatch: pytest.MonkeyPatch, name: str = "notebook") -> ModuleType:
    """A module of that text, as a notebook or a script is one."""
    module = ModuleType(name)
    module.__dict__.update(torch=torch, functools=functools, SDPA=SDPA, modeling=modeling_llama)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    return module


# --- functions that a library looks up ---------------------------------------------------------


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (transformers.AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(registry, "_global_mapping", dict(registry._global_mapping))


ATTENTION = """
FACTOR = 1.0
def helper(out):
    return out * FACTOR
def attention(module, query, key, value, mask, **more):
    out, weights = SDPA(module, query, key, value, mask, **more)
    return helper(out) * 1.0, weights
"""


@pytest.mark.parametrize("name", ["mine", "sdpa"])
def test_attention_that_a_user_registers(
    name: str, registries: None, saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = saved(), set()
    model = load(folder)

    def registered(text: str) -> str:
        function = defined(text, monkeypatch).attention
        transformers.AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
        model.set_attn_implementation(name)
        model(torch.tensor([[1, 2, 3]]))
        return kvzip.fingerprint(model)

    first = registered(ATTENTION)
    assert first.startswith("live:") and registered(ATTENTION) == first
    for old, new in (("* 1.0,", "* 2.0,"), ("FACTOR = 1", "FACTOR = 2"), ("out * F", "out + F")):
        seen.add(registered(ATTENTION.replace(old, new)))
    assert len(seen | {first, kvzip.fingerprint(folder)}) == 5


def test_masks_that_a_user_registers(
    registries: None, saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved()
    transformers.AttentionInterface.register("mine", SDPA)
    seen = {kvzip.fingerprint(folder)}
    for value in ("None", "False"):
        mask = defined(f"def mask(*given, **more):\n    return {value}", monkeypatch).mask
        AttentionMaskInterface.register("mine", mask)
        seen.add(kvzip.fingerprint(load(folder, attn_implementation="mine")))
    assert len(seen) == 3


def test_what_is_registered_and_not_asked_for_or_transformers_own(
    registries: None, saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved()
    transformers.AttentionInterface.register("mine", defined(ATTENTION, monkeypatch).attention)
    transformers.AttentionInterface.register("other", SDPA)
    AttentionMaskInterface.register("other", sdpa_mask)
    for name in ("sdpa", "eager", "other"):
        model = load(folder, attn_implementation=name)
        assert kvzip.fingerprint(model) == kvzip.fingerprint(folder)


WAYS: dict[str, Callable[[Any, Any], tuple[object, str]]] = {
    "class": lambda forward, own: (modeling_llama.LlamaMLP, "forward"),
    "base class": lambda forward, own: (transformers.PreTrainedModel, "get_input_embeddings"),
    "module": lambda forward, own: (modeling_llama, "apply_rotary_pos_emb"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrapped", ["plainly", "by wraps", "by a library", "in a cache"])
def test_functions_put_where_a_library_has_its_own(
    way: str, wrapped: str, saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved()
    model, wanted = load(folder), kvzip.fingerprint(folder)
    place, name = WAYS[way](None, None)
    own = getattr(place, name)
    seen = set()
    for factor in (1.0, 2.0, 1.0):
        text = f"def forward(*given, **more):\n    return OWN(*given, **more), {factor}"
        module = defined("OWN = None", monkeypatch)
        module.OWN = own
        exec(text, module.__dict__)
        function = module.forward
        if wrapped == "by wraps":
            function = functools.wraps(own)(function)
        elif wrapped == "by a library":
            function = torch.no_grad()(function)
        elif wrapped == "in a cache":
            function = functools.lru_cache(function)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, function)
            seen.add(kvzip.fingerprint(model))
    assert len(seen) == 2 and wanted not in seen
    assert kvzip.fingerprint(model) == wanted


# --- classes of a user's -----------------------------------------------------------------------

CLASS = """
SHIFT = 1.0
def moved(x):
    return x + SHIFT
class Norm(modeling.LlamaRMSNorm):
    scale = 1.5
    def __init__(self, *given):
        super().__init__(*given)
    def forward(self, x):
        return self.scaled(super().forward(x)) * self.factor * self.fixed(1.0)
    def scaled(self, x):
        return [moved(part) * self.scale for part in [x]][0]
    @property
    def factor(self):
        return 3.0
    @staticmethod
    def fixed(x):
        return x * 4.0
    def report(self):
        return "words"
"""
CHANGES = {
    "a global": ("SHIFT = 1.0", "SHIFT = 2.0"),
    "a function": ("x + SHIFT", "x - SHIFT"),
    "a constant of the class": ("scale = 1.5", "scale = 2.5"),
    "forward": ("* self.factor", "+ self.factor"),
    "a comprehension": ("moved(part)", "moved(moved(part))"),
    "a property": ("return 3.0", "return 3.5"),
    "a static method": ("x * 4.0", "x * 4.5"),
}


def with_class(text: str, load: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The fingerprint of a model with a layer of the class."""
    model = load(folder)
    model.model.layers[1].input_layernorm.__class__ = defined(text, monkeypatch).Norm
    found = kvzip.fingerprint(model)
    assert found == kvzip.fingerprint(model)
    return found


def test_methods_count_that_are_called(
    saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved()
    first = with_class(CLASS, load, folder, monkeypatch)
    assert with_class(CLASS, load, folder, monkeypatch) == first
    assert with_class(CLASS.replace("words", "others"), load, folder, monkeypatch) == first
    seen = {name: CLASS.replace(*change) for name, change in CHANGES.items()}
    assert all(text != CLASS for text in seen.values())
    found = {with_class(text, load, folder, monkeypatch) for text in seen.values()}
    assert len(found | {first, kvzip.fingerprint(folder)}) == len(CHANGES) + 2


def test_a_model_of_a_users_class_is_no_checkpoint(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its `__init__` does is done by a model that it is compared with, too."""
    folder = saved()
    text = """
class Mine(modeling.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].self_attn.scaling *= FACTOR
"""
    seen = {kvzip.fingerprint(folder)}
    for factor in (2.0, 3.0):
        module = defined(text, monkeypatch)
        module.FACTOR = factor
        seen.add(kvzip.fingerprint(module.Mine.from_pretrained(folder, dtype=torch.bfloat16)))
    assert len(seen) == 3


def test_a_hook_that_is_an_object(saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved()
    text = """
class Hook:
    def __call__(self, module, given, out):
        return self.changed(out)
    def changed(self, out):
        return out * 2.0
    def report(self):
        return "words"
"""
    found = []
    for change in (("", ""), ("words", "others"), ("* 2.0", "* 3.0")):
        model = load(folder)
        hook = defined(text.replace(*change), monkeypatch).Hook()
        model.model.layers[0].register_forward_hook(hook)
        found.append(kvzip.fingerprint(model))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("place", ["site-packages", "target"])
def test_classes_of_installed_packages_are_known_by_their_names(
    place: str, saved: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their code may use what nobody can read. Outside Python's own folders an installer's list of
    files says what was installed."""
    folder, found = saved(), []
    place = tmp_path / place
    place.mkdir()
    monkeypatch.syspath_prepend(place)
    for package, factor in (("kvzip_test_layers", 1), ("kvzip_test_layers_b", 2)):
        if place.name == "target":
            listed = place / f"{package}-1.dist-info"
            listed.mkdir()
            (listed / "RECORD").write_text(f"{package}-1.dist-info/RECORD,,\n{package}.py,,\n")
        (place / f"{package}.py").write_text(
            "import threading\nfrom transformers.models.llama import modeling_llama\n"
            f"LOCK = threading.Lock()\nclass Norm(modeling_llama.LlamaRMSNorm):\n"
            f"    def forward(self, x):\n        with LOCK:\n            return x * {factor}\n"
        )
        model = load(folder)
        model.model.norm.__class__ = __import__(package).Norm
        found += [kvzip.fingerprint(model) for _ in range(2)]
        del sys.modules[package]
    assert found[0] == found[1] != found[2] == found[3]


@pytest.mark.parametrize(
    ("listed", "made", "installed"),
    [
        ("kvzip_own/__init__.py,,", "kvzip_own/__init__.py", True),
        ("kvzip_own.py,sha256=x,1", "kvzip_own.py", True),
        (None, "kvzip_own/__init__.py", False),
        (None, "kvzip_own.py", False),
        ("kvzip_own_too/__init__.py,,", "kvzip_own/__init__.py", False),
        ("src/kvzip_own/__init__.py,,", "kvzip_own/__init__.py", False),
        ("kvzip_own.pyi,,", "kvzip_own.py", False),
        # An editable installation lists a pointer to the text that its owner goes on changing.
        ("__editable__.kvzip_own.pth,,", "kvzip_own/__init__.py", False),
    ],
)
def test_what_is_installed_is_what_an_installer_lists(
    listed: str | None, made: str, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvzip.identity import values

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / made).parent.mkdir(exist_ok=True)
    (tmp_path / made).write_text("")
    if listed:
        (tmp_path / "any-1.dist-info").mkdir()
        (tmp_path / "any-1.dist-info" / "RECORD").write_text(f"any/x.py,,\n{listed}\n")
    importlib.invalidate_caches()
    importlib.import_module("kvzip_own")
    try:
        assert values._is_installed.__wrapped__("kvzip_own") == installed
    finally:
        del sys.modules["kvzip_own"]


def test_a_warning_names_a_few(caplog: pytest.LogCaptureFixture) -> None:
    from kvzip.identity import live

    names = [f"a value of a test {i} (an object)" for i in range(3000)]
    live._say_unread(torch.nn.Linear(1, 1), names)
    assert "test 4 (an object) or 2,995 others has changed" in caplog.text
    assert "test 5 " not in caplog.text


REMOTE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *given, **more):
        return super().forward(*given, **more)
"""


def test_code_in_a_checkpoints_folder_is_the_checkpoints(
    saved: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "mod"))
    monkeypatch.syspath_prepend(tmp_path / "mod")
    folder = saved()
    (folder / "modeling_own.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    before = kvzip.fingerprint(model)
    assert before == kvzip.fingerprint(folder)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", defined(ATTENTION, monkeypatch).attention)
        assert kvzip.fingerprint(model) not in (before, kvzip.fingerprint(folder))
    assert kvzip.fingerprint(model) == before
    (folder / "modeling_own.py").write_text(REMOTE + "# another\n")
    assert kvzip.fingerprint(model).startswith("live:")


def run_python(code: str, environment: dict[str, str]) -> list[str]:
    """The lines that a program says in another process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip().splitlines()


def test_it_is_the_same_in_every_process(
    registries: None, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Sets have another order with each seed of the hash, and an ellipsis has no attributes."""
    folder = saved()
    (tmp_path / "kvzip_test_script.py").write_text(
        "import functools, os, torch, kvzip\n"
        "from transformers import AttentionInterface\n"
        "from transformers.models.llama import modeling_llama as modeling\n"
        "from kvzip.identity.values import ValueReader\n"
        "SDPA = AttentionInterface()['sdpa']\n"
        f"{CLASS}{ATTENTION}"
        "WORDS = {'a', 'b', 'c', 'd'}\n"
        "class Kept:\n    names = frozenset('xyz')\n"
        "    def __call__(self, module, given, out):\n"
        "        return out * 2 if 'x' in {'x', 'y', 'z', 'w'} or WORDS else out\n"
        "load = modeling.LlamaForCausalLM.from_pretrained\n"
        "model = load(os.environ['FOLDER'], dtype=torch.bfloat16)\n"
        "print(kvzip.fingerprint(model))\n"
        "model.model.layers[1].input_layernorm.__class__ = Norm\n"
        "model.model.layers[0].register_forward_hook(Kept())\n"
        "AttentionInterface.register('mine', attention)\n"
        "AttentionInterface.register('sdpa', functools.partial(attention, k=1))\n"
        "print(kvzip.fingerprint(model))\n"
        f"hook = lambda x: x[..., None] if x in { {f'name{i}' for i in range(8)} } else x\n"
        "print(ValueReader({}, lambda module: frozenset(), str).read(hook, 'hook'))\n"
        "print(list(WORDS))\n"
    )
    monkeypatch.setenv("FOLDER", str(folder))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("kvzip_test_script")  # in this process, and then in another
    del sys.modules["kvzip_test_script"]
    *here, order = capsys.readouterr().out.strip().splitlines()
    for seed in itertools.count(1):
        told = "print(list({'a', 'b', 'c', 'd'}))"
        other = {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
        if run_python(told, other)[0] != order:
            break
    *there, other_order = run_python("import kvzip_test_script", other)
    found = {tuple(here), tuple(there)}
    assert order != other_order and len(found) == 1
    [(checkpoint, live, code)] = found
    assert checkpoint == kvzip.fingerprint(folder) and live.startswith("live:") and "name7" in code
