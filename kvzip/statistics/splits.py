"""A model cut over workers, by heads and by layers: the part of a cache that one of them has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvzip.errors import UnsupportedError, UsageError
from kvzip.layout import LayerLayout
from kvzip.snapshot import Layer, Snapshot


@dataclass(frozen=True)
class Cut:
    """How many workers share the heads of a layer (`tensor`), and how many stages the layers are
    cut into (`pipeline`). Parts are counted stage after stage, and in each worker after worker."""

    tensor: int = 1
    pipeline: int = 1

    @classmethod
    def read(cls, text: str) -> Cut:
        """What ``tp=2``, ``pp=2`` or ``tp=2,pp=2`` says. Raises UsageError."""
        found: dict[str, int] = {}
        for word in text.split(","):
            match = re.fullmatch(r"(tp|pp)=([1-9]\d{0,3})", word.strip())
            if match is None or match[1] in found:
                raise UsageError(f"split {text!r}: write tp=N, pp=M or tp=N,pp=M")
            found[match[1]] = int(match[2])
        return cls(found.get("tp", 1), found.get("pp", 1))

    def path(self, path: Path, part: int) -> Path:
        """The file of a part's profile beside the one of the whole model:
        ``m.tp2pp1.0.kvprofile`` beside ``m.kvprofile``."""
        return path.with_name(f"{path.stem}.tp{self.tensor}pp{self.pipeline}.{part}{path.suffix}")

    def parts(self, snapshot: Snapshot) -> int:
        """How many parts a cache is cut into: one a stage where each worker has all of a latent."""
        latent = all("k" not in layer.parts for layer in snapshot.layout.layers)
        return self.pipeline * (1 if latent else self.tensor)

    def stage(self, layers: int, number: int) -> range:
        """The layers of a stage, as vLLM cuts them: all stages alike, and of what is left one more
        to those before the last."""
        if self.pipeline > layers:
            raise UsageError(f"{layers} layers cannot be cut into {self.pipeline} stages")
        each, left = divmod(layers, self.pipeline)
        sizes = [
            each + (n < self.pipeline - 1 and n >= self.pipeline - 1 - left)
            for n in range(self.pipeline)
        ]
        start = sum(sizes[:number])
        return range(start, start + sizes[number])

    def of(self, snapshot: Snapshot, part: int) -> Snapshot:
        """One part of a cache, with all of its tokens. Its arrays are views of the cache's, read
        now where these lie in a file. Raises UnsupportedError where heads cannot be cut so."""
        stage, worker = divmod(part, self.parts(snapshot) // self.pipeline)
        layers = [
            self._of_layer(i, snapshot.layers[i], worker)
            for i in self.stage(len(snapshot.layers), stage)
        ]
        return Snapshot(layers, snapshot.dtype, snapshot.token_ids, snapshot.origin)

    def _of_layer(self, i: int, layer: Layer, worker: int) -> Layer:
        if self.tensor == 1 or "k" not in layer.layout.parts:
            return Layer(layer.parts, layer.layout)
        held, parts = {}, {}
        for name, part in layer.layout.parts.items():
            if "h" not in part.axes:
                raise UnsupportedError(f"layer {i}: how workers share its {name} is not known")
            heads = part.size("h")
            if heads % self.tensor and self.tensor % heads:
                raise UnsupportedError(
                    f"layer {i} has {heads} heads, which {self.tensor} workers cannot share"
                )
            count = max(1, heads // self.tensor)
            first = worker * heads // self.tensor
            at = part.axes.index("h")
            bits = layer.once(name)
            held[name] = bits[(slice(None),) * at + (slice(first, first + count),)]
            parts[name] = msgspec.structs.replace(part, shape=held[name].shape)
        layout: LayerLayout = msgspec.structs.replace(layer.layout, parts=parts)
        return Layer(held, layout)
