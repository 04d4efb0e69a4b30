"""The embedded default: a 1M-parameter model of DeepSeek-V3's shape on two CPU cores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_r1.config.schema import (
    DataConfig,
    GRPOLoopConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
    TrainConfig,
)
from megatron_r1.recipes.r1_zero import TWO_DIGIT_ADDITION

TINY_V3 = Path(__file__).parent / "tiny_v3"


def quickstart() -> RunConfig:
    """`make quickstart`: a warm-up makes the base model, then R1-Zero GRPO on two-digit addition. EP2, one server."""
    return RunConfig(
        name="quickstart",
        run_dir=Path("runs/quickstart"),
        if_exists="archive",
        model=ModelConfig(path=TINY_V3, initialise="random"),
        parallel=ParallelConfig(world_size=2, expert=2),
        train=TrainConfig(dtype="fp32", tokens_per_microbatch=8192),
        optimizer=OptimizerConfig(lr=6e-5, min_lr=1e-5, warmup_steps=3, schedule="cosine"),
        data=DataConfig(tasks=(TWO_DIGIT_ADDITION,), template="plain", holdout=200, validation=100),
        rollout=RolloutConfig(
            device="cpu",
            sync="gloo",
            dtype="fp32",
            max_model_len=128,
            memory_fraction=0.3,
            enforce_eager=True,
            sampling=SamplingConfig(max_new_tokens=48),
            start_timeout_seconds=180.0,
        ),
        rewards=RewardConfig(num_workers=1),
        grpo=GRPOLoopConfig(steps=60, prompts_per_step=32, group_size=8, eval_every=10, target_accuracy=0.95),
        sft=SFTConfig(
            steps=600,
            batch_size=64,
            noise=0.7,
            optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-4, warmup_steps=20, schedule="cosine"),
        ),
    )


def tiny() -> RunConfig:
    """Three steps of the quickstart with almost no warm-up: for tests and for measuring throughput."""
    config = quickstart()
    return dataclasses.replace(
        config,
        name="tiny",
        run_dir=Path("runs/tiny"),
        data=dataclasses.replace(config.data, holdout=16, validation=8),
        sft=dataclasses.replace(config.sft, steps=5),
        grpo=dataclasses.replace(config.grpo, steps=3, eval_every=0, target_accuracy=0.0),
    )
