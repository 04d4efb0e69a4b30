"""The embedded default: a 1M-parameter model of DeepSeek-V3's shape on two CPU cores; and the same with SmolLM2."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    TrainConfig,
)
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.toy.warm_up.config import WarmUpConfig

TINY_V3 = Path(__file__).parent / "tiny_v3"
TWO_DIGIT_ADDITION = (
    "basic_arithmetic:min_terms=2,max_terms=2,min_digits=2,max_digits=2,operators=+,allow_parentheses=False"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUpThenGRPO(PipelineConfig):
    """A base model out of nothing, then R1-Zero on it."""

    warm_up: WarmUpConfig
    grpo: GRPOConfig


def quickstart() -> WarmUpThenGRPO:
    """`make quickstart`: a warm-up makes the base model, then R1-Zero GRPO on two-digit addition. EP2, one server."""
    parallel = ParallelConfig(world_size=2, expert=2)
    train = TrainConfig(dtype="fp32", tokens_per_microbatch=8192)
    data = DataConfig(tasks=(TWO_DIGIT_ADDITION,), template="plain", holdout=200, validation=100)
    return WarmUpThenGRPO(
        name="quickstart",
        run_dir=Path("runs/quickstart"),
        warm_up=WarmUpConfig(
            model=ModelConfig(path=TINY_V3, initialise="random"),
            parallel=parallel,
            train=train,
            optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-4, warmup_steps=20, schedule="cosine"),
            data=data,
            steps=600,
            batch_size=64,
            noise=0.7,
        ),
        grpo=GRPOConfig(
            name="grpo",
            run_dir=Path("runs/grpo"),
            model=ModelConfig(path=Path("@warm_up/model")),
            parallel=parallel,
            train=train,
            optimizer=OptimizerConfig(lr=6e-5, min_lr=1e-5, warmup_steps=3, schedule="cosine"),
            data=data,
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
            steps=60,
            prompts_per_step=32,
            group_size=8,
            eval_every=10,
            target_accuracy=0.95,
        ),
    )


def tiny() -> GRPOConfig:
    """Three steps of the quickstart's GRPO on random weights: for tests and for measuring throughput."""
    config = quickstart()
    return dataclasses.replace(
        config.grpo,
        name="tiny",
        run_dir=Path("runs/tiny"),
        if_exists="archive",
        model=config.warm_up.model,
        data=dataclasses.replace(config.grpo.data, holdout=16, validation=8),
        steps=3,
        eval_every=0,
        target_accuracy=0.0,
    )


def grpo_smollm2() -> WarmUpThenGRPO:
    """SmolLM2-135M-Instruct on two-digit addition, two CPU cores (examples/grpo_smollm2.sh makes the folder).

    A few supervised steps come first: the model never writes the tags by itself, and GRPO learns nothing from rewards
    that are all 0.
    """
    parallel = ParallelConfig(world_size=1)
    train = TrainConfig(dtype="fp32", tokens_per_microbatch=2048, threads_per_rank=2)
    data = DataConfig(tasks=(TWO_DIGIT_ADDITION,), template="chat", holdout=32)
    return WarmUpThenGRPO(
        name="grpo_smollm2",
        run_dir=Path("runs/grpo_smollm2"),
        warm_up=WarmUpConfig(
            model=ModelConfig(path=Path("runs/models/smollm2-135m-instruct")),
            parallel=parallel,
            train=train,
            optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-5, schedule="cosine", warmup_steps=2),
            data=data,
            steps=12,
            batch_size=8,
        ),
        grpo=GRPOConfig(
            name="grpo",
            run_dir=Path("runs/grpo"),
            model=ModelConfig(path=Path("@warm_up/model")),
            parallel=parallel,
            train=train,
            optimizer=OptimizerConfig(lr=5e-6, min_lr=5e-6),
            data=data,
            rollout=RolloutConfig(
                device="cpu",
                sync="gloo",
                dtype="fp32",
                max_model_len=256,
                max_num_seqs=64,
                memory_fraction=0.3,
                enforce_eager=True,
                sampling=SamplingConfig(max_new_tokens=64),
                start_timeout_seconds=300.0,
            ),
            rewards=RewardConfig(num_workers=1),
            steps=10,
            prompts_per_step=4,
            group_size=8,
        ),
    )
