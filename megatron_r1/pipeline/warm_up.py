"""The supervised warm-up that makes the embedded default's base model: no pretrained mixture of experts fits on two
cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from megatron_r1.config.schema import RunConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.data.demonstrations import demonstration_batch
from megatron_r1.data.packing import RowLayout
from megatron_r1.data.problems import ProblemSplit
from megatron_r1.data.stream import ProblemStream
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.observe.progress import duration
from megatron_r1.observe.watch import Watch
from megatron_r1.pipeline.trainer import build_policy, export
from megatron_r1.stages.sft import train_sft
from megatron_r1.types import StepResult, TrainingSequence


def warm_up(
    config: RunConfig,
    shape: ModelShape,
    device: torch.device,
    tokenizer: Tokenizer,
    split: ProblemSplit,
    layout: RowLayout,
    base: Path,
    say: Callable[[str], None],
    watch: Watch,
) -> None:
    """Supervised steps on noisy demonstrations, then the base model as a Hugging Face folder."""
    sft = config.sft
    policy = build_policy(
        config, shape, device, model=config.model, optimizer=sft.optimizer, total_steps=sft.steps, temperature=1.0
    )
    # Another order than GRPO's, and never a held-out problem.
    stream = ProblemStream(split, seed=config.seed + 1)

    def batches() -> Iterator[Sequence[TrainingSequence]]:
        for step in range(sft.steps):
            yield demonstration_batch(
                stream.take(sft.batch_size),
                tokenizer=tokenizer,
                template=config.data.template,
                noise=sft.noise,
                seed=[config.seed, step],
            )

    begun = time.perf_counter()

    def on_step(step: int, result: StepResult) -> None:
        watch.step(0)  # a deadline is one step's
        done = step + 1
        if done % max(1, sft.steps // 10) == 0:
            left = (time.perf_counter() - begun) / done * (sft.steps - done)
            say(f"  warm-up {done}/{sft.steps}  loss {result.loss:.3f}  left {duration(left)}")

    train_sft(policy, batches(), layout, on_step)
    export(policy, config.model.path, base, dtype=config.rollout.dtype, extra={"stage": "warm_up", "steps": sft.steps})
