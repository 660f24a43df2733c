"""A connector and a tier for vLLM (docs/vllm.md). What needs no vLLM can be imported without it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvzip.load.vllm.connector import KvzipConnector
    from kvzip.load.vllm.tier import KvzipTier

__all__ = ["KvzipConnector", "KvzipTier"]
_WHERE = {"KvzipConnector": "connector", "KvzipTier": "tier"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
