"""Where an engine's settings say that caches go. All engines' adapters open it here, and nowhere
else, so that each request has the settings' own patience, and each store its key."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from kvzip.container.sealed import Key
from kvzip.container.secret_keys import key_from
from kvzip.errors import KVZipError, StoreError
from kvzip.store import Store
from kvzip.store.bucket import Objects, open_bucket
from kvzip.store.settings import check_key

T = TypeVar("T")

_NAME = 100
"""How long a folder's name may be: sealed, it is twice as long and a little more, and disks take
255 bytes."""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all engines' settings have in common. Each has its own beside these."""

    url: str
    """A folder, or ``s3://bucket/prefix``."""
    key_from: str | None = None
    """Where the key is that all is encrypted with: ``env:NAME``, a variable of the environment, or
    ``file:PATH``; without, nothing is encrypted."""
    timeout: float = 10.0
    """Seconds of a request."""
    retries: int = 1
    options: dict[str, Any] | None = None
    """Timeout, retries and options: see `kvzip.store.Store`."""

    def key(self) -> Key | None:
        """The key that is named, if one is. Raises UsageError, which does not show it."""
        return key_from(self.key_from)

    def objects(self) -> Objects:
        """The objects under the URL. Raises UsageError, and SealError where what is there was
        sealed with another key, or with one and none is named."""
        found = open_bucket(
            self.url,
            timeout=self.timeout,
            retries=self.retries,
            options=self.options,
            make=True,
            key=self.key(),
        )
        with suppress(StoreError):  # who does not answer now is told of when caches are asked for
            check_key(found)
        return found

    def store(self, limit_bytes: int | None = None, block_tokens: int | None = None) -> Store:
        """The store at the URL. Raises as :meth:`objects`."""
        found = Store(
            self.url,
            limit_bytes=limit_bytes,
            block_tokens=block_tokens,
            timeout=self.timeout,
            retries=self.retries,
            options=self.options,
            key=self.key(),
        )
        with suppress(StoreError):
            found.check_key()
        return found


def converted(what: str, given: object, kind: type[T]) -> T:
    """Settings as an engine was given them, under the name `what`. Raises KVZipError, which names
    one that is wrong, and shows none."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise KVZipError(f"{what}: {error}") from None


def folder_name(text: str, safe: str = "") -> str:
    """A text as the name of one folder, which is not the one above; a digest of one that is too
    long for a disk. `safe`: what stays as it is besides letters and digits."""
    name = quote(text, safe=safe)
    if len(name) > _NAME:
        return hashlib.sha256(text.encode()).hexdigest()
    return name.replace(".", "%2E") if name in (".", "..") else name
