"""What vLLM says of the model that it serves: its cache's layers, and where caches come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import vllm

from kvzip import dtypes
from kvzip.container import Reader
from kvzip.errors import KVZipError, UnsupportedError
from kvzip.identity.checkpoint import changed, checkpoint_fingerprint
from kvzip.load.config import LayerKind, layer_kinds, rope_parameters
from kvzip.load.vllm.settings import Settings
from kvzip.snapshot import LayerLayout, Origin

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class Engine:
    """The model's cache, as both halves of the connector must know it."""

    layers: tuple[str, ...]
    """vLLM's names of the layers, in the model's order."""
    kinds: tuple[LayerKind, ...]
    ropes: tuple[dict[str, Any], ...]
    block_tokens: int
    heads: int
    dim: int
    dtype: str

    @classmethod
    def of(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Engine:
        """What vLLM's configuration says. Raises UnsupportedError, which names the reason, for
        caches that are not handled."""
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise UnsupportedError(
                f"the model's cache is managed in {len(groups)} groups, of which kvzip handles "
                "one: set disable_hybrid_kv_cache_manager=True"
            )
        spec, layers = groups[0].kv_cache_spec, tuple(groups[0].layer_names)
        kind = type(spec).__name__
        if kind not in ("FullAttentionSpec", "SlidingWindowSpec"):
            raise UnsupportedError(f"a cache of {kind} is none of full or sliding-window attention")
        if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UnsupportedError(
                f"a cache of {spec.dtype} depends on scales besides: use kv_cache_dtype='auto'"
            )
        config = vllm_config.model_config.hf_config
        kinds = layer_kinds(config)
        if any(kind.states or kind.kind not in ("full", "sliding") for kind in kinds):
            raise UnsupportedError("a model with states or latents is not handled")
        if len(kinds) != len(layers):
            raise UnsupportedError(
                f"vLLM keeps a cache of {len(layers)} layers, the model's config has {len(kinds)}; "
                "draft models and layers that share a cache are not handled"
            )
        return cls(
            layers,
            tuple(kinds),
            rope_parameters(config),
            spec.block_size,
            spec.num_kv_heads,
            spec.head_size,
            dtypes.get(str(spec.dtype)).name,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        numbers = 2 * self.heads * self.dim * len(self.layers)
        return numbers * dtypes.get(self.dtype).itemsize

    def layout(self, i: int, tokens: int) -> LayerLayout:
        """Layer i of a document of so many tokens: all of them, the sliding layers' too."""
        shape = (self.heads, tokens, self.dim)
        kind = self.kinds[i]
        return LayerLayout.of_kv(
            shape, shape, self.dtype, tokens, kind.kind, kind.window, kind.rope
        )

    def check(self, reader: Reader) -> None:
        """Raise UnsupportedError unless a document has this cache's layers."""
        found = reader.layout
        shapes = {(layer.k[0], layer.k[-1], layer.v[-1]) for layer in found.layers}
        if (
            found.dtype != self.dtype
            or len(found.layers) != len(self.layers)
            or shapes != {(self.heads, self.dim, self.dim)}
        ):
            raise UnsupportedError(
                f"it holds {len(found.layers)} layers of {found.dtype}, [heads, dim] in "
                f"{sorted({s[:2] for s in shapes})}; the engine has {len(self.layers)} of "
                f"{self.dtype}, {(self.heads, self.dim)}"
            )


def check_parallel(config: ParallelConfig) -> None:
    """Raise UnsupportedError where the model is cut over several workers."""
    for name in ("tensor", "pipeline", "decode_context", "prefill_context"):
        if getattr(config, f"{name}_parallel_size", 1) > 1:
            raise UnsupportedError(
                f"{name}_parallel_size is above 1: documents hold whole layers, which no worker has"
            )


def origin_of(vllm_config: VllmConfig, settings: Settings, engine: Engine) -> Origin:
    """What documents are found by: the checkpoint, and what vLLM was told to change about it.

    Raises KVZipError when nothing pins the weights.
    """
    config = vllm_config.model_config
    load_format = str(getattr(getattr(vllm_config, "load_config", None), "load_format", "auto"))
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
    told = {
        "quantization": getattr(config, "quantization", None),
        "hf_overrides": getattr(config, "hf_overrides", None),
        "load_format": not usual and load_format,
    }
    return Origin(
        model=settings.model or config.model,
        revision=changed(revision, told),
        architecture=next(iter(getattr(config.hf_config, "architectures", None) or []), ""),
        rope=engine.ropes,
        software={"vllm": str(vllm.__version__), "torch": str(torch.__version__)},
    )
