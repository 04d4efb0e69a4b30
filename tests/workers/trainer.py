"""What most workers begin with: the process groups of a layout, a policy on this rank, and its rows.

For import after configure_process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.data.packing import RowLayout, pack_rank
from megatron_r1.policy import topology
from megatron_r1.policy.policy import Policy
from megatron_r1.types import PackedMicrobatch, TrainingSequence

FP32 = TrainConfig(dtype="fp32")


@contextlib.contextmanager
def groups(store: str, *, seed: int = 1, **sizes: Any) -> Iterator[ParallelConfig]:
    """Groups of all ranks of this launch, on the CPU, in the layout of these sizes. The ranks leave them together."""
    parallel = ParallelConfig(world_size=int(os.environ["WORLD_SIZE"]), **sizes)
    topology.initialise(parallel, seed=seed, cpu=True, store_path=store)
    yield parallel
    dist.barrier()
    topology.finalise()


def policy_of(
    folder: Path,
    parallel: ParallelConfig,
    *,
    train: TrainConfig = FP32,
    optimizer: OptimizerConfig | None = None,
    steps: int = 1,
    replay_routes: bool = False,
    **model: Any,
) -> Policy:
    """The folder's model on the CPU. `steps`: all that the learning rate falls over. `model`: more of ModelConfig."""
    return Policy(
        load_shape(folder),
        parallel=parallel,
        train=train,
        model=ModelConfig(path=folder, **model),
        optimizer=optimizer or OptimizerConfig(),
        total_steps=steps,
        device=torch.device("cpu"),
        replay_routes=replay_routes,
    )


def random_sequences(
    rng: np.random.Generator, count: int, lengths: tuple[int, int], *, prompt: int, least_id: int, share: int
) -> list[TrainingSequence]:
    """`count` of them, of lengths[0] to lengths[1] - 1 tokens, ids below 101. Each has 1 / `share` of the weight, on
    what follows the first `prompt` tokens."""
    made = []
    for _ in range(count):
        length = int(rng.integers(*lengths))
        mask = np.arange(length) >= prompt
        weight = np.where(mask, 1.0 / (share * mask.sum()), 0).astype(np.float32)
        ids = rng.integers(least_id, 101, length).astype(np.int32)
        made.append(TrainingSequence(token_ids=ids, loss_mask=mask, token_weight=weight))
    return made


def row_layout(parallel: ParallelConfig, tokens: int = 128) -> RowLayout:
    """Rows of `tokens` that every rank of the layout can take its part of."""
    return RowLayout(
        tokens_per_microbatch=tokens,
        row_multiple=parallel.row_multiple,
        segment_multiple=parallel.segment_multiple,
        rows_multiple=parallel.pipeline_parallel if parallel.virtual_pipeline > 1 else 1,
    )


def rows_of(sequences: Sequence[TrainingSequence], layout: RowLayout) -> list[PackedMicrobatch]:
    """This data-parallel rank's rows."""
    rank, ranks = topology.data_parallel()
    return pack_rank(sequences, layout, rank=rank, num_ranks=ranks)
