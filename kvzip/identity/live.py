"""The fingerprint of a model as it lies in memory: of every tensor, module and setting of it.

A tensor's SHA-256 is kept while it is the same memory with the same version counter. What writes
past the counter (``p.data.add_()``, as adapters are merged) is looked for in 64 numbers of each
tensor, which is no proof: ``live_fingerprint(model, anew=True)`` reads everything again.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import json
import logging
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvzip.errors import KVZipError
from kvzip.identity.code import Code, code_of
from kvzip.identity.digests import THREADS
from kvzip.identity.values import (
    ValueReader,
    attributes,
    is_librarys,
    is_whole,
    name_of,
    put_into,
    uncompiled,
    written_in,
)
from kvzip.workers import Lock

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PROBED = 64
"""Numbers of a tensor that tell whether it was written to past its version counter."""

# Attributes of modules that libraries set, and that change nothing of what they compute, or only
# how it is rounded: where weights came from, how they were split and compiled, how `generate` made
# a cache, how a model is trained and moved. What stands in for a module's own methods is not told
# by its name, see `_adds_nothing`.
_IDLE = frozenset(
    {
        "_cache",
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
_BY_ACCELERATE = frozenset({"_hf_hook", "_old_forward"})
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


class Held(NamedTuple):
    """A tensor that a model holds."""

    name: str
    kind: str
    """"stored": a checkpoint has it; "computed": the model makes it from its configuration."""
    tensor: torch.Tensor


class Hung(NamedTuple):
    """What a model's modules are, and what hangs on them."""

    lines: list[str]
    tensors: list[tuple[str, torch.Tensor]]
    code: list[Code]
    unread: list[str]
    """What nothing tells the numbers of, in words."""


@dataclass
class Reading:
    """What was read of a model: its structure, and every tensor with its digest."""

    structure: list[str]
    tensors: list[tuple[Held, str]]
    settings: str
    """Its configuration, as JSON."""
    code: list[Code] = field(default_factory=list)
    """What is a user's own in what it computes."""
    unread: list[str] = field(default_factory=list)
    """What cannot be read. Then no other reading is like this one."""

    @property
    def digest(self) -> str:
        lines = [f"{h.name} {h.tensor.dtype} {list(h.tensor.shape)} {d}" for h, d in self.tensors]
        code = [found.said for found in self.code]
        text = json.dumps([self.settings, self.structure, lines, code])
        return hashlib.sha256(text.encode()).hexdigest()


_Place = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]
_Key = tuple[_Place, int | None, bytes]
"""Where a tensor lies, its version, and some of its numbers."""


@dataclass
class _Known:
    """Digests of one model's tensors, and what its readings came to."""

    digests: dict[_Key, tuple[StorageWeakRef, str]] = field(default_factory=dict)
    checkpoints: dict[tuple[str, str], bool] = field(default_factory=dict)
    """By the digest of a reading and a checkpoint: whether the one is the other."""


_known: weakref.WeakKeyDictionary[torch.nn.Module, _Known] = weakref.WeakKeyDictionary()
_lock = Lock()
_log = logging.getLogger("kvzip.identity")
_said: set[str] = set()
"""What was said that it cannot be read."""


def live_fingerprint(model: torch.nn.Module, *, anew: bool = False) -> str:
    """The checkpoint's ``sha256:...`` for a model that is what its checkpoint says, bit for bit
    (:mod:`kvzip.identity.unchanged`); ``live:...``, the hash of all that it is, for any other.

    `anew`: read every tensor, whatever is known of it. Raises KVZipError for a model whose tensors
    are not in memory.
    """
    from kvzip.identity import unchanged

    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, torch.nn.Module):
        raise KVZipError(f"a {type(model).__name__} is no model: give a torch module, or a path")
    with _lock:
        known = _known.setdefault(model, _Known())
        if anew:
            known.digests.clear()
        reading = _read(model, known)
        if reading.unread:
            _say_unread(model, reading.unread)
            return f"live:{reading.digest}"
        digest, folder = reading.digest, unchanged.folder_of(model)
        if folder is not None:
            checkpoint = unchanged.fingerprint_of(folder)
            same = known.checkpoints.get((digest, checkpoint))
            if same is None and checkpoint:
                same = unchanged.is_checkpoint(model, reading, folder)
                known.checkpoints[digest, checkpoint] = same
            if same:
                return checkpoint
        else:  # the folder was moved; what the model was shown to be it still is
            for (read, checkpoint), same in known.checkpoints.items():
                if same and read == digest:
                    return checkpoint
        return f"live:{digest}"


