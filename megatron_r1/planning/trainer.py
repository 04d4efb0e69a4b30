"""One step of the trainer: seconds by phase, and memory of the fullest rank.

1F1B: rank p holds the activations of pipeline - p microbatches and the pipeline idles for pipeline - 1 of
microbatches + pipeline - 1 slots; with v virtual stages for (pipeline - 1) / v (arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_r1.config.schema import OffloadPart, ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.activations import (
    Inventory,
    checkpoint_bytes,
    head_bytes,
    layer_bytes,
    logits_chunk_bytes,
    mtp_bytes,
)
from megatron_r1.planning.compute import BF16, Passes, rank_passes
from megatron_r1.planning.hardware import GIB, GPU, Assumptions
from megatron_r1.planning.stages import Chunk, pipeline_chunks
from megatron_r1.planning.state import RankState, data_ranks, expert_data_ranks, optimizer_bytes, rank_state
from megatron_r1.planning.tensors import chunk_numbers, router_bias_numbers
from megatron_r1.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSetup:
    """What of a stage's configuration decides the trainer's memory and time."""

    parallel: ParallelConfig
    row_tokens: int = 4096
    recompute: str = "full"
    dtype: str = "bf16"
    distributed: bool = True
    moments: str = "fp32"
    train_mtp: bool = False
    logprob_chunk_tokens: int = 1024
    offload: tuple[OffloadPart, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on one rank at the peak of a training step. `host`: its reference policy's and swapped copies, and what
    is offloaded."""

    pipeline_rank: int
    state: RankState
    kept: float
    """Activations of all microbatches in flight."""
    working: float
    """One layer's activations while they are recomputed or first computed, with the gradients beside them."""
    logits: float
    fp8_copies: float
    reserved: float
    host: float

    @property
    def total(self) -> float:
        return self.state.total + self.kept + self.working + self.logits + self.fp8_copies + self.reserved


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerTime:
    """Seconds of one step. `train` contains `bubble`, `traffic` and `reduction` (gradients and weights over
    data-parallel ranks, and the optimizer)."""

    microbatches: int
    train: float
    bubble: float
    traffic: float
    reduction: float
    scoring: float
    scoring_bubble: float
    swap: float

    @property
    def total(self) -> float:
        return self.train + self.scoring + self.swap


