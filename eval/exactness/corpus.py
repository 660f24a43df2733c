"""Exactness at scale: many documents, several continuations of each, every codec, and beside them
what quantising the cache does to the same tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvzip import api, capture
from kvzip.codec import get_codec
from kvzip.errors import KVZipError
from kvzip.eval.budget import Step
from kvzip.eval.exactness.lossy import LOSSY, quantised
from kvzip.eval.measured_codecs import EXACTNESS_CODECS
from kvzip.eval.results.exactness import ExactnessResult, ExactnessRow
from kvzip.eval.results.provenance import made_by
from kvzip.models import load_model
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot

SUFFIX = 16
"""Tokens that a continuation puts after the document."""

if TYPE_CHECKING:
    from kvzip.eval.exactness.check import Agreement, Exactness, Reference


def run(
    snapshots: Sequence[str | os.PathLike[str]],
    *,
    model: str | None = None,
    codecs: Sequence[str] = EXACTNESS_CODECS,
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
    ways = _Ways(codecs, lossy, None if profile is None else Profile.load(profile))
    first = Snapshot.load(snapshots[0])
    if loaded is None:
        step(f"loading {model or first.origin.model}")
        loaded = load_model(model or first.origin.model, capture.computed_in(first.dtype))
    fresh = _Sum("fresh prefill", False)
    names, tokens = [], []
    for n, path in enumerate(snapshots):
        snapshot = Snapshot.load(path)
        if (snapshot.dtype, snapshot.origin.revision) != (first.dtype, first.origin.revision):
            raise KVZipError(f"{path} is not of the model and dtype of {snapshots[0]}")
        names.append(snapshot.origin.text or Path(path).name)
        tokens.append(snapshot.tokens)
        told = partial(_tell, step, n, len(snapshots))
        following = Snapshot.load(snapshots[(n + 1) % len(snapshots)]).token_ids
        blobs = ways.encode(snapshot, told)
        for c in range(continuations):
            told(f", continuation {c + 1} of {continuations}", c / continuations)
            reference = Reference(
                loaded.model,
                snapshot,
                new_tokens=new_tokens,
                fresh=True,
                suffix=_suffix(following, c),
            )
            assert reference.fresh is not None
            fresh.agreement(reference.fresh.agreement(reference.uncompressed), new_tokens)
            ways.check(reference, blobs, last=c == continuations - 1)
    return ExactnessResult(
        **made_by(command),
        model=loaded.id,
        revision=loaded.revision,
        dtype=first.dtype,
        documents=names,
        document_tokens=tokens,
        continuations=continuations,
        new_tokens=new_tokens,
        rows=[s.row() for s in ways.sums.values()],
        fresh=fresh.row(),
    )


def _tell(step: Step, document: int, documents: int, what: str, done: float = 0.0) -> None:
    """Say what is done with a document, of which the share `done` is behind."""
    step(f"document {document + 1} of {documents}{what}", (document + done) / documents)


def _suffix(following: NDArray[Any] | None, continuation: int) -> Sequence[int]:
    """The tokens of the next document that a continuation puts after the document."""
    if continuation == 0 or following is None:
        return ()
    found: list[int] = np.ravel(following)[(continuation - 1) * SUFFIX :][:SUFFIX].tolist()
    return found


class _Ways:
    """The codecs and the lossy references, and what each was found to change so far.

    Raises KVZipError for a reference that there is not.
    """

    def __init__(self, codecs: Sequence[str], lossy: Sequence[str], profile: Profile | None):
        if unknown := set(lossy) - set(LOSSY):
            raise KVZipError(f"no lossy reference {unknown.pop()!r}; there are: {', '.join(LOSSY)}")
        self.codecs = {spec: get_codec(spec) for spec in codecs}
        self.lossy, self.profile = lossy, profile
        self.sums = {name: _Sum(name, name in lossy) for name in (*self.codecs, *lossy)}

    def encode(self, snapshot: Snapshot, told: Callable[[str], None]) -> dict[str, bytes]:
        """The snapshot's file in each way; of a lossy one, its rounded numbers'."""
        blobs = {}
        for spec, codec in self.codecs.items():
            told(f": encoding with {spec}")
            blobs[spec] = api.encode(snapshot, codec, self._profile_of(spec))
            self.sums[spec].sizes(snapshot.raw_bytes, len(blobs[spec]))
        for name in self.lossy:
            rounded, size = quantised(snapshot, LOSSY[name])
            blobs[name] = api.encode(rounded, "raw")
            self.sums[name].sizes(snapshot.raw_bytes, size)
        return blobs

    def check(self, reference: Reference, blobs: Mapping[str, bytes], last: bool) -> None:
        """Count what each way changes; `last`: in the document's last continuation."""
        for name, blob in blobs.items():
            self.sums[name].add(reference.check(blob, self._profile_of(name)), last)

    def _profile_of(self, name: str) -> Profile | None:
        needs = name in self.codecs and self.codecs[name].needs_profile
        return self.profile if needs else None


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
