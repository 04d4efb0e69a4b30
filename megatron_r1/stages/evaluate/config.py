"""The configuration of an evaluation: the paper's sampling as defaults (arXiv 2501.12948 v2, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_r1.bounds import Count, Natural, number_faults
from megatron_r1.config.colocation import no_trainer_faults
from megatron_r1.config.custom_reward import reward_faults
from megatron_r1.config.parts import problem_faults, request_faults, rollout_faults, sample_faults
from megatron_r1.config.run_folder import sound
from megatron_r1.config.schema import DataConfig, RewardConfig, RolloutConfig, RunningServerConfig, SamplingConfig
from megatron_r1.config.shape import ModelShape, shape_or_faults
from megatron_r1.config.trainer_faults import reward_model_faults


def _rollout() -> RolloutConfig:
    return RolloutConfig(sampling=SamplingConfig(temperature=0.6, top_p=0.95, max_new_tokens=32_768))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """`megatron-r1 evaluate`: sample each problem several times and grade."""

    model: Path
    """Hugging Face folder, or a torch_dist checkpoint (exported to `run_dir` first)."""
    name: str = "evaluation"
    """Of the stage, in its files and reports."""
    run_dir: Path
    """Folder for results.json, samples.jsonl and the servers' logs."""
    if_exists: Literal["refuse", "archive"] = "refuse"
    """What to do with a run_dir that is not empty: stop, or rename it to run_dir.1, .2, ..."""
    data: DataConfig = field(default_factory=DataConfig)
    """Tasks or files; `holdout` and `validation` mean nothing here."""
    limit: Natural = 0
    """At most so many problems, the first ones; 0: all of the files, 100 of each task."""
    samples: Count = 16
    """Samples per problem: pass@1 is their mean."""
    pass_k: tuple[int, ...] = (1,)
    """The k of pass@k to report; each at most `samples`."""
    consensus_k: Natural = 0
    """Votes of cons@k, the first k samples; 0: all samples."""
    seed: Natural = 0
    """Of everything random in the stage."""
    rollout: RolloutConfig = field(default_factory=_rollout)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    server: RunningServerConfig = field(default_factory=RunningServerConfig)


def validate_evaluation(config: EvaluateConfig, *, folder: bool = True) -> ModelShape:
    """The model's shape. Raises ConfigError listing every fault. `folder`: whether run_dir may be used is looked at
    too."""
    shape, faults = shape_or_faults(config.model, "model")
    if shape is not None:
        faults += reward_model_faults(shape, config.model, "model")
    rollout, server = config.rollout, config.server
    faults += number_faults(config) + problem_faults(config.data) + reward_faults(config.rewards)
    if any(not 1 <= k <= config.samples for k in config.pass_k):
        faults.append(f"pass_k is {config.pass_k}; each must be 1 to samples = {config.samples}")
    if config.consensus_k > config.samples:
        faults.append(f"consensus_k is {config.consensus_k}; it must be 0 to samples = {config.samples}")
    faults += sample_faults(config.samples, rollout) + no_trainer_faults(rollout)
    if server.url:
        faults += request_faults(rollout, shape)
    else:
        faults += rollout_faults(rollout, shape, fp8_block=shape and shape.fp8_block)
    if server.url and not server.url.startswith(("http://", "https://")):
        faults.append(f"server.url is {server.url!r}; it must begin with http:// or https://")
    elif "@" in server.url:
        faults.append("server.url holds a password, which would be written to the run's files: use server.token_file")
    if bool(server.url) != bool(server.model):
        faults.append("server.url and server.model: give both, or neither to start servers of our own")
    if server.token_file is not None and not server.token_file.is_file():
        faults.append(f"server.token_file: {server.token_file} does not exist; it holds the server's bearer token")
    return sound(config, shape, faults, folder=folder)
