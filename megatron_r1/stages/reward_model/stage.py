"""Reward model training as a kind of stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.needs import Needs, supervised_needs
from megatron_r1.planning.summary import describe_trainer
from megatron_r1.stages.reward_model.config import RewardModelConfig, validate_reward_model
from megatron_r1.stages.reward_model.names import STEP_NAMES, SUMMARY_NAMES
from megatron_r1.stages.stage import Stage


def needs(config: RewardModelConfig) -> Needs:
    data = config.data
    return supervised_needs(
        config,
        samples=2 * data.batch_pairs,
        longest=data.max_tokens,
        scoring_passes=1,
        reward_head=True,
        files=data.files,
    )


def describe(config: RewardModelConfig, asked: Needs, shape: ModelShape) -> list[str]:
    data = config.data
    return [
        *describe_trainer(asked, shape),
        f"data: {len(data.files)} file(s), {data.epochs} epoch(s), batches of {data.batch_pairs} pairs, judged by "
        f"the {data.part}",
    ]


def load() -> Callable[..., dict[str, Any]]:
    from megatron_r1.stages.reward_model.run import run_reward_model

    return run_reward_model


STAGE = Stage(
    name="reward model",
    config=RewardModelConfig,
    validate=validate_reward_model,
    describe=describe,
    needs=needs,
    load=load,
    outputs=("model",),
    metrics=STEP_NAMES,
    summary=SUMMARY_NAMES,
    common=tuple(
        """
        run_dir if_exists seed device
        model.path model.load_from
        data.files data.template data.part data.max_tokens data.batch_pairs data.epochs data.validation
        parallel
        train.dtype train.tokens_per_microbatch
        optimizer.lr
        track.names
        """.split()
    ),
)
