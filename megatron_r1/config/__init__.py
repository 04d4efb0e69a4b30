"""Typed configuration: the parts that stages share, as frozen dataclasses, and the rules about them. Imports no torch.

A recipe is a function that returns a stage's configuration (stages/*/config.py); the command line overrides any field
by its path (`--optimizer.lr 1e-6`).
"""

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
from megatron_r1.config.shape import ModelShape, load_shape

__all__ = [
    "DataConfig",
    "ModelConfig",
    "ModelShape",
    "OptimizerConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "SamplingConfig",
    "TrainConfig",
    "load_shape",
]
