"""One layer of vLLM's paged cache as keys and values, read and written through strided views.

vLLM hands a connector each layer as a tensor [blocks, heads, tokens of a block, channels]. Within a
block and head a backend orders numbers as its kernels want them; `ARRANGEMENTS` names the orders
that are known. What is taken out is [heads, tokens, dim], so that documents do not depend on who
wrote them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvzip.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

ARRANGEMENTS = {
    "halves": "a token's channels are its key, then its value",
    "columns": "all keys, [dim, tokens]; then all values, [tokens, dim]",
    "tiles": "all keys, [tokens / 16, dim / 2, 16 tokens, 2 dims]; then all values, [dim / 16, "
    "tokens / 2, 16 dims, 2 tokens]",
}
"""From vLLM 0.32.0's attention backends: halves in ``flash_attn.py``, ``triton_attn.py`` and
``flex_attention.py``; on CPU ``csrc/cpu/cpu_attn_vec.hpp`` (columns), ``cpu_attn_amx.hpp`` (tiles,
of 2-byte numbers)."""

_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION")
_CPU = {"vec": "columns", "vec16": "columns", "amx": "tiles"}


def arrangement_of(backend: str, isa: str | None, itemsize: int) -> str:
    """The arrangement that an attention backend of vLLM uses, on CPU with its kernels of `isa`.

    Raises UnsupportedError for one that is not known.
    """
    if backend in _BACKENDS:
        return "halves"
    found = _CPU.get(isa or "") if backend == "CPU_ATTN" else None
    if found is None or (found == "tiles" and itemsize != 2):
        kernels = f" with its {isa} kernels" if backend == "CPU_ATTN" else ""
        raise UnsupportedError(
            f"attention backend {backend}{kernels} orders its cache in a way that kvzip does not "
            f"know: use one of {', '.join(_BACKENDS)}, or on CPU one of {', '.join(_CPU)}"
        )
    return found


class Pages:
    """Keys and values of one layer: `cache`, [blocks, heads, tokens of a block, channels]."""

    def __init__(self, cache: torch.Tensor, arrangement: str, dim: int):
        if cache.ndim != 4 or cache.shape[-1] != 2 * dim:
            raise UnsupportedError(
                f"vLLM's cache has shape {list(cache.shape)}: "
                f"want [blocks, heads, tokens, {2 * dim}]"
            )
        blocks, heads, tokens = cache.shape[:3]
        self._shape = heads, tokens, dim
        if arrangement == "halves":
            self._views = [cache[..., None, :dim, None], cache[..., None, dim:, None]]
            return
        k, v = cache.view(blocks, heads, 2, tokens * dim).unbind(2)
        if arrangement == "columns":
            k = k.unflatten(2, (dim, 1, tokens, 1)).permute(0, 1, 4, 5, 2, 3)
            v = v.unflatten(2, (tokens, 1, dim, 1))
        else:
            k = k.unflatten(2, (tokens // 16, dim // 2, 16, 2)).permute(0, 1, 2, 4, 3, 5)
            v = v.unflatten(2, (dim // 16, tokens // 2, 16, 2)).permute(0, 1, 3, 5, 2, 4)
        self._views = [k, v]
        """[blocks, heads, token, token, dim, dim]: tokens and dims are of two axes each."""

    def take(self, blocks: torch.Tensor, tokens: int) -> list[torch.Tensor]:
        """K and V of the first `tokens` tokens in `blocks` (ids, in the tokens' order): CPU copies,
        [heads, tokens, dim]."""
        heads, size, dim = self._shape
        found: list[torch.Tensor] = []
        for view in self._views:
            picked = view.index_select(0, blocks.to(view.device)).transpose(0, 1)
            flat = picked.reshape(heads, len(blocks) * size, dim)
            found.append(flat[:, :tokens].cpu())
        return found

    def put(self, blocks: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Fill whole `blocks` with k and v, [heads, blocks * tokens of a block, dim]."""
        heads = self._shape[0]
        for view, new in zip(self._views, (k, v), strict=True):
            split = new.to(view.device).view(heads, len(blocks), *view.shape[2:])
            view[blocks.to(view.device)] = split.transpose(0, 1)
