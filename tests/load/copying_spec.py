"""vLLM's `TieringOffloadingSpec` on a CPU: all of vLLM's own but the worker that copies from a GPU.

vLLM refuses to make that one where there is no GPU. This one copies bytes between vLLM's blocks and
the pool, to where vLLM's would copy them. It is named in ``spec_name`` and ``spec_module_path``.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyingWorker(OffloadingWorker):
    """Copies blocks at once, of each group into the tensors that its layers lie in."""

    def __init__(self, caches: CanonicalKVCaches, region: SharedOffloadRegion, each: int):
        self._region, self._each = region, each
        self._blocks = [t.tensor for t in caches.tensors]
        self._pool = [region.create_next_worker_view(t.shape[1] * each) for t in self._blocks]
        self._groups = caches.group_data_refs
        self._done: list[TransferResult] = []

    def _move(self, job: int, blocks: GPULoadStoreSpec, chunks: Any, load: bool) -> bool:
        ids, rows, taken, at = blocks.block_ids.tolist(), chunks.block_ids.tolist(), 0, 0
        for refs, count, first in zip(
            self._groups, blocks.group_sizes, blocks.block_indices, strict=True
        ):
            skip = first % self._each
            for n, block in enumerate(ids[at : at + count], skip):
                row, place = rows[taken + n // self._each], n % self._each
                for ref in refs:
                    mine = self._blocks[ref.tensor_idx][block][: ref.page_size_bytes]
                    start = place * self._blocks[ref.tensor_idx].shape[1]
                    theirs = self._pool[ref.tensor_idx][row][start : start + ref.page_size_bytes]
                    mine.copy_(theirs) if load else theirs.copy_(mine)
            taken += -(-(skip + count) // self._each) if count else 0
            at += count
        self._done.append(TransferResult(job, True))
        return True

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        return self._move(job_id, src_spec, dst_spec, load=False)

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        return self._move(job_id, dst_spec, src_spec, load=True)

    def get_finished(self) -> list[TransferResult]:
        found, self._done = self._done, []
        return found

    def wait(self, job_ids: set[int]) -> None:
        """They are done."""

    def shutdown(self) -> None:
        self._pool.clear()
        self._region.cleanup()


class CopyingSpec(TieringOffloadingSpec):
    """All as vLLM has it, with a :class:`CopyingWorker`."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker: Any = CopyingWorker(kv_caches, region, self.blocks_per_chunk)
        return self._worker
