"""A connector for vLLM (docs/vllm.md). What does not need vLLM can be imported without it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvzip.load.vllm.connector import KvzipConnector

__all__ = ["KvzipConnector"]


def __getattr__(name: str) -> "type[KvzipConnector]":
    if name != "KvzipConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvzip.load.vllm.connector import KvzipConnector

    return KvzipConnector
