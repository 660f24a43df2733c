"""Exactness at scale: many documents, several continuations of each, every codec, and beside them
what quantising the cache does to the same tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvzip import api, dtypes
from kvzip.codec import get_codec
from kvzip.dtypes import Bits
from kvzip.errors import KVZipError, UnsupportedError
from kvzip.eval.budget import Step
from kvzip.eval.results.exactness import ExactnessResult, ExactnessRow
from kvzip.eval.results.provenance import made_by
from kvzip.models import load_model
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Layer, Snapshot

LOSSY = {"int8": 8, "int4": 4}
"""Bits of the references that are not exact."""
SUFFIX = 16
"""Tokens that a continuation puts after the document."""

if TYPE_CHECKING:
    from kvzip.eval.exactness.check import Agreement, Exactness


def run(
    snapshots: Sequence[str | os.PathLike[str]],
    *,
    model: str | None = None,
    codecs: Sequence[str] = ("zstd", "lz4", "planes", "channel"),
    lossy: Sequence[str] = tuple(LOSSY),
    profile: str | os.PathLike[str] | None = None,
    continuations: int = 2,
    new_tokens: int = 32,
    command: str = "kvzip eval exactness",
    step: Step = lambda name, share=None: None,
    loaded: Any = None,
) -> ExactnessResult:
    """Generate `new_tokens` from every snapshot and continuation with the cache as it is, through
    each codec, and quantised; count what differs.

    Continuation 0 is the document itself; each other one puts SUFFIX tokens of the next document
    after it. `model`: what the snapshots say by default; `loaded`, a LoadedModel, spares loading
    it. Raises KVZipError when the snapshots are not of one model and dtype.
    """
    # Brings torch, which reading a stored result does not need.
    from kvzip.eval.exactness.check import Reference

    if not snapshots:
        raise KVZipError("exactness needs at least one snapshot")
    continuations = integer("continuations", continuations, 1, 1000)
    new_tokens = integer("new_tokens", new_tokens, 1, 100_000)
    if unknown := set(lossy) - set(LOSSY):
        raise KVZipError(f"no lossy reference {unknown.pop()!r}; there are: {', '.join(LOSSY)}")
    chosen = {spec: get_codec(spec) for spec in codecs}
    learned = None if profile is None else Profile.load(profile)
    first = Snapshot.load(snapshots[0])
    if loaded is None:
        step(f"loading {model or first.origin.model}")
        computed = "bf16" if dtypes.get(first.dtype).bits == 8 else first.dtype
        loaded = load_model(model or first.origin.model, computed)
    sums = {name: _Sum(name, name in lossy) for name in (*chosen, *lossy)}
    fresh = _Sum("fresh prefill", False)
    names, tokens = [], []
    for n, path in enumerate(snapshots):
        snapshot = Snapshot.load(path)
        if (snapshot.dtype, snapshot.origin.revision) != (first.dtype, first.origin.revision):
            raise KVZipError(f"{path} is not of the model and dtype of {snapshots[0]}")
        names.append(snapshot.origin.text or Path(path).name)
        tokens.append(snapshot.tokens)
        following = Snapshot.load(snapshots[(n + 1) % len(snapshots)]).token_ids
        blobs: dict[str, bytes] = {}
        for spec, codec in chosen.items():
            step(
                f"document {n + 1} of {len(snapshots)}: encoding with {spec}",
                n / len(snapshots),
            )
            own = learned if codec.needs_profile else None
            blobs[spec] = api.encode(snapshot, codec, own)
            sums[spec].sizes(snapshot.raw_bytes, len(blobs[spec]))
        for name in lossy:
            rounded, size = quantised(snapshot, LOSSY[name])
            blobs[name] = api.encode(rounded, "raw")
            sums[name].sizes(snapshot.raw_bytes, size)
        for c in range(continuations):
            step(
                f"document {n + 1} of {len(snapshots)}, continuation {c + 1} of {continuations}",
                (n + c / continuations) / len(snapshots),
            )
            suffix = (
                ()
                if c == 0 or following is None
                else np.ravel(following)[(c - 1) * SUFFIX : c * SUFFIX]
            )
            reference = Reference(
                loaded.model, snapshot, new_tokens=new_tokens, fresh=True, suffix=suffix
            )
            assert reference.fresh is not None
            fresh.agreement(reference.fresh.agreement(reference.uncompressed), new_tokens)
            for name, blob in blobs.items():
                needs = name in chosen and chosen[name].needs_profile
                found = reference.check(blob, learned if needs else None)
                sums[name].add(found, last=c == continuations - 1)
    return ExactnessResult(
        **made_by(command),
        model=loaded.id,
        revision=loaded.revision,
        dtype=first.dtype,
        documents=names,
        document_tokens=tokens,
        continuations=continuations,
        new_tokens=new_tokens,
        rows=[s.row() for s in sums.values()],
        fresh=fresh.row(),
    )


class _Sum:
    """A row in the making."""

    def __init__(self, name: str, lossy: bool):
        self.name, self.lossy = name, lossy
        self.raw = self.encoded = self.runs = self.exact = self.documents = 0
        self.tokens = self.equal = self.matching = 0
        self.worst: int | None = None
        self.logits = 0.0

    def sizes(self, raw: int, encoded: int) -> None:
        self.raw += raw
        self.encoded += encoded

    def add(self, found: Exactness, last: bool) -> None:
        from kvzip.eval.exactness.check import Agreement

        self.exact += found.exact
        self.documents += found.bytes_equal and last
        self.agreement(
            Agreement(found.tokens_equal, found.tokens_matching, found.max_logit_difference),
            found.new_tokens,
        )

    def agreement(self, found: Agreement, new_tokens: int) -> None:
        self.runs += 1
        self.tokens += new_tokens
        self.equal += found.tokens_equal
        self.matching += found.tokens_matching
        worst = self.worst
        self.worst = found.tokens_matching if worst is None else min(worst, found.tokens_matching)
        self.logits = max(self.logits, found.max_logit_difference)

    def row(self) -> ExactnessRow:
        return ExactnessRow(
            self.name,
            self.lossy,
            self.raw / self.encoded if self.encoded else 1.0,
            self.runs,
            self.exact,
            self.documents,
            self.tokens,
            self.equal,
            self.matching,
            self.worst or 0,
            self.logits,
        )


def quantised(snapshot: Snapshot, bits: int) -> tuple[Snapshot, int]:
    """The snapshot with every number rounded to `bits`, and the bytes that it would take.

    Each channel of each head, keys and values apart, has its own scale, the largest magnitude over
    its tokens; ``round(x / scale * m) / m * scale`` with m = 2^(bits - 1) - 1. Bytes: the integers
    and one fp16 scale a channel. The last token stays as it is: `load_cache` compares its keys with
    what the model computes, and would take rounded ones for another text. Raises UnsupportedError
    for 8-bit floats.
    """
    import torch

    form = dtypes.get(snapshot.dtype)
    if form.bits == 8:
        raise UnsupportedError(f"{form.name} has eight bits already: no lossy reference for it")
    most = 2 ** (bits - 1) - 1
    layers, size = [], 0

    def rounded(part: Bits) -> Bits:
        nonlocal size
        kind = getattr(torch, form.torch)
        signed = part.view(part.dtype.str.replace("u", "i"))
        numbers = torch.from_numpy(np.array(signed)).view(kind).float()
        scale = numbers.abs().amax(dim=-2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        size += numbers.numel() * bits // 8 + 2 * scale.numel()
        back = (numbers / scale * most).round() / most * scale
        back[..., -1, :] = numbers[..., -1, :]
        return dtypes.as_bits(back.to(kind))[0]

    for layer in snapshot.layers:
        layers.append(Layer(rounded(layer.k), rounded(layer.v), layer.layout))
    return Snapshot(layers, form.name, snapshot.token_ids, snapshot.origin), size
