"""R1-Zero recipes for real models."""

from __future__ import annotations

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

TWO_DIGIT_ADDITION = (
    "basic_arithmetic:min_terms=2,max_terms=2,min_digits=2,max_digits=2,operators=+,allow_parentheses=False"
)


def grpo_smollm2() -> RunConfig:
    """SmolLM2-135M-Instruct on two-digit addition, two CPU cores (examples/grpo_smollm2.sh makes the folder).

    A few supervised steps come first: the model never writes the tags by itself, and GRPO learns nothing from rewards
    that are all 0.
    """
    return RunConfig(
        name="grpo_smollm2",
        run_dir=Path("runs/grpo_smollm2"),
        if_exists="archive",
        model=ModelConfig(path=Path("runs/models/smollm2-135m-instruct")),
        parallel=ParallelConfig(world_size=1),
        train=TrainConfig(dtype="fp32", tokens_per_microbatch=2048, threads_per_rank=2),
        optimizer=OptimizerConfig(lr=5e-6, min_lr=5e-6),
        data=DataConfig(tasks=(TWO_DIGIT_ADDITION,), template="chat", holdout=32),
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
        grpo=GRPOLoopConfig(steps=10, prompts_per_step=4, group_size=8),
        sft=SFTConfig(
            steps=12, batch_size=8, optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-5, schedule="cosine", warmup_steps=2)
        ),
    )


def grpo_671b() -> RunConfig:
    """DeepSeek-V3-Base to R1-Zero with the paper's numbers (arXiv 2501.12948 v2, section 2.1 and appendix B.4).

    The layout, 512 GPUs as PP16 x EP32, is V3's pre-training with half its expert parallelism. The
    rollouts need 8 x 32 GPUs of their own beside it, with whole experts on each (16 of 80 GB do not hold the weights in
    bf16; in FP8 they do, and 32 would split its blocks: docs/fp8.md). Nothing of it has been run; megatron-r1 plan
    grpo_671b says what it should need.
    """
    return RunConfig(
        name="grpo_671b",
        run_dir=Path("runs/grpo_671b"),
        model=ModelConfig(path=Path("models/DeepSeek-V3-Base")),
        parallel=ParallelConfig(world_size=512, pipeline=16, expert=32, pipeline_layout="Ettt|(tttt|)*14ttmL"),
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
        grpo=GRPOLoopConfig(
            steps=10_400 // 16,
            prompts_per_step=512,
            group_size=16,
            minibatches=16,
            save_every=25,
        ),
    )
