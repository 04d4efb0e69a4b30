"""The whole recipe at toy size: a 1M-parameter DeepSeek-V3 and a dense student, two CPU cores, minutes.

The stages are the paper's, in its order; data comes from a small world with a part for each of them
(toy/world.py). Sizes are the least that show each stage's effect.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_r1.algorithms.on_policy_distill import OnPolicyDistill
from megatron_r1.algorithms.teacher import Teacher
from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PreferenceConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    TrainConfig,
)
from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.stages.evaluate.config import EvaluateConfig
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.rejection.config import MixSource, RejectionConfig
from megatron_r1.stages.reward_model.config import PairDataConfig, RewardModelConfig
from megatron_r1.stages.sft.config import SFTConfig
from megatron_r1.toy.tiny_world.config import TinyWorldConfig

RECIPES = Path(__file__).parent
TEACHER, STUDENT = RECIPES / "tiny_r1", RECIPES / "tiny_qwen2"
TEACHER_RANKS = ParallelConfig(world_size=2, expert=2)
STUDENT_RANKS = ParallelConfig(world_size=2)
TRAIN = TrainConfig(dtype="fp32", tokens_per_microbatch=8192)
MAX_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class R1Tiny(PipelineConfig):
    """The stages of r1_tiny, in order. Paper, figure 2: base model, cold start, reasoning RL, rejection sampling,
    second SFT, reward models, RL on all scenarios, distillation; and the student by RL alone, to compare with."""

    data: TinyWorldConfig
    base: SFTConfig
    cold_start: SFTConfig
    reasoning_rl: GRPOConfig
    rejection: RejectionConfig
    second_sft: SFTConfig
    helpful: RewardModelConfig
    harmless: RewardModelConfig
    final_rl: GRPOConfig
    distill_set: RejectionConfig
    student_base: SFTConfig
    student: SFTConfig
    student_eval: EvaluateConfig
    student_rl: GRPOConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class R1ZeroTiny(PipelineConfig):
    """The stages of r1_zero_tiny: RL on the base model and nothing else (paper, section 2.2)."""

    data: TinyWorldConfig
    base: SFTConfig
    zero_rl: GRPOConfig


def r1_tiny() -> R1Tiny:
    """All of R1's stages, from a base model to a distilled student, on two CPU cores."""
    return R1Tiny(
        name="r1_tiny",
        run_dir=Path("runs/r1_tiny"),
        data=TinyWorldConfig(),
        base=_base("base", TEACHER, TEACHER_RANKS),
        cold_start=_sft("cold_start", "@base/model", "@data/cold_start.jsonl", epochs=2, lr=3e-4),
        reasoning_rl=_rl("reasoning_rl", "@cold_start/model", steps=40, rewards=_rules(language_weight=1.0)),
        rejection=_sampling("rejection", "@reasoning_rl/policy", problems=600, samples=4, mix=True),
        # From the base model, not from the RL's: paper, section 2.3.3.
        second_sft=_sft("second_sft", "@base/model", "@rejection/kept.jsonl", epochs=3, lr=5e-4),
        helpful=_reward_model("helpful", part="answer"),
        harmless=_reward_model("harmless", part="response"),
        final_rl=_rl(
            "final_rl",
            "@second_sft/model",
            steps=30,
            rewards=_rules(
                language_weight=1.0,
                preferences=(
                    PreferenceConfig(name="helpful", model=Path("@helpful/model"), domains=("general",)),
                    PreferenceConfig(name="harmless", model=Path("@harmless/model"), domains=("safety",)),
                ),
            ),
            files=("@data/problems.jsonl", "@data/scenarios.jsonl"),
            temperature=0.7,
            preference_from_step=10,
        ),
        distill_set=_sampling("distill_set", "@final_rl/policy", problems=1500, samples=2),
        student_base=_base("student_base", STUDENT, STUDENT_RANKS),
        student=_sft(
            "student",
            "@student_base/model",
            "@distill_set/kept.jsonl",
            epochs=4,
            lr=1e-3,
            parallel=STUDENT_RANKS,
        ),
        student_eval=EvaluateConfig(
            name="student_eval",
            run_dir=Path("runs/student_eval"),
            model=Path("@student/model"),
            data=DataConfig(files=(Path("@data/held_out.jsonl"),), template="plain"),
            samples=1,
            rollout=_rollout(temperature=0.0),
            rewards=_rules(record_language=True),
        ),
        student_rl=_rl(
            "student_rl", "@student_base/model", steps=40, rewards=_rules(record_language=True), parallel=STUDENT_RANKS
        ),
    )


def r1_zero_tiny() -> R1ZeroTiny:
    """The pure-RL branch: GRPO with rule rewards on the base model, on two CPU cores."""
    return R1ZeroTiny(
        name="r1_zero_tiny",
        run_dir=Path("runs/r1_zero_tiny"),
        data=TinyWorldConfig(),
        base=_base("base", TEACHER, TEACHER_RANKS),
        zero_rl=_rl("zero_rl", "@base/model", steps=40, rewards=_rules(record_language=True)),
    )


