"""What a store holds, as its objects' names tell."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime

import msgspec

from kvzip.errors import CorruptError, FormatError, UsageError
from kvzip.parsing import from_json
from kvzip.store.bucket import Objects
from kvzip.store.keys import About, is_document_key


class Stored(msgspec.Struct, frozen=True):
    """A document as a listing shows it."""

    key: str
    encoded_bytes: int
    used: datetime


def namespaces(objects: Objects) -> list[str]:
    """The namespaces that a store has. Raises UsageError for one that cannot be listed."""
    if not objects.listable:
        raise UsageError(f"{objects.url} cannot be listed: name what the server serves")
    return [name for name in objects.folders() if len(name) == 32]


def abouts(objects: Objects) -> dict[str, About]:
    """What each namespace says of itself, of those that do."""
    found = {}
    for space in namespaces(objects):
        with suppress(CorruptError, FormatError):
            data = objects.get(f"{space}/about.json") or b""
            found[space] = from_json(data, About)
    return found


def documents(objects: Objects) -> list[Stored]:
    """All documents, the one that was used longest ago first. Files that others have put among
    them, such as those that NFS keeps of what is deleted and still read, are none."""
    found = []
    for space in namespaces(objects):
        used = {m.path.rpartition("/")[2]: m.modified for m in objects.under(f"{space}/used")}
        for meta in objects.under(f"{space}/docs"):
            file = meta.path.rpartition("/")[2]
            name = file.removesuffix(".kvz")
            key = f"{space}/{name}"
            if name != file and is_document_key(key):
                last = max(meta.modified, used.get(name, meta.modified))
                found.append(Stored(key, meta.size, last))
    return sorted(found, key=lambda d: (d.used, d.key))
