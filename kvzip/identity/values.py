"""What a Python value says: a text that is the same for values that do the same.

It is for what models hold besides their tensors: settings, functions, hooks. Numbers, arrays,
containers, objects made of them, and functions with what they close over are read. The code of a
user's own functions and classes is read, too; those of installed packages are known by their names.
What an object of a class written in C holds is what pickle would keep of it. What cannot be read
gets another token each time, since nothing would tell that it has changed.
"""

from __future__ import annotations

import _thread
import copyreg
import enum
import functools
import hashlib
import logging
import re
import sys
import types
import uuid
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

PLAIN = frozenset({bool, int, float, str, type(None), complex, bytes})
TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""Classes of tensors that hold numbers and no more."""
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
_BY_WORD = frozenset(
    {
        "__dict__",
        "__getattribute__",
        "__import__",
        "attrgetter",
        "eval",
        "exec",
        "get_buffer",
        "get_parameter",
        "getattr",
        "globals",
        "import_module",
        "locals",
        "methodcaller",
        "modules",
        "to_dict",
        "vars",
    }
)
"""What finds something by a name that is given as a string."""
_NAME = re.compile(r"[^\W\d][\w.]*")

_STREAMS = (torch.device, torch.Stream, torch.Event)
"""Where and when something is computed, not what."""
_NAMED = (
    enum.Enum,
    torch.dtype,
    torch.Size,
    torch.layout,
    torch.memory_format,
    torch.finfo,
    torch.iinfo,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
    slice,
    types.EllipsisType,
)
"""What its own words say all of."""
_BESIDE_ITEMS: Mapping[type[Any], str] = {defaultdict: "default_factory", deque: "maxlen"}
"""What containers written in C hold besides their items; None where they hold nothing besides."""
_LOCKS: tuple[type, ...] = (_thread.LockType, type(_thread.RLock()))
with suppress(ImportError):
    from _multiprocessing import SemLock  # type: ignore[import-not-found]

    _LOCKS = (*_LOCKS, SemLock)


class ValueReader:
    """Reads values. Tensors in them are collected, not read.

    `own`: what is said elsewhere, by `id`, and the words that stand for it. `skipped`: names of
    a module's attributes that say nothing. `unread`: what could not be read, in words; where that
    is anything, what is said is said by nothing else, now or later. `used`: the names that users'
    code uses, but for that of checkpoints.
    """

    def __init__(
        self,
        own: Mapping[int, str],
        skipped: Callable[[torch.nn.Module], frozenset[str]],
        config: Callable[[Any], str],
    ):
        self.own, self.skipped, self.config = dict(own), skipped, config
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.unread: list[str] = []
        self.used: set[str] = set()
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
            return self._token(value, name)
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
            kind = type(value)
            return "tensor" if kind in TENSORS else ["tensor", self._read(kind, name)]
        if isinstance(value, _NAMED):
            return str(value)
        if isinstance(value, _STREAMS):
            return "device"
        if isinstance(value, _LOCKS):
            return "lock"
        if isinstance(value, _FUNCTIONS):
            return self._function(value, name)
        if isinstance(value, types.ModuleType):
            return self._module(value, name)
        if isinstance(value, logging.Logger):
            return ["Logger", value.name]
        if isinstance(value, weakref.ref):
            return ["ref", self._read(value(), name)]
        if isinstance(value, memoryview):
            data = hashlib.sha256(value.tobytes()).hexdigest()
            return ["memoryview", value.format, list(value.shape or ()), data]
        if isinstance(value, np.ma.MaskedArray):
            held = value.data, np.ma.getmaskarray(value), value.fill_value
            return ["masked", *(self._array(np.asarray(part), name) for part in held)]
        if isinstance(value, (np.generic, np.ndarray)):
            return self._array(np.asarray(value), name)
        if type(value).__name__.endswith("Config") and hasattr(value, "to_diff_dict"):
            return self._config(value)
        if isinstance(value, torch.ScriptObject):
            return name_of(value)  # its module's state says what it holds
        said = self._contents(value, name)
        if said is None:
            return self._token(value, name)
        return [self._read(type(value), name), said]

    def _token(self, value: object, name: str) -> str:
        """A word that nothing else has, nor the same object a moment later."""
        self.unread.append(f"{name} (a {type(value).__name__})")
        return uuid.uuid4().hex

    def _contents(self, value: object, name: str) -> object:
        said: list[object] = []
        if isinstance(value, Mapping):
            said.append(sorted(repr(e) for e in self._items(value, name)))
        elif isinstance(value, (list, tuple, deque)):
            said.append([self._read(e, f"{name}.{i}") for i, e in enumerate(list(value))])
        elif isinstance(value, (set, frozenset)):
            said.append(sorted(repr(self._read(inner, name)) for inner in list(value)))
        elif isinstance(value, (bool, int, float, complex, str, bytes, bytearray)):
            said.append(str(value))
        elif not all(map(_keeps_attributes_only, type(value).__mro__)):
            return self._kept_by_pickle(value, name)
        for kind, own in _BESIDE_ITEMS.items():
            if isinstance(value, kind) and (beside := getattr(value, own)) is not None:
                said.append(self._read(beside, f"{name}.{own}"))
        held = attributes(value)
        if isinstance(value, torch.nn.Module):
            skipped = self.skipped(value)
            held = {key: inner for key, inner in held.items() if key not in skipped}
        said += [repr(e) for e in self._items(held, name)]
        return said

    def _kept_by_pickle(self, value: object, name: str) -> object:
        """What an object of a class written in C is made anew from; None if it cannot be."""
        try:
            registered = copyreg.dispatch_table.get(type(value))
            parts = value.__reduce_ex__(4) if registered is None else registered(value)
        except Exception:  # whatever its class raises
            return None
        if isinstance(parts, str):
            return parts
        return [
            self._read(list(part) if isinstance(part, Iterator) else part, name) for part in parts
        ]

    def _items(self, items: Mapping[Any, object], name: str) -> Iterator[tuple[object, object]]:
        for key, inner in list(items.items()):  # which another thread may change meanwhile
            yield self._read(key, name), self._read(inner, f"{name}.{key}")

    def _module(
        self,
        module: types.ModuleType,
        name: str,
        named: Iterable[str] | None = None,
        within: tuple[types.ModuleType, ...] = (),
    ) -> object:
        """What a module says: its name, and those of its attributes that some code has the names
        of; all but code, where it is not known which. An installed package says only its numbers
        and strings."""
        users, there = is_users_module(module.__name__), vars(module).copy()
        said: list[object] = ["module", module.__name__]
        if named is None:
            code = (types.ModuleType, *_FUNCTIONS)
            named = [key for key in there if users and not isinstance(there[key], code)]
        for key in sorted(set(named) & there.keys()):
            inner = there[key]
            if key[:2] == "__" or module in within:
                continue
            if isinstance(inner, types.ModuleType):
                part = self._module(inner, f"{name}.{key}", named, (*within, module))
                said.append([key, part])
            elif users or type(inner) in PLAIN:
                said.append([key, self._read(inner, f"{name}.{key}")])
        return said

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
        value = uncompiled(value)
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
        code = value.__code__  # whose name is its own
        called = f"{written_in(value)}.{getattr(code, 'co_qualname', code.co_name)}"
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
        noted = {key: inner for key, inner in vars(value).items() if key != "__dynamo_disable"}
        brought = [value.__defaults__, value.__kwdefaults__, noted]
        said = [self._read(b, f"{name}.default") for b in brought if b]
        names = list(_names(value.__code__))
        free = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        for variable, cell in free:
            try:
                inner = cell.cell_contents
            except ValueError:  # nothing is in it yet
                said.append([variable])
                continue
            said.append([variable, self._used(inner, f"{name}.{variable}", names)])
        if is_users(value):
            if not written_in(value).startswith("transformers_modules."):
                self.used.update(names)
            said += self._code(value.__code__, value.__globals__, name, names)
        return said

    def _used(self, value: object, name: str, names: Iterable[str]) -> object:
        """What a variable says of which some code uses attributes of these names."""
        if isinstance(value, types.ModuleType):
            return self._module(value, name, names)
        return self._read(value, name)

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

    def _code(
        self, code: types.CodeType, world: dict[str, object], name: str, names: Iterable[str]
    ) -> list[object]:
        """What code says, with the variables of its module, `world`, that it uses; `names`: all
        that it and what it is part of use."""
        said: list[object] = [code.co_code.hex(), list(code.co_names)]
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                said.append(self._code(constant, world, name, names))
            else:
                said.append(self._read(constant, name))  # sets have no order of their own
        for used in dict.fromkeys((*code.co_names, *_words(code))):
            if used in world:
                said.append([used, self._used(world[used], f"{name}.{used}", names)])
            elif used in sys.modules:  # it may import that
                said.append([used, self._module(sys.modules[used], f"{name}.{used}", names)])
        return said


def is_users(thing: Any) -> bool:
    """Whether a function or a class is a user's own: of a script, a notebook, or a file that no
    package was installed with."""
    return is_users_module(written_in(thing))


def is_users_module(module: str) -> bool:
    """Whether a module of that name is a user's own."""
    return not (is_librarys(module) or _is_installed(module.partition(".")[0]))


