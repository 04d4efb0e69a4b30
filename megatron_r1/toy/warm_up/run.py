"""The supervised warm-up that makes the quickstart's base model. Runs on every trainer rank."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.config.shape import ModelShape
from megatron_r1.data.problems import load_problems
from megatron_r1.data.stream import ProblemStream
from megatron_r1.data.template import PromptRoom
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.observe.metrics import write_json
from megatron_r1.observe.progress import duration
from megatron_r1.observe.watch import Watch
from megatron_r1.stages.common.trainer import build_policy, export, printer, row_layout
from megatron_r1.stages.sft.loss import train_sft
from megatron_r1.toy.demonstrations import demonstration_batch
from megatron_r1.toy.warm_up.config import WarmUpConfig
from megatron_r1.types import StepResult, TrainingSequence


def run_warm_up(config: WarmUpConfig, shape: ModelShape, device: torch.device) -> dict[str, Any]:
    """The whole stage on this rank; the folder is prepared. Returns the summary (also in summary.json, on rank 0)."""
    with Watch(config.run_dir, rank=dist.get_rank(), deadlines=config.deadlines.by_phase(dist.get_rank())) as watch:
        return _run(config, shape, device, watch)


def _run(config: WarmUpConfig, shape: ModelShape, device: torch.device, watch: Watch) -> dict[str, Any]:
    begun, say = time.perf_counter(), printer()
    tokenizer = load_tokenizer(config.model.path, thinking=config.data.thinking)
    room = PromptRoom(
        template=config.data.template,
        tokenizer=tokenizer,
        max_new_tokens=1,
        max_model_len=config.train.tokens_per_microbatch,
    )
    # Another order than GRPO's, and never a held-out problem.
    stream = ProblemStream(load_problems(config.data, room), seed=config.seed + 1)
    policy = build_policy(config, shape, device, model=config.model, total_steps=config.steps)
    losses: list[float] = []

    def batches() -> Iterator[Sequence[TrainingSequence]]:
        for step in range(config.steps):
            yield demonstration_batch(
                stream.take(config.batch_size),
                tokenizer=tokenizer,
                template=config.data.template,
                noise=config.noise,
                seed=[config.seed, step],
            )

    def on_step(step: int, result: StepResult) -> None:
        done = step + 1
        watch.step(done, of=config.steps)
        losses.append(result.loss)
        if done % max(1, config.steps // 10) == 0:
            left = (time.perf_counter() - begun) / done * (config.steps - done)
            say(f"  warm-up {done}/{config.steps}  loss {result.loss:.3f}  left {duration(left)}")

    with watch.phase("train"):
        train_sft(policy, batches(), row_layout(config, tokenizer.pad_id, vocab_size=shape.vocab_size), on_step)
    with watch.phase("save"):
        extra = {"stage": config.name, "steps": config.steps}
        export(policy, config.model.path, config.run_dir / "model", dtype=config.save_dtype, extra=extra)
    summary = {
        "steps": config.steps,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "seconds_total": time.perf_counter() - begun,
    }
    if dist.get_rank() == 0:
        write_json(config.run_dir / "summary.json", summary)
    return summary
