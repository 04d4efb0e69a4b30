"""Bytes of weights, gradients and optimizer state of one rank, as Megatron's buffers hold them, padding included.

Per trained number: the weight (2 bytes, 4 in fp32), an fp32 gradient, and two Adam moments (fp32 or bf16) with an fp32
master copy where the weight is not fp32 itself. With the distributed optimizer (ZeRO-1, arXiv 1910.02054) moments and
master exist only for the rank's shard of the buffer, in which each parameter starts at a multiple of 64 numbers and
each bucket ends at a multiple of lcm(data-parallel size, 128) (megatron.core.distributed.param_and_grad_buffer).
Left out: Adam's step counters and, of bf16 moments, Transformer Engine's scales, 4 bytes a tensor each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.stages import Chunk, pipeline_chunks
from megatron_r1.planning.tensors import Parameter, chunk_parameters, router_bias_numbers

PARAMETER_START, BUCKET_END = 64, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """Bytes that one rank holds through the whole run. `parameters` is their number, frozen ones included."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def optimizer_bytes(*, fp32: bool, moments: str = "fp32") -> int:
    """Bytes a trained number of master weight (none beside an fp32 weight) and two moments."""
    return (0 if fp32 else 4) + 2 * (4 if moments == "fp32" else 2)


def rank_state(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    pipeline_rank: int,
    data_rank: int = 0,
    expert_data_rank: int = 0,
    fp32: bool = False,
    distributed: bool = True,
    moments: str = "fp32",
    train_mtp: bool = False,
    chunks: Sequence[Chunk] | None = None,
) -> RankState:
    """The state of a rank at these places. `data_rank` is its place among data x context ranks; `expert_data_rank`
    among the ranks that hold the same experts. `chunks` saves the caller a second split of the pipeline."""
    own = pipeline_chunks(shape, parallel)[pipeline_rank] if chunks is None else chunks
    weight, kept = 4 if fp32 else 2, optimizer_bytes(fp32=fp32, moments=moments)
    numbers = weights = gradients = optimizer = 0
    for chunk in own:
        parameters = chunk_parameters(shape, parallel, chunk, train_mtp=train_mtp)
        numbers += sum(item.size for item in parameters)
        frozen = sum(item.size for item in parameters if not item.trained)
        weights += weight * frozen + 4 * router_bias_numbers(shape, chunk)
        for expert, place, ranks in (
            (False, data_rank, data_ranks(parallel)),
            (True, expert_data_rank, expert_data_ranks(parallel)),
        ):
            trained = [item for item in parameters if item.trained and item.expert == expert]
            buffer = buffer_sizes(trained, place, ranks, distributed=distributed)
            weights, gradients = weights + weight * buffer[0], gradients + 4 * buffer[0]
            optimizer += kept * buffer[1]
    return RankState(parameters=numbers, weights=weights, gradients=gradients, optimizer=optimizer)


def data_ranks(parallel: ParallelConfig) -> int:
    """Ranks that hold the same dense weights: data x context."""
    return parallel.data * parallel.context


def expert_data_ranks(parallel: ParallelConfig) -> int:
    """Ranks that hold the same experts."""
    return parallel.world_size // (parallel.expert * parallel.expert_tensor * parallel.pipeline_parallel)


def buffer_sizes(parameters: Sequence[Parameter], place: int, ranks: int, *, distributed: bool) -> tuple[int, int]:
    """(numbers in the buffer, numbers whose optimizer state rank `place` of `ranks` holds)."""
    if not distributed:
        size = sum(item.size for item in parameters)
        return size, size
    end = math.lcm(ranks, BUCKET_END)
    start, bucket_start, held = 0, 0, 0
    bucket: list[tuple[int, int]] = []

    def close(at: int) -> int:
        """End the bucket at number `at`; the buffer's new length."""
        nonlocal bucket_start, held, bucket
        whole = _up(at, end)
        shard = (whole - bucket_start) // ranks
        low = bucket_start + place * shard
        held += sum(max(0, min(b, low + shard) - max(a, low)) for a, b in bucket)
        bucket_start, bucket = whole, []
        return whole

    # Gradients arrive last layer first, so that is how Megatron lays them.
    for item in reversed(parameters):
        start = _up(start, PARAMETER_START)
        if item.own_bucket and bucket:
            start = close(start)
        bucket.append((start, start + item.size))
        start += item.size
        if item.own_bucket:
            start = close(start)
    if bucket:
        start = close(start)
    return start, held


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
