"""The kinds of stage: how each is checked, described and run. The one place that lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_r1.config.evaluation import EvaluateConfig, validate_evaluation
from megatron_r1.config.packages import installed_versions, needed_packages, version_faults
from megatron_r1.config.rejection import RejectionConfig, validate_rejection
from megatron_r1.config.reward_model import RewardModelConfig, validate_reward_model
from megatron_r1.config.schema import RolloutConfig, RunConfig, StageConfig
from megatron_r1.config.sft import SFTRunConfig, validate_sft
from megatron_r1.config.shape import ModelShape
from megatron_r1.config.tiny_world import TINY_WORLD_FILES, TinyWorldConfig, validate_tiny_world
from megatron_r1.config.validate import validate
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.launch import Ranks
from megatron_r1.planning.fit import check_fit
from megatron_r1.planning.plan import Planned
from megatron_r1.planning.summary import (
    describe,
    describe_model,
    describe_rejection,
    describe_reward_model,
    describe_sft,
)

OUTPUTS: dict[type, tuple[str, ...]] = {
    RunConfig: ("policy",),
    SFTRunConfig: ("model",),
    RewardModelConfig: ("model",),
    RejectionConfig: ("kept.jsonl",),
    EvaluateConfig: ("results.json",),
    TinyWorldConfig: tuple(f"{name}.jsonl" for name in TINY_WORLD_FILES),
}
"""What a stage leaves in its run folder for later stages."""


def check(config: StageConfig, *, folder: bool = True) -> ModelShape | None:
    """The shape of the stage's model, if it has one. Raises ConfigError listing every fault. `folder`: whether run_dir
    may be used is looked at too. A stage for GPUs must fit them."""
    shape = _validated(config, folder)
    if faults := version_faults(packages_of(config), installed_versions()):
        raise ConfigError(faults)
    if shape is not None and isinstance(config, Planned):
        check_fit(config, shape)
    return shape


def _validated(config: StageConfig, folder: bool) -> ModelShape | None:
    if isinstance(config, RunConfig):
        return validate(config, folder=folder)
    if isinstance(config, SFTRunConfig):
        return validate_sft(config, folder=folder)
    if isinstance(config, RewardModelConfig):
        return validate_reward_model(config, folder=folder)
    if isinstance(config, EvaluateConfig):
        return validate_evaluation(config, folder=folder)
    if isinstance(config, TinyWorldConfig):
        return validate_tiny_world(config, folder=folder)
    assert isinstance(config, RejectionConfig)
    return validate_rejection(config, folder=folder)


def summary_of(config: StageConfig, shape: ModelShape | None) -> str:
    """What is about to run, in a few lines."""
    if shape is None:
        return f"run folder: {config.run_dir}"
    fit = check_fit(config, shape) if isinstance(config, Planned) else ""
    return f"{_described(config, shape)}\n{fit}".rstrip()


def _described(config: StageConfig, shape: ModelShape) -> str:
    if isinstance(config, RunConfig):
        return describe(config, shape)
    if isinstance(config, SFTRunConfig):
        return describe_sft(config, shape)
    if isinstance(config, RewardModelConfig):
        return describe_reward_model(config, shape)
    if isinstance(config, EvaluateConfig):
        return f"{describe_model(config.name, shape)}\nrun folder: {config.run_dir}"
    assert isinstance(config, RejectionConfig)
    return describe_rejection(config, shape)


def packages_of(config: StageConfig) -> tuple[str, ...]:
    """What the stage's processes import of other projects' packages, as far as their versions matter."""
    rollout = rollout_of(config)
    ranks = ranks_of(config)
    cuda = (rollout is not None and rollout.device == "cuda") or (ranks is not None and not ranks.cpu)
    return needed_packages(device="cuda" if cuda else "cpu", trains=ranks is not None, serves=rollout is not None)


def rollout_of(config: StageConfig) -> RolloutConfig | None:
    """How the stage's servers run; None for a stage that starts none."""
    if isinstance(config, EvaluateConfig) and config.server.url:
        return None
    return config.rollout if isinstance(config, RunConfig | RejectionConfig | EvaluateConfig) else None


def ranks_of(config: StageConfig) -> Ranks | None:
    """The trainer ranks that the stage runs on; None for a stage of one process without a trainer."""
    if not isinstance(config, RunConfig | SFTRunConfig | RewardModelConfig):
        return None
    return Ranks(
        world_size=config.parallel.world_size, threads=config.train.threads_per_rank, cpu=config.device == "cpu"
    )


def loop_of(config: StageConfig) -> Callable[..., dict[str, Any]]:
    """The stage's function: (config, shape, device) on a trainer rank, (config) in the only process."""
    # Imported here: the command line has to answer without torch.
    if isinstance(config, RunConfig):
        from megatron_r1.pipeline.zero import run_zero

        return run_zero
    if isinstance(config, SFTRunConfig):
        from megatron_r1.pipeline.sft import run_sft

        return run_sft
    if isinstance(config, RewardModelConfig):
        from megatron_r1.pipeline.reward_model import run_reward_model

        return run_reward_model
    if isinstance(config, EvaluateConfig):
        from megatron_r1.pipeline.evaluate import evaluate

        return evaluate
    if isinstance(config, TinyWorldConfig):
        from megatron_r1.pipeline.tiny_world import make_tiny_world

        return make_tiny_world
    from megatron_r1.pipeline.rejection import run_rejection

    return run_rejection
