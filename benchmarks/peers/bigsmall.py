"""bigsmall's coders by number format: first the one that its `compress` prefers for size, then
for bf16 the one that it takes when asked for speed. Its sequence-aware mode was larger."""

from __future__ import annotations

import math
import os
from typing import ClassVar

# It would ask the package index for a newer version at import.
os.environ.setdefault("BIGSMALL_DISABLE_VERSION_CHECK", "1")

from bigsmall.codec_registry import get_codec

from kvzip.benchmarks.peer import Peer, Shape
from kvzip.dtypes import Bits, DType
from kvzip.errors import UnsupportedError
from kvzip.eval.results.bench import Order


class Bigsmall(Peer):
    name, package = "bigsmall", "bigsmall"
    setting = "bf16_se_rans, fp16_se_ac, fp32_se_ac or fp8_cat_ac"
    order: ClassVar[Order] = "token"
    coders: ClassVar[dict[str, str]] = {
        "bf16": "bf16_se_rans",
        "fp16": "fp16_se_ac",
        "fp32": "fp32_se_ac",
        "fp8_e4m3fn": "fp8_cat_ac",
        "fp8_e5m2": "fp8_cat_ac",
    }

    def __init__(self, form: DType) -> None:
        super().__init__(form)
        if form.name not in self.coders:
            raise UnsupportedError(f"not for {form.name}")
        self._encode, self._decode = get_codec(self.coders[form.name])

    def encode(self, numbers: Bits) -> bytes:
        data: bytes
        data, beside = self._encode(numbers.tobytes())
        if beside:
            raise ValueError("it wants to keep something beside its bytes")
        return data

    def decode(self, data: bytes, shape: Shape) -> bytes:
        numbers: bytes = self._decode(data, {}, math.prod(shape))
        return numbers


class BigsmallFast(Bigsmall):
    name, setting = "bigsmall fast", "bf16_se_single_kernel"
    coders: ClassVar[dict[str, str]] = {"bf16": "bf16_se_single_kernel"}


PEERS = (Bigsmall, BigsmallFast)
