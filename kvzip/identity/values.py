"""What a Python value says: a text that is the same for values that do the same.

It is for what models hold besides their tensors: settings, functions, hooks. Numbers, arrays,
containers, objects made of them, and functions with what they close over are read. Of a user's own
functions and classes the code is read, too; those of installed packages are known by their names.
What cannot be read gets a token of its own, for each object and process: it is equal to nothing
else.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import sys
import types
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

PLAIN = frozenset({bool, int, float, str, type(None), complex, bytes})
LIBRARIES = ("torch.", "transformers.", "accelerate.", "kvzip.")
"""Packages whose code is known by its names, wherever they lie; the versions are those that are
installed."""
_MOST = 20_000
"""Values that are read within one; what holds more cannot be read."""
_IMMUTABLE_TYPE, _HEAP_TYPE = 1 << 8, 1 << 9
"""Flags of a class: classes written in Python have the second and not the first."""
_FUNCTIONS = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
    functools._lru_cache_wrapper,
)
_SLOTS = (types.GetSetDescriptorType, types.MemberDescriptorType)
_BOOKKEEPING = frozenset({"__init__", "__repr__", "__str__", "__eq__", "__hash__", "__replace__"})
"""Methods that an object's attributes have felt already, or that change nothing."""

_tokens: dict[int, tuple[weakref.ref[object], str]] = {}


