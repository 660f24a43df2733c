"""What a codec's profile takes: in a store once a model, and in the memory of whoever decodes."""

from __future__ import annotations

import msgspec

from kvzip.choice.cost import CodecFigures
from kvzip.codec import get_codec
from kvzip.eval.money.prices import Shape
from kvzip.eval.money.ratios import slowdown_of
from kvzip.eval.quantities import dollars, duration, significant
from kvzip.eval.results.inputs import Inputs


def region_bytes(layers: int, numbers_per_token: float) -> float:
    """Bytes of a profile's weights of one region, a model: ``layers * 4 * n^2`` with n numbers a
    layer and token, as codecs/predictive/spec.md has them."""
    return float(layers * 4 * (numbers_per_token / layers) ** 2)


def profile_bytes(codec: str, shape: Shape, inputs: Inputs | None = None) -> float:
    """Bytes of a codec's profile for a model of that shape; 0 of a codec that needs none. A model:
    as many regions as the profile had that the inputs were measured with, by its size, or one."""
    if not get_codec(codec).needs_profile:
        return 0.0
    regions = 1.0
    if inputs is not None:
        measured = max((r.profile_bytes or 0.0 for r in inputs.rows if r.codec == codec), default=0)
        if measured:
            regions = measured / region_bytes(inputs.layers, inputs.numbers_per_token)
    return regions * region_bytes(shape.layers, shape.numbers_per_token)


def figures_of(shape: Shape, inputs: Inputs, dtype: str, tokens: float) -> list[CodecFigures]:
    """What was measured of every codec, as it is taken to be for a model of that shape: slower in a
    wider one (:mod:`kvzip.choice.width`), and with a profile of its size. One thread. Raises
    KVZipError when nothing was measured of that dtype."""
    found = []
    for f in inputs.figures(dtype, tokens):
        slow = slowdown_of(f.name, shape, inputs)
        found.append(
            msgspec.structs.replace(
                f,
                decode_rate=f.decode_rate / slow,
                encode_rate=f.encode_rate / slow,
                profile_bytes=profile_bytes(f.name, shape, inputs),
            )
        )
    return found


class ProfileCost(msgspec.Struct, frozen=True):
    """What a codec needs beside the document: the same for all documents of a model."""

    codec: str
    bytes: float
    """In a store, once; and in the memory of whoever decodes."""
    copies: int
    """In so many memories: the host's, or those of all GPUs that a cache is decoded on."""
    on_device: bool
    seconds: float
    """To fetch it, once, before the first load."""
    dollars: float
    """Of its egress then."""

    def line(self) -> str:
        """A sentence of advice."""
        where = "the host's memory"
        if self.on_device:
            where = (
                "a GPU's memory" if self.copies == 1 else f"each of {self.copies} GPUs' memories"
            )
        return (
            f"The profile of {self.codec} takes {significant(self.bytes / 1e6)} MB of it and of "
            f"{where}; the first load fetches it before, {duration(self.seconds)} and "
            f"{dollars(self.dollars)}."
        )
