"""Layers of transformers' `QuantizedCache`: in fp8, or quantised in groups by quanto or HQQ.

In fp8 keys and values stay what they are, each with the scale of the whole tensor. quanto and HQQ
quantise all tokens anew whenever the last ones have filled what is kept of them in full precision,
in groups that may run across tokens. So there is no axis of tokens: what such a layer holds is good
at one length, as a state is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from kvzip.errors import CorruptError, FormatError, KVZipError, UnsupportedError, first_line
from kvzip.parsing import from_json

SETTINGS = "settings"
"""The part that says how a layer is quantised: JSON, in UTF-8."""
GROUPED = {"QuantoQuantizedLayer": "quanto", "HQQQuantizedLayer": "hqq"}
_NAMES = ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length")


def grouped_parts(layer: Any, i: int, backend: str) -> dict[str, tuple[torch.Tensor, str]]:
    """What layer i of a cache holds that quanto or HQQ has quantised: for keys and values what is
    in full precision, packed codes, scales, and shifts or zeros; and the settings.

    Raises UnsupportedError for a layer that is empty, of several rows, or between a step of a beam
    search and the next.
    """
    if layer._quantized_keys is None:
        raise UnsupportedError(f"layer {i} of the cache is empty: run a forward pass first")
    if layer._pending_beam_idx is not None:
        raise UnsupportedError(f"layer {i} is quantised, and its rows are yet to be put in order")
    parts: dict[str, tuple[torch.Tensor, str]] = {}
    for word, found, rest in (
        ("k", layer._quantized_keys, layer.keys),
        ("v", layer._quantized_values, layer.values),
    ):
        if backend == "quanto":
            shape, packed = found.size(), found._data._data
            scale, shift = found._scale, found._shift
        else:
            packed, meta = found
            shape, scale, shift = meta["shape"], meta["scale"], meta["zero"]
        if shape[0] != 1:
            raise UnsupportedError(
                f"layer {i} of the cache is quantised in groups that all {shape[0]} rows of its "
                "batch share: keep each row's cache by itself"
            )
        if rest.ndim != 4:  # nothing yet
            rest = rest.new_empty((*shape[:2], 0, shape[3]))
        parts[f"{word}_residual"] = rest, "bhrd"
        parts[f"{word}_packed"] = packed.contiguous().view(torch.uint8), "rd"
        parts[f"{word}_scale"], parts[f"{word}_shift"] = (scale, "rd"), (shift, "rd")
    told = {"backend": backend} | {name: getattr(layer, name) for name in _NAMES}
    text = bytearray(json.dumps(told, sort_keys=True).encode())
    parts[SETTINGS] = torch.frombuffer(text, dtype=torch.uint8), "d"
    return parts


def settings_of(parts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """How a layer of these parts was quantised. Raises FormatError for what does not say it."""
    try:
        told = from_json(bytes(parts[SETTINGS].cpu().tolist()))
        if told["backend"] in GROUPED.values() and all(type(told[n]) is int for n in _NAMES):
            return dict(told)
    except (CorruptError, FormatError, ValueError, KeyError, TypeError):
        pass
    raise FormatError("a quantised layer does not say how it was quantised")


def grouped_layer(parts: Mapping[str, torch.Tensor], length: int) -> Any:
    """The layer of a cache of `length` tokens that :func:`grouped_parts` took these parts of.

    Raises UnsupportedError where its package is not installed, FormatError for parts that are not
    of such a layer.
    """
    from transformers import cache_utils  # which has no such layers in older releases

    # Loaders put an axis of the batch in front of what has none.
    parts = {name: one if name.endswith("_residual") else one[0] for name, one in parts.items()}
    told = settings_of(parts)
    backend = told["backend"]
    name = next(name for name, each in GROUPED.items() if each == backend)
    try:
        layer = getattr(cache_utils, name)(**{each: told[each] for each in _NAMES})
        quantize = _quanto if backend == "quanto" else _hqq
        for word, kept in (("k", "keys"), ("v", "values")):
            rest, axis = (
                parts[f"{word}_residual"],
                told["axis_key" if word == "k" else "axis_value"],
            )
            shape = torch.Size((*rest.shape[:2], length - rest.shape[2], rest.shape[3]))
            groups = parts[f"{word}_scale"].numel(), parts[f"{word}_shift"].numel()
            if any(layer.q_group_size * each != shape.numel() for each in groups):
                raise ValueError(f"scales of {word} are not one for {layer.q_group_size} numbers")
            one = quantize(layer, parts, word, axis, shape)
            if layer._dequantize(one).shape != shape:
                raise ValueError(f"{word} is not of {list(shape)}")
            setattr(layer, f"_quantized_{kept}", one)
            setattr(layer, kept, rest if rest.shape[2] else rest.new_empty(0))
    except ImportError as error:
        raise UnsupportedError(f"a cache that {backend} has quantised: {error}") from None
    except KVZipError:
        raise
    except Exception as error:  # of the package's own, for numbers that make no sense
        raise FormatError(
            f"a quantised layer whose parts do not go together: {first_line(error)}"
        ) from error
    layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
    layer.is_initialized, layer.cumulative_length = True, length
    return layer


def _quanto(
    layer: Any, parts: Mapping[str, torch.Tensor], word: str, axis: int, shape: torch.Size
) -> Any:
    from optimum.quanto.tensor.packed import PackedTensor
    from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor

    size, groups = layer.q_group_size, shape.numel() // layer.q_group_size
    grouped = (groups, size) if axis == 0 else (size, groups)
    codes = PackedTensor(parts[f"{word}_packed"], layer.nbits, grouped, (grouped[1], 1))
    stride = torch.empty(shape, device="meta").stride()
    scale, shift = parts[f"{word}_scale"], parts[f"{word}_shift"]
    return WeightQBitsTensor(layer.qtype, axis, size, shape, stride, codes, scale, shift)


def _hqq(
    layer: Any, parts: Mapping[str, torch.Tensor], word: str, axis: int, shape: torch.Size
) -> Any:
    packing = layer.quantizer.bit_to_packing[layer.nbits]
    numbers = layer.quantizer.unpack_view_dtype[packing]
    meta = {
        "nbits": layer.nbits,
        "group_size": layer.q_group_size,
        "shape": shape,
        "scale": parts[f"{word}_scale"],
        "zero": parts[f"{word}_shift"],
        "axis": axis,
        "packing": packing,
        "unpack_view_dtype": numbers,
        "view_as_float": False,
        "compute_dtype": parts[f"{word}_residual"].dtype,
    }
    return parts[f"{word}_packed"].view(numbers), meta


def fp8_parts(layer: Any, i: int) -> dict[str, tuple[torch.Tensor, str]]:
    """Keys and values in fp8 of layer i of a cache, each with the scale of the whole tensor."""
    if layer._quantized_keys is None:
        raise UnsupportedError(f"layer {i} of the cache is empty: run a forward pass first")
    (k, k_scale), (v, v_scale) = layer._quantized_keys, layer._quantized_values
    return {"k": (k, "bhtd"), "v": (v, "bhtd"), "k_scale": (k_scale, ""), "v_scale": (v_scale, "")}


def fp8_layer(parts: Mapping[str, torch.Tensor], length: int, computed: torch.dtype) -> Any:
    """The layer of a cache of `length` tokens that :func:`fp8_parts` took these parts of, for a
    model that computes in the dtype `computed`."""
    from transformers.cache_utils import Fp8QuantizedLayer  # there is none in older releases

    layer = Fp8QuantizedLayer()
    layer._quantized_keys = parts["k"], parts["k_scale"]
    layer._quantized_values = parts["v"], parts["v_scale"]
    layer.device = parts["k"].device
    layer.keys = torch.tensor([], dtype=computed, device=layer.device)
    layer.values = torch.tensor([], dtype=computed, device=layer.device)
    layer.is_initialized, layer.cumulative_length = True, length
    return layer