def _read(model: torch.nn.Module, known: _Known) -> Reading:
    hung = _hung(model)
    held = list(_held(model, hung))
    probes = _probes([h.tensor for h in held])
    keys = [(*_key(h.tensor), probe) for h, probe in zip(held, probes, strict=True)]
    fresh: dict[_Key, tuple[StorageWeakRef, str]] = {}
    unread: dict[_Key, torch.Tensor] = {}
    for h, key in zip(held, keys, strict=True):
        found = known.digests.get(key)
        if found is not None and not found[0].expired():
            fresh[key] = found
        else:
            unread.setdefault(key, h.tensor)
    if unread:
        with ThreadPoolExecutor(THREADS, "kvzip-hash") as pool:
            digests = list(pool.map(digest_of, unread.values()))
        for (key, tensor), digest in zip(unread.items(), digests, strict=True):
            fresh[key] = StorageWeakRef(tensor.untyped_storage()), digest
    # What has no version is read each time.
    known.digests = {key: value for key, value in fresh.items() if key[1] is not None}
    tensors = [(h, fresh[key][1]) for h, key in zip(held, keys, strict=True)]
    return Reading(hung.lines, tensors, settings_of(model), hung.code, hung.unread)


def _say_unread(model: torch.nn.Module, unread: list[str]) -> None:
    if any(name not in _said for name in unread):
        _said.update(unread)
        _log.warning(
            "caches of this %s are not kept: its weights are known by all that it computes with, "
            "and nothing tells whether %s has changed",
            type(model).__name__,
            ", ".join(dict.fromkeys(unread)),
        )


# --- tensors -----------------------------------------------------------------------------------


def tensors_of(model: torch.nn.Module) -> Iterator[Held]:
    """Every tensor of a model, those of modules' plain attributes, too; a packed one (of a
    quantised layer) as the tensors that it is made of."""
    yield from _held(model, _hung(model))


def _held(model: torch.nn.Module, hung: Hung) -> Iterator[Held]:
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        computed = module._non_persistent_buffers_set
        for found in (module._parameters, module._buffers):
            for name, tensor in found.copy().items():
                if tensor is not None:
                    kind = "computed" if name in computed else "stored"
                    yield from _parts(prefix + name, kind, tensor)
        packed = not module._parameters and ".quantized" in type(module).__module__
        held = vars(module).copy().values()
        packed = packed or any(isinstance(value, torch.ScriptObject) for value in held)
        if packed:  # no tensors to be seen, but a state
            yield from _parts_of_value(prefix + "state", dict(module.state_dict()), 4)
    for name, tensor in hung.tensors:
        yield from _parts(name, "computed", tensor)


def _parts(name: str, kind: str, tensor: torch.Tensor) -> Iterator[Held]:
    if hasattr(tensor, "__tensor_flatten__"):
        inner, _ = tensor.__tensor_flatten__()
        for part in inner:
            yield from _parts(f"{name}.{part}", "packed", getattr(tensor, part))
        return
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        raise KVZipError(f"the model's {name} is not in memory, so nothing tells its weights")
    yield Held(name, kind, tensor)


def _parts_of_value(name: str, value: object, depth: int) -> Iterator[Held]:
    """The tensors in an attribute that no module registered."""
    if isinstance(value, torch.Tensor):
        yield from _parts(name, "computed", value)
    elif not depth or isinstance(value, (torch.nn.Module, str, int, float, type)):
        return
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _parts_of_value(f"{name}.{key}", inner, depth - 1)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _parts_of_value(f"{name}.{i}", inner, depth - 1)
    elif depth > 2 and hasattr(value, "__dict__"):
        yield from _parts_of_value(name, vars(value), depth - 1)


def _key(tensor: torch.Tensor) -> tuple[_Place, int | None]:
    """Where a tensor lies, and its version; None if it has none."""
    try:
        version = tensor._version
    except RuntimeError:  # an inference tensor
        version = None
    storage = StorageWeakRef(tensor.untyped_storage()).cdata
    place = storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
    return place, version


