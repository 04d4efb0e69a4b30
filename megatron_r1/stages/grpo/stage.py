"""GRPO as a kind of stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.needs import Needs, ServerBeside, TrainerNeeds
from megatron_r1.planning.summary import describe_servers, describe_trainer
from megatron_r1.planning.workload import Workload
from megatron_r1.rollout.routes import RouteForm
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.faults import validate
from megatron_r1.stages.grpo.names import STEP_NAMES, SUMMARY_NAMES
from megatron_r1.stages.stage import Stage


def needs(config: GRPOConfig) -> Needs:
    """Trainer ranks and servers at once, and what each step has to do."""
    exports = 1 + int(config.model.initialise == "random")
    if config.save_every:
        exports += (config.steps - 1) // config.save_every
    return Needs(
        name=config.name,
        run_dir=config.run_dir,
        model=config.model,
        # MTP layers are trained beside the policy's loss; the planner counts them where their loss is the stage's own.
        trainer=None
        if config.rollout_only
        else TrainerNeeds(
            device=config.device, parallel=config.parallel, train=config.train, optimizer=config.optimizer
        ),
        rollout=None if config.train_only else config.rollout,
        beside=() if config.train_only else _beside(config),
        work=None if config.rollout_only else _workload(config),
        deadlines=config.deadlines,
        files=() if config.train_only else (*config.data.files, *config.data.holdout_files),
        tasks=bool(config.data.tasks) and config.train_only is None,
        exports=exports,
    )


def _beside(config: GRPOConfig) -> tuple[ServerBeside, ...]:
    """Reward models, then the teacher."""
    found = [
        ServerBeside(
            name=f"reward-{preference.name}",
            role="reward",
            tensor_parallel=preference.tensor_parallel,
            devices=preference.devices,
            field="rewards.preferences[]",
        )
        for preference in config.rewards.preferences
    ]
    if config.teacher is not None:
        found.append(
            ServerBeside(
                name="teacher",
                role="teacher",
                tensor_parallel=config.teacher.tensor_parallel,
                devices=config.teacher.devices,
                field="algorithm.teacher",
            )
        )
    return tuple(found)


def _workload(config: GRPOConfig) -> Workload:
    """The mean response is in no configuration: a quarter of the longest."""
    of_algorithm, longest = config.algorithm.needs, config.rollout.sampling.max_new_tokens
    return Workload(
        samples=config.prompts_per_step * config.group_size,
        group_size=config.group_size,
        prompt_tokens=min(256, max(1, config.rollout.max_model_len - longest)),
        mean_response=max(1, longest // 4),
        max_response=longest,
        optimizer_steps=config.minibatches,
        rollout=config.train_only is None,
        sync_every=config.sync_every,
        scoring_passes=of_algorithm.old_pass(config.minibatches) + of_algorithm.reference,
    )


def describe(config: GRPOConfig, asked: Needs, shape: ModelShape) -> list[str]:
    samples = config.prompts_per_step * config.group_size
    stale = f", weights to the servers every {config.sync_every} steps" if config.sync_every > 1 else ""
    return [
        *(describe_trainer(asked, shape) if asked.trainer is not None else ()),
        f"rollouts of {config.train_only}" if config.train_only else f"rollout: {describe_servers(config.rollout)}",
        *_about_routes(config, shape),
        f"step: {config.prompts_per_step} prompts x {config.group_size} = {samples:,} samples, at most "
        f"{samples * config.rollout.max_model_len:,} tokens, {config.minibatches} optimizer step(s)"
        f"{stale}; {config.steps:,} steps",
    ]


def _about_routes(config: GRPOConfig, shape: ModelShape) -> list[str]:
    if config.rollout.routes == "off" or shape.moe is None:
        return []
    what = {"compare": "compared", "replay": "replayed"}[config.rollout.routes]
    return [f"experts: the servers' are {what}, {RouteForm.of(shape).bytes_per_token} bytes per token"]


def without(config: GRPOConfig, unmade: Callable[[Path], bool]) -> GRPOConfig:
    """Without the reward models that earlier stages will make: no folder that is there can stand for them."""
    kept = tuple(preference for preference in config.rewards.preferences if not unmade(preference.model))
    return dataclasses.replace(config, rewards=dataclasses.replace(config.rewards, preferences=kept))


def load() -> Callable[..., dict[str, Any]]:
    from megatron_r1.stages.grpo.run import run_grpo

    return run_grpo


STAGE = Stage(
    name="GRPO",
    config=GRPOConfig,
    validate=validate,
    describe=describe,
    needs=needs,
    load=load,
    outputs=("policy",),
    report=True,
    without=without,
    metrics=STEP_NAMES,
    summary=SUMMARY_NAMES,
    common=(
        "run_dir",
        "if_exists",
        "seed",
        "rollout_only",
        "train_only",
        "steps",
        "prompts_per_step",
        "group_size",
        "minibatches",
        "sync_every",
        "eval_every",
        "target_accuracy",
        "checkpoint_every",
        "save_every",
        "algorithm",
        "model.path",
        "model.load_from",
        "model.initialise",
        "data.tasks",
        "data.files",
        "data.source",
        "data.template",
        "data.holdout",
        "data.validation",
        "rewards.accuracy_weight",
        "rewards.format_weight",
        "rewards.language_weight",
        "rewards.custom",
        "rollout.num_engines",
        "rollout.tensor_parallel",
        "rollout.max_model_len",
        "rollout.sampling.temperature",
        "rollout.sampling.max_new_tokens",
        "rollout.device",
        "rollout.sync",
        "parallel",
        "train.dtype",
        "train.tokens_per_microbatch",
        "train.recompute",
        "optimizer.lr",
        "optimizer.schedule",
        "optimizer.warmup_steps",
        "track.names",
    ),
)
