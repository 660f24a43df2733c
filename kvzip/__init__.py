"""kvzip: lossless compression of language models' KV caches."""

from kvzip import interruption  # noqa: F401 - first of all, see there
from kvzip.api import decode, encode, info, max_encoded_size, open, verify, write
from kvzip.codec import Codec, Context, codec_names, get_codec, register_codec
from kvzip.container import Info, Reader
from kvzip.container.sealed import Key
from kvzip.errors import (
    CancelledError,
    CorruptError,
    FormatError,
    KVZipError,
    ProfileError,
    SealError,
    StoreError,
    UnsupportedError,
    UsageError,
    WeightsError,
)
from kvzip.identity import fingerprint
from kvzip.pages import decode_page, encode_page, max_page_size
from kvzip.profile import Profile
from kvzip.snapshot import Layer, LayerLayout, Layout, Origin, PartLayout, Snapshot
from kvzip.version import __version__

__all__ = [
    "CancelledError",
    "Codec",
    "Context",
    "CorruptError",
    "FormatError",
    "Info",
    "KVZipError",
    "Key",
    "Layer",
    "LayerLayout",
    "Layout",
    "Origin",
    "PartLayout",
    "Profile",
    "ProfileError",
    "Reader",
    "SealError",
    "Snapshot",
    "StoreError",
    "UnsupportedError",
    "UsageError",
    "WeightsError",
    "__version__",
    "codec_names",
    "decode",
    "decode_page",
    "encode",
    "encode_page",
    "fingerprint",
    "get_codec",
    "info",
    "max_encoded_size",
    "max_page_size",
    "open",
    "register_codec",
    "verify",
    "write",
]