def microbatches(setup: TrainerSetup, tokens: float, filled: float) -> int:
    """Rows of one data-parallel rank for `tokens` in all; at least 1, and with virtual stages a multiple of the
    pipeline."""
    parallel = setup.parallel
    rows = math.ceil(max(1, math.ceil(tokens / (setup.row_tokens * filled))) / parallel.data)
    each = parallel.pipeline_parallel if parallel.virtual_pipeline > 1 else 1
    return -(-rows // each) * each


def fullest_state(shape: ModelShape, setup: TrainerSetup) -> RankState:
    """The weights, gradients and optimizer state of the rank that holds most of them, to the byte. ConfigError if the
    layout does not hold the model."""
    stages = distinct(shape, pipeline_chunks(shape, setup.parallel))
    states = [_state(shape, setup, rank, chunks, rank_state) for rank, chunks in stages.items()]
    return max(states, key=lambda state: state.total)


def trainer_memory(
    shape: ModelShape, setup: TrainerSetup, work: Workload, assume: Assumptions, *, exact: bool = True
) -> RankMemory:
    """The fullest rank's memory. `exact` counts padding and shards to the byte; without, sums alone (for searches)."""
    count = microbatches(setup, work.tokens / work.optimizer_steps, assume.rows_filled)
    stages = pipeline_chunks(shape, setup.parallel)
    ranks = [
        _rank_memory(shape, setup, work, assume, rank, chunks, count, exact)
        for rank, chunks in distinct(shape, stages).items()
    ]
    return max(ranks, key=lambda memory: memory.total)


def distinct(shape: ModelShape, stages: list[list[Chunk]]) -> dict[int, list[Chunk]]:
    """The first pipeline rank of each kind: ranks that build the same differ only in how much they keep, and the first
    of them keeps the most."""
    seen: dict[object, int] = {}
    for rank, chunks in enumerate(stages):
        kind = tuple(
            (sum(map(shape.is_moe_layer, c.layers)), len(c.layers), c.embedding, c.mtp, c.loss) for c in chunks
        )
        seen.setdefault(kind, rank)
    return {rank: stages[rank] for rank in seen.values()}


def _state(
    shape: ModelShape, setup: TrainerSetup, rank: int, chunks: list[Chunk], count: Callable[..., RankState]
) -> RankState:
    return count(
        shape,
        setup.parallel,
        pipeline_rank=rank,
        fp32=setup.dtype == "fp32",
        distributed=setup.distributed,
        moments=setup.moments,
        train_mtp=setup.train_mtp,
        chunks=chunks,
    )


def _rank_memory(
    shape: ModelShape,
    setup: TrainerSetup,
    work: Workload,
    assume: Assumptions,
    rank: int,
    chunks: list[Chunk],
    count: int,
    exact: bool,
) -> RankMemory:
    parallel = setup.parallel
    fp32 = setup.dtype == "fp32"
    size = 4 if fp32 else 2
    inventory = Inventory(dtype_bytes=size)
    tokens = setup.row_tokens / parallel.context
    state = _state(shape, setup, rank, chunks, rank_state if exact else _summed_state)

    def layer(sparse: bool) -> float:
        return layer_bytes(
            shape,
            parallel,
            inventory,
            sparse=sparse,
            segment_tokens=setup.row_tokens,
            imbalance=assume.expert_imbalance,
        )

    kinds = {bool(shape.is_moe_layer(number)) for chunk in chunks for number in chunk.layers}
    saved = {sparse: layer(sparse) for sparse in kinds}
    full = setup.recompute == "full"
    per_layer = checkpoint_bytes(shape, parallel, size)
    own = sum(per_layer if full else saved[shape.is_moe_layer(n)] for c in chunks for n in c.layers) / len(chunks)
    kept = in_flight(parallel, rank, count) * own * tokens
    if any(chunk.loss for chunk in chunks):
        kept += head_bytes(shape, parallel, inventory) * tokens
        if setup.train_mtp:
            kept += sum(c.mtp for c in chunks) * (mtp_bytes(shape, parallel, inventory) + per_layer) * tokens
    beside = max((_gradient_bytes(shape, parallel, sparse, size, assume) for sparse in kinds), default=0.0)
    working = tokens * (beside + (max(saved.values(), default=0.0) if full else 0.0))
    logits = 0
    if any(chunk.loss for chunk in chunks) and not shape.reward_head:
        logits = logits_chunk_bytes(shape, parallel, setup.logprob_chunk_tokens, size)
    copies = 2.0 * state.parameters if setup.dtype == "fp8" else 0.0  # row- and column-wise blocks
    return RankMemory(
        pipeline_rank=rank,
        state=state,
        kept=kept,
        # The logits' chunk and a layer's working set are not there at the same time.
        working=max(working, logits) - logits,
        logits=logits,
        fp8_copies=copies,
        reserved=assume.reserved_gib * GIB,
        host=(2.0 * state.parameters * size if work.scoring_passes and work.rollout else 0.0)
        + ("weights" in setup.offload) * state.weights
        + ("optimizer" in setup.offload) * state.optimizer,
    )


def in_flight(parallel: ParallelConfig, rank: int, count: int) -> int:
    """Chunks of a pipeline rank whose activations are kept at once (Megatron's warm-up and one)."""
    p, v = parallel.pipeline_parallel, parallel.virtual_pipeline
    if v == 1:
        return min(count, p - rank)
    return min(count * v, (p - rank - 1) * 2 + (v - 1) * p + 1)


def _gradient_bytes(shape: ModelShape, parallel: ParallelConfig, sparse: bool, size: int, assume: Assumptions) -> float:
    """Per token, what stands beside a layer's saved tensors in its backward pass: the gradients of its two widest
    tensors (dispatched and returned copies of a token, or gate and up)."""
    split = parallel.tensor if parallel.sequence else 1
    if sparse and shape.moe is not None:
        copies = assume.expert_imbalance * shape.moe.top_k * parallel.expert_tensor / split
        return 2 * size * copies * shape.hidden_size
    return size * (2 * shape.ffn_size / parallel.tensor + 2 * shape.hidden_size / split)


def _summed_state(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    pipeline_rank: int,
    fp32: bool,
    distributed: bool,
    moments: str,
    train_mtp: bool,
    chunks: list[Chunk],
) -> RankState:
    """`rank_state` without padding, and with shards of equal size."""
    weight, kept = 4 if fp32 else 2, optimizer_bytes(fp32=fp32, moments=moments)
    numbers = [chunk_numbers(shape, parallel, chunk) for chunk in chunks]
    dense, expert, frozen = (sum(column) for column in zip(*numbers, strict=True))
    if train_mtp:
        dense, frozen = dense + frozen, 0
    biases = 4 * sum(router_bias_numbers(shape, chunk) for chunk in chunks)
    shards = (data_ranks(parallel), expert_data_ranks(parallel)) if distributed else (1, 1)
    return RankState(
        parameters=dense + expert + frozen,
        weights=weight * (dense + expert + frozen) + biases,
        gradients=4 * (dense + expert),
        optimizer=round(kept * (dense / shards[0] + expert / shards[1])),
    )


def trainer_time(shape: ModelShape, setup: TrainerSetup, work: Workload, gpu: GPU, assume: Assumptions) -> TrainerTime:
    """One step: `work.optimizer_steps` optimizer steps and `work.scoring_passes` forward passes over all samples."""
    parallel, p, v = setup.parallel, setup.parallel.pipeline_parallel, setup.parallel.virtual_pipeline
    stages = list(distinct(shape, pipeline_chunks(shape, parallel)).values())
    passes = slowest_stage(shape, setup, work, gpu, assume, stages)
    count = microbatches(setup, work.tokens / work.optimizer_steps, assume.rows_filled)
    idle = (p - 1) / v
    reduction = reduction_seconds(shape, setup, gpu, assume, stages)
    steps = work.optimizer_steps
    rows = microbatches(setup, work.tokens, assume.rows_filled)
    most = max(sum(sum(chunk_numbers(shape, parallel, c)) for c in chunks) for chunks in stages)
    return TrainerTime(
        microbatches=count,
        train=steps * ((count + idle) * passes.both + reduction),
        bubble=steps * idle * passes.both,
        traffic=steps * count * (passes.forward_traffic + passes.backward_traffic),
        reduction=steps * reduction,
        scoring=work.scoring_passes * (rows + idle) * passes.forward,
        scoring_bubble=work.scoring_passes * idle * passes.forward,
        # Own weights out, the reference policy's in, own in again.
        swap=3 * most * BF16 / assume.host_link if work.scoring_passes and work.rollout else 0.0,
    )


def slowest_stage(
    shape: ModelShape, setup: TrainerSetup, work: Workload, gpu: GPU, assume: Assumptions, stages: list[list[Chunk]]
) -> Passes:
    """The pipeline goes at the pace of its slowest rank."""
    found = [
        rank_passes(
            shape,
            setup.parallel,
            chunks,
            gpu,
            assume,
            row_tokens=setup.row_tokens * assume.rows_filled,
            context=min(work.context_per_token, setup.row_tokens),
            recompute=setup.recompute == "full",
            flops=gpu.fp8_flops if setup.dtype == "fp8" else gpu.bf16_flops / (2 if setup.dtype == "fp32" else 1),
            dispatch_bytes=1 if setup.dtype == "fp8" else BF16,
        )
        for chunks in stages
    ]
    return max(found, key=lambda passes: passes.both)


def reduction_seconds(
    shape: ModelShape, setup: TrainerSetup, gpu: GPU, assume: Assumptions, stages: list[list[Chunk]]
) -> float:
    """Once an optimizer step: fp32 gradients out and weights back over the data-parallel ranks (not overlapped here),
    and the optimizer's passes over its shard: gradient, master and moments are read (16 bytes a number with moments in
    fp32), and all but the gradient written, with a bf16 weight (14)."""
    parallel = setup.parallel
    dense, expert = data_ranks(parallel), expert_data_ranks(parallel)
    numbers = [[sum(column) for column in zip(*(chunk_numbers(shape, parallel, c) for c in chunks), strict=True)]
               for chunks in stages]  # fmt: skip
    sent = max(d * (dense - 1) / dense + e * (expert - 1) / expert for d, e, _ in numbers)
    shard = max(d / dense + e / expert for d, e, _ in numbers)
    passes = 6 + 2 * optimizer_bytes(fp32=False, moments=setup.moments)
    # Ring neighbours of data-parallel groups are on other nodes as soon as a node holds other shards.
    return 6 * sent / (gpu.network * assume.network_efficiency) + passes * shard / gpu.memory_bandwidth
