"""How a model is cut over workers, each of which stores and loads its part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvzip.errors import UnsupportedError
from kvzip.identity.checkpoint import changed
from kvzip.profile import Profile
from kvzip.snapshot import Origin
from kvzip.statistics.splits import Cut

if TYPE_CHECKING:
    from vllm.config import ParallelConfig


@dataclass(frozen=True)
class Split:
    """Over how many workers heads (`tensor`) and layers (`pipeline`) are cut."""

    tensor: int = 1
    pipeline: int = 1
    equal: bool = False
    """Whether all workers of the tensor split hold the same numbers, of which one stores them."""

    @classmethod
    def of(cls, config: ParallelConfig) -> Split:
        """What vLLM's configuration says. Raises UnsupportedError where tokens are cut."""
        for name in ("decode_context", "prefill_context"):
            if getattr(config, f"{name}_parallel_size", 1) > 1:
                raise UnsupportedError(
                    f"{name}_parallel_size is above 1: a document holds all tokens, of which each "
                    "worker has some"
                )
        tensor = getattr(config, "tensor_parallel_size", 1)
        return cls(tensor, getattr(config, "pipeline_parallel_size", 1))

    def with_equal_tensor_ranks(self) -> Split:
        """The same where heads are not cut: each worker of the tensor split has the whole latent
        of its layers (MLA)."""
        return replace(self, equal=True)

    @property
    def parts(self) -> int:
        """How many documents a prompt becomes."""
        return self.pipeline * (1 if self.equal else self.tensor)

    def others(self) -> Iterator[Split]:
        """Other splits that a model may have been served with."""
        for tensor, pipeline in product((1, 2, 4, 8), (1, 2, 4)):
            found = replace(self, tensor=tensor, pipeline=pipeline)
            if found.parts != self.parts or found.pipeline != self.pipeline:
                yield found

    def __str__(self) -> str:
        return f"tensor_parallel_size={self.tensor}, pipeline_parallel_size={self.pipeline}"

    def own_part(self) -> tuple[int, bool]:
        """Which part the worker in this process has, and whether it is the one that stores it."""
        if self.tensor * self.pipeline == 1:
            return 0, True
        from vllm.distributed import parallel_state

        stage = parallel_state.get_pp_group().rank_in_group
        rank = parallel_state.get_tensor_model_parallel_rank()
        return (stage, rank == 0) if self.equal else (stage * self.tensor + rank, True)

    def profile(self, named: str | None, part: int, whole: Profile | None) -> Profile | None:
        """The profile that a part is stored with: its own, which lies beside the one that is named
        by a path (``kvzip fit --split``), or where there is none `whole`, which is that one.
        Raises ProfileError, and the OSError of a path."""
        if named is not None and self.tensor * self.pipeline > 1:
            own = Cut(self.tensor, self.pipeline).path(Path(named), part)
            if own.exists():
                return Profile.load(own)
        return whole

    def origin(self, whole: Origin, part: int) -> Origin:
        """Where a part comes from, by `whole`, where the model's cache does: its revision names the
        split, so that parts of another one are never found."""
        if self.parts == 1:
            return whole
        told = {"tensor": self.tensor, "pipeline": self.pipeline, "part": f"{part} of {self.parts}"}
        if self.equal:
            told.pop("tensor")
        return msgspec.structs.replace(whole, revision=changed(whole.revision, told))
