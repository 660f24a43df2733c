"""Warnings that are given once for each kind of trouble."""

from __future__ import annotations

import logging

log = logging.getLogger("kvzip.vllm")


class Troubles:
    """Each kind of trouble is told when it begins, and not again until it is over."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, kind: str, message: str, *values: object) -> None:
        """Warn, unless this kind was told already."""
        if kind not in self._told:
            self._told.add(kind)
            log.warning(message, *values)

    def over(self, kind: str) -> None:
        """Take note that the trouble is over."""
        self._told.discard(kind)
