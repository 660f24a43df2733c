"""A store of documents' caches, found by model and by the tokens that a prompt begins with."""

from kvzip.store.store import BLOCK_TOKENS, Match, Store

__all__ = ["BLOCK_TOKENS", "Match", "Store"]
