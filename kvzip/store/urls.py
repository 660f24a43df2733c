"""What a path or a URL names, told from its text alone."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import unquote

from kvzip.container.source import is_url
from kvzip.errors import UsageError

_URL_PARTS = re.compile(r"([A-Za-z0-9+.-]{1,16}://)(?:[^/\s]+@)?([^?\s\"']*)(\?[^\s\"']*)?")
"""A scheme is bounded, or a text of a million letters, which a server may answer, takes a quarter
of an hour."""


def without_secrets(url: str) -> str:
    """A URL, or a text with URLs, for messages: without what gives access in it, a password or a
    signature in its query."""
    return _URL_PARTS.sub(lambda u: u[1] + u[2] + ("?..." if u[3] else ""), url)


def store_option(url: str) -> str:
    """How a command line that may be copied names a store."""
    return f"--store {shlex.quote(url)}"


AZURE = ("az", "adl", "azure", "abfs", "abfss")
_OBJECT_STORES = ("s3", "s3a", "gs", *AZURE)
WEB = ("http", "https")


def scheme_of(url: str) -> str:
    """The scheme of a URL in small letters; "" for a path. Raises UsageError for any that is not
    one of ours, and for what looks like one."""
    scheme = url.partition("://")[0].lower() if is_url(url) else ""
    if scheme and scheme not in (*_OBJECT_STORES, *WEB, "file"):
        raise UsageError(
            f"{without_secrets(url)!r}: there is no store of the kind {scheme}://; name a folder, "
            "file://, s3://bucket/prefix (gs://, az://), or http(s):// to read from"
        )
    begun = re.match(r"(file|https?|s3a?|gs|az):(?!//)", url, re.IGNORECASE)
    if not scheme and (begun or "://" in url):
        raise UsageError(f"{without_secrets(url)!r} is neither a path nor a URL (s3://..., ...)")
    return scheme


def plain_scheme(url: str) -> str:
    """The same URL with its scheme in small letters, as clients want it; a path as it is."""
    scheme = scheme_of(url)
    return scheme + url[len(scheme) :]


def folder_of(url: str) -> Path | None:
    """The folder that a path or a file:// URL names; None for other URLs."""
    scheme = scheme_of(url)
    if scheme not in ("", "file"):
        return None
    if not scheme:
        found = url
    else:
        host, slash, rest = url.partition("://")[2].partition("/")
        if host or not slash:
            raise UsageError(f"{url!r}: write file:///folder, the whole path after file://")
        found = "/" + unquote(rest)
    if not found or "\0" in found:
        raise UsageError(f"{url!r} names no folder")
    return Path(found)
