"""What each kind of a transformers cache's layers holds, by the names of parts, and the way back.

A part is a tensor with a letter for each axis, as in :mod:`kvzip.layout`. In this module and above
it tensors have transformers' own shapes: an axis of the batch first, and the tokens of a part that
has them in the last axis but one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from kvzip.errors import UnsupportedError
from kvzip.layout import Kind
from kvzip.load.quantized import GROUPED, fp8_parts, grouped_parts

ENCODER_IDS = "ids"
"""The part of the first layer of kind "cross" that has the ids of the encoder's tokens."""
TOKEN_PARTS = ("k", "v", "latent", "k_rope", "indexer_k", "positions", ENCODER_IDS)
"""Parts that have an axis of tokens. What else a layer holds was left behind by all tokens."""
KEYS, VALUES = ("k", "latent"), ("v", "k_rope")
"""What lies in place of keys and of values: MLA has a latent and the rotated part of a key."""
_MULTI_STATE = {"conv": "conv_states", "recurrent": "recurrent_states"}
_COMPRESSED = {
    "buffer": "buffer_kv",
    "gate": "buffer_gate",
    "entries": "compressed_kv",
    "overlap": "overlap_kv",
    "overlap_gate": "overlap_gate",
}
"""DeepSeek V4: its layers have a dict of tensors for each, by "compressor" and "indexer"."""
_SLIDING = (
    "DynamicSlidingWindowLayer",
    "StaticSlidingWindowLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer",
    "DeepseekV4HCACache",
    "DeepseekV4CSACache",
)
_FULL = (
    "DynamicLayer",
    "DynamicIndexedLayer",
    "MiniMaxM3VLSparseCacheLayer",
    "StaticLayer",
    "StaticIndexedLayer",
    "MiniMaxM3VLSparseStaticCacheLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
)
_QUANTIZED = ("Fp8QuantizedLayer", *GROUPED)
_STATE = ("LinearAttentionLayer",)
_NOTHING = ("DummyLayer",)


class Piece(NamedTuple):
    """A tensor of a layer, and a letter for each of its axes."""

    tensor: torch.Tensor
    axes: str


class Held(NamedTuple):
    """What one layer of a cache holds."""

    kind: Kind
    window: int | None
    length: int | None
    """How many tokens it has seen; None where it does not count them."""
    pieces: dict[str, Piece]

    def copied(self) -> Held:
        """The same, with states that the model no longer changes: it updates them in place."""
        pieces = {
            name: piece if name in TOKEN_PARTS else piece._replace(tensor=piece.tensor.clone())
            for name, piece in self.pieces.items()
        }
        return self._replace(pieces=pieces)


def class_name(layer: object) -> str:
    """The name of a layer's class in transformers, also of one that decodes when it is used."""
    found = getattr(layer, "base", None) or type(layer)
    return found.__name__ if found.__module__.startswith("transformers.") else ""


def kind_of(layer: Any, i: int) -> tuple[Kind, int | None]:
    """Kind and window of layer i of a cache. Raises UnsupportedError for what is not handled."""
    name = class_name(layer)
    if name in _SLIDING:
        return "sliding", int(getattr(layer, "sliding_window", None) or layer.max_cache_len)
    if name in _FULL + _QUANTIZED + _NOTHING:
        return "full", None
    if name in _STATE:
        return "state", None
    raise UnsupportedError(
        f"layer {i} of the cache is a {type(layer).__name__}, which is of no kind that can be read"
    )


def has_states(layer: Any) -> bool:
    """Whether a layer keeps what is good at one length only."""
    return not {"conv_states", "compressed_kv"}.isdisjoint(vars(layer))


def has_nothing(layer: Any) -> bool:
    """Whether a layer never holds anything: it shares another's cache, or has no attention."""
    return class_name(layer) in _NOTHING


def check_crop(layer: Any, i: int, removed: int) -> None:
    """Raise UnsupportedError unless layer i of a cache can be put back to before its last `removed`
    tokens."""
    kind, window = kind_of(layer, i)
    recorded = getattr(layer, "record_past", False)  # for this
    if has_states(layer) and not (recorded and layer.is_croppable):
        why = "keeps states, from which no token can be taken away"
    elif class_name(layer) in _QUANTIZED:
        why = "is quantised, and tokens are not taken away from what was quantised together"
    elif window is not None and not recorded and layer.get_seq_length() >= window:
        length = layer.get_seq_length()
        why = (
            f"slides: of {length} tokens it holds the last {window - 1} and no more, and to end at "
            f"{length - removed} it needs some before these"
        )
    else:
        return
    raise UnsupportedError(
        f"the cache cannot be cropped: layer {i}, of kind {kind}, {why}; load the cache of a "
        "prompt or a document that ends where it is to end"
    )


def held(layer: Any, i: int, latent: bool = False) -> Held:
    """What layer i of a cache holds, `latent` where MLA's latents lie in place of keys.

    Raises UnsupportedError, which names the layer and its class, for a layer of another kind, and
    for one that is empty.
    """
    kind, window = kind_of(layer, i)
    if has_nothing(layer):
        return Held(kind, None, None, {})
    if (backend := GROUPED.get(class_name(layer))) is not None:
        parts = grouped_parts(layer, i, backend)
        grouped = {name: Piece(*part) for name, part in parts.items()}
        return Held("state", None, _length(layer), grouped)
    pieces = {} if kind == "state" else _tokens(layer, i, latent)
    if has_states(layer):
        pieces |= _states(layer)
    if not pieces:
        raise UnsupportedError(f"layer {i} of the cache is empty: run a forward pass first")
    if latent and kind != "state":
        kind = "latent"
    return Held(kind, window, None if kind == "state" else _length(layer), pieces)


