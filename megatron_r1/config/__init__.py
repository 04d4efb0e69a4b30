"""Typed configuration: frozen dataclasses, one `validate`. Imports no torch.

A recipe is a function that returns a RunConfig; the command line overrides any field by its path
(`--algorithm.kl.coef 0.01`). Defaults are the paper's where the paper states a number
(arXiv 2501.12948 v2, section 2.1 and appendix B.4).
"""

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
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.config.validate import validate

__all__ = [
    "DataConfig",
    "GRPOLoopConfig",
    "ModelConfig",
    "ModelShape",
    "OptimizerConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "TrainConfig",
    "load_shape",
    "validate",
]