def is_librarys(module: str) -> bool:
    """Whether a module is of one of the libraries that models are made with."""
    return f"{module}.".startswith(LIBRARIES)


def written_in(thing: Any) -> str:
    """The name of the module whose text a function or a class stands in, whatever it says of
    itself: a function that wraps another one says what that one does. What was compiled from
    another text into an installed module is in none of that name."""
    if isinstance(thing, types.MethodType):
        thing = thing.__func__
    if isinstance(thing, types.FunctionType):
        home = thing.__globals__
        module = str(home.get("__name__", ""))
        file = thing.__code__.co_filename
        own = file == home.get("__file__") or file.startswith("<frozen ")
        return module if own or is_users_module(module) else f"made.{module}"
    if isinstance(thing, (type, types.BuiltinFunctionType)):
        return str(thing.__module__)
    return type(thing).__module__


@functools.cache
def _is_installed(package: str) -> bool:
    """Whether a package is Python's own, or was installed: by the folder that it lies in, or where
    that is any other (`pip install --target`, a layer of a container, an unpacked archive) by the
    list of files that an installer leaves beside it."""
    if package in sys.stdlib_module_names:
        return True
    module = sys.modules.get(package)
    file, folders = getattr(module, "__file__", None), getattr(module, "__path__", ())
    places = [Path(place) for place in (file, *folders) if place]
    if any({"site-packages", "dist-packages"} & set(place.parts) for place in places):
        return True
    return any(_is_listed(Path(folder).parent, f"{package}/") for folder in folders) or bool(
        file and not folders and _is_listed(Path(file).parent, f"{Path(file).name},")
    )


