"""What a file under peers/ offers: a competitor as it is called on one block of numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from kvzip.dtypes import Bits, DType
from kvzip.eval.results.bench import Order

Shape = tuple[int, int]


class Peer(ABC):
    """A competitor with one setting. Each thread has its own object, which may hold contexts.

    `__init__` takes the format of the numbers and raises UnsupportedError for one that the
    competitor cannot take.
    """

    name: ClassVar[str]
    """What its row in the table is called."""
    setting: ClassVar[str]
    """The settings, in the competitor's own words."""
    package: ClassVar[str]
    """The distribution that it comes in."""
    order: ClassVar[Order]
    """How the numbers shall lie, whichever suits the competitor better."""

    def __init__(self, form: DType) -> None:
        self.form = form

    @abstractmethod
    def encode(self, numbers: Bits) -> Any:
        """Bytes that hold `numbers`, which must stay as they are: one layer's K or V.

        `numbers` are unsigned integers without gaps, in rows: in the order "token" each row is one
        token of one head, in the order "channel" each row is one channel, all its tokens.
        """

    @abstractmethod
    def decode(self, data: Any, shape: Shape) -> Any:
        """A buffer of the bytes of the numbers, whose rows and columns are known.

        `data` is what `encode` gave.
        """
