"""What stages on trainer ranks begin with: a policy, the form of its rows, a voice, and a log of their steps."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.agreement import on_rank_zero
from megatron_r1.config.packages import has_module
from megatron_r1.config.schema import ModelConfig, TrainerStage
from megatron_r1.config.shape import ModelShape
from megatron_r1.config.trainer_faults import FP8_ROWS
from megatron_r1.data.packing import RowLayout
from megatron_r1.observe.progress import Column, Progress
from megatron_r1.observe.tracking import MetricsLog, TrackedStage
from megatron_r1.policy.policy import Policy
from megatron_r1.weights.save import save_hf_folder

LINES_SHOWN = 40
"""Of progress, in a whole run."""

EXPORT_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def row_layout(config: TrainerStage, pad_id: int, *, vocab_size: int) -> RowLayout:
    parallel = config.parallel
    fp8_rows = FP8_ROWS * parallel.tensor * parallel.context if config.train.dtype == "fp8" else 1
    return RowLayout(
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        row_multiple=math.lcm(parallel.row_multiple, fp8_rows),
        segment_multiple=parallel.segment_multiple,
        pad_id=pad_id,
        rows_multiple=parallel.pipeline_parallel if parallel.virtual_pipeline > 1 else 1,
        vocab_size=vocab_size,
    )


def build_policy(
    config: TrainerStage,
    shape: ModelShape,
    device: torch.device,
    *,
    model: ModelConfig,
    total_steps: int,
    temperature: float = 1.0,
    replay_routes: bool = False,
) -> Policy:
    """`total_steps`: optimizer steps, over which the learning rate falls. `temperature`: of the scored distribution.
    `replay_routes`: experts are taken from the rows, where they have them."""
    return Policy(
        shape,
        parallel=config.parallel,
        train=config.train,
        model=model,
        optimizer=config.optimizer,
        total_steps=total_steps,
        device=device,
        transformer_engine=device.type == "cuda" and has_module("transformer_engine"),
        temperature=temperature,
        replay_routes=replay_routes,
    )


def export(policy: Policy, source: Path, target: Path, *, dtype: str, extra: Mapping[str, object]) -> None:
    """Write the policy, MTP layers included, as a Hugging Face folder with `source`'s tokenizer and configuration. One
    that an earlier start of this run left there is replaced. A collective; errors as in save_hf_folder."""
    on_rank_zero(lambda: shutil.rmtree(target, ignore_errors=True))
    stream = policy.weights(dtype=EXPORT_DTYPE[dtype], include_mtp=True)
    save_hf_folder(stream, source, target, extra=extra)
    dist.barrier()


def printer() -> Callable[[str], None]:
    """Prints on rank 0 only."""
    is_writer = dist.get_rank() == 0

    def say(text: str) -> None:
        if is_writer:
            print(text, flush=True)

    return say


class StepLog:
    """metrics.jsonl, the trackers and the lines of progress of a supervised stage: rank 0's. Of the others, nothing."""

    def __init__(
        self, config: TrackedStage, *, stage: str, num_steps: int, columns: Sequence[Column], first_step: int = 0
    ) -> None:
        self._files = ExitStack()
        self._metrics: MetricsLog | None = None
        if dist.get_rank() == 0:
            every = max(1, num_steps // LINES_SHOWN)
            self._metrics = self._files.enter_context(MetricsLog(config, stage=stage, first_step=first_step))
            self._progress = self._files.enter_context(
                Progress(num_steps, columns=columns, every=every, first_step=first_step)
            )

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._files.__exit__(*exception)

    def write(self, step: int, row: Mapping[str, Any], **shown: float) -> None:
        """A row of numbers; `shown` beside it are for the line of progress only."""
        if self._metrics is not None:
            self._metrics.write(row)
            self._progress.update(step, {**row, **shown})
