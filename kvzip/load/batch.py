"""Several prompts as one batch, each with a document of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from kvzip.container import Reader
from kvzip.errors import KVZipError, StoreError
from kvzip.load.config import LayerKind, cache_argument, layer_kinds
from kvzip.load.documents import (
    Opened,
    agreed,
    check_config,
    check_held,
    finder,
    ids_of,
    in_common,
    lazy_cache,
    prefill_of,
    spans_of,
)
from kvzip.load.lazy import BatchLoader, Computed, Loader, Recovery, naming, tell
from kvzip.load.witness import watch
from kvzip.snapshot import Snapshot
from kvzip.store import Store


def load_batch(
    sources: Sequence[Any],
    config: Any,
    prompts: Sequence[Any],
    *,
    pad_token_id: int = 0,
    profile: Any = None,
    device: Any = None,
    threads: int = 0,
) -> dict[str, Any]:
    """Several prompts with a document each as one batch: ``generate(**load_batch(...))``.

    `sources`: for each prompt what :func:`kvzip.load.hf.load_cache` takes, or None where there is
    no document. `prompts`: token ids, [n] each, of any lengths. Returns ``input_ids``,
    ``attention_mask`` (both [batch, longest], padded at the left) and the cache, as
    :func:`kvzip.load.hf.cache_argument` names it.

    All rows of a cache end at one column, so the row with the most tokens after its document tells
    how much the others compute again. Checks and errors are those of `load_cache` with `prompt`,
    and say which prompt's document they are about; what is fed must be what was returned.
    """
    padded = _Prompts(prompts, sources)
    kinds = layer_kinds(config)
    with ExitStack() as stack:
        opened, shared = [], []
        for n, (source, row) in enumerate(zip(sources, padded.rows, strict=True)):
            with naming(n):
                one = stack.enter_context(Opened(source, profile, threads))
                common = 0
                if one.source is not None:
                    check_config(one.source, config)
                    common = in_common(one.source.layout, one.source.token_ids, row[None])
            opened.append(one)
            shared.append(common)
        column = min(padded.column(n, common) for n, common in enumerate(shared))
        rows: list[Loader | None] = []
        for n, (one, common) in enumerate(zip(opened, shared, strict=True)):
            count, row = padded.before(n, column), None
            if count and one.source is not None:
                with naming(n):
                    row = _loader(one.source, kinds, count, common, device, threads)
            rows.append(row)
        if len({row.dtype for row in rows if row is not None}) > 1:
            raise KVZipError("the documents of a batch are not all of one dtype")
        return padded.inputs(pad_token_id, device) | _cache(
            rows, config, kinds, column, padded.longest, opened
        )


def load_batch_or_prefill(
    source: Any,
    model: Any,
    prompts: Sequence[Any],
    *,
    name: str | None = None,
    revision: str | None = None,
    pad_token_id: int = 0,
    profile: Any = None,
    threads: int = 0,
) -> dict[str, Any]:
    """What :func:`load_batch` returns, on the model's device, and right whatever happens to what is
    stored, as :func:`kvzip.load.hf.load_or_prefill` is for one prompt.

    `source`: a :class:`kvzip.store.Store` in which each prompt's document is looked for, or for
    each prompt a source of its own: a Store, what `load_cache` takes, or None. `name`, `revision`:
    as for `load_or_prefill`.

    A prompt whose document is missing, or fails (at once or while the model runs), is computed on
    its own, as far as the others are loaded; those stay loaded. Only when what the model is fed
    does not go on from what is stored, as with other weights, all are computed, since it does not
    show which one is wrong. Each failure is logged as one warning ("kvzip.load"), which says whose
    document it is. A store that does not answer is not asked again for the rest of the batch.
    """
    sources = [source] * len(prompts) if isinstance(source, Store) else source
    padded = _Prompts(prompts, sources)
    kinds = layer_kinds(model.config)
    with ExitStack() as stack:
        opened: list[Opened] = []
        shared: dict[int, tuple[Reader | Snapshot, int, int]] = {}
        silent: list[Any] = []
        for n, (one_source, row) in enumerate(zip(sources, padded.rows, strict=True)):
            if any(one_source is store for store in silent):
                continue
            find = finder(model, row, name, revision, profile, threads)
            try:
                with naming(n):
                    one = stack.enter_context(Opened(one_source, profile, threads, find))
                    if one.source is not None:
                        _, most, common = agreed(one.source, model, row[None])
                        shared[n] = one.source, most, common
                        opened.append(one)
            except (KVZipError, OSError) as error:
                tell(error)
                if isinstance(error, StoreError) and isinstance(one_source, Store):
                    silent.append(one_source)
        column = min((padded.column(n, usable) for n, (_, usable, _) in shared.items()), default=0)
        rows: list[Loader | Computed | None] = []
        for n, prompt in enumerate(padded.rows):
            count = padded.before(n, column)
            if not count:
                rows.append(None)
                continue
            recovery = Recovery(prefill_of(model, prompt[None], count))
            loaded: Loader | Computed = Computed(recovery, model.dtype, model.device)
            if n in shared:
                document, _, common = shared[n]
                try:
                    with naming(n):
                        loaded = _loader(document, kinds, count, common, None, threads)
                    loaded.recovery = recovery
                except KVZipError as error:
                    tell(error)
            rows.append(loaded)
        made = _cache(rows, model.config, kinds, column, padded.longest, opened)
        if any(rows):
            watch(model, *made.values())
        return padded.inputs(pad_token_id, model.device) | made


class _Prompts:
    """Prompts of a batch, [n] each, the shorter ones padded at the left."""

    def __init__(self, prompts: Sequence[Any], sources: Sequence[Any]):
        if not len(sources) == len(prompts) > 0:
            raise KVZipError(f"{len(sources)} documents for {len(prompts)} prompts")
        self.rows = [ids_of(prompt, "prompts")[0] for prompt in prompts]
        self.longest = max(map(len, self.rows))

    def column(self, n: int, tokens: int) -> int:
        """Where a row's first `tokens` end, if one at least is to be left."""
        length = len(self.rows[n])
        return min(tokens, length - 1) + self.longest - length

    def before(self, n: int, column: int) -> int:
        """How many of a row's tokens lie before a column."""
        return max(0, column - self.longest + len(self.rows[n]))

    def inputs(self, pad_token_id: int, device: Any) -> dict[str, Any]:
        ids = torch.full((len(self.rows), self.longest), pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(self.rows):
            ids[i, self.longest - len(row) :] = torch.from_numpy(row.astype(np.int64))
            mask[i, self.longest - len(row) :] = 1
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _loader(
    document: Reader | Snapshot,
    kinds: Sequence[LayerKind],
    count: int,
    common: int,
    device: Any,
    threads: int,
) -> Loader:
    """Of a document's first `count` tokens; of those `common` ones the next key is their witness.
    Raises KVZipError if it does not hold them."""
    check_held(document.layout, count)
    return Loader(document, spans_of(kinds, count, count < common), count, device, threads)


def _cache(
    rows: Sequence[Loader | Computed | None],
    config: Any,
    kinds: Sequence[LayerKind],
    column: int,
    longest: int,
    opened: Sequence[Opened],
) -> dict[str, Any]:
    if not any(rows):
        return cache_argument(DynamicCache(config=config.get_text_config(decoder=True)))
    batch = BatchLoader(rows, column, [kind.window for kind in kinds])
    for one in opened:
        one.close_after(batch)
    return cache_argument(lazy_cache(batch, kinds, column, longest))
