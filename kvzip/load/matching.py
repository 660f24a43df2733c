"""Whether a document, a model and a prompt fit each other, and how much of it can be used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from kvzip import dtypes
from kvzip.container import Reader
from kvzip.errors import KVZipError, UnsupportedError, UsageError, first_line
from kvzip.identity import fingerprint, is_fingerprint
from kvzip.identity.checkpoint import changed
from kvzip.layout import KV
from kvzip.load.calls import check_no_virtual_tokens
from kvzip.load.config import (
    LayerKind,
    check_rope_length,
    check_rope_state,
    configs_of_layers,
    layers_of,
    rope_of_model,
)
from kvzip.load.dropout import check_draws_no_lots
from kvzip.load.held import ENCODER_IDS
from kvzip.load.quantized import SETTINGS
from kvzip.options import integer, text
from kvzip.profile import Profile, check_profile
from kvzip.snapshot import LayerLayout, Layout, Origin, Snapshot
from kvzip.store import Match, Store
from kvzip.workers import thread_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Ids: TypeAlias = NDArray[np.integer[Any]]
"""Token ids, [batch, tokens] where nothing else is said."""


def ids_of(ids: ArrayLike | torch.Tensor, name: str) -> Ids:
    """Token ids in any form as [batch, tokens]. Raises UsageError for what are none."""
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().numpy()
    try:
        found = np.atleast_2d(np.asarray(ids))
    except (ValueError, TypeError, RuntimeError):  # rows of unequal length, for one
        found = np.empty(0)
    if found.ndim != 2 or found.dtype.kind not in "iu" or not found.size:
        raise UsageError(f"{name} must be token ids, [tokens] or [batch, tokens]")
    return found


def check_model(model: object) -> None:
    """Raise UsageError for what has no config of its own, and so is no model of transformers."""
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise UsageError(
            f"a {type(model).__name__} is no model of transformers: give the model itself, not "
            "its config or what wraps it"
        )


def check_options(
    tokens: int | None = None,
    threads: int = 0,
    prefill_chunk_size: int | None = None,
    profile: Profile | None = None,
    **names: str | None,
) -> None:
    """Raise UsageError, or ProfileError, for options that make no sense, whatever is stored."""
    check_profile(profile)
    thread_count(threads)
    if tokens is not None:
        integer("tokens", tokens, 1)
    if prefill_chunk_size is not None:
        integer("prefill_chunk_size", prefill_chunk_size, 1)
    for name, value in names.items():
        if value is not None:
            text(name, value)


def device_of(device: torch.device | str | None) -> torch.device | None:
    """A device that tensors can be put on. Raises UsageError for any other."""
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"device is {device!r}: {first_line(error)}") from None
    if found.type == "meta":
        raise UsageError("device is 'meta', which holds no numbers")
    return found


def check_config(source: Reader | Snapshot, config: PretrainedConfig) -> list[LayerKind]:
    """The config's layer kinds; raises KVZipError unless the document is one of its caches."""
    layout, origin = source.layout, source.origin
    kinds, ropes = layers_of(config)
    if len(layout.layers) != len(kinds):
        raise KVZipError(f"the file has {len(layout.layers)} layers, the model {len(kinds)}")
    owns = configs_of_layers(config.get_text_config(decoder=True), len(kinds))
    keys = [layer.part("k") for layer in layout.layers if "k" in layer.parts]
    alike = len({part.size("h") for part in keys}) == 1
    for i, (layer, kind, own) in enumerate(zip(layout.layers, kinds, owns, strict=True)):
        for what, stored, wanted in _compared(layer, kind, own, alike):
            if stored != wanted and (wanted is not None or what == "sliding window"):
                raise KVZipError(
                    f"the file is not of this model: layer {i} has {what} {stored}, not {wanted}"
                )
        if layer.rope is not None and layer.rope < len(origin.rope) and kind.rope is not None:
            stored, wanted = origin.rope[layer.rope], msgspec.to_builtins(ropes[kind.rope])
            for key in sorted(stored.keys() & wanted.keys()):
                if stored[key] != wanted[key]:
                    raise KVZipError(
                        f"the file is not of this model: layer {i} has {key} {stored[key]}, "
                        f"not {wanted[key]}"
                    )
    _check_lengths(layout)
    return kinds


