"""The .kvz file: a header, an index of blocks, blocks, checksums of everything (docs/format.md)."""

from kvzip.container.reader import (
    MAGIC,
    Info,
    Reader,
    decode,
    encode,
    header_schema,
    info,
    max_encoded_size,
    open,
    stated_length,
    thread_count,
    verify,
    write,
)
from kvzip.container.source import Source

__all__ = [
    "MAGIC",
    "Info",
    "Reader",
    "Source",
    "decode",
    "encode",
    "header_schema",
    "info",
    "max_encoded_size",
    "open",
    "stated_length",
    "thread_count",
    "verify",
    "write",
]
