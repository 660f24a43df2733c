"""Exactness at scale: many documents, several continuations of each, every codec, and beside them
what quantising the cache does to the same tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import api, capture, checksum
from kvzip.codec import get_codec
from kvzip.errors import KVZipError
from kvzip.eval.budget import Step
from kvzip.eval.exactness import MOST_NEW_TOKENS
from kvzip.eval.exactness.lossy import LOSSY, quantised
from kvzip.eval.kept import kept
from kvzip.eval.measured_codecs import EXACTNESS_CODECS
from kvzip.eval.results.exactness import ExactnessResult, ExactnessRow
from kvzip.eval.results.provenance import machine, made_by, versions
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
    work: Path | None = None,
    command: str = "kvzip eval exactness",
    step: Step = lambda name, share=None: None,
    loaded: Any = None,
) -> ExactnessResult:
    """Generate `new_tokens` from every snapshot and continuation with the cache as it is, through
    each codec, and quantised; count what differs.

    Continuation 0 is the document itself; each other one puts SUFFIX tokens of the next document
    after it. `model`: what the snapshots say by default; `loaded`, a LoadedModel, spares loading
    it. `work`: a folder for what each document gave, so that the same call goes on where an earlier
    one was ended. Raises KVZipError when the snapshots are not of one model and dtype.
    """
    # Brings torch, which reading a stored result does not need.
    from kvzip.eval.exactness.check import Reference, layer_hashes

    if not snapshots:
        raise KVZipError("exactness needs at least one snapshot")
    continuations = integer("continuations", continuations, 1, 1000)
    new_tokens = integer("new_tokens", new_tokens, 1, MOST_NEW_TOKENS)
    ways = _Ways(codecs, lossy, None if profile is None else Profile.load(profile))
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    first = Snapshot.load(snapshots[0])
    for path in snapshots:
        _check_like(first, path, snapshots[0])
    if loaded is None:
        step(f"loading {model or first.origin.model}")
        loaded = load_model(model or first.origin.model, capture.computed_in(first.dtype))
    sums = ways.counts()
    names, tokens = [], []
    for n, path in enumerate(snapshots):
        snapshot = Snapshot.load(path)
        names.append(snapshot.origin.text or Path(path).name)
        tokens.append(snapshot.tokens)
        following = Snapshot.load(snapshots[(n + 1) % len(snapshots)]).token_ids
        suffixes = [_suffix(following, c) for c in range(continuations)]
        measure = partial(
            ways.measure,
            snapshot,
            partial(Reference, loaded.model, snapshot, new_tokens=new_tokens),
            suffixes,
            partial(_tell, step, n, len(snapshots)),
        )
        if work is None:
            found = measure()
        else:
            of = layer_hashes(snapshot), loaded.revision, new_tokens, suffixes, ways.names()
            by = machine().cpu, versions()
            name = checksum.of_bytes(msgspec.json.encode((of, by)))
            found = kept(work / f"{name:016x}.json", list[_Counts], measure)
        for total, count in zip(sums, found, strict=True):
            total.plus(count)
    fresh, *rows = (each.row() for each in sums)
    return ExactnessResult(
        **made_by(command),
        model=loaded.id,
        revision=loaded.revision,
        dtype=first.dtype,
        documents=names,
        document_tokens=tokens,
        continuations=continuations,
        new_tokens=new_tokens,
        rows=rows,
        fresh=fresh,
    )


def _check_like(
    first: Snapshot, path: str | os.PathLike[str], first_path: str | os.PathLike[str]
) -> None:
    """Raise KVZipError unless a file is a snapshot that a model can go on from, of the model and
    dtype of the first."""
    snapshot = Snapshot.load(path)
    if (snapshot.dtype, snapshot.origin.revision) != (first.dtype, first.origin.revision):
        raise KVZipError(f"{path} is not of the model and dtype of {first_path}")
    if snapshot.token_ids is None:
        raise KVZipError(f"{path} has no token ids: there is nothing to prompt with")


def _tell(step: Step, document: int, documents: int, what: str, done: float = 0.0) -> None:
    """Say what is done with a document, of which the share `done` is behind."""
    step(f"document {document + 1} of {documents}: {what}", (document + done) / documents)


def _suffix(following: NDArray[Any] | None, continuation: int) -> Sequence[int]:
    """The tokens of the next document that a continuation puts after the document."""
    if continuation == 0 or following is None:
        return ()
    found: list[int] = np.ravel(following)[(continuation - 1) * SUFFIX :][:SUFFIX].tolist()
    return found


class _Ways:
    """The codecs and the lossy references.

    Raises KVZipError for a reference that there is not.
    """

    def __init__(self, codecs: Sequence[str], lossy: Sequence[str], profile: Profile | None):
        if unknown := set(lossy) - set(LOSSY):
            raise KVZipError(f"no lossy reference {unknown.pop()!r}; there are: {', '.join(LOSSY)}")
        self.codecs = {spec: get_codec(spec) for spec in codecs}
        self.lossy, self.profile = lossy, profile

    def names(self) -> list[str]:
        """What they are called, and the profile, if there is one."""
        return [*self.codecs, *self.lossy, "" if self.profile is None else self.profile.id]

    def counts(self) -> list[_Counts]:
        """Nothing counted yet: of a fresh prefill, and of each way."""
        lossy = [_Counts(name, True) for name in self.lossy]
        return [
            _Counts("fresh prefill", False),
            *(_Counts(spec, False) for spec in self.codecs),
            *lossy,
        ]

    def measure(
        self,
        snapshot: Snapshot,
        refer: Callable[..., Reference],
        suffixes: Sequence[Sequence[int]],
        told: Callable[..., None],
    ) -> list[_Counts]:
        """What a fresh prefill and each way change of one document, over all continuations.

        `refer` runs the model on the cache as it is, before the tokens of a `suffix`; `told` is
        called with what is done and the share that is behind.
        """
        fresh, *found = self.counts()
        steps = len(found) + len(suffixes) * (1 + len(found))
        behind = iter(range(steps))

        def tell(what: str) -> None:
            told(what, next(behind) / steps)

        blobs = []
        for each in found:
            tell(f"encoding, {each.name}")
            blob, size = self._encoded(each.name, snapshot)
            blobs.append(blob)
            each.raw, each.encoded = snapshot.raw_bytes, size
        for c, suffix in enumerate(suffixes):
            turn = f"continuation {c + 1} of {len(suffixes)}"
            tell(f"{turn}, uncompressed and a fresh prefill")
            reference = refer(suffix=suffix)
            assert reference.fresh is not None
            fresh.add(reference.fresh.agreement(reference.uncompressed), reference.new_tokens)
            for each, blob in zip(found, blobs, strict=True):
                tell(f"{turn}, {each.name}")
                exactness = reference.check(blob, self._profile_of(each.name))
                each.exact += exactness.exact
                each.documents += exactness.bytes_equal and c == len(suffixes) - 1
                each.add(exactness, exactness.new_tokens)
        return [fresh, *found]

    def _encoded(self, name: str, snapshot: Snapshot) -> tuple[bytes, int]:
        """The snapshot's file, of a lossy way that of its rounded numbers; and the bytes that the
        way takes."""
        if name in self.lossy:
            rounded, size = quantised(snapshot, LOSSY[name])
            return api.encode(rounded, "raw"), size
        blob = api.encode(snapshot, self.codecs[name], self._profile_of(name))
        return blob, len(blob)

    def _profile_of(self, name: str) -> Profile | None:
        needs = name in self.codecs and self.codecs[name].needs_profile
        return self.profile if needs else None


class _Counts(msgspec.Struct):
    """A row in the making."""

    name: str
    lossy: bool
    raw: int = 0
    encoded: int = 0
    runs: int = 0
    exact: int = 0
    documents: int = 0
    tokens: int = 0
    equal: int = 0
    matching: int = 0
    worst: int | None = None
    logits: float = 0.0

    def add(self, found: Agreement | Exactness, new_tokens: int) -> None:
        """Count one run."""
        equal, matching = found.tokens_equal, found.tokens_matching
        run = {"runs": 1, "tokens": new_tokens, "equal": equal, "matching": matching}
        logits = found.max_logit_difference
        self.plus(_Counts(self.name, self.lossy, **run, worst=matching, logits=logits))

    def plus(self, more: _Counts) -> None:
        """Count what was counted apart."""
        for name in ("raw", "encoded", "runs", "exact", "documents", "tokens", "equal", "matching"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        known = [n for n in (self.worst, more.worst) if n is not None]
        self.worst = min(known, default=None)
        self.logits = max(self.logits, more.logits)

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
