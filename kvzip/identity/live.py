"""The fingerprint of a model as it lies in memory: of every tensor, module and setting of it.

A tensor's SHA-256 is kept while it is the same memory with the same version counter. What writes
past the counter (``p.data.add_()``, as adapters are merged) is looked for in 64 numbers of each
tensor, which is no proof: ``live_fingerprint(model, anew=True)`` reads everything again. Fused
optimizers write past it, too, so what an optimizer has trained is forgotten at each of its steps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from kvzip.errors import KVZipError
from kvzip.identity.code import Code
from kvzip.identity.digests import THREADS
from kvzip.identity.structure import Hung, hung_on, settings_of
from kvzip.workers import Lock

_PROBED = 64
"""Numbers of a tensor that tell whether it was written to past its version counter."""


class Held(NamedTuple):
    """A tensor that a model holds."""

    name: str
    kind: str
    """"stored": a checkpoint has it; "computed": the model makes it from its configuration."""
    tensor: torch.Tensor


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


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
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


def weights_of(model: torch.nn.Module) -> str:
    """``weights:...``, the hash of a model's parameters and buffers alone: it tells in a few
    milliseconds whether they have changed. Raises KVZipError for tensors that are not in memory."""
    model = getattr(model, "_orig_mod", model)
    with _lock:
        known = _known.setdefault(model, _Known())
        held = list(_held(model, Hung([], [], [], [])))
        digests, fresh = _digests(held, known)
        known.digests |= fresh
    lines = [f"{h.name} {h.tensor.dtype} {d}" for h, d in zip(held, digests, strict=True)]
    return f"weights:{hashlib.sha256(json.dumps(lines).encode()).hexdigest()}"


def _read(model: torch.nn.Module, known: _Known) -> Reading:
    hung = hung_on(model)
    held = list(_held(model, hung))
    digests, known.digests = _digests(held, known)
    tensors = list(zip(held, digests, strict=True))
    return Reading(hung.lines, tensors, settings_of(model), hung.code, hung.unread)


def _digests(
    held: Sequence[Held], known: _Known
) -> tuple[list[str], dict[_Key, tuple[StorageWeakRef, str]]]:
    """The digest of each tensor, and what is to be kept of them."""
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
    kept = {key: value for key, value in fresh.items() if key[1] is not None}
    return [fresh[key][1] for key in keys], kept


def _forget_trained(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Forget the digests of what an optimizer has written to: torch's fused kernels (of AdamW, SGD
    and others) leave the version counters as they are."""
    with _lock:
        models = [known for known in list(_known.values()) if known.digests]
        if not models:
            return
        try:
            trained = {
                _storage(held.tensor)
                for group in optimizer.param_groups
                for parameter in group["params"]
                for held in _parts("", "", parameter)
            }
        except Exception:  # an optimizer of another kind, whose step must not fail for this
            trained = None
        for known in models:
            known.digests = {
                key: found
                for key, found in known.digests.items()
                if trained is not None and key[0][0] not in trained
            }


# Compiled steps call it as it is, as they do optimizers' own methods.
register_optimizer_step_post_hook(torch._disable_dynamo(_forget_trained))


_MOST_NAMES = 5


def _say_unread(model: torch.nn.Module, unread: list[str]) -> None:
    if any(name not in _said for name in unread):
        _said.update(unread)
        names = list(dict.fromkeys(unread))
        more = len(names) - _MOST_NAMES
        _log.warning(
            "caches of this %s are not kept: its weights are known by all that it computes with, "
            "and nothing tells whether %s has changed",
            type(model).__name__,
            ", ".join(names[:_MOST_NAMES]) + (f" or {more:,} others" if more > 0 else ""),
        )


# --- tensors -----------------------------------------------------------------------------------


def tensors_of(model: torch.nn.Module) -> Iterator[Held]:
    """Every tensor of a model, those of modules' plain attributes, too; a packed one (of a
    quantised layer) as the tensors that it is made of."""
    yield from _held(model, hung_on(model))


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
    there = tensor.layout is torch.strided and not tensor.is_nested and not is_lazy(tensor)
    if tensor.device.type == "meta" or not there:
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
    at, shape = tensor.storage_offset(), tuple(tensor.shape)
    return (_storage(tensor), at, shape, tensor.stride(), tensor.dtype), version


def _storage(tensor: torch.Tensor) -> int:
    """Which memory a tensor lies in, as long as it lives."""
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def _probes(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """The bytes of evenly spaced numbers of each tensor."""
    found: list[bytes] = [b""] * len(tensors)
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[int, torch.Tensor]]] = {}
    for i, tensor in enumerate(tensors):
        if not tensor.is_quantized and tensor.numel():
            count = min(_PROBED, tensor.numel())
            step = max(tensor.numel() // count - 1, 1)  # not whole rows: each of another column
            plain = _plain(tensor)
            if plain.is_contiguous():
                picked = plain.as_strided((count,), (step,), plain.storage_offset())
            else:
                places = torch.arange(0, count * step, step, device=plain.device)
                picked = plain[torch.unravel_index(places, plain.shape)]
            groups.setdefault((plain.dtype, plain.device), []).append((i, picked))
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
    whole = _plain(tensor).cpu().contiguous()
    # Of one number alone the steps may be anything, and reshaping keeps them.
    flat = whole.as_strided((whole.numel(),), (1,), whole.storage_offset())
    return memoryview(flat.view(torch.uint8).numpy())


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers as integers of their width, if there are such: torch indexes and joins
    them, as it does not numbers of 4 bits. A view that says that its memory is to be conjugated or
    negated is not what lies there."""
    found = tensor.detach().resolve_conj().resolve_neg()
    kind = _INTEGERS.get(found.element_size())
    return found if kind is None else found.view(kind)


def named(tensors: Iterable[tuple[Held, str]]) -> dict[str, tuple[Held, str]]:
    """The same by name."""
    return {held.name: (held, digest) for held, digest in tensors}
