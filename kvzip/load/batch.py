"""Several prompts as one batch, each with a document of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from kvzip.container import Reader
from kvzip.errors import KVZipError, StoreError, UnsupportedError, UsageError
from kvzip.load.caches import (
    devices_of,
    empty_cache,
    lazy_cache,
    prefill_after,
    prefill_of,
    spans_of,
)
from kvzip.load.config import (
    LayerKind,
    cache_argument,
    check_fed_one_by_one,
    check_is_config,
    check_padding,
    layer_kinds,
)
from kvzip.load.documents import Document, OpenDocument, find_document, open_document
from kvzip.load.loaders import BatchLoader, Computed, Loader
from kvzip.load.matching import (
    agreed,
    check_config,
    check_held,
    check_model,
    check_options,
    check_rope,
    check_weights,
    device_of,
    finder,
    ids_of,
    in_common,
)
from kvzip.load.placeholders import check_text_only
from kvzip.load.recovery import Recovery, naming, tell
from kvzip.load.reuse import pin
from kvzip.load.witness import watch
from kvzip.options import integer, items
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.store import Store

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_batch(
    sources: Sequence[Document | None],
    config: PretrainedConfig,
    prompts: Sequence[ArrayLike | torch.Tensor],
    *,
    pad_token_id: int = 0,
    profile: Profile | None = None,
    device: torch.device | str | None = None,
    threads: int = 0,
) -> dict[str, Any]:
    """Several prompts with a document each as one batch: ``generate(**load_batch(...))``.

    `sources`: for each prompt what :func:`kvzip.load.hf.load_cache` takes, or None where there is
    no document. `prompts`: token ids, [n] each, of any lengths. Returns ``input_ids``,
    ``attention_mask`` (both [batch, longest], padded at the left) and the cache, as
    :func:`kvzip.load.hf.cache_argument` names it.

    All rows of a cache end at one column, so the row with the most tokens after its document tells
    how much the others compute again. Raises UnsupportedError for prompts of unequal length where
    transformers itself does not do right by padding. Other checks and errors are those of
    `load_cache` with `prompt`, and say which prompt's document they are about; what is fed must be
    what was returned.
    """
    check_options(threads=threads, profile=profile)
    pad_token_id = integer("pad_token_id", pad_token_id, 0)
    device = device_of(device)
    kinds = _kinds(config)
    sources = _one_each(sources, "sources", "a list of a document, or None, for each prompt")
    padded = _Prompts(prompts, sources)
    padded.check_text_only(config, f"the model of {type(config).__name__}")
    check_padding(config, padded.lengths)
    with ExitStack() as stack:
        usable: dict[int, _Usable] = {}
        for n, (source, row) in enumerate(zip(sources, padded.rows, strict=True)):
            if source is None:
                continue
            with naming(n):
                opened = stack.enter_context(open_document(source, profile, threads))
                check_config(opened.source, config)
                check_rope(config, opened.source.layout.tokens, padded.longest)
                layout, ids = opened.source.layout, opened.source.token_ids
                common = in_common(layout, ids, row[None])
                kept = layout.state_length
                if kept is not None and common < kept:
                    check_held(layout, common)
            usable[n] = _Usable(opened, common if kept is None else kept, common)
        tokens = (usable[n].tokens if n in usable else 0 for n in range(len(sources)))
        columns = [padded.column(n, count) for n, count in enumerate(tokens)]
        column = min(columns)
        if _stateful(kinds) and len(set(columns)) > 1:
            left = [padded.longest - each for each in columns]
            raise KVZipError(
                "the states of a batch must all end at one column, so that as many tokens are left "
                f"of each prompt, and these have {left} after their documents: "
                "load_batch_or_prefill computes what is missing"
            )
        check_fed_one_by_one(config, padded.longest - column, None)
        rows: list[Loader | None] = []
        for n in range(len(sources)):
            count = padded.before(n, column)
            if not count or n not in usable:
                rows.append(None)
                continue
            with naming(n):
                rows.append(usable[n].loader(kinds, count, device, threads))
        if len({row.dtype for row in rows if row is not None}) > 1:
            raise KVZipError("the documents of a batch are not all of one dtype")
        made = _cache(rows, config, kinds, column, padded, usable.values())
        return padded.inputs(pad_token_id, device) | made


def load_batch_or_prefill(
    source: Store | Sequence[Document | Store | None],
    model: PreTrainedModel,
    prompts: Sequence[ArrayLike | torch.Tensor],
    *,
    name: str | None = None,
    revision: str | None = None,
    pad_token_id: int = 0,
    profile: Profile | None = None,
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
    Raises UnsupportedError as `load_batch` does, for what the model itself would compute wrongly.
    """
    check_model(model)
    check_options(threads=threads, profile=profile, name=name, revision=revision)
    pad_token_id = integer("pad_token_id", pad_token_id, 0)
    kinds = _kinds(model.config)
    sources = _sources(source, prompts)
    padded = _Prompts(prompts, sources)
    padded.check_text_only(model.config, type(model).__name__)
    check_padding(model.config, padded.lengths)

    def find(source: Document | Store | None, n: int) -> OpenDocument[Reader | Snapshot] | None:
        look_up = finder(model, padded.rows[n], name, revision, profile, threads)
        return find_document(source, look_up, profile, threads)

    with ExitStack() as stack:
        usable = _find_all(sources, padded, model, find, revision, stack)
        columns = [padded.column(n, one.tokens) for n, one in usable.items()]
        # A state cannot be cut, but it can be gone on from.
        column = (max if _stateful(kinds) else min)(columns, default=0)
        if column:
            try:
                check_rope(model.config, prompt=padded.longest)
                check_fed_one_by_one(model.config, padded.longest - column, None)
            except KVZipError as error:
                tell(error)
                column = 0
        rows = [
            _row_or_prefill(usable.get(n), n, model, padded, column, kinds, threads)
            for n in range(len(sources))
        ]
        made = _cache(rows, model.config, kinds, column, padded, usable.values())
        if any(rows):
            [cache] = made.values()
            pin(cache, model, revision)
            watch(model, cache)
        return padded.inputs(pad_token_id, model.device) | made


