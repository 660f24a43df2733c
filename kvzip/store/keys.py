"""The names of documents: a cache's identity, and the hashes of its tokens, block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvzip.container import Reader
from kvzip.errors import CorruptError, KVZipError, UnsupportedError, UsageError
from kvzip.identity import is_fingerprint
from kvzip.options import text

Ids = NDArray[np.uint32]
"""Token ids, [tokens]."""

BLOCK_TOKENS = 256
"""Tokens in a block of a store that is made without saying it."""


class Identity(msgspec.Struct, frozen=True):
    """What must be equal for a cache to be of use."""

    model: str
    """Empty where a fingerprint says which weights these are, whatever they are called."""
    revision: str
    dtype: str
    profile: str = ""
    """SHA-256 of the profile that a reader must have; empty: none."""

    @classmethod
    def of(cls, model: str, revision: str, dtype: str, profile: str = "") -> Identity:
        return cls("" if is_fingerprint(revision) else model, revision, dtype, profile)

    @classmethod
    def of_document(cls, reader: Reader) -> Identity:
        """What a document says of itself. Raises KVZipError when it does not name its model."""
        header = reader.header
        if not (header.origin.model or is_fingerprint(header.origin.revision)):
            raise KVZipError(
                "the document does not name its model, by which it would be found: "
                "Snapshot.from_arrays(..., origin=kvzip.Origin(model=..., revision=...)) does"
            )
        return cls.of(
            header.origin.model, header.origin.revision, header.layout.dtype, header.profile or ""
        )

    def __str__(self) -> str:
        names = [self.model and f"model {self.model}", self.revision, self.dtype]
        return ", ".join(filter(None, [*names, self.profile and f"profile {self.profile[:12]}"]))

    @property
    def namespace(self) -> str:
        """The first part of the keys of all documents of this identity."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:32]


class About(Identity, frozen=True):
    """What a namespace says of itself."""

    called: str = ""
    """The model's name in the first document that was put there: for people, since a fingerprint is
    enough to find it."""

    @classmethod
    def of_identity(cls, identity: Identity, called: str) -> About:
        return cls(**msgspec.structs.asdict(identity), called=called)

    @property
    def identity(self) -> Identity:
        """What the namespace is a hash of."""
        return Identity(self.model, self.revision, self.dtype, self.profile)


def hash_chain(ids: Ids, block_tokens: int) -> list[str]:
    """The hash chain of the whole blocks of a document: H(1), H(2), ... in hexadecimal."""
    data = np.ascontiguousarray(ids, "<u4")
    digest, chain = b"", []
    for end in range(block_tokens, len(data) + 1, block_tokens):
        digest = hashlib.sha256(digest + data[end - block_tokens : end].tobytes()).digest()
        chain.append(digest.hex())
    return chain


def block_tokens_of(ids: Ids, marks: Sequence[str]) -> int | None:
    """How many tokens a block has, if one of the marks stands for the first block of these ids."""
    digest, wanted = hashlib.sha256(), set(marks)
    for count, token in enumerate(np.ascontiguousarray(ids, "<u4").reshape(-1, 1), 1):
        digest.update(token.tobytes())
        if digest.hexdigest() in wanted:
            return count
    return None


def token_ids_from(given: ArrayLike) -> Ids:
    """Token ids in any form as [tokens]. Raises UsageError for what are none."""
    try:
        ids = np.asarray(given).reshape(-1)
    except (ValueError, TypeError, RuntimeError):
        raise UsageError("token ids must be one row of integers") from None
    if ids.dtype.kind not in "iu" and ids.size:
        raise UsageError(f"token ids must be integers, not {ids.dtype}")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 2**32:
        raise UsageError("token ids must be from 0 to 4,294,967,295")
    return ids.astype(np.uint32)


def token_ids_of(reader: Reader, given: ArrayLike | None = None) -> Ids:
    """The ids of a document's tokens, from the file, or as given where it has only their hash.

    Raises UnsupportedError for a batch, and KVZipError when there are no ids or they are not the
    document's.
    """
    if (reader.layout.batch or 1) != 1:
        raise UnsupportedError("the document is a batch: store each row as a document of its own")
    ids = reader.token_ids
    if ids is None:
        if given is None:
            raise KVZipError("the document has no token ids, by which it would be found: give them")
        ids = token_ids_from(given)
        if reader.header.token_ids_sha256 not in (None, hashlib.sha256(_bytes(ids)).hexdigest()):
            raise KVZipError("the token ids given are not those of the document")
    ids = ids.reshape(-1)
    if len(ids) != reader.layout.tokens:
        raise KVZipError(f"{len(ids)} token ids for a document of {reader.layout.tokens} tokens")
    return ids


def document_name(reader: Reader, ids: Ids) -> str:
    """A document's name within its namespace: its tokens, how it is coded, and what it holds."""
    digest = hashlib.sha256(_bytes(ids))
    digest.update(msgspec.json.encode(reader.header.codec, order="sorted"))
    digest.update(msgspec.json.encode(reader.layout))
    return digest.hexdigest()


def is_document_key(key: str) -> bool:
    """Whether a text has the form of a document's key: its namespace and its name."""
    space, _, name = key.partition("/")
    return space.isalnum() and name.isalnum()


def document_path(key: str) -> str:
    """Where the document of a key lies. Raises KVZipError for what is no key."""
    if not is_document_key(text("key", key)):
        raise KVZipError(f"{key!r} is no key of a document: kvzip ls shows them")
    space, name = key.split("/")
    return f"{space}/docs/{name}.kvz"


def check_place(reader: Reader, key: str, chain: list[str] | None = None) -> None:
    """Raise CorruptError, and close it, for a document that does not belong where it lies: what a
    server gives in the place of another may be of the same tokens, by another model, or of other
    tokens. `chain`: that of the key's document, if it is known."""
    try:
        identity, ids = Identity.of_document(reader), reader.token_ids
    except KVZipError:
        found = "a model that it does not name"
    else:
        found = str(identity)
        if identity.namespace == key.partition("/")[0]:
            if ids is None or chain is None or _is_chain_of(chain, ids.reshape(-1)):
                return
            found = "other tokens"
    reader.close()
    raise CorruptError(f"what lies under the key {key} is another document, of {found}")


def _is_chain_of(chain: list[str], ids: Ids) -> bool:
    """Whether that is the hash chain of these ids, by blocks of its own: a store that was deleted
    and made anew may have other ones than it had."""
    block_tokens = block_tokens_of(ids[: len(ids) // max(1, len(chain))], chain[:1])
    return block_tokens is not None and hash_chain(ids, block_tokens) == chain


def _bytes(ids: Ids) -> bytes:
    """The ids as little-endian uint32."""
    return np.ascontiguousarray(ids, "<u4").tobytes()
