"""What vLLM says of the model that it serves: its cache's layers, and where caches come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import vllm

from kvzip import dtypes
from kvzip.errors import KVZipError, UnsupportedError
from kvzip.identity.checkpoint import changed, checkpoint_fingerprint
from kvzip.load.config import LayerKind, layer_kinds, rope_of_config
from kvzip.load.vllm.names import fp8_format, index_of
from kvzip.load.vllm.settings import Settings
from kvzip.load.vllm.split import Split
from kvzip.snapshot import LayerLayout, Layout, Origin, PartLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

_FULL, _SLIDING, _LATENT = "FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"
_STATE = "MambaSpec"


@dataclass(frozen=True)
class Group:
    """Layers whose tokens lie in the same of vLLM's blocks."""

    block_tokens: int
    window: int | None
    """How many positions a query sees, its own included, where vLLM gives back the blocks that lie
    before; None where it keeps the blocks of all tokens."""
    state: bool = False
    """Whether a block holds no tokens, but the state that all tokens up to its end leave."""

    def needed_from(self, position: int) -> int:
        """The first token, at the beginning of a block, that is needed to go on at `position`."""
        if self.state:
            return max(0, position - self.block_tokens)
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.block_tokens * self.block_tokens


@dataclass(frozen=True)
class CachedLayer:
    """A layer of the model that has a cache of its own."""

    name: str
    """vLLM's name of it."""
    group: int
    kind: LayerKind
    parts: Mapping[str, tuple[int, int]]
    """Heads and dim of each part: "k" and "v", or of MLA "latent" and "k_rope"; none of states."""
    states: tuple[PartLayout, ...] = ()
    """What the layer keeps in place of tokens, in vLLM's order."""

    def layout(self, dtype: str, first: int, tokens: int) -> LayerLayout:
        """Of a document of so many tokens, of which it holds those from `first` on."""
        if self.states:
            named = {f"state_{n}": part for n, part in enumerate(self.states)}
            return LayerLayout(named, tokens, "state", state_length=tokens)
        parts = {
            name: PartLayout(dtype, (heads, tokens - first, dim), "htd")
            for name, (heads, dim) in self.parts.items()
        }
        kind = self.kind
        return LayerLayout(parts, tokens, kind.kind, kind.window, kind.rope)


