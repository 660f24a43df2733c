"""Whether the libraries that a model computes with still are what was imported.

A library's code is known by its version alone, so its modules must hold what their files say. Each
of their functions is compared with the code that Python compiled of the module's file, so whatever
was put in its place is found: a user's function, or another one of the library's own. What a file
does not define (a function of torch's that is written in C, a function's default values) is
compared with what was there when the module was first examined.
"""

from __future__ import annotations

import functools
import operator
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvzip.identity.values import (
    PLAIN,
    is_librarys,
    is_users,
    is_users_module,
    layers_of,
    written_in,
)

_ALWAYS = (
    "torch._C._nn",
    "torch._tensor",
    "torch.nn.functional",
    "transformers.activations",
    "transformers.cache_utils",
    "transformers.integrations.moe",
    "transformers.integrations.sdpa_attention",
    "transformers.masking_utils",
    "transformers.modeling_rope_utils",
)
"""Modules that compute for all models, where they are imported."""
_OF_MODELS = "transformers.models."
_SETTINGS = ("transformers.models.auto.", "transformers.utils.")
"""Modules that models import from and that compute nothing."""
_OPTIMIZED = 1
"""Flag of a code object: of a function, and not of a class's body."""
_says = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_CALLED = (types.BuiltinFunctionType, types.MethodType, functools.partial, type)

_Defined = Mapping[str, Mapping[str, list[types.CodeType]]]
"""By the name of a class ("" for none) and by their own: the functions that a file defines."""


class _Namespace:
    """A module or a class, and what it holds."""

    def __init__(self, home: Any, defined: Mapping[str, list[types.CodeType]], file: _Module):
        self.name = home.__qualname__ if isinstance(home, type) else ""
        self._home, self._defined, self._file = home, defined, file
        self._first: dict[str, tuple[object, list[object]]] = {}
        """What was under each name when it was first seen, if the file allows that."""
        self.examine()

    def has_changed(self) -> bool:
        values = vars(self._home).values()
        return (
            len(values) != len(self._values)
            or not all(map(operator.is_, values, self._values))
            or list(map(_says, self._functions)) != self._said
        )

    def examine(self) -> None:
        held = dict(vars(self._home))
        self._values = list(held.values())
        self._functions = [layer for value in self._values for layer in layers_of(value)]
        self._said = list(map(_says, self._functions))
        self.strange: dict[str, object] = {}
        """What is under names that should hold something else."""
        for name, put in held.items():
            if type(put) in PLAIN:
                continue
            value = _untagged(put)
            layers = layers_of(value)
            if not self._is_generated(name) and self._is_strange(name, value, layers):
                self.strange[name] = value
            elif layers or isinstance(value, _CALLED):
                now: tuple[object, list[object]] = value, list(map(_says, layers))
                first = self._first.setdefault(name, now)
                if (first[0] is not value or first[1] != now[1]) and not _wraps(layers, first[1]):
                    self.strange[name] = value
        self.strange |= dict.fromkeys(self._first.keys() - held.keys())

    def _is_generated(self, name: str) -> bool:
        """Whether a method is one that Python writes for a data class or a named tuple."""
        return (
            name[:2] == "__"
            and not {"__dataclass_fields__", "_fields"}.isdisjoint(vars(self._home))
            and (name not in self._defined)
        )

    def _is_strange(self, name: str, value: Any, layers: list[types.FunctionType]) -> bool:
        if _is_of_user(value, layers):
            return True
        codes = self._defined.get(name)
        if codes is None:
            return bool(layers) and not self.name and not self._may_be_called(name, layers)
        if not layers:  # a decorator may have made it something else, but not one of these
            return isinstance(value, (types.BuiltinFunctionType, functools.partial))
        return not any(layer.__code__ in codes or _is_made(layer) for layer in layers)

    def _may_be_called(self, name: str, layers: list[types.FunctionType]) -> bool:
        """Whether a module may have a function under that name that it does not define."""
        if any(layer.__name__ == name or _is_made(layer) for layer in layers):
            return True
        name, function = re.escape(name), re.escape(layers[0].__name__)
        renamed = rf"\b{function}\s+as\s+{name}\b|^\s*{name}\b[^=\n]*="
        text = self._file.text
        return not text or re.search(renamed, text, re.MULTILINE) is not None


