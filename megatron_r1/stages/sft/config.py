"""The configuration of a supervised stage: cold start, mixed SFT, distillation, or making a small base model.

Defaults are the paper's second SFT (arXiv 2501.12948 v2, appendix B.4.1): 2-3 epochs, cosine from 5e-5 to 5e-6, at most
32,768 tokens, batches of 128.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_r1.bounds import Count, Natural, number_faults
from megatron_r1.config.colocation import offload_faults
from megatron_r1.config.lengths import length_faults
from megatron_r1.config.run_folder import sound
from megatron_r1.config.schema import DeadlineConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_r1.config.sft_data import SFTDataConfig, sft_data_faults
from megatron_r1.config.shape import ModelShape, shape_or_faults
from megatron_r1.config.track import TrackConfig
from megatron_r1.config.trainer_faults import (
    checkpoint_faults,
    mtp_faults,
    optimizer_faults,
    parallel_faults,
    row_faults,
    train_faults,
    weight_faults,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig:
    """`model` is trained on conversations; the result is a Hugging Face folder, `run_dir`/model."""

    name: str
    """Of the stage, in its files and reports."""
    run_dir: Path
    """Folder for everything that the stage writes."""
    model: ModelConfig
    data: SFTDataConfig
    seed: Natural = 0
    """Of everything random in the stage."""
    if_exists: Literal["refuse", "archive", "resume"] = "refuse"
    """What to do with a run_dir that is not empty: stop; rename it to run_dir.1, .2, ...; or go on from its last
    checkpoint, if it is a run of this very configuration (else rename it)."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Where the trainer ranks run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(tokens_per_microbatch=32_768))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=5e-5, min_lr=5e-6, schedule="cosine", warmup_steps=10)
    )
    validate_every: Natural = 100
    """Loss on the validation examples every N steps, and at the start and end; 0: at the start and end only."""
    save_every: Natural = 0
    """Export a Hugging Face folder every N steps (0: at the end only)."""
    checkpoint_every: Natural = 0
    """Save what a restart needs every N steps (0: never)."""
    keep_checkpoints: Count = 2
    """The newest so many are kept."""
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)
    save_dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the exported weights."""
    max_skipped_steps: Natural = 4
    """Optimizer steps in a row that may be skipped because their gradient is not finite; more stop the run."""
    track: TrackConfig = field(default_factory=TrackConfig)


def validate_sft(config: SFTConfig, *, folder: bool = True) -> ModelShape:
    """The model's shape, if the configuration is sound. Raises ConfigError listing every fault."""
    shape, faults = shape_or_faults(config.model.path)
    if shape is not None:
        faults += weight_faults(config.model, shape) + mtp_faults(config.model, shape)
        faults += length_faults("data.max_tokens", config.data.max_tokens, shape, served=False)
    faults += number_faults(config)
    faults += parallel_faults(config.parallel, shape)
    faults += train_faults(config.train, config.parallel, config.model, shape) + offload_faults(config.train)
    faults += row_faults(config.train, config.data.max_tokens, "data.max_tokens")
    faults += optimizer_faults(config.optimizer, config.train, config.device)
    faults += checkpoint_faults(config.checkpoint_every, config.optimizer)
    faults += sft_data_faults(config.data)
    return sound(config, shape, faults, folder=folder)
