"""DeepSeek-R1 from DeepSeek-V3-Base, all stages, with the paper's numbers (arXiv 2501.12948 v2).

Sections and appendices named below are the paper's. Layouts are ours: training as in grpo_671b, 512 GPUs as PP16 x
EP32, rollouts on 8 servers of 32 GPUs each. Nothing of it has been run. A GRPO step of ours is one rollout with 16
optimizer steps, so the paper's numbers of steps are divided by 16.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_r1.algorithms import GRPO
from megatron_r1.algorithms.clip import Clip
from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PreferenceConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.recipes.r1_zero import grpo_671b
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.rejection.config import MixSource, RejectionConfig
from megatron_r1.stages.reward_model.config import PairDataConfig, RewardModelConfig
from megatron_r1.stages.sft.config import SFTConfig

BASE = Path("models/DeepSeek-V3-Base")
HELD_OUT = (Path("data/aime_2024.jsonl"), Path("data/math_500.jsonl"))
MAX_TOKENS = 32_768
CHECKPOINT_EVERY = 50
"""Supervised steps, for a restart."""

STUDENTS: dict[str, tuple[str, float, ParallelConfig]] = {
    "qwen_1_5b": ("Qwen2.5-Math-1.5B", 1e-4, ParallelConfig(world_size=8)),
    "qwen_7b": ("Qwen2.5-Math-7B", 8e-5, ParallelConfig(world_size=16, tensor=2, sequence=True)),
    "qwen_14b": ("Qwen2.5-14B", 7e-5, ParallelConfig(world_size=32, tensor=4, sequence=True)),
    "qwen_32b": ("Qwen2.5-32B", 6e-5, ParallelConfig(world_size=64, tensor=8, sequence=True)),
    "llama_8b": ("Llama-3.1-8B", 5e-5, ParallelConfig(world_size=16, tensor=2, sequence=True)),
    "llama_70b": (
        "Llama-3.3-70B-Instruct",
        2e-5,
        ParallelConfig(world_size=128, tensor=8, pipeline_parallel=2, sequence=True),
    ),
}
"""Students of the paper (table 6) with their learning rates (appendix B.4.3) and layouts of ours. Where a folder's
config.json allows fewer positions than 32,768 (Qwen2.5-Math), raise max_position_embeddings there first; validation
says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class R1671B(PipelineConfig):
    """The stages of r1_671b, in order (paper, figure 2)."""

    cold_start: SFTConfig
    reasoning_rl: GRPOConfig
    rejection: RejectionConfig
    second_sft: SFTConfig
    helpful: RewardModelConfig
    harmless: RewardModelConfig
    final_rl: GRPOConfig
    distill_set: RejectionConfig
    qwen_1_5b: SFTConfig
    qwen_7b: SFTConfig
    qwen_14b: SFTConfig
    qwen_32b: SFTConfig
    llama_8b: SFTConfig
    llama_70b: SFTConfig


def r1_671b() -> R1671B:
    """DeepSeek-V3-Base to R1 and its six dense students, with the paper's numbers."""
    return R1671B(
        name="r1_671b",
        run_dir=Path("runs/r1_671b"),
        cold_start=sft_671b("cold_start", Path("data/cold_start.jsonl")),
        reasoning_rl=_reasoning_rl(),
        rejection=_sampling("rejection", Path("@reasoning_rl/policy"), mix=True),
        # From V3-Base again: section 2.3.3.
        second_sft=sft_671b("second_sft", Path("@rejection/kept.jsonl")),
        helpful=_reward_model("helpful", part="answer"),
        harmless=_reward_model("harmless", part="response"),
        final_rl=_final_rl(),
        distill_set=_sampling("distill_set", Path("@final_rl/policy"), mix=True),
        qwen_1_5b=distill("qwen_1_5b"),
        qwen_7b=distill("qwen_7b"),
        qwen_14b=distill("qwen_14b"),
        qwen_32b=distill("qwen_32b"),
        llama_8b=distill("llama_8b"),
        llama_70b=distill("llama_70b"),
    )


def sft_671b(name: str = "sft_671b", file: Path = Path("data/sft.jsonl")) -> SFTConfig:
    """Supervised fine-tuning of DeepSeek-V3-Base: 2 epochs, cosine 5e-5 to 5e-6, batches of 128 (appendix B.4.1)."""
    zero = grpo_671b()
    return SFTConfig(
        name=name,
        run_dir=Path("runs") / name,
        model=ModelConfig(path=BASE, train_mtp=True),
        parallel=zero.parallel,
        train=dataclasses.replace(zero.train, tokens_per_microbatch=MAX_TOKENS),
        optimizer=OptimizerConfig(lr=5e-5, min_lr=5e-6, schedule="cosine", warmup_steps=10),
        data=SFTDataConfig(
            files=(file,), template="chat", max_tokens=MAX_TOKENS, batch_sequences=128, epochs=2, validation=512
        ),
        checkpoint_every=CHECKPOINT_EVERY,
    )