class _Module:
    """A library's module with the classes that it defines."""

    def __init__(self, module: types.ModuleType):
        self._module, self._defined = module, _defined_in(module)
        self._spaces: dict[int, _Namespace] = {}
        self._look()

    @functools.cached_property
    def text(self) -> str:
        """What its file says; "" where there is none. Few modules are asked, and to read all takes
        longer than to examine them."""
        try:
            return _loader_of(self._module).get_source(self._module.__name__) or ""
        except (AttributeError, ImportError, OSError, SyntaxError):
            return ""

    def refresh(self) -> None:
        changed = [space for space in self._spaces.values() if space.has_changed()]
        for space in changed:
            space.examine()
        if self._spaces[id(self._module)] in changed:
            self._look()

    def _look(self) -> None:
        """Find the classes, and the modules that it imports from."""
        self.imports: set[str] = set()
        homes: list[Any] = [self._module]
        for value in list(vars(self._module).values()):
            if isinstance(value, types.ModuleType):
                self.imports.add(value.__name__)
            elif type(value) not in PLAIN:
                code = isinstance(value, (type, types.FunctionType))
                self.imports.add(str((value if code else type(value)).__module__))
            if isinstance(value, type) and self._defines(value):
                homes.append(value)
        for home in homes:
            if id(home) not in self._spaces:
                place = home.__qualname__ if isinstance(home, type) else ""
                space = _Namespace(home, self._defined.get(place, {}), self)
                self._spaces[id(home)] = space

    def _defines(self, kind: type) -> bool:
        """Whether a class is the module's, and not another module's of the same name, as torch's
        two `CrossMapLRN2d` are."""
        if kind.__qualname__ not in self._defined:
            return False
        other = sys.modules.get(kind.__module__)
        if other is None or other is self._module:
            return True
        return kind.__qualname__ not in _defined_in(other)

    def strange(self) -> Iterator[tuple[str, object]]:
        for space in self._spaces.values():
            for name, value in space.strange.items():
                yield ".".join(filter(None, (self._module.__name__, space.name, name))), value


_examined: dict[types.ModuleType, _Module] = {}


def replaced(homes: Iterable[str]) -> list[tuple[str, object]]:
    """What libraries' modules of these names, and those that models' own import from, hold in
    place of their own: where it was put, and what it is (None where a name is gone)."""
    found = _examine({*homes, *_ALWAYS})
    models = (module.imports for name, module in found.items() if name.startswith(_OF_MODELS))
    imported = {name for name in set().union(*models) if not name.startswith(_SETTINGS)}
    found |= _examine(imported - found.keys())
    return sorted((put for each in found.values() for put in each.strange()), key=lambda f: f[0])


def _examine(names: Iterable[str]) -> dict[str, _Module]:
    found = {}
    for name in names:
        module = sys.modules.get(name)
        if isinstance(module, types.ModuleType) and is_librarys(name):
            known = _examined.get(module)
            if known is None:
                known = _examined[module] = _Module(module)
            else:
                known.refresh()
            found[name] = known
    return found


def _loader_of(module: types.ModuleType) -> Any:
    return getattr(module.__spec__, "loader", None)


def _defined_in(module: types.ModuleType) -> _Defined:
    """The functions that a module's file defines; nothing where there is no file."""
    try:
        code = _loader_of(module).get_code(module.__name__)
    except (AttributeError, ImportError, OSError, SyntaxError):
        return {}
    found: dict[str, dict[str, list[types.CodeType]]] = {}
    asked: list[tuple[str, types.CodeType]] = [] if code is None else [("", code)]
    while asked:
        place, code = asked.pop()
        for inner in code.co_consts:
            if not isinstance(inner, types.CodeType) or inner.co_name[0] == "<":
                continue
            if inner.co_flags & _OPTIMIZED:
                found.setdefault(place, {}).setdefault(inner.co_name, []).append(inner)
            else:
                asked.append((".".join(filter(None, (place, inner.co_name))), inner))
    return found


def _is_of_user(value: Any, layers: list[types.FunctionType]) -> bool:
    if layers:
        return any(map(is_users, layers))
    if isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
        return any(_is_of_user(each, layers_of(each)) for each in inner)
    if isinstance(value, types.MethodType):
        return is_users(value)
    if isinstance(value, types.ModuleType):
        return is_users_module(value.__name__)
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__ in sys.modules and is_users(kind)  # C's may name a module there is not


def _wraps(layers: list[types.FunctionType], own: list[object]) -> bool:
    """Whether libraries' functions stand around what was there, as kvzip's around `generate`."""
    inner = list(map(_says, layers[-len(own) :])) if own else None
    return inner == own and all(is_librarys(written_in(layer)) for layer in layers)


def _untagged(value: Any) -> Any:
    """The method of `torch.nn.Module` that the first `torch.compile` of a process puts one of its
    own around, which marks modules; else the value itself."""
    home = "torch._dynamo.mutation_guard"
    if not isinstance(value, types.FunctionType) or value.__module__ != home:
        return value
    made = _makers(sys.modules[home]) if home in sys.modules else []
    inner = [cell.cell_contents for cell in value.__closure__ or ()]
    own = value.__code__ in made and not value.__defaults__ and not value.__kwdefaults__
    return inner[0] if own and len(inner) == 1 else value


@functools.cache
def _makers(module: types.ModuleType) -> list[types.CodeType]:
    """The code of the functions that `torch._dynamo` makes to mark modules, as its file says."""
    makers = _defined_in(module).get("", {}).get("install_generation_tagging_init", [])
    inner = (constant for maker in makers for constant in maker.co_consts)
    return [code for code in inner if isinstance(code, types.CodeType)]


def _is_made(function: types.FunctionType) -> bool:
    """Whether a function was made by another one, as decorators do, or is Python's own."""
    name = getattr(function.__code__, "co_qualname", function.__qualname__)
    return "<" in name or written_in(function).partition(".")[0] in sys.stdlib_module_names
