"""Documents as they are given to a store: paths, bytes and snapshots, and the file that each is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from kvzip import api, tensors
from kvzip.codec import Codec
from kvzip.container import MAGIC
from kvzip.container.format import whole_length
from kvzip.container.source import Named, naming
from kvzip.errors import UsageError
from kvzip.files import name_of, scratch_file
from kvzip.profile import Profile
from kvzip.reading import reading
from kvzip.snapshot import Snapshot
from kvzip.tensors import TensorFile


@contextmanager
def open_either(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], Snapshot | None]]:
    """The open file that a path names, and the snapshot that it holds, or None for a .kvz file.

    A pipe is read once, and what begins like neither, no further. Raises OSError, and FormatError
    or CorruptError for what is neither.
    """
    name = name_of(path)
    with naming(Named(name)), reading(path, partial(_length, name)) as file:
        encoded = file.read(len(MAGIC)) == MAGIC
        file.seek(0)
        yield file, None if encoded else Snapshot.of_file(TensorFile(name, file=file))


@contextmanager
def as_file(
    document: Snapshot | str | os.PathLike[str] | bytes | bytearray | memoryview,
    codec: str | Codec | Mapping[str, Any],
    profile: Profile | None,
    threads: int,
    progress: Callable[[int], None] | None,
    device: Any = None,
) -> Iterator[IO[bytes]]:
    """The document as an open .kvz file: as it is, or encoded. Raises UsageError for what is
    none, and what encoding does."""
    if isinstance(document, (str, os.PathLike)):
        with open_either(document) as (file, snapshot):
            if snapshot is None:
                yield file
                return
            document = snapshot  # which goes on reading when the file is closed
    with scratch_file() as file:
        if isinstance(document, Snapshot):
            writer = api.writer_of(document, codec, profile, device=device)
            writer.write(file, threads, progress)
        else:
            kind = type(document).__name__
            try:
                file.write(document)
            except TypeError:
                raise UsageError(
                    f"a {kind} is no document: give a Snapshot, a path or bytes"
                ) from None
        file.flush()
        yield file


def _length(name: str, first: bytearray) -> int | None:
    """How long a .kvz file or a snapshot is that begins so; None if it takes more bytes to tell."""
    if len(first) < len(MAGIC):
        return None
    if first.startswith(MAGIC):
        return whole_length(first)
    return tensors.whole_length(name, first)
