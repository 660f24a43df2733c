"""What a model is besides its tensors: its modules with their settings, what hangs on them, and
its configuration."""

from __future__ import annotations

import builtins
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvzip.identity.code import Code, code_of
from kvzip.identity.values import (
    TENSORS,
    ValueReader,
    attributes,
    is_librarys,
    is_whole,
    name_of,
    put_into,
    uncompiled,
    written_in,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Attributes of modules that libraries set, and that change nothing of what they compute, or only
# how it is rounded: where weights came from, how they were split and compiled, how `generate` made
# a cache, how a model is trained and moved. What stands in for a module's own methods is not told
# by its name, see `_adds_nothing`.
_IDLE = frozenset(
    {
        "_cache",
        "_dynamo_static_input_type",
        "_ep_plan",
        "_fsdp_plan",
        "_gradient_checkpointing_func",
        "_is_accelerate_prepared",
        "_is_hf_initialized",
        "_is_torch_compile",
        "_last_compile_config",
        "_name_or_path",
        "_output_capturing_hooks_installed",
        "_pp_plan",
        "_previous_max_cache_length",
        "_require_grads_hook",
        "_require_grads_hooks",
        "_tp_plan",
        "_use_kernels",
        "_weight_conversions",
        "base_model_name_or_path",
        "dump_patches",
        "generation_config",
        "gradient_checkpointing",
        "hf_device_map",
        "hf_quantizer",
        "model_tags",
        "name_or_path",
        "training",
        "warnings_issued",
    }
)
_OF_TORCH = frozenset(vars(torch.nn.Module()))
_ALL_NAMES = frozenset({"__dict__", "__getstate__", "dir", "getmembers", "to_dict", "vars"})
"""What gives code all attributes of a thing, whatever they are called."""
_MOVES = frozenset({"cuda", "mlu", "musa", "neuron", "npu", "sdaa", "to", "xpu"})
"""Methods that move a model, which accelerate replaces by ones that warn."""
_PASSED_OVER = ("kvzip.", "transformers.")
"""Packages whose hooks look on, or change what is trained."""
_PLACING = ("AlignDevicesHook", "CpuOffload", "ModelHook")
"""Hooks of accelerate that move weights and what comes in, and compute nothing."""
# Settings of a config that say where it comes from, how numbers are rounded (the dtype is every
# tensor's own), or what is done with the outputs.
_NOISE = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class Hung(NamedTuple):
    """What a model's modules are, and what hangs on them."""

    lines: list[str]
    tensors: list[tuple[str, torch.Tensor]]
    code: list[Code]
    unread: list[str]
    """What nothing tells the numbers of, in words."""


def structure_of(model: torch.nn.Module) -> list[str]:
    """A line for each module: its class, its settings, and what was hung on it."""
    return hung_on(model).lines


def hung_on(model: torch.nn.Module) -> Hung:
    """The structure of a model, the tensors that are in it but that no module registered, and the
    code that is a user's."""
    own = {id(module): f"the module {path}" for path, module in model.named_modules()}
    for config in _configs_of(model):
        own[id(config)] = "the configuration"
    reader = ValueReader(own, _idle_of, settings_of_config)
    lines, passed = [], []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        plain = []
        for name, value in vars(module).copy().items():  # other threads may change it
            if name in _OF_TORCH or name == "forward":
                continue
            if _is_passed_over(module, name, value):
                passed.append((prefix + name, name, value))
            else:
                plain.append((name, reader.read(value, prefix + name)))
        lines.append(f"{path} {name_of(type(module))} {sorted(plain, key=_first)!r}")
        forward = _forward_of(module)
        if forward is not None:
            lines.append(f"{path} forward {reader.read(forward, prefix + 'forward')!r}")
        lines += [
            f"{path} hook {reader.read(hook, f'{prefix}hook{i}')!r}"
            for i, hook in enumerate(_hooks_of(module))
        ]
        lines += _on_tensors(module, path, prefix, reader)
    lines += _standing_elsewhere(model)
    code = code_of(model, reader)
    lines += _asked_for(model, passed, reader)
    return Hung(lines, reader.tensors, code, reader.unread)


def _standing_elsewhere(model: torch.nn.Module) -> Iterator[str]:
    """The places, but for its first, where a module stands again: a layer that is run twice."""
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), path) != path:
            yield f"{path} is {first[id(module)]}"


def _on_tensors(
    module: torch.nn.Module, path: str, prefix: str, reader: ValueReader
) -> Iterator[str]:
    """What parameters and buffers hold besides their numbers, as the scales of what is quantised,
    and the classes of those that compute in another way than tensors do."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.copy().items():
            if tensor is None:
                continue
            if type(tensor) not in TENSORS:
                lines = reader.read(type(tensor), prefix + name)
                yield f"{path} {name} class {lines!r}"
            said = {key: value for key, value in vars(tensor).items() if key not in _IDLE}
            if said:
                yield f"{path} {name} {reader.read(said, prefix + name)!r}"


def _asked_for(
    model: torch.nn.Module, passed: list[tuple[str, str, object]], reader: ValueReader
) -> list[str]:
    """What is passed over by its name, where a user's own code on the model has that name."""
    every, lines = bool(reader.used & _ALL_NAMES), []
    for place, name, value in passed:
        if every or name in reader.used:
            lines.append(f"{place} {reader.read(value, place)!r}")
    if every or "training" in reader.used:
        lines.append(f"training {[module.training for module in model.modules()]}")
    for config in _configs_of(model):
        for name in sorted(_NOISE if every else _NOISE & reader.used):
            lines.append(f"setting {name} {reader.read(getattr(config, name, None), name)!r}")
    return lines


