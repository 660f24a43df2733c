"""What `kvzip eval exactness` finds: how many bytes, tokens and logits codecs changed."""

from __future__ import annotations

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result


class ExactnessRow(msgspec.Struct, frozen=True):
    """One codec, or one lossy reference, over all documents and continuations."""

    name: str
    lossy: bool
    ratio: float
    """Raw bytes over encoded ones, of all documents together."""
    runs: int
    """Continuations of all documents."""
    exact_runs: int
    """Runs whose bytes, tokens and logits were all those of the uncompressed cache."""
    documents_exact: int
    """Documents whose every byte came back."""
    tokens: int
    """Generated, over all runs."""
    tokens_equal: int
    """Before the first difference of each run."""
    tokens_matching: int
    """The same token at the same place."""
    worst_tokens_matching: int
    """In the worst run."""
    max_logit_difference: float


class ExactnessResult(Result, frozen=True, kw_only=True, tag="exactness"):
    """The file that `kvzip eval exactness -o` writes."""

    writer = "kvzip eval exactness"

    model: str
    revision: str
    dtype: str
    documents: list[str]
    """Names of the texts."""
    document_tokens: list[int]
    continuations: int
    new_tokens: int
    rows: list[ExactnessRow]
    fresh: ExactnessRow
    """A fresh prefill against the uncompressed cache: what differs here is the model's own."""

    @property
    def exact(self) -> bool:
        """Whether every lossless codec was exact in every run."""
        return all(row.exact_runs == row.runs for row in self.rows if not row.lossy)

    def check(self) -> None:
        if not self.rows or any(row.runs < 1 or row.tokens < 1 for row in self.rows):
            raise KVZipError("there is no run in it")
