"""What the scheduler's half tells the worker's half with each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvzip.snapshot import Origin


@dataclass
class Span:
    """Blocks of one of vLLM's groups of layers, whose first token has the position `start`."""

    start: int
    blocks: list[int]


@dataclass
class Load:
    """Tokens up to `stop` of a prompt's documents, and vLLM's blocks that they fill."""

    request: str
    documents: tuple[str, ...]
    """The documents' keys in the store, one for each part that the model is cut into."""
    start: int
    stop: int
    spans: list[Span]
    """Of each group: from `start` on, or, where a window has slid on, from later on."""

    @property
    def blocks(self) -> set[int]:
        """All blocks that are filled."""
        return {block for span in self.spans for block in span.blocks}


@dataclass
class Save:
    """A prompt whose tokens lie in `spans`, one of each group, when the step is done."""

    request: str
    token_ids: list[int]
    spans: list[Span]
    origin: Origin
    replace: bool
    """Whether what the store has may be damaged."""


@dataclass
class Metadata(KVConnectorMetadata):
    """The loads and saves of one step."""

    loads: list[Load] = field(default_factory=list)
    background: list[Load] = field(default_factory=list)
    """Loads of requests that wait for them, and are no part of the step."""
    saves: list[Save] = field(default_factory=list)
    failures: int = 0
    """Of how many steps vLLM knew, when it planned this one, that something was not loaded."""