def _is_listed(folder: Path, begins: str) -> bool:
    """Whether a distribution that was installed into a folder has a file that begins so."""
    for record in folder.glob("*.dist-info/RECORD"):
        try:
            text = record.read_text(errors="replace")
        except OSError:
            continue
        if f"\n{begins}" in f"\n{text}":
            return True
    return False


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
    """All names that code uses: globals and attributes, and those in its words that it may look
    something up by."""
    yield from code.co_names
    yield from _words(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _words(code: types.CodeType) -> Iterator[str]:
    """The names in code's strings, where it uses what takes names as strings."""
    if not _BY_WORD.isdisjoint(code.co_names):
        for text in _strings(code.co_consts):
            for name in _NAME.findall(text):
                yield name
                yield from name.split(".") if "." in name else ()


def _strings(constants: Iterable[object]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from _strings(constant)


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


def uncompiled(value: Any) -> Any:
    """What `torch.compile` was given. (A function that wraps what it made says that of itself, too,
    as it says all else that what it wraps does.)"""
    while isinstance(value, types.FunctionType) and written_in(value).startswith("torch."):
        inner = vars(value).get("_torchdynamo_orig_callable")
        if inner is None:
            break
        value = inner
    return value


def is_whole(value: Any, packages: tuple[str, ...]) -> bool:
    """Whether a function is of these packages with all functions that it wraps, closes over or is
    bound to, whatever it says of itself."""
    asked, seen = [value], set[int]()
    while asked:
        value = asked.pop()
        if id(value) in seen or type(value) in PLAIN or isinstance(value, torch.Tensor):
            continue
        seen.add(id(value))
        if isinstance(value, functools.partial):
            asked += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            asked += [value.__func__, value.__self__]
        elif isinstance(value, (list, tuple)):
            asked += value
        elif not f"{written_in(value)}.".startswith(packages):
            return False
        elif isinstance(value, types.FunctionType):
            asked += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            asked += [*vars(value).values(), *map(_held_in, value.__closure__ or ())]
    return True


def _held_in(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


def name_of(thing: object) -> str:
    """The module and the name of a class or function, or of an object's class."""
    own = getattr(thing, "__qualname__", None) or type(thing).__qualname__
    return f"{getattr(thing, '__module__', None) or type(thing).__module__}.{own}"
