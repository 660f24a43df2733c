"""Documents: what can be loaded, and the one way in which it is opened."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from kvzip import api, metrics
from kvzip.container import Reader, Source
from kvzip.errors import UsageError
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.store import Match, Store


@dataclass(frozen=True)
class StoredDocument:
    """A document in a store, by its key."""

    store: Store
    key: str


Bytes: TypeAlias = bytes | bytearray | memoryview | NDArray[np.uint8]
Encoded: TypeAlias = str | os.PathLike[str] | Bytes | IO[bytes] | Source | StoredDocument
"""A .kvz file: a path, a URL (``https://``, ``s3://``), bytes, whatever else :func:`kvzip.open`
takes, or a store's document."""
Document: TypeAlias = Encoded | Reader | Match | Snapshot
"""What can be loaded: a .kvz file, one that is open, what a store has found, or a snapshot."""

Source_co = TypeVar("Source_co", bound=Reader | Snapshot, covariant=True)


class OpenDocument(Generic[Source_co]):
    """A document that can be read.

    As a context it closes the file at its end, if :func:`open_document` has opened it; unless
    :meth:`close_after` left that to another.
    """

    def __init__(self, source: Source_co, opened: Reader | None = None):
        self.source, self._opened = source, opened

    def close_after(self, user: object) -> None:
        """Close the file when `user` is gone."""
        if self._opened is not None:
            weakref.finalize(user, self._opened.close)
            self._opened = None

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> OpenDocument[Source_co]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@overload
def open_document(
    document: Encoded | Reader | Match, profile: Profile | None = None, threads: int = 0
) -> OpenDocument[Reader]: ...
@overload
def open_document(
    document: Document, profile: Profile | None = None, threads: int = 0
) -> OpenDocument[Reader | Snapshot]: ...
def open_document(
    document: Document, profile: Profile | None = None, threads: int = 0
) -> OpenDocument[Any]:
    """Open whatever can be loaded. What was open before stays open when this is closed.

    Raises what :func:`kvzip.open` does, ProfileError when the document needs another profile, and
    UsageError for a folder.
    """
    if isinstance(document, Snapshot):
        return OpenDocument(document)
    if isinstance(document, (Reader, Match)):
        reader = document if isinstance(document, Reader) else document.reader
        opened = OpenDocument(reader)
    else:
        if isinstance(document, StoredDocument):
            reader = document.store.open(document.key, profile, threads)
        else:
            if isinstance(document, (str, Path)) and Path(document).is_dir():
                raise UsageError(f"{document} is a folder: if it is a store, give a Store of it")
            reader = api.open(document, profile, threads)
        opened = OpenDocument(reader, reader)
    try:
        reader.decode(layers=[])  # a profile that is missing is told now
    except BaseException:
        opened.close()
        raise
    return opened


def find_document(
    source: Document | Store | None,
    find: Callable[[Store], Match | None],
    profile: Profile | None = None,
    threads: int = 0,
) -> OpenDocument[Reader | Snapshot] | None:
    """As :func:`open_document`, for a store, too, in which `find` looks; None where there is no
    document."""
    if isinstance(source, Store):
        match = find(source)
        if match is None:
            metrics.count("lookups", where="transformers", result="miss")
            return None
        metrics.count("lookups", where="transformers", result="hit")
        metrics.count("found_tokens", match.tokens, where="transformers")
        opened: OpenDocument[Reader | Snapshot] = OpenDocument(match.reader, match.reader)
        try:
            match.reader.decode(layers=[])  # a profile that cannot be fetched is told now
        except BaseException:
            opened.close()
            raise
        return opened
    return None if source is None else open_document(source, profile, threads)