def _compared(
    layer: LayerLayout, kind: LayerKind, own: PretrainedConfig, alike: bool
) -> Iterator[tuple[str, object, object]]:
    """What of a stored layer must be as the model has it: what it is called, and both. Where not
    all layers are `alike` a config says how many heads there are in words of its own."""
    yield "parts", not layer.parts, kind.empty
    if kind.empty:
        return
    if SETTINGS in layer.parts:  # of a quantised layer, which has neither heads nor tokens
        return
    # A cache that was taken without its model does not say that it holds latents.
    latent = kind.kind == "latent" and "latent" not in layer.parts
    for name in KV:  # another's shape may be the model's by chance
        if name in layer.parts:
            yield f"axes of {name}", layer.parts[name].axes.removeprefix("b"), "htd"
    sliding = "full" if kind.window is None else "sliding"
    yield "kind of attention", layer.kind, sliding if latent else kind.kind
    yield "sliding window", layer.window, kind.window
    yield "a state", layer.state_length is not None, kind.states
    if alike and "k" in layer.parts and kind.kind not in ("latent", "cross"):
        heads = getattr(own, "num_key_value_heads", None)
        dim = getattr(own, "head_dim", None)
        if dim is None and heads is not None:
            dim = own.hidden_size // own.num_attention_heads
        yield "KV heads", layer.part("k").size("h"), heads
        yield "head dimension", layer.part("k").size("d"), dim


def _check_lengths(layout: Layout) -> None:
    """Raise KVZipError unless all layers end at one token, and all states at one length."""
    ends = {
        layer.cumulative_length
        for layer in layout.layers
        if layer.counts_tokens and layer.parts and layer.kind != "state"
    }
    states = {layer.state_length for layer in layout.layers} - {None}
    if len(ends) > 1 or not layout.tokens:
        raise KVZipError("the file's layers do not all end at the same token")
    if len(states) > 1:
        raise KVZipError("the file's states are not all of the same length")


def check_held(layout: Layout, count: int) -> None:
    """Raise KVZipError unless a document holds what a cache of its first `count` tokens needs."""
    i = layout.lacking(count)
    if i is None:
        return
    layer = layout.layers[i]
    if layer.state_length is not None:
        raise KVZipError(
            f"layer {i} keeps a state after {layer.state_length} of {layout.tokens} tokens, so "
            f"these can be kept and no other number, and not {count}: the prompt must begin with "
            f"them and have one more at least"
        )
    raise KVZipError(
        f"layer {i} slides and holds only the last {layer.stored} of "
        f"{layout.tokens} tokens, so {count} cannot be kept, only all of them: pass prompt=, "
        "longer than the document and beginning with all of it, or capture the document with "
        "`kvzip capture --full-history`"
    )


def check_encoder_given(config: PretrainedConfig, encoder_ids: object) -> None:
    """Raise UsageError unless an encoder's ids are given where there is one, and only there."""
    if bool(config.is_encoder_decoder) != (encoder_ids is not None):
        raise UsageError(
            "encoder_ids= (--encoder-text) is for what a model's encoder gets: this model has "
            f"{'one, and they are missing' if config.is_encoder_decoder else 'none'}"
        )


def check_encoder(
    source: Reader | Snapshot, config: PretrainedConfig, encoder_ids: Ids | None
) -> None:
    """Raise KVZipError unless a document's encoder, if there is one, was given these ids, [batch,
    n]."""
    check_encoder_given(config, encoder_ids)
    if encoder_ids is None:
        return
    stored = encoder_ids_of(source)
    if stored is None:
        raise KVZipError("the file does not say what tokens its encoder was given")
    if not np.array_equal(stored, encoder_ids):
        raise KVZipError("the file's encoder was given other tokens than encoder_ids=")


def encoder_ids_of(source: Reader | Snapshot) -> Ids | None:
    """What a document's encoder was given, [batch, n]; None where there is none, or nothing says
    it."""
    at = next((i for i, each in enumerate(source.layout.layers) if each.kind == "cross"), None)
    if at is None or ENCODER_IDS not in source.layout.layers[at].parts:
        return None
    if isinstance(source, Snapshot):
        layer = source.layers[at]
    else:
        layer = source.decode(layers=[at]).layers[0]
    return np.atleast_2d(np.ascontiguousarray(layer.once(ENCODER_IDS)).view("<i8")[..., 0])


def check_rope(
    config: PretrainedConfig,
    document: int | None = None,
    prompt: int | None = None,
    encoder_ids: Ids | None = None,
) -> None:
    """Raise UnsupportedError if RoPE's frequencies may be others for a document, or a prompt, of so
    many tokens than for shorter ones, or for what an encoder is given."""
    text = config.get_text_config(decoder=True)
    if document is not None:
        check_rope_length(text, document, "the document")
    if prompt is not None:
        check_rope_length(text, prompt, "the prompt")
    if encoder_ids is not None:
        encoder = config.get_text_config(encoder=True)
        check_rope_length(encoder, encoder_ids.shape[1], "what the encoder is given")


