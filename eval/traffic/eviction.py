"""What a cache of blocks drops when it is full: LRU, and S3-FIFO.

A policy holds at most so many blocks. :meth:`touch` says whether it has a block, and takes it in if
it has not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, Protocol


class Policy(Protocol):
    """A cache that decides by itself what it drops."""

    def touch(self, block: int) -> bool:
        """Use a block; whether it was there."""


class Lru:
    """Drops what was used longest ago."""

    def __init__(self, room: float):
        self.room = room
        self._held: OrderedDict[int, None] = OrderedDict()

    def touch(self, block: int) -> bool:
        there = block in self._held
        self._held[block] = None
        self._held.move_to_end(block)
        if len(self._held) > self.room:
            self._held.popitem(last=False)
        return there

    def forget(self, block: int) -> None:
        """Have a block no more."""
        self._held.pop(block, None)


_MOST_USES = 3
"""Uses of a block that S3-FIFO counts."""


class S3Fifo:
    """S3-FIFO (Yang, Zhang, Qiu, Yue, Vinayak, "FIFO queues are all you need for cache eviction",
    SOSP 2023).

    New blocks pass through a small queue, a tenth of the room. Those that were used again by the
    time they reach its end go on to the main queue, the others are dropped, and their ids are kept
    for a while: a block that comes back by then enters the main queue at once. In the main queue a
    block that was used since it was last looked at goes round once more for each use.
    """

    def __init__(self, room: int):
        self.room = room
        self._small_room = max(room // 10, 1)
        self._main_room = max(room - self._small_room, 0)
        self._small: OrderedDict[int, int] = OrderedDict()
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def touch(self, block: int) -> bool:
        for queue in (self._small, self._main):
            if block in queue:
                queue[block] = min(queue[block] + 1, _MOST_USES)
                return True
        if self.room < 1:
            return False
        while len(self._small) + len(self._main) >= self.room:
            self._drop()
        back = block in self._ghosts
        if back:
            del self._ghosts[block]
        (self._main if back else self._small)[block] = 0
        return False

    def _drop(self) -> None:
        """Drop one block."""
        if len(self._small) >= self._small_room or not self._main:
            self._drop_from_small()
        else:
            self._drop_from_main()

    def _drop_from_small(self) -> None:
        while self._small:
            block, uses = self._small.popitem(last=False)
            if uses and self._main_room:
                self._main[block] = 0
                if len(self._main) > self._main_room:
                    self._drop_from_main()
                    return
            else:
                self._ghosts[block] = None
                if len(self._ghosts) > self._main_room:
                    self._ghosts.popitem(last=False)
                return

    def _drop_from_main(self) -> None:
        while self._main:
            block, uses = self._main.popitem(last=False)
            if not uses:
                return
            self._main[block] = uses - 1


PolicyName = Literal["lru", "s3-fifo"]
POLICIES: dict[PolicyName, Callable[[int], Policy]] = {"lru": Lru, "s3-fifo": S3Fifo}
"""Policies by name, each made with the blocks that it has room for."""
