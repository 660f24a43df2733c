"""From a model and text to snapshots: run a prefill, keep what it put into the cache."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.errors import CorruptError, FormatError, KVZipError, UnsupportedError, UsageError
from kvzip.files import made_folder
from kvzip.identity.checkpoint import changed
from kvzip.layout import KV
from kvzip.models import LoadedModel, check_is_decoder
from kvzip.options import callback, integer
from kvzip.reading import text_in
from kvzip.snapshot import Layer, LayerLayout, Origin, Snapshot

if TYPE_CHECKING:
    from kvzip.load.held import Held

# The largest finite numbers: engines saturate, torch's cast would make NaN or infinity.
_FP8_MAX = {
    "fp8_e4m3fn": 448.0,
    "fp8_e5m2": 57344.0,
    "fp8_e4m3fnuz": 240.0,
    "fp8_e5m2fnuz": 57344.0,
}


LEAST_TOKENS = 2
"""Of a document: one that the cache holds, and one to compute with it."""


@dataclass(frozen=True)
class Text:
    """What documents are cut from. It is read once, which is all that a pipe can be, and before a
    model is loaded for it."""

    name: str
    content: str

    @classmethod
    def read(cls, texts: Sequence[str]) -> Text:
        """The texts one after the other: paths of UTF-8 files, or "pydoc", the language reference
        that ships with Python. Raises UsageError and OSError."""
        parts = []
        for name in texts:
            if name == "pydoc":
                from pydoc_data.topics import topics

                parts += [topics[key] for key in sorted(topics)]
            else:
                parts.append(text_in(name, 1 << 30))
        return cls("+".join(texts), "\n\n".join(parts))


@dataclass(frozen=True)
class Document:
    """A cut of a text: its number in the text, and its token ids, uint32 [tokens]."""

    number: int
    token_ids: NDArray[Any]
    name: str


def ids_for_encoder(tokenizer: Any, text: Text) -> NDArray[Any]:
    """What an encoder gets of a text: all its token ids, uint32 [tokens], with the special ones
    that the tokenizer puts in front and behind."""
    return np.array(tokenizer(text.content, verbose=False).input_ids, np.uint32)


def decoder_start(model: Any) -> list[int]:
    """The id that a model's decoder begins with, beside an encoder. Raises UnsupportedError where
    it does not say."""
    for config in (model.generation_config, model.config):
        found = getattr(config, "decoder_start_token_id", None)
        if found is not None:
            return list(np.atleast_1d(found))
    raise UnsupportedError(f"{type(model).__name__} does not say what its decoder begins with")


def cut_documents(
    tokenizer: Any,
    text: Text,
    tokens: int,
    numbers: slice = slice(None),
    front: Sequence[int] | None = None,
) -> list[Document]:
    """Cut text into documents of `tokens` tokens each, a rest left out; `numbers` picks some.

    `front`: ids in front of each document, by default what the tokenizer puts in front of any text
    (a BOS token).
    """
    tokens = integer("tokens", tokens, LEAST_TOKENS)
    front = _special_in_front(tokenizer) if front is None else list(front)
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids
    body = tokens - len(front)
    if body < 1:
        raise KVZipError(
            f"a document of {tokens} tokens has no room beside {len(front)} special ones"
        )
    found = [
        Document(
            n,
            np.array(front + ids[n * body : (n + 1) * body], np.uint32),
            f"{text.name}, document {n} of {tokens} tokens",
        )
        for n in range(len(ids) // body)
    ]
    picked = found[numbers]
    if not picked and None not in (numbers.start, numbers.stop) and numbers.start >= numbers.stop:
        raise KVZipError(f"documents {numbers.start}:{numbers.stop} are none: want A:B, A below B")
    if not picked:
        raise KVZipError(
            f"the text has {len(ids):,} tokens: {len(found)} documents of {tokens}; none is left"
        )
    return picked


def _special_in_front(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts in front of any text: of no text the same, and those behind."""
    whole, own = (
        list(tokenizer("a", add_special_tokens=special, verbose=False).input_ids)
        for special in (True, False)
    )
    for n in range(len(whole) - len(own) + 1 if own else 0):
        if whole[n : n + len(own)] == own:
            return whole[:n]
    return list(tokenizer("").input_ids)


