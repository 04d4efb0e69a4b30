"""R1-Zero for DeepSeek-V3-Base."""

from __future__ import annotations

from pathlib import Path

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


def grpo_671b() -> GRPOConfig:
    """DeepSeek-V3-Base to R1-Zero with the paper's numbers (arXiv 2501.12948 v2, section 2.1 and appendix B.4).

    The layout, 512 GPUs as PP16 x EP32, is V3's pre-training with half its expert parallelism. The
    rollouts need 8 x 32 GPUs of their own beside it, with whole experts on each (16 of 80 GB do not hold the weights in
    bf16; in FP8 they do, and 32 would split its blocks: docs/fp8.md). Nothing of it has been run; megatron-r1 plan
    grpo_671b says what it should need.
    """
    return GRPOConfig(
        name="grpo_671b",
        run_dir=Path("runs/grpo_671b"),
        model=ModelConfig(path=Path("models/DeepSeek-V3-Base")),
        parallel=ParallelConfig(world_size=512, pipeline_parallel=16, expert=32, pipeline_layout="Ettt|(tttt|)*14ttmL"),
        train=TrainConfig(dtype="bf16", recompute="full", tokens_per_microbatch=33_792),
        optimizer=OptimizerConfig(lr=3e-6, min_lr=3e-6),
        data=DataConfig(files=(Path("data/reasoning.jsonl"),), template="r1_zero", holdout=500),
        rollout=RolloutConfig(
            num_engines=8,
            tensor_parallel=32,
            expert_parallel=True,
            max_model_len=33_792,
            sampling=SamplingConfig(max_new_tokens=32_768),
        ),
        rewards=RewardConfig(num_workers=64),
        steps=10_400 // 16,
        prompts_per_step=512,
        group_size=16,
        minibatches=16,
        save_every=25,
    )