@dataclass(frozen=True)
class Engine:
    """The model's cache, as both halves of the connector must know it."""

    layers: tuple[CachedLayer | None, ...]
    """In the model's order; None for one that shares another's cache."""
    groups: tuple[Group, ...]
    ropes: tuple[dict[str, Any], ...]
    dtype: str
    split: Split
    goes_on: bool = True
    """Whether vLLM computes a prompt on top of what is in the cache. Where it does not, prompts are
    stored, and none is loaded."""

    @classmethod
    def of(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Engine:
        """What vLLM's configuration says. Raises UnsupportedError, which names the reason, for
        caches that are not handled."""
        config = vllm_config.model_config.hf_config
        split = Split.of(vllm_config.parallel_config)
        kinds = layer_kinds(config)
        # In an older transformers those at the end that share others' caches are left out.
        count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
        kinds += [LayerKind("full", None, None, empty=True)] * (count - len(kinds))
        groups, found = list[Group](), dict[int, CachedLayer]()
        specs: list[KVCacheSpec] = []
        for number, group in enumerate(kv_cache_config.kv_cache_groups):
            spec = group.kv_cache_spec
            each = getattr(spec, "kv_cache_specs", {})  # of layers whose pages differ
            window = getattr(spec, "sliding_window", None)
            owns = [each.get(name, spec) for name in group.layer_names]
            sliding = type(spec).__name__ == _SLIDING
            state = any(type(own).__name__ == _STATE for own in owns)
            groups.append(Group(spec.block_size, window if sliding else None, state))
            for name, own in zip(group.layer_names, owns, strict=True):
                i = index_of(name, len(kinds))
                if i in found:
                    raise UnsupportedError(
                        f"layer {i} of the model has several caches, {found[i].name} and {name}: "
                        "such models are not handled"
                    )
                kind = kinds[i]
                if sliding:
                    kind = kind._replace(kind="sliding", window=window)
                if state:
                    found[i] = CachedLayer(name, number, kind, {}, _states_of(own, name))
                    continue
                found[i] = CachedLayer(name, number, kind, _parts_of(own, config, name))
                specs.append(own)
        dtype = _dtype_of(specs, vllm_config) if specs or not found else _model_dtype(vllm_config)
        for i, kind in enumerate(kinds):
            if i not in found and not kind.empty and split.pipeline == 1:
                raise UnsupportedError(
                    f"vLLM keeps no cache of layer {i} of {len(kinds)}, which the model's config "
                    f"says is of kind {kind.kind}: such models are not handled"
                )
        layers = [found.get(i) for i in range(len(kinds)) if i in found or split.pipeline == 1]
        latents = ["latent" in layer.parts for layer in layers if layer is not None]
        if all(latents):
            split = split.with_equal_tensor_ranks()
        scheduling = getattr(vllm_config, "scheduler_config", None)
        # MLA on a CPU: where prompts are not computed in chunks, attention leaves out the cache.
        goes_on = not any(latents) or getattr(scheduling, "enable_chunked_prefill", True)
        return cls(tuple(layers), tuple(groups), rope_of_config(config), dtype, split, goes_on)

    def most(self, tokens: int) -> int:
        """Up to which position a cache for a prompt of so many tokens can be loaded at the most:
        one is left for the model, which must compute the next one."""
        return (tokens - 1) // self.block_tokens * self.block_tokens if self.goes_on else 0

    @cached_property
    def has_states(self) -> bool:
        """Whether some layers keep states, which are good at one position only."""
        return any(group.state for group in self.groups)

    def kept(self, tokens: int) -> int:
        """How many first tokens of a prompt of so many are stored: all; or, where there are
        states, those up to the last position at which vLLM keeps them and that can be loaded."""
        return self.most(tokens) if self.has_states else tokens

    @cached_property
    def block_tokens(self) -> int:
        """Prefixes are loaded in multiples of this: a whole block in each group."""
        return math.lcm(*(group.block_tokens for group in self.groups))

    @cached_property
    def in_background(self) -> bool:
        """Whether documents are loaded before a request is scheduled, and not layer after layer
        within its first step. What fails in a step is told to vLLM by block, which it can only
        answer to where a single group keeps the blocks of all tokens."""
        return len(self.groups) > 1 or any(g.state or g.window is not None for g in self.groups)

    def document_bytes(self, tokens: int) -> int:
        """Bytes of so many tokens in all layers, and of the states after them."""
        held = (layer.states for layer in self.layers if layer is not None)
        states = sum(part.nbytes for parts in held for part in parts)
        return self._token_bytes * tokens + states

    @cached_property
    def _token_bytes(self) -> int:
        numbers = (
            heads * dim
            for layer in self.layers
            if layer is not None
            for heads, dim in layer.parts.values()
        )
        return sum(numbers) * dtypes.get(self.dtype).itemsize

    def layer_layout(self, i: int, first: int, tokens: int) -> LayerLayout:
        """Layer i of a document of so many tokens, of which it holds those from `first` on."""
        layer = self.layers[i]
        if layer is None:
            return LayerLayout({}, tokens)
        return layer.layout(self.dtype, first, tokens)

    def usable(self, layout: Layout, tokens: int, most: int, computed: int) -> int:
        """To which position a document can be loaded into a cache that has the first `computed`
        tokens: 0 if to none beyond these. `tokens`: how many first ones are the prompt's; `most`:
        where to stop at the latest. Of a document of other layers all is taken to be there: that it
        does not fit is told when it is opened."""
        stop = min(tokens // self.block_tokens * self.block_tokens, most)
        if stop <= computed or (self.has_states and stop != layout.tokens):
            return 0
        if len(layout.layers) != len(self.layers):
            return stop
        for layer, stored in zip(self.layers, layout.layers, strict=True):
            if layer is not None and stored.parts and not layer.states:
                needed = max(computed, self.groups[layer.group].needed_from(stop))
                if stored.first > needed:
                    return 0
        return stop

    def check(self, layout: Layout) -> None:
        """Raise UnsupportedError unless a document has this cache's layers."""
        tokens = layout.tokens
        alike = layout.dtype == self.dtype and len(layout.layers) == len(self.layers)
        for i, stored in enumerate(layout.layers if alike else ()):
            wanted = self.layer_layout(i, stored.first if stored.parts else tokens, tokens)
            alike = alike and [*stored.parts.items()] == [*wanted.parts.items()]
        if not alike:
            raise UnsupportedError(
                f"it holds {_described(layout.dtype, layout)}; the engine has "
                f"{_described(self.dtype, self._layout(tokens))}"
            )

    def _layout(self, tokens: int) -> Layout:
        count = len(self.layers)
        return Layout(self.dtype, tuple(self.layer_layout(i, 0, tokens) for i in range(count)))


def _described(dtype: str, layout: Layout) -> str:
    """Layers of a document in a few words."""
    shapes = {
        tuple((name, part.dtype, part.size("h"), part.size("d")) for name, part in parts.items())
        for parts in (layer.parts for layer in layout.layers)
    }
    told = "; ".join(
        ", ".join(f"{name} {form} [{heads}, {dim}]" for name, form, heads, dim in shape) or "none"
        for shape in sorted(shapes)
    )
    return f"{len(layout.layers)} layers of {dtype}, [heads, dim] of parts: {told}"


def _parts_of(spec: KVCacheSpec, config: Any, name: str) -> dict[str, tuple[int, int]]:
    """Heads and dim of the parts of a layer of this spec. Raises UnsupportedError."""
    kind = type(spec).__name__
    if kind not in (_FULL, _SLIDING, _LATENT):
        raise UnsupportedError(
            f"the cache {name} is a {kind}, which is none of full, sliding-window or latent "
            "attention, and no state: such models are not handled"
        )
    whole = getattr(spec, "tokens_per_state", 1) == 1 and not getattr(spec, "dcp_size", 0)
    packed = getattr(spec, "num_head_slots", None) or getattr(spec, "state_content_bytes", None)
    if not whole or packed is not None:
        raise UnsupportedError(f"the cache {name} packs its tokens: such caches are not handled")
    if kind == _LATENT:
        text = config.get_text_config(decoder=True)
        latent = text.kv_lora_rank
        return {"latent": (1, latent), "k_rope": (1, spec.head_size - latent)}
    heads, dim = spec.num_kv_heads, spec.head_size
    return {"k": (heads, dim), "v": (heads, getattr(spec, "head_size_v", None) or dim)}


def _states_of(spec: Any, name: str) -> tuple[PartLayout, ...]:
    """What a layer of this spec keeps, [heads, rows, dim] and less. Raises UnsupportedError."""
    if getattr(spec, "mamba_cache_mode", "") != "align":
        raise UnsupportedError(
            f"vLLM keeps the states of {name} at no block's end: set enable_prefix_caching=True, "
            'and mamba_cache_mode="align" if it is set'
        )
    if getattr(spec, "num_speculative_blocks", 0):
        raise UnsupportedError(f"the states of {name} are of drafts, too: draft models are refused")
    found = []
    for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
        rows = (math.prod(shape[:-2]), *shape[-2:]) if len(shape) > 3 else tuple(shape)
        found.append(PartLayout(dtypes.get(str(dtype)).name, rows, "hrd"[-len(rows) :]))
    return tuple(found)


def _model_dtype(vllm_config: VllmConfig) -> str:
    """The format of a model's numbers, where no layer keeps keys and values."""
    return dtypes.get(str(vllm_config.model_config.dtype)).name


def _dtype_of(specs: list[KVCacheSpec], vllm_config: VllmConfig) -> str:
    """The format of all layers' numbers. Raises UnsupportedError where they are of several, or mean
    something only with scales that no document has."""
    forms = {spec.dtype for spec in specs}
    told = str(getattr(getattr(vllm_config, "cache_config", None), "cache_dtype", "auto"))
    fp8 = fp8_format(told)
    if forms == {torch.uint8} and fp8 is not None:
        return fp8
    if len(forms) != 1 or not forms <= {torch.bfloat16, torch.float16, torch.float32}:
        names = ", ".join(sorted(map(str, forms))) or "no layers"
        raise UnsupportedError(
            f"a cache of {names} (kv_cache_dtype={told!r}) depends on scales besides, or is of "
            "several formats: use kv_cache_dtype='auto' or 'fp8'"
        )
    return dtypes.get(str(forms.pop())).name


def origin_of(vllm_config: VllmConfig, settings: Settings, engine: Engine) -> Origin:
    """What documents are found by: the checkpoint, and what vLLM was told to change about it.

    Raises KVZipError when nothing pins the weights.
    """
    config = vllm_config.model_config
    loading = getattr(vllm_config, "load_config", None)
    load_format = str(getattr(loading, "load_format", "auto"))
    usual = load_format.rpartition(".")[2].lower() in ("auto", "safetensors", "hf")
    revision = settings.revision
    if revision is None:
        commit = getattr(config.hf_config, "_commit_hash", None)
        try:
            revision = checkpoint_fingerprint(config.model, commit, every=not usual)
        except KVZipError:
            revision = commit  # an engine may stream weights that never lie on this machine
        if not revision:
            raise KVZipError(
                f"nothing says which weights of {config.model} these are: set revision in "
                "kv_connector_extra_config, and change it whenever they change"
            )
    overrides = getattr(config, "hf_overrides", None)
    # A function says nothing of what it does, and a path nothing of what lies there.
    of_another = callable(overrides) or getattr(config, "hf_config_path", None)
    told = {
        "quantization": getattr(config, "quantization", None),
        "quantization_config": getattr(config, "quantization_config", None),
        "hf_overrides": None if callable(overrides) else overrides,
        "config": of_another and config.hf_config.to_json_string(),
        "classes": getattr(config, "model_class_overrides", None),
        "load_format": not usual and load_format,
        "loader": getattr(loading, "model_loader_extra_config", None),
        # Of transformers' the shapes are others.
        "states": engine.has_states and "as vLLM keeps them",
        # What numbers of 8 bits mean is told by the checkpoint's scales, or by 1.
        "scales": dtypes.get(engine.dtype).itemsize == 1 and "as vLLM takes them",
    }
    return Origin(
        model=settings.model or config.model,
        revision=changed(revision, told),
        architecture=next(iter(getattr(config.hf_config, "architectures", None) or []), ""),
        rope=engine.ropes,
        software={"vllm": str(vllm.__version__), "torch": str(torch.__version__)},
    )