def prefill(
    loaded: LoadedModel,
    token_ids: NDArray[Any],
    *,
    dtype: str | None = None,
    full_history: bool = False,
    text: str = "",
    encoder_ids: NDArray[Any] | None = None,
) -> Snapshot:
    """Run one document through a model and take its cache.

    `token_ids`: [tokens] or [batch, tokens]. `encoder_ids`, in the same form: what the encoder of a
    model that has one gets; `token_ids` are then what its decoder does. `dtype`: the format of keys
    and values, by default the model's own; fp8 is a saturating cast with scale 1, as engines make
    it. A sliding layer keeps the last `window` tokens, one more than its cache does, so that the
    last token can be computed again; with `full_history` it keeps all that it computed. States (of
    linear attention, Mamba) are kept as they are before the last token, for the same reason; a
    model that keeps nothing else gives a snapshot of one token less.
    """
    import torch
    import transformers

    from kvzip.load.calls import check_no_virtual_tokens
    from kvzip.load.config import layer_kinds, rope_of_model
    from kvzip.load.dropout import check_draws_no_lots
    from kvzip.load.filling import filled
    from kvzip.load.matching import check_encoder_given, revision_of_source
    from kvzip.load.placeholders import check_text_only
    from kvzip.load.snapshots import dtype_of, format_of, layer_of
    from kvzip.models import products

    model = loaded.model
    config = model.config
    check_is_decoder(config, type(model).__name__)
    check_draws_no_lots(model)
    check_no_virtual_tokens(model)
    kinds = layer_kinds(config)
    check_ids(token_ids, config)
    check_text_only(config, np.asarray(token_ids), type(model).__name__)
    check_encoder_given(config, encoder_ids)
    single = np.ndim(token_ids) == 1
    ids = torch.from_numpy(np.atleast_2d(token_ids).astype(np.int64)).to(model.device)
    given = {}
    if encoder_ids is not None:
        source = torch.from_numpy(np.atleast_2d(encoder_ids).astype(np.int64)).to(model.device)
        given = {"input_ids": source}
    kept = filled(model, kinds, ids, given, full_history)
    computed = format_of(kept)
    stateful = ids.shape[1] - 1  # how many tokens the states have seen
    layers = [
        layer_of(_cut_and_cast(one, dtype, full_history), stateful, kind.rope, single)
        for one, kind in zip(kept, kinds, strict=True)
    ]
    name = dtype_of(layers)
    if not any(kind.counts for kind in kinds):  # there is nothing of the last token
        token_ids = token_ids[..., :-1]
    software = {
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
        "device": device_name(model.device),
        **products.of(model),
    }
    revision = loaded.fingerprint
    if loaded.revision not in ("", revision):
        software["checkpoint"] = loaded.revision
    origin = Origin(
        loaded.id,
        revision_of_cast(revision_of_source(revision, encoder_ids), computed, name),
        type(model).__name__,
        rope_of_model(model),
        text,
        software,
    )
    return Snapshot(layers, name, token_ids, origin)


def _cut_and_cast(one: Held, dtype: str | None, full_history: bool) -> Held:
    """What a snapshot keeps of a layer: of a sliding one its window, unless all is wanted; keys and
    values in the format that is wanted."""
    from kvzip.load.held import TOKEN_PARTS

    pieces = {}
    for name, (tensor, axes) in one.pieces.items():
        if name in TOKEN_PARTS:
            if one.window is not None and not full_history:
                tensor = tensor[..., -one.window :, :]
            if dtype is not None and tensor.dtype.is_floating_point:
                tensor = _cast(tensor, dtype)
        pieces[name] = type(one.pieces[name])(tensor.cpu().contiguous(), axes)
    return one._replace(pieces=pieces)


def check_ids(token_ids: NDArray[Any], config: Any) -> None:
    """Raise UsageError for ids that are none of the model's."""
    known = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if np.ndim(token_ids) not in (1, 2) or not np.size(token_ids):
        raise UsageError(f"token ids are [tokens] or [batch, tokens], not {np.shape(token_ids)}")
    least, most = int(np.min(token_ids)), int(np.max(token_ids))
    if least < 0 or (known is not None and most >= known):
        raise UsageError(f"token ids from {least} to {most}: the model has {known} tokens")


def cast(snapshot: Snapshot, dtype: str) -> Snapshot:
    """The same cache in another format, as `prefill` with `dtype` makes it from the model's own.

    Its revision says so (:func:`revision_of_cast`), and a store does not find it for a model.
    """
    layers = [cast_layer(layer, snapshot.dtype, dtype) for layer in snapshot.layers]
    name = dtypes.get(dtype).name
    revision = revision_of_cast(snapshot.origin.revision, snapshot.dtype, name)
    origin = msgspec.structs.replace(snapshot.origin, revision=revision)
    return Snapshot(layers, name, snapshot.token_ids, origin)


def revision_of_cast(revision: str, computed: str, dtype: str) -> str:
    """The revision of a cache of `dtype` that a model of `revision` computed in the dtype
    `computed`.

    It is the model's own where a model computes in that very dtype for such a cache
    (:func:`computed_in`). Any other is told apart: a model that computes in `dtype` would have
    other keys and values, and must not find these.
    """
    if computed in (dtype, computed_in(dtype)):
        return revision
    return changed(revision, {"computed in": computed})


def cast_layer(layer: Layer, dtype: str, to: str) -> Layer:
    """One layer whose bits are of `dtype` in the format `to`."""
    k, v = (
        dtypes.as_bits(_cast(dtypes.as_tensor(np.array(layer.part(part)), dtype), to))[0]
        for part in KV
    )
    held = layer.layout
    layout = LayerLayout.of_kv(
        k.shape, v.shape, to, held.cumulative_length, held.kind, held.window, held.rope
    )
    return Layer.of_kv(k, v, layout)