def on_policy_distill_tiny() -> GRPOConfig:
    """r1_tiny's base model learns from its final model on its own samples; run r1_tiny first."""
    made = Path("runs/r1_tiny")
    student = _rl("on_policy_distill_tiny", str(made / "base/model"), steps=30, rewards=_rules(record_language=True))
    return dataclasses.replace(
        student,
        data=dataclasses.replace(
            student.data, files=(made / "data/problems.jsonl",), holdout_files=(made / "data/held_out.jsonl",)
        ),
        algorithm=OnPolicyDistill(teacher=Teacher(model=made / "final_rl/policy")),
    )


def _base(name: str, folder: Path, parallel: ParallelConfig) -> SFTConfig:
    """A base model of random weights: long training on everything, bad habits included."""
    return _sft(
        name,
        ModelConfig(path=folder, initialise="random"),
        "@data/base.jsonl",
        epochs=1,
        lr=2e-3,
        batch=64,
        parallel=parallel,
    )


def _sft(
    name: str,
    model: ModelConfig | str,
    file: str,
    *,
    epochs: int,
    lr: float,
    batch: int = 32,
    parallel: ParallelConfig = TEACHER_RANKS,
) -> SFTConfig:
    return SFTConfig(
        name=name,
        run_dir=Path("runs") / name,
        model=ModelConfig(path=Path(model)) if isinstance(model, str) else model,
        device="cpu",
        parallel=parallel,
        train=TRAIN,
        optimizer=_cosine(lr),
        data=SFTDataConfig(
            files=(Path(file),),
            template="plain",
            max_tokens=MAX_TOKENS,
            batch_sequences=batch,
            epochs=epochs,
            validation=64,
        ),
        save_dtype="fp32",
    )


def _rl(
    name: str,
    model: str,
    *,
    steps: int,
    rewards: RewardConfig,
    files: tuple[str, ...] = ("@data/problems.jsonl",),
    temperature: float = 1.0,
    preference_from_step: int = 0,
    parallel: ParallelConfig = TEACHER_RANKS,
) -> GRPOConfig:
    return GRPOConfig(
        name=name,
        run_dir=Path("runs") / name,
        model=ModelConfig(path=Path(model)),
        parallel=parallel,
        train=TRAIN,
        optimizer=OptimizerConfig(lr=1e-4, min_lr=2e-5, warmup_steps=3, schedule="cosine"),
        data=DataConfig(files=tuple(map(Path, files)), template="plain", holdout_files=(Path("@data/held_out.jsonl"),)),
        rollout=_rollout(temperature=temperature),
        rewards=rewards,
        steps=steps,
        prompts_per_step=32,
        group_size=8,
        preference_from_step=preference_from_step,
    )


def _sampling(name: str, model: str, *, problems: int, samples: int, mix: bool = False) -> RejectionConfig:
    return RejectionConfig(
        name=name,
        run_dir=Path("runs") / name,
        model=Path(model),
        data=DataConfig(files=(Path("@data/problems.jsonl"),), template="plain"),
        num_problems=problems,
        samples=samples,
        keep_per_problem=1,
        decontaminate=(Path("@data/held_out.jsonl"),),
        mix=(MixSource(file=Path("@data/other.jsonl"), weight=1.0),) if mix else (),
        rollout=_rollout(temperature=1.0),
        rewards=_rules(),
    )


def _reward_model(kind: str, *, part: Literal["answer", "response"]) -> RewardModelConfig:
    return RewardModelConfig(
        name=kind,
        run_dir=Path("runs") / kind,
        model=ModelConfig(path=Path("@base/model")),
        device="cpu",
        parallel=TEACHER_RANKS,
        train=TRAIN,
        optimizer=_cosine(3e-4),
        data=PairDataConfig(
            files=(Path(f"@data/{kind}_pairs.jsonl"),),
            template="plain",
            part=part,
            max_tokens=MAX_TOKENS,
            batch_pairs=64,
            validation=200,
        ),
        save_dtype="fp32",
    )


def _rollout(*, temperature: float) -> RolloutConfig:
    return RolloutConfig(
        device="cpu",
        sync="gloo",
        dtype="fp32",
        max_model_len=MAX_TOKENS,
        memory_fraction=0.3,
        kv_cache_gib=0.5,
        enforce_eager=True,
        sampling=SamplingConfig(max_new_tokens=64, temperature=temperature),
        start_timeout_seconds=300.0,
    )


def _rules(
    *,
    language_weight: float = 0.0,
    record_language: bool = False,
    preferences: tuple[PreferenceConfig, ...] = (),
) -> RewardConfig:
    return RewardConfig(
        num_workers=1, language_weight=language_weight, record_language=record_language, preferences=preferences
    )


def _cosine(lr: float) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, min_lr=lr / 10, schedule="cosine", warmup_steps=10)