class ValueReader:
    """Reads values. Tensors in them are collected, not read.

    `own`: what is said elsewhere, by `id`, and the words that stand for it. `skipped`: names of
    attributes that say nothing.
    """

    def __init__(
        self, own: Mapping[int, str], skipped: frozenset[str], config: Callable[[Any], str]
    ):
        self.own, self.skipped, self.config = dict(own), skipped, config
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self._within: set[int] = set()
        self._kept: list[object] = []  # so that no id is used again
        self._left = _MOST
        self._said: dict[int, int] = {}
        """Functions and classes that were read, by `id`: which they are in their order."""

    def read(self, value: object, name: str) -> object:
        """What a value says; `name`: how the tensors in it are called."""
        self._left, self._said = _MOST, {}
        return self._read(value, name)

    def read_class(self, kind: type, name: str, begin: Iterable[str]) -> list[object]:
        """What a class does besides what its name says: what is in it that is a user's (the class
        itself, or what was put into it), as far as methods named `begin` reach it."""
        self._left, self._said = _MOST, {}
        return self._class(kind, name, begin)

    def _read(self, value: object, name: str) -> object:
        if type(value) in PLAIN:
            return value
        if id(value) in self.own:
            return self.own[id(value)]
        self._left -= 1
        if self._left < 0:
            return token(value)
        if id(value) in self._within:
            return "itself"
        self._within.add(id(value))
        try:
            return self._read_more(value, name)
        finally:
            self._within.discard(id(value))

    def _read_more(self, value: object, name: str) -> object:
        if isinstance(value, torch.Tensor):
            self.tensors.append((name, value))
            return "tensor"
        if isinstance(value, (enum.Enum, torch.dtype, torch.Size, slice, types.EllipsisType)):
            return str(value)
        if isinstance(value, torch.device):
            return "device"
        if isinstance(value, _FUNCTIONS):
            return self._function(value, name)
        if isinstance(value, (types.ModuleType, logging.Logger)):
            return [type(value).__name__, getattr(value, "__name__", None) or value.name]
        if isinstance(value, (np.generic, np.ndarray)):
            return self._array(np.asarray(value), name)
        if type(value).__name__.endswith("Config") and hasattr(value, "to_diff_dict"):
            return self._config(value)
        if isinstance(value, torch.ScriptObject):
            return name_of(value)  # its module's state says what it holds
        said = self._contents(value, name)
        if said is None:
            return token(value)
        return [self._read(type(value), name), said]

    def _contents(self, value: object, name: str) -> object:
        said: list[object] = []
        if isinstance(value, Mapping):
            said.append(sorted(repr(e) for e in self._items(value, name)))
        elif isinstance(value, (list, tuple, deque)):
            said.append([self._read(inner, f"{name}.{i}") for i, inner in enumerate(value)])
        elif isinstance(value, (set, frozenset)):
            said.append(sorted(repr(self._read(inner, name)) for inner in value))
        elif isinstance(value, (bool, int, float, complex, str, bytes, bytearray)):
            said.append(str(value))
        elif not all(map(_keeps_attributes_only, type(value).__mro__)):
            return None
        said += [repr(e) for e in self._items(attributes(value), name)]
        return said

    def _items(self, items: Mapping[Any, object], name: str) -> Iterator[tuple[object, object]]:
        for key, inner in items.items():
            if key not in self.skipped:
                yield self._read(key, name), self._read(inner, f"{name}.{key}")

    def _array(self, array: np.ndarray, name: str) -> object:
        if array.dtype.hasobject:
            return [list(array.shape), self._read(array.tolist(), name)]
        data = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return [str(array.dtype), list(array.shape), data]

    def _config(self, value: object) -> str:
        said: str = self.config(value)
        self.own[id(value)] = said
        self._kept.append(value)
        return said

    def _function(self, value: object, name: str) -> object:
        """A function's name, its code, and all that it brings along."""
        while (inner := getattr(value, "_torchdynamo_orig_callable", None)) is not None:
            value = inner  # what was compiled
        if isinstance(value, functools._lru_cache_wrapper):
            value = value.__wrapped__
        called = name_of(value)
        if isinstance(value, type):
            return [called, self._once(value, name)] if is_users(value) else called
        if isinstance(value, functools.partial):
            parts: list[object] = [value.func, value.args, value.keywords]
            return ["partial", *(self._read(p, name) for p in parts)]
        if isinstance(value, types.MethodType):
            return [self._read(value.__self__, name), self._read(value.__func__, name)]
        if isinstance(value, types.BuiltinFunctionType):
            of = value.__self__
            told = of is None or isinstance(of, (type, types.ModuleType))
            return called if told else [called, self._read(of, name)]
        assert isinstance(value, types.FunctionType)
        return [called, self._once(value, name)]

    def _once(self, value: Any, name: str) -> object:
        """What a function or a class says; where that was said before, which it was."""
        if id(value) in self._said:
            return self._said[id(value)]
        self._said[id(value)] = len(self._said)
        self._kept.append(value)
        if isinstance(value, type):
            begin = _methods(value)
            return self._class(value, name, ["__call__"] if "__call__" in begin else begin)
        brought = [value.__defaults__, value.__kwdefaults__, vars(value)]
        said = [self._read(b, f"{name}.default") for b in brought if b]
        free = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        for variable, cell in free:
            try:
                said.append([variable, self._read(cell.cell_contents, f"{name}.{variable}")])
            except ValueError:  # nothing is in it yet
                said.append([variable])
        if is_users(value):
            said += self._code(value.__code__, value.__globals__, name)
        return said

    def _class(self, kind: type, name: str, begin: Iterable[str]) -> list[object]:
        for each in kind.__mro__:  # what `super()` looks at in each method
            self._said.setdefault(id(each), len(self._said))
        there = _part_of_users(kind)
        put = sorted(set().union(*map(put_into, kind.__mro__)))
        asked, seen, said = deque([*begin, *put]), set[str](), list[object]()
        while asked:
            attribute = asked.popleft()
            if attribute in seen:
                continue
            seen.add(attribute)
            for value in there.get(attribute, ()):
                said.append([attribute, self._read(value, f"{name}.{attribute}")])
                for function in layers_of(value):
                    asked.extend(_names(function.__code__))
        return said

    def _code(self, code: types.CodeType, world: dict[str, object], name: str) -> list[object]:
        said: list[object] = [code.co_code.hex(), list(code.co_names)]
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                said.append(self._code(constant, world, name))
            else:
                said.append(self._read(constant, name))  # sets have no order of their own
        for used in code.co_names:
            if used in world:
                said.append([used, self._read(world[used], f"{name}.{used}")])
        return said


def is_users(thing: Any) -> bool:
    """Whether a function or a class is a user's own: of a script, a notebook, or a file that no
    package was installed with."""
    module = written_in(thing)
    return not (is_librarys(module) or _is_installed(module.partition(".")[0]))


