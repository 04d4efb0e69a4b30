"""The experts that each token went to, returned by vLLM on CPUs as its own capture returns them on GPUs.

vLLM offers that (--enable-return-routed-experts) with the GPU's model runner alone. Its scheduler, its answers and its
hooks at the routers do not depend on it, and are used as they are. What is missing on CPUs is here: a worker that keeps
the experts of every cached token beside the KV cache, in the same slots. So a prompt whose blocks were cached has its
experts too, and a token that is computed again (a preempted request, a rejected draft) overwrites them. Runs inside
vLLM, by its options --worker-cls and --scheduler-cls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector, AuxRequestOutput
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker


class RoutesScheduler(Scheduler):
    """vLLM's scheduler, that takes the experts out of each step's output."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.aux_output_connector = AuxOutputSchedulerConnector()


class RoutesWorker(CPUWorker):
    """vLLM's worker, that adds the experts to each step's output."""

    routes: Routes | None = None
    found: dict[str, AuxRequestOutput] | None = None

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self.routes = Routes(self.vllm_config, kv_cache_config, self.model_runner.get_model())

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        output = super().execute_model(scheduler_output)
        self.found = None
        if self.routes is not None and scheduler_output.total_num_scheduled_tokens:
            self.found = self.routes.of_step(self.model_runner.input_batch, scheduler_output)
        return self._with_routes(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._with_routes(super().sample_tokens(grammar_output))

    def _with_routes(self, output: Any) -> Any:
        if isinstance(output, ModelRunnerOutput) and self.found is not None:
            output.aux_output_connector_output = self.found
        return output


class Routes:
    """The experts of every cached token: by_slot u8 or u16 [slots, layers of the model, K]."""

    def __init__(self, config: VllmConfig, cache: KVCacheConfig, model: torch.nn.Module) -> None:
        """RuntimeError where a token has not one slot: a model whose layers cache differently."""
        if len(cache.kv_cache_groups) != 1:
            raise RuntimeError(
                f"rollout.routes: the model's layers have {len(cache.kv_cache_groups)} kinds of KV cache; experts are "
                "returned on CPUs for models with one: set it to off"
            )
        self.capturer = RoutedExpertsCapturer(config.scheduler_config.max_num_batched_tokens, config)
        bind_routed_experts_capturer(model, self.capturer)
        slots = cache.num_blocks * cache.kv_cache_groups[0].kv_cache_spec.block_size
        dtype = np.dtype(self.capturer.output_dtype_name)
        self.by_slot = np.zeros((slots, *self.capturer.shape_per_token), dtype)

    def of_step(self, batch: Any, step: SchedulerOutput) -> dict[str, AuxRequestOutput]:
        """Keep the experts of the tokens that the model has just computed; for each request those from where the
        scheduler wants them, to its last computed token. `batch`: the model runner's."""
        wanted = step.aux_output_connector_metadata
        assert wanted is not None  # RoutesScheduler makes it
        requests = batch.req_ids
        counts = np.array([step.num_scheduled_tokens[request] for request in requests])
        starts, edges = batch.num_computed_tokens_cpu[: len(requests)], np.cumsum([0, *counts])
        table = batch.block_table[0]
        blocks, size = table.block_table.np, table.block_size
        rows = self.capturer.snapshot_routing_data(int(edges[-1])).numpy()
        of_token = np.repeat(np.arange(len(requests)), counts)
        positions = np.arange(edges[-1]) + (starts - edges[:-1])[of_token]
        self.by_slot[_slots(blocks, size, of_token, positions)] = rows
        found = {}
        for place, request in enumerate(requests):
            begin, start, end = wanted.requests[request], int(starts[place]), int(starts[place] + counts[place])
            if begin < start:  # the first output of a request whose prompt was cached, in part
                own = self.by_slot[_slots(blocks, size, place, np.arange(begin, end))]
            else:
                own = rows[edges[place] + begin - start : edges[place + 1]]
            found[request] = AuxRequestOutput(begin, own)
        return found


def _slots(blocks: np.ndarray, size: int, places: np.ndarray | int, positions: np.ndarray) -> np.ndarray:
    """i64[n] of tokens at these positions of the requests at these places of the batch; `blocks`: each request's."""
    return blocks[places, positions // size].astype(np.int64) * size + positions % size
