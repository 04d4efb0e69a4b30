"""Recipes for one to eight GPUs of 80 GB: the first runs of somebody who has a machine and not a cluster.

Hyper-parameters are usual ones for mathematics with rule rewards; layouts are the planner's (megatron-r1 plan NAME
--gpu h100). None has been run on a GPU: docs/gpu.md says what was tried.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_r1.algorithms import DAPO
from megatron_r1.algorithms.correction import Correction
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
from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.sft.config import SFTConfig

MATH = DataConfig(
    files=(Path("data/math_train.jsonl"),),
    holdout_files=(Path("data/math_500.jsonl"),),
    validation=128,
    template="chat",
    thinking="template",
)
BOXED = RewardConfig(answer_from="boxed", format_weight=0.0, num_workers=8)
"""Qwen's and Moonlight's models end with \\boxed{}, without tags."""
ALGORITHM = DAPO(sampling_rounds=1, overlong_share=0.0, correction=Correction(weight="token"))
"""DAPO's clip and token mean. Sampling once a step is what the planner's times are for; a longer run gains by the
paper's 10 rounds."""


def grpo_qwen_1_5b() -> GRPOConfig:
    """Qwen2.5-Math-1.5B on mathematics, one 80 GB GPU that trainer and server share in turns."""
    return GRPOConfig(
        name="grpo_qwen_1_5b",
        run_dir=Path("runs/grpo_qwen_1_5b"),
        model=ModelConfig(path=Path("models/Qwen2.5-Math-1.5B")),
        parallel=ParallelConfig(world_size=1),
        train=TrainConfig(
            dtype="bf16", recompute="full", tokens_per_microbatch=16_384, offload=("optimizer", "gradients")
        ),
        optimizer=OptimizerConfig(lr=1e-6, min_lr=1e-6, warmup_steps=5),
        data=MATH,
        rollout=RolloutConfig(
            num_engines=1,
            max_model_len=4096,
            memory_fraction=0.7,
            sync="ipc",
            sleep_level=2,
            sampling=SamplingConfig(max_new_tokens=3072),
        ),
        rewards=BOXED,
        algorithm=ALGORITHM,
        steps=200,
        prompts_per_step=64,
        group_size=8,
        minibatches=2,
        eval_every=20,
        save_every=100,
        checkpoint_every=20,
    )


def grpo_qwen_7b() -> GRPOConfig:
    """Qwen2.5-Math-7B on mathematics, eight 80 GB GPUs: four train (TP2), four serve."""
    small = grpo_qwen_1_5b()
    return dataclasses.replace(
        small,
        name="grpo_qwen_7b",
        run_dir=Path("runs/grpo_qwen_7b"),
        model=ModelConfig(path=Path("models/Qwen2.5-Math-7B")),
        parallel=ParallelConfig(world_size=4, tensor=2, sequence=True),
        train=dataclasses.replace(small.train, offload=()),
        rollout=dataclasses.replace(small.rollout, num_engines=4, memory_fraction=0.85, sync="nccl", sleep_level=0),
        algorithm=ALGORITHM,
        prompts_per_step=128,
        minibatches=4,
    )


def grpo_qwen_7b_colocated() -> GRPOConfig:
    """Qwen2.5-Math-7B on mathematics, eight 80 GB GPUs that trainer (TP2) and eight servers share in turns."""
    apart, small = grpo_qwen_7b(), grpo_qwen_1_5b()
    return dataclasses.replace(
        apart,
        name="grpo_qwen_7b_colocated",
        run_dir=Path("runs/grpo_qwen_7b_colocated"),
        parallel=ParallelConfig(world_size=8, tensor=2, sequence=True),
        train=small.train,
        rollout=dataclasses.replace(small.rollout, num_engines=8),
    )


def grpo_moe_16b() -> GRPOConfig:
    """Moonlight-16B-A3B (DeepSeek-V3's architecture) on mathematics, eight 80 GB GPUs in turns: EP8, servers of TP4."""
    shared = grpo_qwen_7b_colocated()
    return dataclasses.replace(
        shared,
        name="grpo_moe_16b",
        run_dir=Path("runs/grpo_moe_16b"),
        model=ModelConfig(path=Path("models/Moonlight-16B-A3B")),
        parallel=ParallelConfig(world_size=8, expert=8),
        rollout=dataclasses.replace(
            shared.rollout,
            num_engines=2,
            tensor_parallel=4,
            expert_parallel=True,
            max_model_len=8192,
            memory_fraction=0.6,
            sampling=SamplingConfig(max_new_tokens=6144),
        ),
    )


def distill_qwen_7b() -> SFTConfig:
    """Qwen2.5-7B on a teacher's samples (data/distill.jsonl), eight 80 GB GPUs: TP2, rows of 16,384 tokens."""
    return SFTConfig(
        name="distill_qwen_7b",
        run_dir=Path("runs/distill_qwen_7b"),
        model=ModelConfig(path=Path("models/Qwen2.5-7B")),
        parallel=ParallelConfig(world_size=8, tensor=2, sequence=True),
        train=TrainConfig(dtype="bf16", recompute="full", tokens_per_microbatch=16_384),
        optimizer=OptimizerConfig(lr=8e-5, min_lr=8e-6, schedule="cosine", warmup_steps=10),
        data=SFTDataConfig(
            files=(Path("data/distill.jsonl"),),
            template="chat",
            max_tokens=16_384,
            batch_sequences=64,
            epochs=2,
            validation=128,
        ),
        checkpoint_every=50,
    )
