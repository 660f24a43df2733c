"""A profile from documents of a text, for evaluations of codecs that need one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kvzip import capture
from kvzip.codec import Codec
from kvzip.codecs.predictive.fit import check_one
from kvzip.errors import UsageError
from kvzip.models import LoadedModel
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot

Told = Callable[[str], Any]
"""Called with a few words on what begins."""


def training_count(train: int, codecs: Iterable[Codec]) -> int:
    """`train`, how many documents codecs learn from. Raises UsageError for what is no count, and
    for 0 where one of them needs a profile."""
    count = integer("train", train, 0, 10**6)
    if not count and any(codec.needs_profile for codec in codecs):
        raise UsageError("a codec that needs a profile needs documents to learn from: --train")
    return count


def documents_after(
    document: int, count: int, loaded: LoadedModel, text: capture.Text, tokens: int
) -> list[capture.Document]:
    """Cut the `count` documents of the text that follow number `document`, of `tokens` tokens each:
    a profile learned from them has not seen that one."""
    others = slice(document + 1, document + 1 + count)
    return capture.cut_documents(loaded.tokenizer, text, tokens, others)


def learn(
    loaded: LoadedModel,
    documents: Sequence[capture.Document],
    *,
    dtype: str | None = None,
    snapshots: Path | None = None,
    resume: Path | None = None,
    capturing: Told,
    learning: Told,
    progress: Callable[[str, int, int], None] | None = None,
) -> Profile:
    """Capture documents and learn a profile from them.

    `snapshots`: a folder that keeps the captured caches; without it they are only in memory.
    `resume`: a folder for finished layers, so that the same call goes on where an earlier one
    ended. `capturing` is called before each document, `learning` before the profile, and `progress`
    (what, done, total) while it is learned.
    """
    captured: list[Snapshot | Path] = []
    for n, document in enumerate(documents):
        capturing(f"capturing documents to learn from: {n + 1} of {len(documents)}")
        if snapshots is None:
            captured.append(capture.prefill(loaded, document.token_ids, dtype=dtype))
        else:
            captured += capture.capture(loaded, [document], snapshots, dtype=dtype)
        if n == 0:
            check_one(captured[0])  # what cannot be learned is said before all others are captured
    learning(f"learning a profile from {len(captured)} documents")
    return Profile.fit(captured, progress=progress, resume=resume)
