"""Copies of a model whose prefill predicts the model's own cache: the far end of the frontier.

A copy's weights are rounded, then it computes in float32, so that nothing but the rounding of the
weights is added; that is how "speculative KV coding" (Finn 2026) predicts.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.capture import prefill
from kvzip.entropy.linear import Floats
from kvzip.entropy.residual import held_layers
from kvzip.errors import UsageError
from kvzip.eval.frontier.predictors import Entry
from kvzip.files import replacing
from kvzip.models import LoadedModel, load_model
from kvzip.snapshot import Layer, LayerLayout, Origin, Snapshot
from kvzip.statistics.rope import ChannelOrder

COPIES = {
    "int4": Entry("copy", "second prefill, int4 weights", "int4 copy"),
    "fp8": Entry("copy", "second prefill, fp8 weights", "fp8 copy"),
    "int8": Entry("copy", "second prefill, int8 weights", "int8 copy"),
    "fp32": Entry("recomputation", "recomputed in fp32", "fp32 again"),
    "pieces": Entry("recomputation", "recomputed in pieces of 512 tokens", "in pieces"),
    "stream": Entry("floor", "given the residual stream of this layer", "rounding noise"),
}
"""What is said of each copy. int4 has groups of 32 weights along the inputs, with one
fp16 scale each; fp8 (e4m3) and int8 have one scale an output channel; fp32 has the same weights and
computes in fp32; pieces computes in the model's dtype, but in pieces; stream computes in fp32 from
the exact input of the layer, which leaves the rounding noise of the layer's own keys and values."""
NATIVE = ("pieces", "stream")
"""Those that compute in the model's own dtype, and so are measured where that is bf16."""
GROUP = 32
"""Weights that share a scale in int4."""
PIECE = 512
"""Tokens."""


def weights_of(model: Any) -> list[Any]:
    """The linear layers of a decoder, without the head that makes logits."""
    import torch

    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def products_of(model: Any) -> int:
    """Multiplications of a weight that a prefill makes for a token: attention's own products and
    logits left out."""
    return sum(m.weight.numel() for m in weights_of(model))


def bytes_of(kind: str, model: Any) -> float:
    """Bytes of a copy's weights."""
    count = products_of(model)
    outputs = sum(m.weight.shape[0] for m in weights_of(model))
    sizes = {"int4": count * (0.5 + 2 / GROUP), "fp8": count + 4.0 * outputs}
    sizes |= {"int8": count + 4.0 * outputs, "fp32": 2.0 * count, "pieces": 2.0 * count}
    return sizes.get(kind, 0.0)


def rounded(weight: Any, kind: str) -> Any:
    """A weight matrix [outputs, inputs], float32, rounded as `COPIES` says."""
    import torch

    if kind == "int4":
        outputs, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % GROUP))
        groups = padded.view(outputs, -1, GROUP)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float().clamp(min=1e-12)
        return ((groups / scale).round().clamp(-8, 7) * scale).view(outputs, -1)[:, :columns]
    top = {"fp8": 448.0, "int8": 127.0}[kind]
    scale = (weight.abs().amax(1, keepdim=True) / top).clamp(min=1e-30)
    whole = weight / scale
    if kind == "fp8":
        return whole.to(torch.float8_e4m3fn).float() * scale
    return whole.round() * scale


def make(kind: str, ref: str, dtype: str) -> Callable[[NDArray[Any]], Snapshot]:
    """A function from token ids [tokens] to what the copy predicts. `dtype`: what the model's own
    cache was computed in."""
    import torch

    if kind == "stream":
        return _Stream(load_model(ref, dtype), load_model(ref, "fp32"))
    loaded = load_model(ref, dtype if kind == "pieces" else "fp32")
    if kind == "pieces":
        return lambda ids: _in_pieces(loaded, ids)
    if kind != "fp32":
        with torch.no_grad():
            for module in weights_of(loaded.model):
                module.weight.copy_(rounded(module.weight, kind))
    return lambda ids: prefill(loaded, ids, full_history=True)


def _snapshot(cache: Any, origin: Origin) -> Snapshot:
    layers = []
    for held in cache:
        parts = [dtypes.as_bits(t.float().contiguous())[0][0] for t in held]
        layers.append(
            Layer.of_kv(
                parts[0],
                parts[1],
                LayerLayout.of_kv(parts[0].shape, parts[1].shape, "fp32", parts[0].shape[1]),
            )
        )
    return Snapshot(layers, "fp32", None, origin)


