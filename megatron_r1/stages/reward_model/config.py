"""The configuration of reward model training. Defaults are the paper's helpful reward model's (arXiv 2501.12948 v2,
appendix B.2: 66k pairs, batches of 256, learning rate 6e-6, one epoch, at most 8,192 tokens)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_r1.bounds import Count, Natural, at_least, number_faults
from megatron_r1.config.colocation import offload_faults
from megatron_r1.config.lengths import length_faults
from megatron_r1.config.parts import missing_files
from megatron_r1.config.run_folder import sound
from megatron_r1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_r1.config.shape import ModelShape, shape_or_faults
from megatron_r1.config.track import TrackConfig
from megatron_r1.config.trainer_faults import (
    optimizer_faults,
    parallel_faults,
    row_faults,
    train_faults,
    weight_faults,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairDataConfig:
    """jsonl files of preference pairs (docs/reward_models.md)."""

    files: tuple[Path, ...] = ()
    """jsonl files of preference pairs."""
    template: Literal["r1_zero", "chat", "plain"] = "chat"
    """How the turns before the answer become a prompt; the policy's own."""
    part: Literal["answer", "response"] = "answer"
    """What is judged: the final answer only (helpfulness), or thought and answer (harmlessness)."""
    max_tokens: Annotated[int, at_least(2)] = 8192
    """Longest prompt and response together; pairs with a longer one are left out and counted."""
    batch_pairs: Count = 256
    """Pairs per optimizer step."""
    epochs: Count = 1
    """How often each pair is trained on."""
    validation: Count = 512
    """Pairs kept apart, for accuracy before and after, and for the scale of the values."""
    seed: Natural = 0
    """Of the order of the pairs, and of which are kept apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelConfig:
    """`model` gets a head of one value and is trained on pairs; the result is a Hugging Face folder,
    `run_dir`/model."""

    name: str
    """Of the stage, in its files and reports."""
    run_dir: Path
    """Folder for everything that the stage writes."""
    model: ModelConfig
    data: PairDataConfig
    seed: Natural = 0
    """Of everything random in the stage."""
    if_exists: Literal["refuse", "archive"] = "refuse"
    """What to do with a run_dir that is not empty: stop, or rename it to run_dir.1, .2, ..."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Where the trainer ranks run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(tokens_per_microbatch=8192))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=6e-6, min_lr=6e-6))
    save_dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the exported weights."""
    max_skipped_steps: Natural = 4
    """Optimizer steps in a row that may be skipped because their gradient is not finite; more stop the run."""
    track: TrackConfig = field(default_factory=TrackConfig)


def validate_reward_model(config: RewardModelConfig, *, folder: bool = True) -> ModelShape:
    """The shape of the model that is started from, if the configuration is sound. Raises ConfigError listing every
    fault."""
    shape, faults = shape_or_faults(config.model.path)
    if shape is not None:
        faults += weight_faults(config.model, shape)
        faults += length_faults("data.max_tokens", config.data.max_tokens, shape, served=False)
    if config.model.train_mtp:
        faults.append("model.train_mtp is True; a reward model predicts no tokens: leave it out")
    faults += number_faults(config)
    # A reward model has no MTP layers, whatever its base has.
    faults += parallel_faults(config.parallel, shape and dataclasses.replace(shape, num_mtp_layers=0))
    faults += train_faults(config.train, config.parallel, config.model, shape) + offload_faults(config.train)
    # A token is added that stands for the value's place.
    faults += row_faults(config.train, config.data.max_tokens + 1, "data.max_tokens + 1")
    faults += optimizer_faults(config.optimizer, config.train, config.device)
    if not config.data.files:
        faults.append("data.files is empty; name at least one jsonl file of preference pairs")
    faults += missing_files({"data.files": config.data.files})
    return sound(config, shape, faults, folder=folder)
