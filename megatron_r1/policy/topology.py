"""Process groups: torch.distributed, then Megatron's tensor, pipeline, context, expert and data groups."""

from __future__ import annotations

import datetime
import math
import os
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_r1.config.schema import ParallelConfig

T = TypeVar("T")
Question = TypeVar("Question")
Answer = TypeVar("Answer")


def initialise(
    parallel: ParallelConfig, *, seed: int, cpu: bool, timeout_seconds: float = 1800.0, store_path: str | None = None
) -> None:
    """Join the process group (gloo on CPU, nccl otherwise) and build Megatron's groups.

    Rank and world size come from torchrun's environment; with `store_path` a file is the rendezvous instead of a port.
    Raises ValueError if the world is not the one the configuration was checked for.
    """
    own_rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world != parallel.world_size:
        raise ValueError(
            f"parallel.world_size is {parallel.world_size}, but {world} processes were started; "
            "start as many with torchrun or change the configuration"
        )
    if not cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        init_method = f"file://{store_path}" if store_path else ("env://" if "MASTER_ADDR" in os.environ else None)
        store = None if init_method else dist.HashStore()
        dist.init_process_group(
            "gloo" if cpu else "nccl",
            init_method=init_method,
            store=store,
            rank=own_rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=not cpu,
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def data_parallel() -> tuple[int, int]:
    """(rank, size) among the ranks that hold different data."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def gather_over_data(value: T) -> list[T]:
    """The (picklable) value of every rank that holds different data, in their order; the same on all of them."""
    parts: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(parts, value, group=parallel_state.get_data_parallel_group())
    return parts


def sum_over_data(value: float) -> float:
    """The sum of a number over the ranks that hold different data; the same float on all of them."""
    return math.fsum(gather_over_data(value))


def answered(question: Question, answer: Callable[[list[Question]], Sequence[Answer]]) -> Answer:
    """What rank 0 answers to this rank's (picklable) question: `answer` has the questions of all ranks, in order, and
    gives each its own. A rank sends and receives its own part alone. An error of `answer` is raised on every rank."""
    world = dist.get_world_size()
    if world == 1:
        return answer([question])[0]
    first = dist.get_rank() == 0
    questions: list[Any] | None = [None] * world if first else None
    dist.gather_object(question, questions, dst=0)
    outcomes: list[Any] = []
    if questions is not None:
        try:
            outcomes = [(found, None) for found in answer(questions)]
        except Exception as error:
            outcomes = [(None, error)] * world
    received: list[Any] = [None]
    dist.scatter_object_list(received, outcomes or None, src=0)
    found, error = received[0]
    if error is not None:
        raise error
    return found


def scatter_over_data(work: Callable[[], Sequence[T]]) -> T:
    """Rank 0 does `work`, which gives a (picklable) part for each data-parallel rank; every rank returns its own part,
    or raises what rank 0 raised. A part goes to the first rank of its data-parallel rank, and from there to those that
    share it: tensor, context and then pipeline parallel. None receives another's."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [(part, None) for part in work()]
        except Exception as error:
            outcome = [(None, error)] * parallel_state.get_data_parallel_world_size()
    tensor, context, pipeline = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    received = outcome[:1]
    if not (tensor or context or pipeline) and parallel_state.get_data_parallel_world_size() > 1:
        sent = outcome if dist.get_rank() == 0 else None
        group: Any = parallel_state.get_data_parallel_group()
        dist.scatter_object_list(received, sent, src=0, group=group)
    shared: list[tuple[Any, bool]] = [
        (parallel_state.get_tensor_model_parallel_group(), not context and not pipeline),
        (parallel_state.get_context_parallel_group(), not pipeline),
        (parallel_state.get_pipeline_model_parallel_group(), True),
    ]
    for group, takes_part in shared:
        if takes_part and dist.get_world_size(group) > 1:
            dist.broadcast_object_list(received, src=dist.get_process_group_ranks(group)[0], group=group)
    part, error = received[0]
    if error is not None:
        raise error
    return part


def rank() -> int:
    """This process's rank among all trainer ranks."""
    return dist.get_rank()


def finalise() -> None:
    """Leave all groups; safe to call twice."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
