"""One layer of vLLM's paged cache as parts of a document, read and written through views.

vLLM hands a connector each layer as a tensor [blocks, heads, tokens of a block, channels]. Within a
block and head a backend orders numbers as its kernels want them; `ARRANGEMENTS` names the orders
that are known. What is taken out is [heads, tokens, dim], so that documents do not depend on who
wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kvzip.errors import UnsupportedError
from kvzip.snapshot import PartLayout

ARRANGEMENTS = {
    "halves": "a token's channels are its key, then its value; or its latent, then what is rotated",
    "columns": "all keys, [dim, tokens]; then all values, [tokens, dim]",
    "tiles": "all keys, [tokens / 16, dim / 2, 16 tokens, 2 dims]; then all values, [dim / 16, "
    "tokens / 2, 16 dims, 2 tokens]",
}
"""From the attention backends of vLLM 0.32.0 and 0.33.0: halves in ``flash_attn.py``,
``triton_attn.py`` and ``flex_attention.py``; on CPU ``csrc/cpu/cpu_attn_vec.hpp`` (columns),
``cpu_attn_amx.hpp`` (tiles), of fp8 ``cpu_attn_fp8.hpp``, which orders bytes as these do their
numbers, and of latents ``sgl-kernels/mla_cache.cpp`` (halves)."""

_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION")
_LATENT = ("CPU_MLA", "AMX_MLA", "FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA")
_CPU = {"vec": "columns", "vec16": "columns", "amx": "tiles"}
_MOST_BYTES = {"columns": 4, "tiles": 2}
"""Of a number, in an arrangement of the CPU's kernels."""


def kernels_of(layer: Any, itemsize: int) -> str | None:
    """vLLM's name of the CPU kernels of an attention layer, and "amx_fp8" for those that take the
    place of "amx" where numbers have 1 byte and the processor multiplies these itself; None: it has
    no such kernels."""
    isa: str | None = getattr(layer, "isa", None)
    if isa == "amx" and itemsize == 1:
        asked = getattr(torch.ops._C, "cpu_has_amx_fp8", None)
        if asked is not None and asked():
            return "amx_fp8"
    return isa


def arrangement_of(backend: str, isa: str | None, itemsize: int) -> str:
    """The arrangement that an attention backend of vLLM uses, on CPU with its kernels of `isa`.

    Raises UnsupportedError for one that is not known.
    """
    if backend in _BACKENDS + _LATENT:
        return "halves"
    found = _CPU.get(isa or "") if backend == "CPU_ATTN" else None
    if found is None or itemsize > _MOST_BYTES[found]:
        kernels = f" with its {isa} kernels" if backend == "CPU_ATTN" else ""
        kernels += f" for numbers of {itemsize} bytes" if found else ""
        raise UnsupportedError(
            f"attention backend {backend}{kernels} orders its cache in a way that kvzip does not "
            f"know: use one of {', '.join(_BACKENDS)}, for latents one of {', '.join(_LATENT)}, or "
            f"on CPU one of {', '.join(_CPU)}"
        )
    return found


class Paged(NamedTuple):
    """Where a device may write a layer's keys and values itself, as :meth:`Reader.decode` takes
    it."""

    out: tuple[torch.Tensor, ...]
    """[pages, tokens of a page, heads, dim] of each."""
    pages: list[int]
    """Which page holds each run of positions, from position 0 on."""


