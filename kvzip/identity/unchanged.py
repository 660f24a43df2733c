"""Whether a model in memory is its checkpoint, bit for bit.

Its tensors are compared with the checkpoint's, brought to their dtypes; its modules and settings
with those of a model that transformers makes from the checkpoint's configuration. What cannot be
compared (weights that transformers renames, joins or unpacks as it loads them) counts as changed:
such a model has a fingerprint of its own, the same in each process.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvzip.errors import KVZipError
from kvzip.identity import digests
from kvzip.identity.checkpoint import checkpoint_fingerprint, checkpoint_folder, weight_files
from kvzip.identity.live import Held, Reading, digest_of, named
from kvzip.identity.structure import settings_of_config, structure_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_Place = tuple[int, int, tuple[int, ...], torch.dtype]
"""Where a tensor lies, and in what shape."""


def folder_of(model: torch.nn.Module) -> Path | None:
    """Where the checkpoint lies that a model says it was loaded from, if it is on this machine."""
    config = getattr(model, "config", None)
    name = getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "")
    if not isinstance(name, str) or not name:
        return None
    commit = getattr(config, "_commit_hash", None)
    return checkpoint_folder(name, commit if isinstance(commit, str) else None)


def fingerprint_of(folder: Path) -> str:
    """A folder's fingerprint; "" if it holds none of the weights that can be compared."""
    if not any(folder.glob("*.safetensors")) or (folder / "adapter_config.json").exists():
        return ""
    try:
        return checkpoint_fingerprint(folder)
    except KVZipError:
        return ""


def is_checkpoint(model: torch.nn.Module, reading: Reading, folder: Path) -> bool:
    """Whether what was read of a model is what the folder's checkpoint holds."""
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        return False
    if not all(code.is_of(folder) for code in reading.code):
        return False  # the same code is in whatever it would be compared with
    try:
        config = type(model.config).from_pretrained(folder)
        if settings_of_config(config) != reading.settings:
            return False
        like = _made(model, config)
        if structure_of(like) != reading.structure:
            return False
        return _same_tensors(model, reading, like, folder)
    except Exception:  # whatever cannot be compared is not known to be the same
        return False


def _made(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of that config as transformers makes it before it fills in weights: without memory
    but for what it computes from the config."""
    config._attn_implementation = model.config._attn_implementation
    with ExitStack() as stack:
        for context in type(model).get_init_context(model.dtype, False, False, None):
            stack.enter_context(context)
        made = type(model)(config)
    made.eval()
    for module in made.modules():
        computed = module._non_persistent_buffers_set
        if computed:
            for name in computed:
                like = module._buffers[name]
                if like is not None:
                    module._buffers[name] = torch.full_like(like, 0, device="cpu")
            with torch.no_grad():
                made._init_weights(module)
    return made


def _same_tensors(
    model: PreTrainedModel, reading: Reading, like: PreTrainedModel, folder: Path
) -> bool:
    files = weight_files(folder)
    stored = _Stored(files)
    prefix = f"{model.base_model_prefix}."
    computed = dict(like.named_buffers())
    tied = _tied(reading)
    made = {name: t.dtype for name, t in (*like.named_parameters(), *like.named_buffers())}
    for held, digest in named(reading.tensors).values():
        if held.kind == "computed":
            fresh = computed.get(held.name)
            if fresh is None or fresh.device.type == "meta" or fresh.dtype != held.tensor.dtype:
                return False
            if digest_of(fresh) != digest:
                return False
            continue
        if not _dtype_as_loaded(held, model, made.get(held.name)):
            return False
        names = [
            found
            for alias in tied[_place(held.tensor)]
            for found in (alias, prefix + alias, alias.removeprefix(prefix))
            if found in stored
        ]
        if not names or any(stored.digest(name, held.tensor) != digest for name in names):
            return False
    stored.keep()
    return True


def _dtype_as_loaded(held: Held, model: PreTrainedModel, made: torch.dtype | None) -> bool:
    """Whether a tensor is of a dtype that transformers gives it in a model of that dtype."""
    if held.tensor.dtype in (model.dtype, made):
        return True
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return held.tensor.dtype is torch.float32 and any(name in held.name for name in kept)


def _place(tensor: torch.Tensor) -> _Place:
    return tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.dtype


def _tied(reading: Reading) -> dict[_Place, list[str]]:
    """The names of each tensor: those that are tied have several."""
    found: dict[_Place, list[str]] = {}
    for held, _ in reading.tensors:
        found.setdefault(_place(held.tensor), []).append(held.name)
    return found


class _Stored:
    """The tensors of a checkpoint's files, and their digests in any dtype."""

    def __init__(self, files: list[Path]):
        from safetensors import safe_open

        self._files: list[Any] = [safe_open(file, framework="pt") for file in files]
        self._kept = [digests.load(file) for file in files]
        self._new: set[int] = set()
        self._where = {name: i for i, file in enumerate(self._files) for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def digest(self, name: str, like: torch.Tensor) -> str:
        """The digest of a tensor, brought to the dtype of `like`; "" if it has another shape."""
        i = self._where[name]
        file, kept = self._files[i], self._kept[i]
        if tuple(file.get_slice(name).get_shape()) != tuple(like.shape):
            return ""
        key = f"{name} {like.dtype}"
        if key not in kept.tensors:
            kept.tensors[key] = digest_of(file.get_tensor(name).to(like.dtype))
            self._new.add(i)
        return kept.tensors[key]

    def keep(self) -> None:
        for i in self._new:
            digests.keep(self._kept[i])