def _length(layer: Any) -> int:
    return int(layer.get_seq_length())


def _tokens(layer: Any, i: int, latent: bool) -> dict[str, Piece]:
    """The parts that have an axis of tokens."""
    if class_name(layer) == "Fp8QuantizedLayer":
        return {name: Piece(*part) for name, part in fp8_parts(layer, i).items()}
    keys, values = layer.keys, layer.values
    if keys is None or keys.ndim != 4:
        raise UnsupportedError(f"layer {i} of the cache is empty: run a forward pass first")
    filled = _filled(layer)
    keys, values = keys[:, :, :filled], values[:, :, :filled]
    if latent:
        pieces = {"latent": Piece(keys, "bhtd"), "k_rope": Piece(values, "bhtd")}
    elif hasattr(layer, "compressed_kv"):  # its values are its keys
        pieces = {"k": Piece(keys, "bhtd")}
    else:
        pieces = {"k": Piece(keys, "bhtd"), "v": Piece(values, "bhtd")}
    for name in ("indexer_keys", "idx_keys"):
        found = getattr(layer, name, None)
        if found is not None:
            found = found[..., :filled, :]
            pieces["indexer_k"] = Piece(found, "btd" if found.ndim == 3 else "bhtd")
    if (positions := getattr(layer, "indexer_position_ids", None)) is not None:
        pieces["positions"] = Piece(as_bytes(positions.transpose(0, 1)), "bhtd")
    return pieces


def as_bytes(integers: torch.Tensor) -> torch.Tensor:
    """The eight bytes of each integer, in an axis of their own."""
    return integers.contiguous()[..., None].view(torch.uint8)


def _from_bytes(found: torch.Tensor) -> torch.Tensor:
    return found.contiguous().view(torch.int64)[..., 0]


def _filled(layer: Any) -> int | None:
    """How many tokens of a layer's tensors mean something; None: all of them."""
    most = getattr(layer, "max_cache_len", None)
    return None if most is None else min(most, _length(layer))


def _states(layer: Any) -> dict[str, Piece]:
    """The parts that all tokens have left behind."""
    pieces = {}
    if hasattr(layer, "compressed_kv"):
        for whose in layer.compressed_kv:
            for word, attribute in _COMPRESSED.items():
                found = getattr(layer, attribute, {}).get(whose)
                if found is not None:
                    pieces[f"{whose}_{word}"] = Piece(found, "brd")
        return pieces
    for word, attribute in _MULTI_STATE.items():
        for n, found in getattr(layer, attribute).items():
            if found is None:
                continue
            if not found.dtype.is_floating_point:
                pieces[f"{word}{n or ''}"] = Piece(as_bytes(found), "brd")
            else:
                axes = {2: "bd", 3: "bdr", 4: "bhrd"}[found.ndim]
                pieces[f"{word}{n or ''}"] = Piece(found, axes)
    return pieces


# --- the way back ----------------------------------------------------------------------------


LAZY = (
    *("keys", "values", "indexer_keys", "idx_keys", "indexer_position_ids"),
    *_MULTI_STATE.values(),
    *_COMPRESSED.values(),
)
"""The attributes of layers that hold tensors, or dicts of them."""


def announce(layer: Any, shapes: Mapping[str, tuple[int, ...]], length: int) -> None:
    """Have an empty layer say of itself what it says once it holds parts of these shapes after so
    many tokens."""
    if hasattr(layer, "is_initialized"):
        layer.is_initialized = True
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length
    if "indexer_k" in shapes and hasattr(layer, "is_indexer_initialized"):
        layer.is_indexer_initialized = True
    if hasattr(layer, "entry_count"):
        for whose in layer.entry_count:
            layer.entry_count[whose] = shapes.get(f"{whose}_entries", (0, 0))[1]
    for n in range(getattr(layer, "number_of_states", 0)):
        conv, recurrent = shapes.get(f"conv{n or ''}"), shapes.get(f"recurrent{n or ''}")
        if conv is not None:
            layer.is_conv_states_initialized[n] = True
            layer.conv_kernel_size[n] = conv[-1]
        layer.is_recurrent_states_initialized[n] = recurrent is not None
        layer.has_previous_state[n] = True


def assign(layer: Any, parts: Mapping[str, torch.Tensor]) -> None:
    """Give a layer its tensors. It updates states in place, so they must be its own."""
    for attribute, names in (("keys", KEYS), ("values", VALUES)):
        found = next((parts[name] for name in names if name in parts), None)
        if found is not None:
            setattr(layer, attribute, found)
    if hasattr(layer, "compressed_kv"):
        layer.values = layer.keys
    if (found := parts.get("indexer_k")) is not None:
        setattr(layer, "idx_keys" if hasattr(layer, "idx_keys") else "indexer_keys", found)
        layer.indexer_dtype, layer.indexer_device = found.dtype, found.device
    for word, attribute in _MULTI_STATE.items():
        for n in range(getattr(layer, "number_of_states", 0)):
            if (found := parts.get(f"{word}{n or ''}")) is not None:
                bytes_of_integers = found.dtype == torch.uint8
                getattr(layer, attribute)[n] = _from_bytes(found) if bytes_of_integers else found
    if (found := parts.get("positions")) is not None:
        layer.indexer_position_ids = _from_bytes(found).transpose(0, 1)
    if hasattr(layer, "compressed_kv"):
        for word, attribute in _COMPRESSED.items():
            for whose in layer.compressed_kv:
                if (found := parts.get(f"{whose}_{word}")) is not None:
                    getattr(layer, attribute)[whose] = found
