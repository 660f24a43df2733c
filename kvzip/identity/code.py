"""Which of a user's own code a model computes with: of its classes, and of what libraries look up.

Two ways lead past a module's class name and attributes: a class that is not of an installed
package, whose methods may be anything, and functions that somebody put where a library looks for
its own, into a class, into a module or into one of transformers' registries.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from kvzip.identity.imported import replaced
from kvzip.identity.values import (
    ValueReader,
    is_librarys,
    is_users,
    layers_of,
    name_of,
    put_into,
    written_in,
)

_CALLED = (
    "__call__",
    "__getattr__",
    "__getattribute__",
    "forward",
    "prepare_inputs_for_generation",
)
"""What is called of a module from without."""
_REGISTRIES = (
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", "_attn_implementation"),
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS", "_attn_implementation"),
    ("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS", "_experts_implementation"),
)
"""Where transformers looks functions up: a module, its registry, and which setting names one."""


class Code(NamedTuple):
    """Code that is not a library's."""

    module: str
    """Whose text it stands in; "" where it was put where a library looks for its own."""
    said: str

    def is_of(self, folder: Path) -> bool:
        """Whether it is a checkpoint's own, a file of its folder that transformers has loaded."""
        if not self.module.startswith("transformers_modules."):
            return False
        used = Path(getattr(sys.modules.get(self.module), "__file__", None) or "")
        there = folder / used.name
        return used.is_file() and there.is_file() and used.read_bytes() == there.read_bytes()


def code_of(model: torch.nn.Module, reader: ValueReader) -> list[Code]:
    """All such code that a model computes with."""
    kinds: dict[type, str] = {}
    for path, module in model.named_modules():
        kinds.setdefault(type(module), path)
    return [*_of_classes(kinds, reader), *_put_elsewhere(model, kinds, reader)]


def _of_classes(kinds: Mapping[type, str], reader: ValueReader) -> Iterator[Code]:
    changed = {each: bool(put_into(each)) for each in {e for kind in kinds for e in kind.__mro__}}
    for kind, path in kinds.items():
        put = any(changed[each] for each in kind.__mro__)
        if put or any(map(is_users, kind.__mro__)):
            said = reader.read_class(kind, path, _CALLED)
            yield Code("" if put else kind.__module__, f"{name_of(kind)} {said!r}")


def autocasts(model: torch.nn.Module) -> Iterator[str]:
    """What torch casts to by itself where the model's parameters lie, in the code under way."""
    for device in sorted({each.device.type for each in model.parameters()}):
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            yield f"autocast on {device} to {torch.get_autocast_dtype(device)}"


def _put_elsewhere(
    model: torch.nn.Module, kinds: Mapping[type, str], reader: ValueReader
) -> Iterator[Code]:
    """What was put into libraries' modules, what torch asks before each of its functions, and
    functions that are registered under the names in a model's configuration."""
    for where, value in replaced({each.__module__ for kind in kinds for each in kind.__mro__}):
        yield Code("", f"{where} {reader.read(value, where)!r}")
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        if not is_librarys(type(mode).__module__):
            yield Code("", f"mode {reader.read(mode, 'mode')!r}")
    for told in autocasts(model):
        yield Code("", told)
    for when in ("pre_hooks", "hooks"):  # on all modules of all models
        hooks = getattr(torch.nn.modules.module, f"_global_forward_{when}")
        for i, hook in enumerate(list(hooks.values())):
            yield Code("", f"{when} {reader.read(hook, f'{when}.{i}')!r}")
    found = {}
    for module in model.modules():
        config = vars(module).get("config")
        for where, registry, setting in _REGISTRIES:
            chosen = getattr(config, setting, None)
            for place in (where, type(module).__module__):
                known = getattr(sys.modules.get(place), registry, {})
                named = isinstance(chosen, str) and isinstance(known, Mapping)
                function = known.get(chosen) if named else None
                if function is not None and not _is_librarys(function):
                    found[registry, id(function)] = function
    for (registry, _), function in sorted(found.items(), key=lambda pair: pair[0][0]):
        yield Code("", f"{registry} {reader.read(function, registry)!r}")


def _is_librarys(function: Any) -> bool:
    """Whether a function is a library's for all models (a model's own may be for no other), with no
    arguments of a user's."""
    of_kernel = {"implementation"}  # which transformers gives to a kernel that was downloaded
    if isinstance(function, functools.partial) and function.keywords.keys() <= of_kernel:
        return not function.args and _is_librarys(function.func)
    homes = [written_in(layer) for layer in layers_of(function) or [function]]
    return all(is_librarys(home) and not home.startswith("transformers.models.") for home in homes)
