"""Is a compressed cache exact? Its bytes, and what a model makes of it, beside the same cache
uncompressed. What a fresh prefill gives is reported apart: it may round otherwise, with no codec
to blame.
"""

from __future__ import annotations

import hashlib
from time import perf_counter
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from transformers import StoppingCriteria

from kvzip import api
from kvzip.capture import check_ids
from kvzip.container import Reader
from kvzip.errors import KVZipError
from kvzip.eval.exactness import MOST_NEW_TOKENS
from kvzip.load.hf import cache_argument, load_cache
from kvzip.options import integer
from kvzip.snapshot import Layer, Snapshot


class LayerCheck(msgspec.Struct, frozen=True):
    """SHA-256 of one layer's raw bytes before encoding and after decoding."""

    layer: int
    k_before: str
    k_after: str
    v_before: str
    v_after: str
    equal: bool


class Agreement(msgspec.Struct, frozen=True):
    """How far two greedy generations agree."""

    tokens_equal: int
    """Steps before the first that differs, in any row of the batch."""
    tokens_matching: int
    """Steps whose tokens are the same in all rows of the batch, wherever they are."""
    max_logit_difference: float
    """Largest over all steps that were fed the same tokens, the first that differs included."""


class Exactness(msgspec.Struct, frozen=True):
    """What `check` found; ``msgspec.to_builtins`` or ``msgspec.json.encode`` make JSON of it."""

    exact: bool
    """Bytes, all tokens and all logits are those of the uncompressed cache."""
    bytes_equal: bool
    new_tokens: int
    tokens_equal: int
    """How many are those of the uncompressed cache, up to the first that differs."""
    tokens_matching: int
    """The same, wherever they are."""
    max_logit_difference: float
    layers: tuple[LayerCheck, ...]
    fresh: Agreement | None
    """Against a prefill of the whole prompt by this model on this machine, when one was run."""
    prompt_tokens: int
    first_token_seconds: float
    """From opening the encoded cache to the first new token."""
    uncompressed_first_token_seconds: float
    """The same from the snapshot in memory: what is left when decoding costs nothing."""
    prefill_seconds: float | None
    """To the first new token without a cache."""


def layer_hashes(snapshot: Snapshot) -> list[dict[str, Any]]:
    """SHA-256 of every layer's raw bytes, C order: [{"layer": 0, "k": "...", "v": "..."}, ...]."""
    return [{"layer": i, **_hashes(layer)} for i, layer in enumerate(snapshot.layers)]


def _hashes(layer: Layer) -> dict[str, str]:
    return {
        name: hashlib.sha256(np.ascontiguousarray(bits).data).hexdigest()
        for name, bits in layer.parts.items()
    }


class _Run(NamedTuple):
    tokens: Any
    """[steps, batch]"""
    logits: Any
    """[steps, batch, vocabulary], fp32 on the CPU"""
    first_token_seconds: float

    def agreement(self, other: _Run) -> Agreement:
        differ = (self.tokens != other.tokens).any(dim=1)
        equal = int(differ.int().argmax()) if bool(differ.any()) else len(differ)
        a, b = self.logits[: equal + 1], other.logits[: equal + 1]
        same = (a == b) | (a.isnan() & b.isnan())
        matching = len(differ) - int(differ.sum())
        return Agreement(equal, matching, float((a - b).abs().masked_fill(same, 0).max()))