def is_librarys(module: str) -> bool:
    """Whether a module is of one of the libraries that models are made with."""
    return f"{module}.".startswith(LIBRARIES)


def written_in(thing: Any) -> str:
    """The name of the module whose text a function or a class stands in, whatever it says of
    itself: a function that wraps another one says what that one does."""
    if isinstance(thing, types.MethodType):
        thing = thing.__func__
    if isinstance(thing, types.FunctionType):
        return str(thing.__globals__.get("__name__", ""))
    return str(getattr(thing, "__module__", None) or type(thing).__module__)


@functools.cache
def _is_installed(package: str) -> bool:
    """Whether a package is Python's own, or was installed; by the folder that it lies in."""
    if package in sys.stdlib_module_names:
        return True
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(
        {"site-packages", "dist-packages"} & set(Path(place).parts) for place in places if place
    )


def put_into(kind: type) -> set[str]:
    """Methods of a class itself that stand in the text of another package: somebody put them in."""
    home = getattr(sys.modules.get(kind.__module__), "__dict__", None)
    package = kind.__module__.partition(".")[0]
    found = set()
    for name, value in vars(kind).items():
        if isinstance(value, types.FunctionType) and value.__globals__ is home:
            continue  # nearly all are
        for function in layers_of(value):
            module = written_in(function)
            theirs = module.partition(".")[0]
            known = theirs == package or is_librarys(module)
            if not known and theirs not in sys.stdlib_module_names:
                found.add(name)
    return found


def _part_of_users(kind: type) -> dict[str, list[object]]:
    """What is in a class and in those that it is made of, by name, where the class is a user's; and
    what was put into others."""
    found: dict[str, list[object]] = {}
    for each in kind.__mro__:
        names = vars(each) if is_users(each) else put_into(each)
        for name in names:
            value = _plain(vars(each)[name])
            if not isinstance(value, _SLOTS):
                found.setdefault(name, []).append(value)
    return found


def _methods(kind: type) -> list[str]:
    """What is a user's in a class and may change what its objects do."""
    return [
        name
        for name, values in _part_of_users(kind).items()
        if name not in _BOOKKEEPING
        and any(layers_of(v) or (type(v) in PLAIN and name[:2] != "__") for v in values)
    ]


def _plain(value: Any) -> object:
    """The function that a method was made of."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    return value.func if isinstance(value, functools.cached_property) else value


def layers_of(value: Any) -> list[types.FunctionType]:
    """A method's function, and those that it wraps."""
    found, value = [], _plain(value)
    while isinstance(value, (types.FunctionType, functools._lru_cache_wrapper)):
        if value in found:
            break
        if isinstance(value, types.FunctionType):
            found.append(value)
        value = getattr(value, "__wrapped__", None)
    return found


def _names(code: types.CodeType) -> Iterator[str]:
    """All names that code uses: globals and attributes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def attributes(value: object) -> dict[str, object]:
    """An object's attributes, those in slots, too."""
    found = dict(getattr(value, "__dict__", {}))
    for each in type(value).__mro__:
        slots = vars(each).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                found[slot] = getattr(value, slot)
    return found


def _keeps_attributes_only(kind: type) -> bool:
    """Whether the objects of a class hold nothing but attributes: unlike those written in C."""
    if kind in (object, types.SimpleNamespace):
        return True
    if kind.__flags__ & (_IMMUTABLE_TYPE | _HEAP_TYPE) != _HEAP_TYPE:
        return False
    return kind.__dictoffset__ != 0 or "__slots__" in vars(kind)


def token(value: object) -> str:
    """A word that no other object has, nor another process; another one each time for an object of
    which it cannot be told whether it is the same."""
    kept = _tokens.get(id(value))
    if kept is not None and kept[0]() is value:
        return kept[1]
    found = uuid.uuid4().hex
    with suppress(TypeError):  # of some objects there are no weak references
        _tokens[id(value)] = weakref.ref(value), found
    return found


def name_of(thing: object) -> str:
    """The module and the name of a class or function, or of an object's class."""
    own = getattr(thing, "__qualname__", None) or type(thing).__qualname__
    return f"{getattr(thing, '__module__', None) or type(thing).__module__}.{own}"