def revision_of_source(revision: str, encoder_ids: ArrayLike | torch.Tensor | None) -> str:
    """The revision of a cache of a model whose encoder was given these ids: with others the same
    tokens have other keys and values, and must not be found."""
    if encoder_ids is None:
        return revision
    ids = ids_of(encoder_ids, "encoder_ids").astype("<i8")
    told = {"encoder ids": f"{ids.shape} {hashlib.sha256(ids.tobytes()).hexdigest()}"}
    return changed(revision, told)


def in_common(layout: Layout, document: Ids | None, prompt: Ids) -> int:
    """How many first tokens a document and a prompt, [batch, n], have in common, more than 0."""
    if document is None:
        raise KVZipError("the file has no token ids to compare prompt= with: leave prompt out")
    document = np.atleast_2d(document)
    if document.shape[0] not in (1, prompt.shape[0]):
        raise KVZipError(
            f"prompt has a batch of {prompt.shape[0]}, the file one of {document.shape[0]}"
        )
    shared = min(prompt.shape[1], layout.tokens)
    equal = (prompt[:, :shared] == document[:, :shared]).all(axis=0)
    common = int(np.append(equal, False).argmin())
    if not common:
        raise KVZipError("the prompt and the cached document have no prefix in common")
    return common


class Agreed(NamedTuple):
    """What a document and a prompt for a model agree in."""

    kinds: list[LayerKind]
    tokens: int
    """How many to keep."""
    common: int
    """How many they have in common."""


def agreed(
    document: Reader | Snapshot, model: PreTrainedModel, ids: Ids, tokens: int | None = None
) -> Agreed:
    """What a document and a prompt, [batch, n], agree in.

    Raises KVZipError unless the document is of the model and its dtype, and the model computes the
    same each time.
    """
    check_draws_no_lots(model)
    check_no_virtual_tokens(model)
    kinds = check_config(document, model.config)
    stored = getattr(torch, dtypes.get(document.layout.dtype).torch)
    if stored != model.dtype:
        raise UnsupportedError(f"the file holds {stored}, the model {model.dtype}")
    check_rope(model.config, document.layout.tokens)
    check_rope_state(model)
    common = in_common(document.layout, document.token_ids, ids)
    most = common if tokens is None else min(common, tokens)
    kept = document.layout.state_length
    if kept is not None:
        check_held(document.layout, kept if most >= kept else most)
        most = kept
    elif most == common > 1 and document.layout.lacking(most - 1) is None:
        most -= 1  # one token less, so that its key tells whether the weights are the same
    return Agreed(kinds, most, common)


def check_weights(
    found_in: object,
    document: Reader | Snapshot,
    model: PreTrainedModel,
    revision: str | None,
    encoder_ids: Ids | None = None,
) -> None:
    """Raise KVZipError for a document whose fingerprint is that of other weights than the model's.

    One that has none is left to its witness. A store has compared them already (`found_in`), and a
    caller who gives a `revision` vouches for what is found.
    """
    origin = document.origin
    vouched = isinstance(found_in, Store) or revision is not None
    if vouched or not is_fingerprint(origin.revision):
        return
    own = revision_of_source(fingerprint(model), encoder_ids)
    if own != origin.revision:
        raise KVZipError(
            f"the file is of other weights: its fingerprint is {origin.revision}, and the model's "
            f"{own}"
        )


# --- what a store knows a model by ---------------------------------------------------------------


def name_of_model(model: PreTrainedModel) -> str:
    """What a model calls itself; "" where it says nothing."""
    return str(
        getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or ""
    )


def origin_of_model(model: PreTrainedModel) -> Origin:
    """Where caches of a transformers model come from: `revision` is its fingerprint."""
    return Origin(
        model=name_of_model(model),
        revision=fingerprint(model),
        architecture=type(model).__name__,
        rope=rope_of_model(model),
    )


def finder(
    model: PreTrainedModel,
    ids: Ids,
    name: str | None,
    revision: str | None,
    profile: Profile | None,
    threads: int,
    encoder_ids: Ids | None = None,
) -> Callable[[Store], Match | None]:
    """What looks for a model's prompt, [n], in a store: by its fingerprint, unless a revision is
    given."""
    return lambda store: store.find(
        ids,
        model=name_of_model(model) if name is None else name,
        revision=revision_of_source(
            fingerprint(model) if revision is None else revision, encoder_ids
        ),
        dtype=str(model.dtype),
        profile=profile,
        threads=threads,
    )
