"""A secondary tier for vLLM's own offloading: what leaves the GPU for the CPU's memory goes on from
there, compressed, to a disk or a bucket, and comes back when a prompt asks for it.

.. code-block:: json

    {"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
     "kv_connector_extra_config": {
       "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 17179869184,
       "secondary_tiers": [{"type": "KvzipTier", "module_path": "kvzip.load.vllm",
                            "url": "/nvme/kv", "limit_bytes": 1000000000000}]}}

vLLM hands over chunks of fixed size, which become objects of whatever size they compress to, each
written whole or not at all under vLLM's own hash of its tokens. What is damaged, gone, or does not
come in time is a miss: vLLM computes it, and it is written anew. Nothing that goes wrong ends a
request; each kind of trouble is told once (logger ``kvzip.vllm``).

The interface is that of vLLM 0.32.0 and 0.33.0, ``vllm.v1.kv_offload.tiering.base``. vLLM calls one
method at a time, and none waits for a chunk, but for :meth:`KvzipTier.drain_jobs`. docs/vllm.md has
the settings.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvzip import metrics
from kvzip.codec import get_codec
from kvzip.dtypes import Bits
from kvzip.errors import KVZipError
from kvzip.identity.checkpoint import checkpoint_fingerprint
from kvzip.load import chunks
from kvzip.load.place import folder_name
from kvzip.load.vllm.bounded import Bounded
from kvzip.load.vllm.names import fp8_format
from kvzip.load.vllm.rows import Rows
from kvzip.load.vllm.settings import TierSettings, profile_from, tier_settings_from
from kvzip.load.vllm.troubles import Troubles, log
from kvzip.snapshot import Origin
from kvzip.workers import Lock, Workers

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

_PREFIX = "tier"
_WRITTEN = "vllm:kvzip_tier_written_bytes"
_READ = "vllm:kvzip_tier_read_bytes"
_RECOMPUTED = "vllm:kvzip_tier_recomputes"
_METRICS: dict[str, OffloadingMetricMetadata] = {
    _WRITTEN: OffloadingCounterMetadata("Bytes of the chunks that were stored, compressed."),
    _READ: OffloadingCounterMetadata("Bytes of the chunks that were loaded, compressed."),
    _RECOMPUTED: OffloadingCounterMetadata(
        "Chunks that were there and had to be computed all the same, by the reason.", ("reason",)
    ),
}


class _Job:
    """What became of a job's chunks."""

    def __init__(self, job: TransferJob, count: int):
        self.keys, self.result = list(job.keys), Future[JobResult]()
        self._id, self._began, self._left = job.job_id, time.monotonic(), count
        self._done, self._lock = list[OffloadKey](), Lock()

    def ended(self, key: OffloadKey | None, size: int) -> None:
        """Take note that a chunk is done, or, with no key, that it failed."""
        with self._lock:
            self._left -= 1
            if key is not None:
                self._done.append(key)
            last = self._left <= 0
        if last:
            self.result.set_result(
                JobResult(
                    job_id=self._id,
                    success=len(self._done) == len(self.keys),
                    successful_keys=self._done,
                    transfer_time=time.monotonic() - self._began,
                    transfer_bytes=len(self._done) * size,
                )
            )


class _Lookups(AsyncLookupManager):
    """vLLM's own keeping of lookups, which asks in a thread."""

    def __init__(self, tier_type: str, has: Callable[[OffloadKey], bool], pool: Workers):
        self._has, self._ask = has, pool
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return list(self._ask.map(self._has, keys))


