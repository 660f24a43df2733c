"""What `kvzip eval ratios` finds: how small whole files and their layers become on the test split
of each kind of text, by codecs that learned on the training split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result, above_zero

Split = Literal["train", "test"]


class TextFile(msgspec.Struct, frozen=True):
    """One split of one kind of text, before it was cut into documents."""

    kind: str
    split: Split
    characters: int
    sha256: str
    """Of the text in UTF-8."""


class DocumentRow(msgspec.Struct, frozen=True):
    """One document that took part."""

    kind: str
    split: Split
    number: int
    """Which document of its text it is, from 0 on."""
    tokens: int
    sha256: str
    """Of the token ids, each as four bytes, the lowest first."""
    seen: float | None = None
    """Of a test document, the share of its tokens that stand in a passage of 32 tokens which the
    training documents have, too; None where that was not looked at, or nothing was learned from."""

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.split} document {self.number} of {self.tokens} tokens"


def is_in_both_splits(documents: Sequence[DocumentRow]) -> bool:
    """Whether a document of one split is in the other, too."""
    train, test = ({d.sha256 for d in documents if d.split == s} for s in ("train", "test"))
    return bool(train & test)


class LearnedProfile(msgspec.Struct, frozen=True):
    """What a codec learned of the training split: a reader needs these bytes beside the file."""

    codec: str
    id: str
    bytes: int
    documents: int
    tokens: int


class LayerRow(msgspec.Struct, frozen=True):
    """One part of one layer in all test documents of a kind."""

    layer: int
    part: str
    numbers: int
    raw_bytes: int
    encoded_bytes: int
    """Blocks and tables, without the file's header and index."""


class RatioRow(msgspec.Struct, frozen=True):
    """One codec on the test documents of one kind of text."""

    codec: str
    """As :func:`kvzip.get_codec` takes it."""
    kind: str
    documents: int
    numbers: int
    raw_bytes: int
    encoded_bytes: int
    """Of whole files, with headers, token ids and indexes; without a profile."""
    ratio: float
    """`raw_bytes` over `encoded_bytes`."""
    bits_per_value: float
    """Bits of the files for each number of the caches."""
    exact: bool
    """Every decoded cache was the same, bit for bit."""
    layers: list[LayerRow]


def check_figures(what: str, row: Any) -> None:
    """Raise KVZipError that says `what` unless a codec was exact, and its figures follow from each
    other. `row`: a RatioRow, or what has its fields of them."""
    if not row.exact:
        raise KVZipError(f"{what} was not exact; its figures are none")
    for name in ("numbers", "raw_bytes", "encoded_bytes"):
        above_zero(f"{what}: {name}", getattr(row, name))
    derived = {
        "ratio": row.raw_bytes / row.encoded_bytes,
        "bits_per_value": 8 * row.encoded_bytes / row.numbers,
    }
    for name, wanted in derived.items():
        if not math.isclose(value := getattr(row, name), wanted, rel_tol=1e-9):
            raise KVZipError(f"{what}: {name} is {value}, and its bytes say {wanted}")


class RatiosResult(Result, frozen=True, kw_only=True, tag="ratios"):
    """One model's result; the file that `kvzip eval ratios -o` writes."""

    writer = "kvzip eval ratios"

    model: str
    revision: str
    architecture: str
    dtype: str
    layers: int
    hidden_size: int
    numbers_per_token: float
    """Numbers that a token leaves in the cache; over `layers` and `hidden_size`, how much of the
    residual stream keys and values are."""
    parameters: int
    """Those that multiply with every token."""
    document_tokens: int
    seed: int
    """Which split of the texts was taken."""
    texts: list[TextFile]
    documents: list[DocumentRow]
    profiles: list[LearnedProfile]
    rows: list[RatioRow]

    def seen(self, kind: str) -> float | None:
        """Of the test documents of a kind of text, the share that the training documents have."""
        shares = [d.seen for d in self.tested(kind) if d.seen is not None]
        return sum(shares) / len(shares) if shares else None

    def tested(self, kind: str) -> list[DocumentRow]:
        """The test documents of a kind of text."""
        return [d for d in self.documents if d.kind == kind and d.split == "test"]

    def check(self) -> None:
        if not self.rows:
            raise KVZipError("there is no row in it")
        if is_in_both_splits(self.documents):
            raise KVZipError("a document is in both splits: nothing was held out")
        for document in self.documents:
            if document.seen is not None and not 0 <= document.seen <= 1:
                raise KVZipError(f"{document.name}: seen is {document.seen}, which is no share")
        for row in self.rows:
            self._check_row(row)
        for row in self.rows:
            name = row.codec.partition(":")[0]
            if name == "predictive" and not any(p.codec == name for p in self.profiles):
                raise KVZipError(f"{row.codec} needs a profile, and none is listed")

    def _check_row(self, row: RatioRow) -> None:
        """Raise KVZipError unless a row's figures follow from each other and from the documents."""
        what = f"{row.codec} on {row.kind}"
        check_figures(what, row)
        if len(self.tested(row.kind)) != row.documents or not row.documents:
            raise KVZipError(f"{what} is of {row.documents} documents, and others are listed")
        for name in ("numbers", "raw_bytes"):
            if sum(getattr(layer, name) for layer in row.layers) != getattr(row, name):
                raise KVZipError(f"{what}: the {name} of its layers do not add up")
        if sum(layer.encoded_bytes for layer in row.layers) > row.encoded_bytes:
            raise KVZipError(f"{what}: its layers are greater than its files")