def _probes(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """The bytes of evenly spaced numbers of each tensor."""
    found: list[bytes] = [b""] * len(tensors)
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[int, torch.Tensor]]] = {}
    for i, tensor in enumerate(tensors):
        if not tensor.is_quantized and tensor.numel():
            count = min(_PROBED, tensor.numel())
            step = tensor.numel() // count
            if tensor.is_contiguous():
                picked = tensor.detach().as_strided((count,), (step,), tensor.storage_offset())
            else:
                places = torch.arange(0, count * step, step, device=tensor.device)
                picked = tensor.detach()[torch.unravel_index(places, tensor.shape)]
            groups.setdefault((tensor.dtype, tensor.device), []).append((i, picked))
    for group in groups.values():
        data = _bytes(torch.cat([picked for _, picked in group]))
        width, at = group[0][1].element_size(), 0
        for i, picked in group:
            size = picked.numel() * width
            found[i] = bytes(data[at : at + size])
            at += size
    return found


def digest_of(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's numbers in their order."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes | memoryview:
    if tensor.is_quantized:
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            scales = [tensor.q_scale(), tensor.q_zero_point()]
        else:
            scales = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
            scales = [each.tolist() for each in scales]
        return repr(scales).encode() + bytes(_bytes(tensor.int_repr()))
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


# --- structure and settings --------------------------------------------------------------------


def structure_of(model: torch.nn.Module) -> list[str]:
    """A line for each module: its class, its settings, and what was hung on it."""
    return _hung(model).lines


def _hung(model: torch.nn.Module) -> Hung:
    """The structure of a model, the tensors that are in it but that no module registered, and the
    code that is a user's."""
    own = {id(module): f"the module {path}" for path, module in model.named_modules()}
    for config in _configs_of(model):
        own[id(config)] = "the configuration"
    reader = ValueReader(own, _idle_of, settings_of_config)
    lines = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        held = vars(module).copy()  # other threads may change it
        plain = [
            (name, reader.read(value, prefix + name))
            for name, value in held.items()
            if name not in _OF_TORCH and name not in _idle_of(module) and name != "forward"
            if not (name[0] == "_" and _of_transformers(module, name))
            if not _adds_nothing(module, name, value)
        ]
        lines.append(f"{path} {name_of(type(module))} {sorted(plain, key=_first)!r}")
        forward = _forward_of(module)
        if forward is not None:
            lines.append(f"{path} forward {reader.read(forward, prefix + 'forward')!r}")
        lines += [
            f"{path} hook {reader.read(hook, f'{prefix}hook{i}')!r}"
            for i, hook in enumerate(_hooks_of(module))
        ]
        for tensors in (module._parameters, module._buffers):  # as the scales of what is quantised
            for name, tensor in tensors.copy().items():
                said = {} if tensor is None else vars(tensor)
                said = {key: value for key, value in said.items() if key not in _IDLE}
                if said:
                    lines.append(f"{path} {name} {reader.read(said, prefix + name)!r}")
    code = code_of(model, reader)
    return Hung(lines, reader.tensors, code, reader.unread)


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


def _adds_nothing(module: torch.nn.Module, name: str, value: object) -> bool:
    """Whether an attribute is what would be found without it, or a copy that is made again."""
    if name in _BY_ACCELERATE or name in _MOVES:
        return True  # the first are read with the hooks
    if name.endswith("long_inv_freq") and isinstance(value, torch.Tensor):
        return _is_long_rope(module, name, value)
    value = uncompiled(value)
    if not isinstance(value, MethodType):
        return False
    if name in ("_compiled_call", "_compiled_call_impl"):
        calls = (module.__call__, module._call_impl)
        return value in calls and "__call__" not in vars(module)
    if name == "_original_forward":  # kept for whoever undoes what was done to `forward`
        return True
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
    called = found.func if isinstance(found, functools.partial) else None
    if "_hf_hook" in held and written_in(called) == "accelerate.hooks":
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


def settings_of(model: torch.nn.Module) -> str:
    """A model's configuration as JSON, without what changes nothing; "" if it has none."""
    config = getattr(model, "config", None)
    return "" if config is None else settings_of_config(config)


def settings_of_config(config: PretrainedConfig) -> str:
    found = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.dumps(_telling(found), sort_keys=True, default=repr)


def _telling(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(k): _telling(v) for k, v in value.items() if str(k) not in _NOISE}
    if isinstance(value, (list, tuple)):
        return [_telling(inner) for inner in value]
    return value


def named(tensors: Iterable[tuple[Held, str]]) -> dict[str, tuple[Held, str]]:
    """The same by name."""
    return {held.name: (held, digest) for held, digest in tensors}