def _sources(
    source: Store | Sequence[Document | Store | None], prompts: object
) -> list[Document | Store | None]:
    """For each prompt where its document is, or is looked for."""
    if isinstance(source, Store):
        return [source] * len(_one_each(prompts, "prompts", _PROMPTS))
    return _one_each(source, "source", "a Store, or a list of a document or None for each prompt")


_PROMPTS = "a list of token ids, [n], for each prompt"


def _one_each(given: Any, name: str, what: str) -> list[Any]:
    """A list with something for each prompt. Raises UsageError, which names it and says `what` it
    must be."""
    if isinstance(given, (str, bytes, bytearray, memoryview)):  # one source
        raise UsageError(f"{name} is a {type(given).__name__}: it must be {what}")
    return items(name, given, what)


def _kinds(config: PretrainedConfig) -> list[LayerKind]:
    """The kinds of a model's layers. Raises UnsupportedError for a model with an encoder."""
    check_is_config(config)
    if config.is_encoder_decoder:
        raise UnsupportedError(
            "prompts of a model with an encoder cannot be loaded as a batch: load each by itself"
        )
    return layer_kinds(config)


def _stateful(kinds: Sequence[LayerKind]) -> bool:
    return any(kind.states for kind in kinds)


class _Usable(NamedTuple):
    """A prompt's document."""

    opened: OpenDocument[Reader | Snapshot]
    tokens: int
    """How many first tokens can be kept."""
    common: int
    """How many first tokens it shares with the prompt."""

    def loader(
        self,
        kinds: Sequence[LayerKind],
        count: int,
        device: torch.device | str | None,
        threads: int,
    ) -> Loader:
        """A loader of the first `count` tokens, and of the next one's keys as their witness, if it
        is shared. Raises KVZipError if the document does not hold them."""
        document = self.opened.source
        check_held(document.layout, count)
        spans = spans_of(kinds, count, count < self.common)
        return Loader(document, spans, count, device, threads)