def distill_32b() -> SFTConfig:
    """Distillation of R1 into Qwen2.5-32B: data/distill.jsonl, as tools/make_distill_set.py writes it."""
    return distill("qwen_32b", Path("data/distill.jsonl"), run_dir=Path("runs/distill_32b"))


def distill(name: str, file: Path = Path("@distill_set/kept.jsonl"), *, run_dir: Path | None = None) -> SFTConfig:
    """A dense student on the teacher's samples: 2 epochs, cosine to a tenth, batches of 64 (appendix B.4.3)."""
    folder, lr, parallel = STUDENTS[name]
    return SFTConfig(
        name=name,
        run_dir=run_dir or Path("runs") / name,
        model=ModelConfig(path=Path("models") / folder),
        parallel=parallel,
        train=TrainConfig(dtype="bf16", recompute="full", tokens_per_microbatch=MAX_TOKENS),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr / 10, schedule="cosine", warmup_steps=10),
        data=SFTDataConfig(
            files=(file,), template="chat", max_tokens=MAX_TOKENS, batch_sequences=64, epochs=2, validation=512
        ),
        checkpoint_every=CHECKPOINT_EVERY,
    )


def _reasoning_rl() -> GRPOConfig:
    """Section 2.3.2 and appendix B.4.2: R1-Zero's numbers, clip 10, language consistency."""
    zero = grpo_671b()
    return dataclasses.replace(
        zero,
        name="reasoning_rl",
        model=ModelConfig(path=Path("@cold_start/model")),
        data=dataclasses.replace(zero.data, template="chat", holdout_files=HELD_OUT),
        rewards=dataclasses.replace(zero.rewards, language_weight=1.0),
        # A ratio is positive, so 1 - 10 never binds and neither does 1 - 1.
        algorithm=GRPO(clip=Clip(low=1.0, high=10.0)),
    )


def _final_rl() -> GRPOConfig:
    """Section 2.3.4 and appendix B.4.2: temperature 0.7, 1,700 steps, preferences in the last 400."""
    first = _reasoning_rl()
    return dataclasses.replace(
        first,
        name="final_rl",
        model=ModelConfig(path=Path("@second_sft/model")),
        data=dataclasses.replace(first.data, files=(*first.data.files, Path("data/scenarios.jsonl"))),
        rollout=dataclasses.replace(
            first.rollout,
            sampling=SamplingConfig(temperature=0.7, max_new_tokens=first.rollout.sampling.max_new_tokens),
        ),
        rewards=dataclasses.replace(
            first.rewards,
            preferences=tuple(
                PreferenceConfig(name=name, model=Path(f"@{name}/model"), domains=(domain,), tensor_parallel=32)
                for name, domain in (("helpful", "general"), ("harmless", "safety"))
            ),
        ),
        steps=1700 // 16,
        preference_from_step=1300 // 16,
    )


def _sampling(name: str, model: Path, *, mix: bool) -> RejectionConfig:
    """Section 2.3.3: reasoning samples of the RL's policy, and other data at 600k : 200k."""
    zero = grpo_671b()
    return RejectionConfig(
        name=name,
        run_dir=Path("runs") / name,
        model=model,
        data=DataConfig(files=zero.data.files, template="chat"),
        decontaminate=HELD_OUT,
        mix=(MixSource(file=Path("data/other.jsonl"), weight=1.0),) if mix else (),
        rollout=dataclasses.replace(
            zero.rollout, sampling=SamplingConfig(temperature=1.0, max_new_tokens=zero.rollout.sampling.max_new_tokens)
        ),
        rewards=RewardConfig(num_workers=64),
    )


def _reward_model(kind: str, *, part: Literal["answer", "response"]) -> RewardModelConfig:
    """Appendix B.2: batches of 256 pairs, learning rate 6e-6, one epoch, 8,192 tokens. The paper's safety model is
    trained on single labelled responses; ours on pairs, as the helpful one."""
    zero = grpo_671b()
    return RewardModelConfig(
        name=kind,
        run_dir=Path("runs") / kind,
        model=ModelConfig(path=BASE),
        # Without the place of the MTP layer, which a reward model does not have.
        parallel=dataclasses.replace(zero.parallel, pipeline_layout="Ettt|(tttt|)*14ttL"),
        train=dataclasses.replace(zero.train, tokens_per_microbatch=16_384),
        optimizer=OptimizerConfig(lr=6e-6, min_lr=6e-6),
        data=PairDataConfig(files=(Path(f"data/{kind}_pairs.jsonl"),), template="chat", part=part),
    )