def _in_pieces(loaded: LoadedModel, ids: NDArray[Any]) -> Snapshot:
    import torch
    from transformers import DynamicCache

    from kvzip.load.config import cache_argument

    cache = DynamicCache()
    with torch.inference_mode():
        for piece in torch.from_numpy(ids.astype(np.int64))[None].split(PIECE, dim=1):
            loaded.model(input_ids=piece, use_cache=True, logits_to_keep=1, **cache_argument(cache))
    return _snapshot([(c.keys, c.values) for c in cache.layers], Origin(loaded.id))


class _Stream:
    """Each layer in float32 from the input that the model's own layer had."""

    def __init__(self, own: LoadedModel, fine: LoadedModel):
        self.own, self.id = own.model, own.id
        self.layers = fine.model.get_decoder().layers
        self.found: list[Any] = []
        for layer, twin in zip(own.model.get_decoder().layers, self.layers, strict=True):
            layer.register_forward_pre_hook(
                lambda _, given, named, twin=twin: self._compute(twin, given, named),
                with_kwargs=True,
            )

    def _compute(self, twin: Any, given: Any, named: dict[str, Any]) -> None:
        import torch
        from transformers import DynamicCache

        from kvzip.load.config import cache_argument

        def fine(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(fine(v) for v in value)
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.float() if is_float else value

        cache = DynamicCache()
        twin(*fine(given), **{k: fine(v) for k, v in named.items()} | cache_argument(cache))
        held = cache.layers[-1]
        self.found.append((held.keys, held.values))

    def __call__(self, ids: NDArray[Any]) -> Snapshot:
        import torch

        self.found.clear()
        with torch.inference_mode():
            self.own(
                input_ids=torch.from_numpy(ids.astype(np.int64))[None],
                use_cache=True,
                logits_to_keep=1,
            )
        return _snapshot(self.found, Origin(self.id))


# --- what they predict, kept on disk -------------------------------------------------------------


def predictions(
    kind: str,
    ref: str,
    native: str,
    paths: Sequence[Path],
    layers: Sequence[int],
    out: Path,
    progress: Callable[[str, int, int], None],
) -> list[Path]:
    """What a copy predicts of documents: for each a file in `out`, with the vectors of each of
    `layers` [tokens, channels], RoPE undone, under the layer's number.

    `native`: the format that the model's own cache was computed in. The files stay, and are not
    made again: formats that a cache is cast to need the same.
    """
    about = f"{ref}-{native if kind in NATIVE else ''}"
    folder = out / "copies" / f"{kind}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    copy: Callable[[NDArray[Any]], Snapshot] | None = None
    found = []
    for done, path in enumerate(paths):
        snapshot = Snapshot.load(path)
        if snapshot.token_ids is None or snapshot.token_ids.ndim != 1:
            raise UsageError(f"{path}: a copy of the model needs token ids of a single document")
        name = hashlib.sha256(snapshot.token_ids.tobytes()).hexdigest()[:24]
        place = folder / f"{name}.npz"
        if not {str(n) for n in layers} <= _kept(place):
            copy = copy or make(kind, ref, native)
            own, said = held_layers(snapshot), copy(np.array(snapshot.token_ids)).layers
            vectors: dict[str, Any] = {str(n): _unturned(said[n], own[n], snapshot) for n in layers}
            with replacing(place) as file:
                np.savez(file, **vectors)
        found.append(place)
        progress(f"{kind} copy", done + 1, len(paths))
    return found


def _kept(place: Path) -> set[str]:
    """The names of the arrays in a file; none if it is not there, or damaged."""
    try:
        with zipfile.ZipFile(place) as found:
            return set() if found.testzip() else {Path(n).stem for n in found.namelist()}
    except (OSError, zipfile.BadZipFile, ValueError):
        return set()


def _unturned(said: Layer, own: Layer, snapshot: Snapshot) -> Floats:
    """What a copy says of the tokens of `own`, in coding order with RoPE undone."""
    rows = slice(own.layout.first, own.layout.cumulative_length)
    order = ChannelOrder(own.layout, snapshot.origin, "fp32")
    return order.unturned(Layer.of_kv(said.k[:, rows], said.v[:, rows], own.layout))
