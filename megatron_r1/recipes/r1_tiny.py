"""The whole recipe at toy size: a 1M-parameter DeepSeek-V3 and a dense student, two CPU cores, minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.reward_model import PairDataConfig, RewardModelConfig
from megatron_r1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_r1.config.sft import SFTRunConfig
from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.config.tiny_world import TinyWorldConfig

RECIPES = Path(__file__).parent
TEACHER, STUDENT = RECIPES / "tiny_r1", RECIPES / "tiny_qwen2"
RANKS = ParallelConfig(world_size=2, expert=2)
TRAIN = TrainConfig(dtype="fp32", tokens_per_microbatch=8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class R1Tiny(PipelineConfig):
    """The stages of r1_tiny, in order."""

    data: TinyWorldConfig
    base: SFTRunConfig
    cold_start: SFTRunConfig
    helpful: RewardModelConfig
    harmless: RewardModelConfig


def r1_tiny() -> R1Tiny:
    """All of R1's stages on two CPU cores: base model, cold start."""
    return R1Tiny(
        name="r1_tiny",
        run_dir=Path("runs/r1_tiny"),
        data=TinyWorldConfig(),
        base=_sft("base", ModelConfig(path=TEACHER, initialise="random"), ("base",), epochs=1, lr=2e-3, batch=64),
        cold_start=_sft("cold_start", ModelConfig(path=Path("@base/model")), ("cold_start",), epochs=2, lr=5e-4),
        helpful=_reward_model("helpful", part="answer"),
        harmless=_reward_model("harmless", part="response"),
    )


def _sft(
    name: str, model: ModelConfig, files: tuple[str, ...], *, epochs: int, lr: float, batch: int = 32
) -> SFTRunConfig:
    """A supervised stage on the teacher's two ranks."""
    return SFTRunConfig(
        name=name,
        run_dir=Path("runs") / name,
        model=model,
        device="cpu",
        parallel=RANKS,
        train=TRAIN,
        optimizer=_cosine(lr),
        data=SFTDataConfig(
            files=tuple(Path(f"@data/{file}.jsonl") for file in files),
            template="plain",
            max_tokens=128,
            batch_sequences=batch,
            epochs=epochs,
            validation=64,
        ),
        save_dtype="fp32",
    )


def _reward_model(kind: str, *, part: Literal["answer", "response"]) -> RewardModelConfig:
    return RewardModelConfig(
        name=kind,
        run_dir=Path("runs") / kind,
        model=ModelConfig(path=Path("@base/model")),
        device="cpu",
        parallel=RANKS,
        train=TRAIN,
        optimizer=_cosine(5e-4),
        data=PairDataConfig(
            files=(Path(f"@data/{kind}_pairs.jsonl"),),
            template="plain",
            part=part,
            max_tokens=128,
            batch_pairs=64,
            validation=200,
        ),
        save_dtype="fp32",
    )


def _cosine(lr: float) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, min_lr=lr / 10, schedule="cosine", warmup_steps=10)
