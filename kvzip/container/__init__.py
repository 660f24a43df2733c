"""The .kvz file: a header, an index of blocks, blocks, checksums of everything (docs/format.md).

`format` and `index` are what comes before the blocks, `source` the bytes that a file is read from,
`sink` what it is written to. `writer` makes a file of a snapshot and a codec. `reader` is an open
file: `plan` says which blocks a request takes, `blocks` what is stored of them, `decoding` and
`on_device` decode them.
"""

from kvzip.container.format import MAGIC, Header, Info, PartInfo, header_schema, stated_length
from kvzip.container.reader import Reader
from kvzip.container.source import Source
from kvzip.container.writer import Writer

__all__ = [
    "MAGIC",
    "Header",
    "Info",
    "PartInfo",
    "Reader",
    "Source",
    "Writer",
    "header_schema",
    "stated_length",
]
