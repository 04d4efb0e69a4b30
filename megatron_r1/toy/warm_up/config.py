"""The configuration of the warm-up that makes a base model for the quickstart: supervised steps on demonstrations of
sums, most of which forget their carries.

No pretrained mixture of experts fits on two cores; a real run starts from a model's folder, or from SFT on files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_r1.bounds import Count, Natural, Share, number_faults
from megatron_r1.config.colocation import offload_faults
from megatron_r1.config.parts import problem_faults
from megatron_r1.config.run_folder import sound
from megatron_r1.config.schema import (
    DataConfig,
    DeadlineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron_r1.config.shape import ModelShape, shape_or_faults
from megatron_r1.config.trainer_faults import (
    mtp_faults,
    optimizer_faults,
    parallel_faults,
    train_faults,
    weight_faults,
)

SUMS = ("basic_arithmetic", "chain_sum")
"""The tasks whose problems can be sums of two whole numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUpConfig:
    """`model` learns the form of an answer, and a bad habit; the result is a Hugging Face folder, `run_dir`/model."""

    name: str = "warm_up"
    """Of the stage, in its files and reports."""
    run_dir: Path = Path("runs/warm_up")
    """Folder for everything that the stage writes."""
    model: ModelConfig
    seed: Natural = 0
    """Of everything random in the stage."""
    if_exists: Literal["refuse", "archive"] = "refuse"
    """What to do with a run_dir that is not empty: stop, or rename it to run_dir.1, .2, ..."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the trainer ranks run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3, min_lr=1e-3))
    data: DataConfig = field(default_factory=DataConfig)
    """Tasks of sums; the problems that `holdout` and `validation` keep apart are never shown."""
    steps: Count = 600
    """Optimizer steps."""
    batch_size: Count = 64
    """Demonstrations per optimizer step."""
    noise: Share = 0.0
    """Share of demonstrations that forget every carry, so that RL has something to correct."""
    save_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the exported weights."""
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)


def validate_warm_up(config: WarmUpConfig, *, folder: bool = True) -> ModelShape:
    """The model's shape, if the configuration is sound. Raises ConfigError listing every fault."""
    shape, faults = shape_or_faults(config.model.path)
    if shape is not None:
        faults += weight_faults(config.model, shape) + mtp_faults(config.model, shape)
    faults += number_faults(config)
    faults += parallel_faults(config.parallel, shape)
    faults += train_faults(config.train, config.parallel, config.model, shape) + offload_faults(config.train)
    faults += optimizer_faults(config.optimizer, config.train, config.device)
    faults += problem_faults(config.data) + _sum_faults(config.data)
    return sound(config, shape, faults, folder=folder)


def _sum_faults(data: DataConfig) -> list[str]:
    """Demonstrations exist for sums of two whole numbers only."""
    remedy = "give such a task, or make a base model of your conversations with a stage of SFT"
    if data.files or data.source:
        named = "data.files" if data.files else "data.source"
        return [f"{named}: the warm-up demonstrates sums of data.tasks, and cannot answer problems of yours: {remedy}"]
    return [
        f"data.tasks: {task}: the warm-up demonstrates sums of two whole numbers ({' or '.join(SUMS)}): {remedy}"
        for task in data.tasks
        if task.partition(":")[0] not in SUMS
    ]
