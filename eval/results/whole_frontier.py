"""What `kvzip eval frontier --whole` finds: bits a number of whole files, all layers, against the
work to predict or compute them."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result, above_zero, not_below_zero
from kvzip.eval.results.scaling import Shape

Basis = Literal["measured", "derived", "stated"]
"""measured: files, decoded again. derived: from the bytes of measured files' layers and counted
products; nothing was run that does it. stated: an earlier measurement, on what `about` says."""


class WholePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One way to have a model's cache."""

    key: str
    title: str
    label: str
    """The title in a few words, beside its point in a chart; "" for none."""
    family: Literal["file", "recompute", "tried"]
    """A file of all layers; the first layers computed and the others loaded; or a predictor that
    was tried on some layers, and that no codec has."""
    basis: Basis
    about: str = ""
    """Where a stated figure is from, and of which layers it is."""
    bits: float
    """That are stored for each number of the cache."""
    share: float
    """Products of a weight over those of the model's own prefill; of what was tried, at least."""
    profile_bytes: float = 0.0
    computed_layers: int = 0


class WholeRun(msgspec.Struct, frozen=True, kw_only=True):
    """All points of one model."""

    shape: Shape
    dtype: str
    document_tokens: int
    points: list[WholePoint]
    hull: list[str]
    """Keys of the lower convex hull of files and computed layers, the cheapest first."""


class WholeFrontier(Result, frozen=True, kw_only=True, tag="whole-frontier"):
    """What was found; the file whole.json in the command's folder."""

    writer = "kvzip eval frontier --whole"

    sources: list[str]
    """The stored results that points are from, by name."""
    runs: list[WholeRun]

    def check(self) -> None:
        if not any(run.points for run in self.runs):
            raise KVZipError("there is no figure in it")
        for run in self.runs:
            keys = {point.key for point in run.points}
            if len(keys) < len(run.points) or not keys >= set(run.hull):
                raise KVZipError(f"{run.shape.name}: its points are not told apart by their keys")
            for p in run.points:
                what = f"{run.shape.name}, {p.title}"
                above_zero(f"{what}: bits", p.bits)
                not_below_zero(f"{what}: share", p.share)
                not_below_zero(f"{what}: profile_bytes", p.profile_bytes)
                if p.basis == "stated" and not p.about:
                    raise KVZipError(f"{what} is stated, and has no source")
