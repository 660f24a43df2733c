"""What the scheduler's half tells the worker's half with each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvzip.snapshot import Origin


@dataclass
class Load:
    """Tokens `start` to `stop` of a document, and vLLM's blocks that they fill."""

    request: str
    document: str
    """The document's key in the store."""
    start: int
    stop: int
    blocks: list[int]


@dataclass
class Save:
    """A prompt whose tokens lie in `blocks` when the step is done."""

    request: str
    token_ids: list[int]
    blocks: list[int]
    origin: Origin
    replace: bool
    """Whether what the store has may be damaged."""


@dataclass
class Metadata(KVConnectorMetadata):
    """The loads and saves of one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