def _first(pair: tuple[str, object]) -> str:
    return pair[0]


def _configs_of(model: torch.nn.Module) -> list[object]:
    """The configuration of a model and those within it, which its settings say."""
    config = getattr(model, "config", None)
    inner = vars(config).values() if hasattr(config, "to_dict") else ()
    return [config, *(c for c in inner if hasattr(c, "to_diff_dict"))]


def _of_transformers(module: torch.nn.Module, name: str) -> bool:
    """Whether an attribute is of every model of transformers: how to load, split and save it."""
    return any(c.__name__ == "PreTrainedModel" and name in vars(c) for c in type(module).__mro__)


def _idle_of(module: torch.nn.Module) -> frozenset[str]:
    """Attributes that are passed over by their names: those that libraries set. A class that is a
    user's, and none of theirs, may have others in mind."""
    kinds = (kind for kind in type(module).__mro__ if kind is not torch.nn.Module)
    known = any(is_librarys(kind.__module__) for kind in kinds)
    return _IDLE if known else _IDLE & {"training", "_is_hf_initialized"}


def _is_passed_over(module: torch.nn.Module, name: str, value: object) -> bool:
    if name in _idle_of(module) or (name[0] == "_" and _of_transformers(module, name)):
        return True
    return _adds_nothing(module, name, value)


def _adds_nothing(module: torch.nn.Module, name: str, value: object) -> bool:
    """Whether an attribute is what would be found without it, a copy that is made again, or read
    with the hooks."""
    if name == "_hf_hook" or (name == "_old_forward" and _is_accelerates(module)):
        return True
    if name in _MOVES:
        return is_librarys(written_in(value))
    if name.endswith("long_inv_freq") and isinstance(value, torch.Tensor):
        return _is_long_rope(module, name, value)
    value = uncompiled(value)
    if not isinstance(value, MethodType):
        return False
    if name in ("_compiled_call", "_compiled_call_impl"):
        calls = (module.__call__, module._call_impl)
        return value in calls and "__call__" not in vars(module)
    if name in ("_old_forward", "_original_forward"):  # kept to undo what is done to `forward`
        name = "forward"
    own = getattr(type(module), name, None)
    if own is not None:
        return value.__self__ is module and value.__func__ is own
    try:  # adapters find in the model what they do not have, and keep it
        return bool(type(module).__getattr__(module, name) == value)
    except AttributeError:
        return False


def _is_long_rope(module: torch.nn.Module, name: str, kept: torch.Tensor) -> bool:
    """Whether these are the frequencies for long texts that transformers made of the configuration,
    and would make again. (Which it turns by at the next call depends on that call alone.)"""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        layers = name.removesuffix("long_inv_freq").removesuffix("_")
        parameters, kind = module.config.rope_parameters, module.rope_type
        given: dict[str, object] = {"layer_type": layers} if layers else {}
        if layers:
            parameters, kind = parameters[layers], kind[layers]
        length = parameters["original_max_position_embeddings"] + 1
        made, _ = ROPE_INIT_FUNCTIONS[kind](module.config, kept.device, seq_len=length, **given)
        return torch.equal(made, kept)
    except (AttributeError, KeyError, TypeError):
        return False


def _hooks_of(module: torch.nn.Module) -> Iterator[object]:
    """Hooks that may change what a module computes, accelerate's among them."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in list(hooks.values()):
            if not is_whole(hook, _PASSED_OVER):
                yield hook
    asked = [vars(module).get("_hf_hook")]
    while asked:
        hook = asked.pop(0)
        kind = type(hook)
        own = vars(sys.modules.get("accelerate.hooks", builtins)).get(kind.__name__) is kind
        own = (
            own
            and not put_into(kind)
            and not {"pre_forward", "post_forward"} & attributes(hook).keys()
        )
        if own and kind.__name__ == "SequentialHook" and isinstance(hook.hooks, (list, tuple)):
            asked += hook.hooks
        elif hook is not None and not (own and kind.__name__ in _PLACING):
            yield hook


def _forward_of(module: torch.nn.Module) -> object:
    """What stands in for a module's own `forward`, if anything does that changes it."""
    held = vars(module).copy()
    found = held.get("forward")
    if _is_accelerates(module):
        found = held.get("_old_forward")  # which that calls, and the hook
    while found is not None:
        if getattr(type(found), "idle", False) and is_librarys(type(found).__module__):
            found = found.before
        elif uncompiled(found) is not found:
            found = uncompiled(found)
        else:
            break
    of_class = getattr(found, "__func__", None) is type(module).forward
    return None if of_class and getattr(found, "__self__", None) is module else found


def _is_accelerates(module: torch.nn.Module) -> bool:
    """Whether a module's `forward` is accelerate's, which calls the hook and `_old_forward`."""
    held = vars(module)
    found = held.get("forward")
    called = found.func if isinstance(found, functools.partial) else None
    return "_hf_hook" in held and written_in(called) == "accelerate.hooks"


def settings_of(model: torch.nn.Module) -> str:
    """A model's configuration as JSON, without what changes nothing; "" if it has none."""
    config = getattr(model, "config", None)
    return "" if config is None else settings_of_config(config)


def settings_of_config(config: PretrainedConfig) -> str:
    """A config as JSON in a settled order, without what changes no number of a cache (`_NOISE`)."""
    found = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.dumps(_telling(found), sort_keys=True, default=repr)


def _telling(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(k): _telling(v) for k, v in value.items() if str(k) not in _NOISE}
    if isinstance(value, (list, tuple)):
        return [_telling(inner) for inner in value]
    return value