class _Clock(StoppingCriteria):
    """Notes when the first token is there; never stops."""

    def __init__(self) -> None:
        self.start, self.first = perf_counter(), 0.0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if not self.first:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            self.first = perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Reference:
    """What a model makes of a snapshot's cache as it is, and of a fresh prefill: run once, to
    check many encodings against.

    The prompt is the snapshot's document, of which the cache gives all tokens but the last, or the
    document and the ids of `suffix`, [n], which the model computes on top of the cache. When its
    sliding layers hold too little for that, the prompt is the document and its last token
    again. Batches must not be padded. Raises KVZipError when model and snapshot do not fit.
    """

    def __init__(
        self,
        model: Any,
        snapshot: Snapshot,
        *,
        new_tokens: int = 24,
        fresh: bool = True,
        suffix: Any = (),
    ):
        if snapshot.token_ids is None:
            raise KVZipError("the snapshot has no token ids: there is nothing to prompt with")
        new_tokens = integer("new_tokens", new_tokens, 1, MOST_NEW_TOKENS)
        check_ids(snapshot.token_ids, model.config)
        self.model, self.new_tokens = model, new_tokens
        self.layers = layer_hashes(snapshot)
        document = np.atleast_2d(snapshot.token_ids).astype(np.int64)
        more = np.broadcast_to(np.asarray(suffix, np.int64), (len(document), len(suffix)))
        self.prompt = np.concatenate([document, more], axis=1)
        try:
            load_cache(snapshot, model.config, prompt=self.prompt)
        except KVZipError:
            self.prompt = np.concatenate([self.prompt, self.prompt[:, -1:]], axis=1)
        self.uncompressed = self._generate(snapshot)
        self.fresh = self._generate(None) if fresh else None

    def _generate(self, source: Any, profile: Any = None) -> _Run:
        clock = _Clock()
        cache = None
        if source is not None:
            # A reference may be lossy: what that costs is what is asked.
            cache = load_cache(
                source,
                self.model.config,
                prompt=self.prompt,
                profile=profile,
                check_weights=False,
            )
        ids = torch.from_numpy(self.prompt).to(self.model.device)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,  # an end-of-text token ends nothing
            pad_token_id=0,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            stopping_criteria=[clock],
            **cache_argument(cache),
        )
        return _Run(
            out.sequences[:, ids.shape[1] :].T.cpu(),
            torch.stack(out.logits).float().cpu(),
            clock.first - clock.start,
        )

    def check(self, encoded: Any, profile: Any = None) -> Exactness:
        """Compare an encoding (path, bytes or Reader) of the snapshot with the snapshot.

        Raises CorruptError, FormatError or ProfileError when it cannot be read.
        """
        decoded = self._generate(encoded, profile)
        reader = encoded
        if not isinstance(encoded, Reader):
            reader = api.open(encoded, profile)
        try:
            after = [_hashes(reader.layer(i)) for i in range(len(reader))]
        finally:
            if reader is not encoded:
                reader.close()
        layers = tuple(
            LayerCheck(
                before["layer"],
                k_before=before["k"],
                k_after=found["k"],
                v_before=before["v"],
                v_after=found["v"],
                equal=before["k"] == found["k"] and before["v"] == found["v"],
            )
            for before, found in zip(self.layers, after, strict=True)
        )
        agreement = decoded.agreement(self.uncompressed)
        bytes_equal = all(layer.equal for layer in layers)
        return Exactness(
            exact=bytes_equal and agreement == Agreement(self.new_tokens, self.new_tokens, 0.0),
            bytes_equal=bytes_equal,
            new_tokens=self.new_tokens,
            tokens_equal=agreement.tokens_equal,
            tokens_matching=agreement.tokens_matching,
            max_logit_difference=agreement.max_logit_difference,
            layers=layers,
            fresh=None if self.fresh is None else decoded.agreement(self.fresh),
            prompt_tokens=self.prompt.shape[1],
            first_token_seconds=decoded.first_token_seconds,
            uncompressed_first_token_seconds=self.uncompressed.first_token_seconds,
            prefill_seconds=None if self.fresh is None else self.fresh.first_token_seconds,
        )


def check(
    model: Any,
    snapshot: Snapshot,
    encoded: Any,
    *,
    new_tokens: int = 24,
    profile: Any = None,
    fresh: bool = True,
) -> Exactness:
    """Check one encoding (path, bytes or Reader) of a snapshot; for several, see `Reference`.

    Compares SHA-256 of every layer, and `new_tokens` greedy tokens with their logits, with the
    same cache uncompressed through the same load path; `fresh` adds a prefill without a cache.
    """
    return Reference(model, snapshot, new_tokens=new_tokens, fresh=fresh).check(encoded, profile)
