"""A connector for vLLM: prompts' caches go into a store, and come back instead of a prefill.

.. code-block:: python

    KVTransferConfig(
        kv_connector="KvzipConnector", kv_connector_module_path="kvzip.load.vllm",
        kv_role="kv_both", kv_load_failure_policy="recompute",
        kv_connector_extra_config={"url": "s3://bucket/caches", "codec": "channel"})

The scheduler's half looks a prompt up in the store, beside the engine's work; what the store has is
used in whole blocks of vLLM's. The worker's half decodes the document: layer after layer in a
thread, ahead of the model, which waits only for the layer that it is at; or, where layers slide or
are of several groups, before the request is scheduled. After a prefill it copies the layers out,
and encodes and stores the document beside the engine.

Nothing that goes wrong ends a request: a store that does not answer is a miss; a document that
cannot be loaded is reported to vLLM, which computes those tokens, and is passed over for a while.

The interface is that of vLLM 0.32.0 and 0.33.0,
``vllm.distributed.kv_transfer.kv_connector.v1.base``. Where a model is cut over several workers,
each has documents of its own. docs/vllm.md has all settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvzip.load.vllm.engine import Engine, origin_of
from kvzip.load.vllm.metadata import Metadata
from kvzip.load.vllm.scheduler import Scheduler
from kvzip.load.vllm.settings import profile_from, settings_from
from kvzip.load.vllm.split import Split
from kvzip.load.vllm.troubles import log
from kvzip.load.vllm.worker import Worker
from kvzip.profile import Profile

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class KvzipConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM makes one for the scheduler and one for the worker."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        settings = settings_from(transfer.kv_connector_extra_config)
        engine = Engine.of(vllm_config, kv_cache_config)
        store = settings.store(settings.limit_bytes, settings.block_tokens)
        whole = profile_from(settings.profile, lambda: store)

        def profile_of(split: Split, part: int) -> Profile | None:
            return split.profile(settings.profile, part, whole)

        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        if role == KVConnectorRole.SCHEDULER:
            origin = origin_of(vllm_config, settings, engine)
            if transfer.kv_load_failure_policy != "recompute":
                log.warning(
                    "a request whose document cannot be loaded will fail: "
                    'set kv_load_failure_policy="recompute"'
                )
            if not engine.goes_on:
                log.warning(
                    "prompts are stored and not loaded: vLLM does not compute a prompt on top of a "
                    "cache here (MLA without chunked prefill)"
                )
            self._scheduler = Scheduler(
                settings,
                engine,
                store,
                profile_of,
                origin,
                loads=transfer.is_kv_consumer,
                saves=transfer.is_kv_producer and store.bucket.writable,
                blocks=kv_cache_config.num_blocks,
            )
        else:
            part, stores = engine.split.own_part()
            profile = profile_of(engine.split, part)
            self._worker = Worker(settings, engine, store, profile, part, stores)

    @property
    def requires_kv_delivery(self) -> bool:
        """What is not stored is a miss later on, no more."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: Mapping[str, object]) -> bool:
        """Layers are waited for one by one, which a whole graph would skip."""
        return True

    # --- for the scheduler -----------------------------------------------------------------

    @property
    def _planner(self) -> Scheduler:
        assert self._scheduler is not None, "asked of the worker's half"
        return self._scheduler

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        found = self._planner.matched(request, num_computed_tokens)
        return found, bool(found) and self._planner.in_background

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._planner.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Metadata:
        return self._planner.plan(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._planner.failed(connector_output.invalid_block_ids or ())
        failed = getattr(connector_output, "failed_recving", None) or ()
        self._planner.loaded(connector_output.finished_recving or (), failed)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, None]:
        self._planner.finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool | None:
        """vLLM calls this when its weights are no longer those of the checkpoint."""
        if self._scheduler is None:
            return None
        self._scheduler.forget_weights()
        return True

    # --- for the worker --------------------------------------------------------------------

    @property
    def _mover(self) -> Worker:
        assert self._worker is not None, "asked of the scheduler's half"
        return self._worker

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        context = self._vllm_config.compilation_config.static_forward_context
        self._mover.register(kv_caches, context)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: object) -> None:
        step = self._get_connector_metadata()
        self._mover.start(step.loads, step.background, step.failures)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._mover.wait(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: object,
    ) -> None:
        pass  # all are copied together, when the step is done

    def wait_for_save(self) -> None:
        self._mover.end_step(self._get_connector_metadata().saves)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        done, failed = self._mover.take_done()
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._mover.take_invalid()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