def _find_all(
    sources: Sequence[Document | Store | None],
    padded: _Prompts,
    model: PreTrainedModel,
    find: Callable[[Document | Store | None, int], OpenDocument[Reader | Snapshot] | None],
    revision: str | None,
    stack: ExitStack,
) -> dict[int, _Usable]:
    """The documents that prompts have, by the prompts' numbers; they are closed with the stack.
    What cannot be used is told. A store that has not answered once is not asked again."""
    usable: dict[int, _Usable] = {}
    silent: list[Store] = []
    for n, (source, row) in enumerate(zip(sources, padded.rows, strict=True)):
        if any(source is store for store in silent):
            continue
        try:
            with naming(n):
                found = find(source, n)
                if found is not None:
                    opened = stack.enter_context(found)
                    _, most, common = agreed(opened.source, model, row[None])
                    check_weights(source, opened.source, model, revision)
                    usable[n] = _Usable(opened, most, common)
        except UsageError:  # a source that is none
            raise
        except (KVZipError, OSError) as error:
            tell(error)
            if isinstance(error, StoreError) and isinstance(source, Store):
                silent.append(source)
    return usable


def _row_or_prefill(
    usable: _Usable | None,
    n: int,
    model: PreTrainedModel,
    padded: _Prompts,
    column: int,
    kinds: Sequence[LayerKind],
    threads: int,
) -> Loader | Computed | None:
    """What prompt n has before a column, from its document or else computed; None for nothing."""
    count = padded.before(n, column)
    if not count:
        return None
    row = padded.rows[n][None]
    prefill = prefill_of(model, row, count)
    recovery = Recovery(prefill)
    if usable is not None:
        try:
            if _stateful(kinds) and usable.tokens < count:
                with naming(n):
                    start = usable.loader(kinds, usable.tokens, None, threads)
                start.devices = devices_of(model, kinds)
                recovery = Recovery(prefill_after(start, model, row, count, prefill))
                return Computed(recovery, model.dtype, model.device)
            with naming(n):
                loader = usable.loader(kinds, count, None, threads)
            loader.devices, loader.recovery = devices_of(model, kinds), recovery
            return loader
        except KVZipError as error:
            tell(error)
    return Computed(recovery, model.dtype, model.device)


class _Prompts:
    """Prompts of a batch, [n] each, the shorter ones padded at the left."""

    def __init__(self, prompts: Sequence[ArrayLike | torch.Tensor], sources: Sequence[object]):
        prompts = _one_each(prompts, "prompts", _PROMPTS)
        if not len(sources) == len(prompts) > 0:
            raise UsageError(f"{len(sources)} documents for {len(prompts)} prompts")
        self.rows = [ids_of(prompt, "prompts")[0] for prompt in prompts]
        self.lengths = [len(row) for row in self.rows]
        self.longest = max(self.lengths)

    def check_text_only(self, config: PretrainedConfig, owner: str) -> None:
        """As :func:`kvzip.load.placeholders.check_text_only`, for each prompt."""
        for n, row in enumerate(self.rows):
            with naming(n):
                check_text_only(config, row, owner)

    def column(self, n: int, tokens: int) -> int:
        """Where a row's first `tokens` end, if one at least is to be left."""
        length = len(self.rows[n])
        return min(tokens, length - 1) + self.longest - length

    def before(self, n: int, column: int) -> int:
        """How many of a row's tokens lie before a column."""
        return max(0, column - self.longest + len(self.rows[n]))

    def inputs(
        self, pad_token_id: int, device: torch.device | str | None
    ) -> dict[str, torch.Tensor]:
        """What `generate` is fed: the ids, and the mask that leaves out the padding."""
        ids = torch.full((len(self.rows), self.longest), pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(self.rows):
            ids[i, self.longest - len(row) :] = torch.from_numpy(row.astype(np.int64))
            mask[i, self.longest - len(row) :] = 1
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _cache(
    rows: Sequence[Loader | Computed | None],
    config: PretrainedConfig,
    kinds: Sequence[LayerKind],
    column: int,
    prompts: _Prompts,
    usable: Collection[_Usable],
) -> dict[str, Any]:
    """The argument of `generate` that hands over a cache of these rows, all up to one column."""
    if not any(rows):
        return cache_argument(empty_cache(config))
    batch = BatchLoader(rows, column, [kind.window for kind in kinds])
    for one in usable:
        one.opened.close_after(batch)
    cache = lazy_cache(batch, config, kinds, column, prompts.longest)
    cache.padding = [prompts.longest - len(row) for row in prompts.rows]
    return cache_argument(cache)