class KvzipTier(SecondaryTierManager):
    """Chunks of vLLM's CPU pool, compressed, in a folder or a bucket."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        locality: str | None = None,
        **settings: Any,
    ):
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        told = tier_settings_from(settings)
        self._objects = told.objects()
        if not self._objects.writable:
            raise KVZipError(f"{told.url} is read only: name a folder or a bucket")
        place = Locality.REMOTE if self._objects.folder is None else Locality.LOCAL
        self.locality = place if locality is None else Locality(locality)
        self._bounded = Bounded(self._objects, _PREFIX, told.limit_bytes)
        self._troubles = Troubles()
        self._rows, self._scope = self._prepared(offloading_spec, told)
        self._pool = np.asarray(primary_kv_view).view(np.uint8)
        self._loads = Workers(told.workers, "kvzip-tier-load")
        self._stores = Workers(told.workers, "kvzip-tier-store")
        self._asks = Workers(told.workers, "kvzip-tier-lookup")
        self._lookups = _Lookups(tier_type, self._has, self._asks)
        self._jobs: dict[int, tuple[_Job, bool]] = {}
        """Those that vLLM was not told the end of, and whether they load."""
        self._failed: set[str] = set()
        """Chunks that are there and could not be loaded."""
        self._counts, self._lock = OffloadingConnectorStats(), Lock()

    def _prepared(self, spec: OffloadingSpec, told: TierSettings) -> tuple[Rows, str]:
        """How chunks are stored, and the folder of those that are alike in all that their numbers
        and their bytes depend on. Raises KVZipError."""
        config = spec.config
        revision = told.revision
        if revision is None:
            try:
                revision = checkpoint_fingerprint(config.model.name)
            except KVZipError as error:
                raise KVZipError(
                    f"nothing says which weights of {config.model.name} these are ({error}): set "
                    "revision in the tier's settings, and change it whenever they change"
                ) from None
        profile = profile_from(told.profile, told.store)
        codec = chunks.codec_for_chunks(get_codec(told.codec), log)
        copies = 1 if spec.replicated_layout else config.parallel.world_size
        model = told.model or config.model.name
        about = {
            "model": model,
            "revision": revision,
            "dtype": config.model.dtype,
            "tokens_per_hash": config.cache.tokens_per_hash,
            "blocks_per_chunk": config.cache.blocks_per_chunk,
            "groups": [[g.tokens_per_block, *g.layer_names] for g in config.groups],
            "layout": [config.kv_cache_layout, config.canonical_layout, spec.replicated_layout],
            "row_bytes": self.block_size_bytes,
            "workers": {
                name: getattr(config.parallel, f"{name}_size")
                for name in ("tp", "pp", "pcp", "dcp")
            },
        }
        if config.model.dtype.startswith("fp8"):  # one name of two formats
            about["format"] = fp8_format(config.model.dtype)
        origin = Origin(model=model, revision=_digest(about))
        rows = Rows(config, copies, profile, codec, origin)
        if rows.why_no_pages:
            log.warning("chunks do not become pages: %s", rows.why_no_pages)
        about["profile"] = profile.id if profile is not None and rows.makes_pages else None
        scope = f"{_PREFIX}/{folder_name(model).replace('.', '%2E')}/{_digest(about)}"
        try:
            text = json.dumps(about, indent=1).encode()
            self._objects.put(f"{scope}/about.json", text, create=True)
        except KVZipError as error:  # nobody reads it but people
            self._troubles.tell("save", "chunks are not stored: %s", error)
        return rows, scope

    def _path(self, key: OffloadKey) -> str:
        name, group = get_offload_block_hash(key).hex(), get_offload_group_idx(key)
        return f"{self._scope}/{name[:3]}/{name}.{group}"

    # --- lookups ---------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def _has(self, key: OffloadKey) -> bool:
        """Whether a chunk is there that is worth loading; never raises."""
        path = self._path(key)
        try:
            found = path not in self._failed and self._bounded.has(path)
        except Exception as error:
            self._troubles.tell("lookup", "chunks are computed: %s", error)
            metrics.count("lookups", where="vllm", result="error")
            return False
        metrics.count("lookups", where="vllm", result="hit" if found else "miss")
        return found

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        for key in keys:
            self._bounded.use(self._path(key))

    # --- moving chunks ---------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._store, self._stores, loads=False)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._load, self._loads, loads=True)

    def _submit(
        self,
        job: TransferJob,
        do: Callable[[str, Bits, int], bool],
        pool: Workers,
        loads: bool,
    ) -> None:
        ids = [int(chunk) for chunk in job.chunk_ids]
        made = _Job(job, len(ids))
        self._jobs[job.job_id] = made, loads
        if not ids:
            made.ended(None, 0)

        def move(key: OffloadKey, path: str, chunk: int) -> None:
            done = False
            try:
                done = do(path, self._pool[chunk], get_offload_group_idx(key))
            finally:
                made.ended(key if done else None, self.block_size_bytes)

        for key, chunk in zip(made.keys, ids, strict=True):
            pool.submit(move, key, self._path(key), chunk)

    def _store(self, path: str, row: Bits, group: int) -> bool:
        """Store a chunk that is not there; whether it is, after that. Never raises."""
        try:
            if path not in self._failed and self._bounded.has(path):
                return True
            data = self._rows.encode(row, group)
            self._bounded.put(path, data)
        except Exception as error:  # a chunk that is not stored is a miss, no more
            self._troubles.tell("save", "chunks are not stored: %s", error)
            return False
        self._failed.discard(path)
        self._troubles.over("save")
        self._count(_WRITTEN, len(data))
        return True

    def _load(self, path: str, row: Bits, group: int) -> bool:
        """Fill a chunk; whether that went well. Never raises."""
        try:
            data = self._bounded.get(path, chunks.most_stored(row.nbytes))
            if data is None:  # somebody made room
                return False
            self._rows.decode(data, row, group)
        except Exception as error:
            self._failed.add(path)
            self._troubles.tell(
                type(error).__name__, "chunk %s is not used, and is computed: %s", path, error
            )
            metrics.recomputed("vllm", error)
            self._count(_RECOMPUTED, 1, (metrics.reason_of(error),))
            return False
        self._count(_READ, len(data))
        return True

    def get_finished_jobs(self) -> Iterable[JobResult]:
        found = []
        for number, (job, loads) in list(self._jobs.items()):
            if not job.result.done():
                continue
            del self._jobs[number]
            result = job.result.result()
            found.append(result)
            if loads and not result.success:
                failed = set(job.keys).difference(result.successful_keys or ())
                self._lookups.mark_miss(failed)
        return found

    def drain_jobs(self) -> None:
        """Return when all jobs have ended. vLLM calls this when it forgets its caches, as it does
        when its weights are no longer those of the checkpoint: from then on nothing is found that
        was stored before, and what is stored is found by this engine alone."""
        wait([job.result for job, _ in self._jobs.values()])
        self._scope = f"{_PREFIX}/{uuid.uuid4().hex}"
        self._failed.clear()

    def shutdown(self) -> None:
        """Return when all is stored that was given, and nothing looks at vLLM's memory."""
        self._lookups.shutdown()
        for pool in (self._loads, self._stores, self._asks):
            pool.shutdown()
        del self._pool

    # --- metrics ---------------------------------------------------------------------------

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return dict(_METRICS)

    def _count(self, name: str, value: int, labels: tuple[str, ...] = ()) -> None:
        with self._lock:
            self._counts.increase_counter(name, value, labels)

    def get_stats(self) -> OffloadingConnectorStats | None:
        with self._lock:
            found, self._counts = self._counts, OffloadingConnectorStats()
        return None if found.is_empty() else found


def _digest(about: dict[str, Any]) -> str:
    """What stands for a description in a path."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