class Pages:
    """The parts of one layer in vLLM's blocks.

    `cache`: [blocks, heads, tokens of a block, channels], or [blocks, tokens of a block, channels]
    of latents. `parts`: heads and dim of each part, in the order of the channels. `tokens`: of one
    of vLLM's blocks, of which each may be several here, one after the other.

    Raises UnsupportedError when the cache has another shape.
    """

    def __init__(
        self,
        cache: torch.Tensor,
        arrangement: str,
        parts: Mapping[str, tuple[int, int]],
        tokens: int,
    ):
        self._dtype = cache.dtype
        if cache.ndim == 3:
            cache = cache[:, None]
        heads, dims = next(iter(parts.values()))[0], [dim for _, dim in parts.values()]
        size = cache.shape[2] if cache.ndim == 4 else 0
        if cache.ndim != 4 or cache.shape[1] != heads or cache.shape[3] != sum(dims):
            raise UnsupportedError(
                f"vLLM's cache has shape {list(cache.shape)}: "
                f"want [blocks, {heads}, tokens, {sum(dims)}]"
            )
        if size == 0 or tokens % size:
            raise UnsupportedError(
                f"vLLM's cache has pages of {size} tokens for blocks of {tokens}"
            )
        self._heads, self._size, self._each = heads, size, tokens // size
        self._dims, self._side_by_side = dims, arrangement == "halves"
        views = _in_order(cache, arrangement, dims)
        self._views = dict(zip(parts, views, strict=True))

    def _pages(self, blocks: Sequence[int], device: torch.device) -> torch.Tensor:
        """Which pages are those of vLLM's blocks."""
        found = torch.tensor(blocks, dtype=torch.int64, device=device)
        if self._each == 1:
            return found
        within = torch.arange(self._each, device=device)
        return (found[:, None] * self._each + within).reshape(-1)

    def paged(self, blocks: Sequence[int], start: int) -> Paged | None:
        """The places of the parts in `blocks`, whose first token has the position `start`; None
        where the numbers of a head do not lie side by side, or pages begin elsewhere."""
        if not self._side_by_side or start % self._size:
            return None
        out = tuple(view[:, :, :, 0, :, 0].transpose(1, 2) for view in self._views.values())
        within = range(self._each)
        found = [block * self._each + n for block in blocks for n in within]
        return Paged(out, [0] * (start // self._size) + found)

    def take(self, blocks: Sequence[int], tokens: int) -> dict[str, torch.Tensor]:
        """The parts of the first `tokens` tokens in `blocks` (ids, in the tokens' order), [heads,
        tokens, dim]: copies, on the cache's device."""
        found: dict[str, torch.Tensor] = {}
        for (name, view), dim in zip(self._views.items(), self._dims, strict=True):
            pages = self._pages(blocks, view.device)
            picked = view.index_select(0, pages).transpose(0, 1)
            flat = picked.reshape(self._heads, len(pages) * self._size, dim)
            found[name] = flat[:, :tokens]
        return found

    def put(self, blocks: Sequence[int], parts: Mapping[str, torch.Tensor]) -> None:
        """Fill `blocks` with parts, [heads, tokens, dim]. Where the last block is not full, what
        follows in it stays."""
        for (name, view), dim in zip(self._views.items(), self._dims, strict=True):
            pages, new = self._pages(blocks, view.device), parts[name]
            if new.is_cuda:  # whoever decoded it may get its memory back before this has run
                new.record_stream(torch.cuda.current_stream(new.device))
            new = new.view(self._dtype).to(view.device)
            if new.shape[1] < len(pages) * self._size:
                whole = view.index_select(0, pages).transpose(0, 1)
                whole = whole.reshape(self._heads, len(pages) * self._size, dim)
                whole[:, : new.shape[1]] = new
                new = whole
            split = new.reshape(self._heads, len(pages), *view.shape[2:])
            view[pages] = split.transpose(0, 1)

    def settle(self) -> None:
        """Return when what was put is there, on a device whose work goes on by itself."""
        _settle(next(iter(self._views.values())).device)


class StatePages:
    """The states of one layer in vLLM's blocks, of which each holds one of each kind, side by side.

    `cache`: [blocks, ..., bytes]. `parts`: by their names, in vLLM's order. Raises UnsupportedError
    when the cache has another shape.
    """

    def __init__(self, cache: torch.Tensor, parts: Mapping[str, PartLayout]):
        need = sum(part.nbytes for part in parts.values())
        raw = cache.flatten(1) if cache.ndim > 1 else cache[:, None]
        raw = raw.view(torch.uint8)
        if raw.data_ptr() != cache.data_ptr() or raw.shape[1] < need:
            raise UnsupportedError(
                f"vLLM's cache has shape {list(cache.shape)}: want [blocks, {need:,} bytes]"
            )
        self._views: dict[str, torch.Tensor] = {}
        at = 0
        for name, part in parts.items():
            self._views[name] = raw[:, at : at + part.nbytes]
            at += part.nbytes
        self._parts = dict(parts)

    def take(self, blocks: Sequence[int], tokens: int) -> dict[str, torch.Tensor]:
        """The states after the last of so many tokens in `blocks`: copies, on the cache's
        device."""
        found = {}
        for name, part in self._parts.items():
            copied = self._views[name][blocks[-1]].clone()
            found[name] = copied.view(getattr(torch, part.form.torch)).view(part.shape)
        return found

    def put(self, blocks: Sequence[int], parts: Mapping[str, torch.Tensor]) -> None:
        """Fill the last of `blocks` with states."""
        for name, view in self._views.items():
            new = parts[name].contiguous().view(-1).view(torch.uint8)
            view[blocks[-1]] = new.to(view.device)

    def settle(self) -> None:
        """As :meth:`Pages.settle`."""
        _settle(next(iter(self._views.values())).device)


def reached(device: torch.device) -> torch.cuda.Event | None:
    """When what the thread's stream was given so far is done; None on a device that does it at
    once."""
    if device.type != "cuda":
        return None
    # Who waits for it sleeps: the CPU is the engine's.
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _in_order(cache: torch.Tensor, arrangement: str, dims: Sequence[int]) -> Sequence[torch.Tensor]:
    """A view of each part, [pages, heads, token, token, dim, dim]: tokens and dims may be of two
    axes each."""
    pages, heads, tokens = cache.shape[:3]
    if arrangement == "halves":
        return [part[..., None, :, None] for part in cache.split(list(dims), -1)]
    if len({*dims}) > 1:
        raise UnsupportedError(f"keys and values of {dims} numbers are not known in {arrangement}")
    dim = dims[0]
    k, v = cache.view(pages, heads, 2, tokens * dim).unbind(2)
    if arrangement == "columns":
        return [
            k.unflatten(2, (dim, 1, tokens, 1)).permute(0, 1, 4, 5, 2, 3),
            v.unflatten(2, (tokens, 1, dim, 1)),
        ]
    return [
        k.unflatten(2, (tokens // 16, dim // 2, 16, 2)).permute(0, 1, 2, 4, 3, 5),
        v.unflatten(2, (dim // 16, tokens // 2, 16, 2)).permute(0, 1, 3, 5, 2, 4),
    ]