def _cast(tensor: Any, dtype: str) -> Any:
    import torch

    check_cast(dtype)
    form = dtypes.get(dtype)
    if (top := _FP8_MAX.get(form.name)) is not None:
        tensor = tensor.float().clamp(-top, top)
    return tensor.to(getattr(torch, form.torch))


def check_cast(dtype: str | None) -> None:
    """Raise UsageError or UnsupportedError for a dtype that no cache is cast to. None is the
    model's own."""
    if dtype is not None and not (form := dtypes.get(dtype)).is_float:
        raise UnsupportedError(
            f"a cache is not cast to {form.name}, only to a floating-point dtype"
        )


def computed_in(cache_dtype: str | None) -> str:
    """The dtype that a model computes in for a cache of that dtype, which is the same, except that
    caches of fp8 are cast from bf16. None, whatever the model has, stands for bf16."""
    if cache_dtype is None:
        return "bf16"
    form = dtypes.get(cache_dtype)
    return "bf16" if form.bits == 8 else form.name


def device_name(device: Any) -> str:
    """A device's name as people know it: the GPU's, or the processor's."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return processor_name()


def processor_name() -> str:
    """The processor's model name, or what the platform module knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def capture(
    loaded: LoadedModel,
    documents: Sequence[Document],
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    full_history: bool = False,
    encoder_ids: NDArray[Any] | None = None,
    progress: Callable[[Document, bool], None] | None = None,
) -> list[Path]:
    """Write a snapshot of each document to `folder`/doc-NNNNN.safetensors; their paths. The other
    arguments are those of :func:`prefill`.

    A file that is there already, of the same model, tokens and dtype, is kept, so an interrupted
    capture goes on where it stopped; one that differs raises KVZipError. One document is in
    memory at a time. `progress` is called after each with whether it was computed now.
    """
    callback("progress", progress)

    def captured(token_ids: NDArray[Any], text: str = "") -> Snapshot:
        return prefill(
            loaded,
            token_ids,
            dtype=dtype,
            full_history=full_history,
            text=text,
            encoder_ids=encoder_ids,
        )

    known: dict[int, tuple[str, str]] = {}

    def told(document: Document) -> tuple[str, str]:
        """Revision and dtype of what is captured of the document, as its first tokens tell."""
        few = _telling_tokens(loaded, len(document.token_ids))
        if few not in known:
            found = captured(document.token_ids[:few])
            known[few] = found.origin.revision, found.dtype
        return known[few]

    paths = []
    with made_folder(folder) as there:
        for document in documents:
            path = there / f"doc-{document.number:05d}.safetensors"
            made = not path.exists()
            if made:
                captured(document.token_ids, document.name).save(path)
            else:
                _check_same(path, loaded, document, *told(document), full_history)
            paths.append(path)
            if progress is not None:
                progress(document, made)
    return paths


def _telling_tokens(loaded: LoadedModel, tokens: int) -> int:
    """How many first tokens of a document of so many tell of which revision and dtype its snapshot
    is: a few, unless RoPE's frequencies, which count as the model's, follow the length."""
    from kvzip.load.config import rope_length

    length = rope_length(loaded.model.config.get_text_config(decoder=True))
    return LEAST_TOKENS if length is None or tokens < length else tokens


def _check_same(
    path: Path,
    loaded: LoadedModel,
    document: Document,
    revision: str,
    form: str,
    full_history: bool,
) -> None:
    """Raise KVZipError that says how a file that is there already differs from the snapshot that
    would be captured: it is none, or of another model, revision, dtype, document or history."""
    from kvzip.load.config import layer_kinds

    try:
        old = Snapshot.load(path)
    except (CorruptError, FormatError) as error:
        told = f"{path} is in the way: choose another folder, or remove it ({error})"
        raise KVZipError(told) from None
    # Of a model with nothing but states nothing is kept of the last token.
    counted = any(kind.counts for kind in layer_kinds(loaded.model.config))
    wanted_ids = document.token_ids if counted else document.token_ids[:-1]
    kept = all(
        layer.stored == (n if full_history else min(n, layer.window or n))
        for layer in old.layout.layers
        if layer.kind != "state" and layer.parts  # some layers use another's
        for n in [layer.cumulative_length]
    )
    ids = "none" if old.token_ids is None else f"others, {old.tokens}"
    history = ("all of it", "only the window's")
    differing = [
        f"{what} ({was}, not {wanted})"
        for what, was, wanted, same in (
            ("model", old.origin.model, loaded.id, old.origin.model == loaded.id),
            ("revision", old.origin.revision, revision, old.origin.revision == revision),
            ("dtype", old.dtype, form, old.dtype == form),
            (
                "document, by its tokens",
                ids,
                f"the {len(wanted_ids)} of {document.name}",
                old.token_ids is not None and np.array_equal(old.token_ids, wanted_ids),
            ),
            ("history of sliding layers", history[full_history], history[not full_history], kept),
        )
        if not same
    ]
    if differing:
        raise UsageError(
            f"{path} is there already and differs in {' and '.join(differing)}: "
            "choose another folder, or remove it"
        )
