"""A store of documents' caches, found by model and by the tokens that a prompt begins with."""

from kvzip.store.finding import Match
from kvzip.store.keys import BLOCK_TOKENS
from kvzip.store.store import Store

__all__ = ["BLOCK_TOKENS", "Match", "Store"]
