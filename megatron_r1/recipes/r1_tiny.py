"""The whole recipe at toy size: a 1M-parameter DeepSeek-V3 and a dense student, two CPU cores, minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_r1.config.sft import SFTRunConfig
from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.config.tiny_world import TinyWorldConfig

RECIPES = Path(__file__).parent
TEACHER, STUDENT = RECIPES / "tiny_r1", RECIPES / "tiny_qwen2"


@dataclass(frozen=True, slots=True, kw_only=True)
class R1Tiny(PipelineConfig):
    """The stages of r1_tiny, in order."""

    data: TinyWorldConfig
    base: SFTRunConfig
    cold_start: SFTRunConfig


def r1_tiny() -> R1Tiny:
    """All of R1's stages on two CPU cores: base model, cold start."""
    return R1Tiny(
        name="r1_tiny",
        run_dir=Path("runs/r1_tiny"),
        data=TinyWorldConfig(),
        base=_sft("base", ModelConfig(path=TEACHER, initialise="random"), ("base",), epochs=1, lr=2e-3, batch=64),
        cold_start=_sft("cold_start", ModelConfig(path=Path("@base/model")), ("cold_start",), epochs=2, lr=5e-4),
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
        parallel=ParallelConfig(world_size=2, expert=2),
        train=TrainConfig(dtype="fp32", tokens_per_microbatch=8192),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr / 10, schedule="cosine", warmup_steps=10),
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
