"""The quickstart's warm-up as a kind of stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.needs import Needs, supervised_needs
from megatron_r1.planning.summary import describe_trainer
from megatron_r1.stages.stage import Stage
from megatron_r1.toy.warm_up.config import WarmUpConfig, validate_warm_up
from megatron_r1.toy.warm_up.names import SUMMARY_NAMES


def needs(config: WarmUpConfig) -> Needs:
    longest = config.train.tokens_per_microbatch
    return supervised_needs(config, samples=config.batch_size, longest=longest, tasks=True)


def describe(config: WarmUpConfig, asked: Needs, shape: ModelShape) -> list[str]:
    return [
        *describe_trainer(asked, shape),
        f"warm-up: {config.steps:,} supervised steps of {config.batch_size} sums make the base model; "
        f"{config.noise:.0%} of them forget their carries",
    ]


def load() -> Callable[..., dict[str, Any]]:
    from megatron_r1.toy.warm_up.run import run_warm_up

    return run_warm_up


STAGE = Stage(
    name="warm-up",
    config=WarmUpConfig,
    validate=validate_warm_up,
    describe=describe,
    needs=needs,
    load=load,
    outputs=("model",),
    summary=SUMMARY_NAMES,
    common=tuple(
        """
        run_dir if_exists seed steps batch_size noise
        model.path model.initialise
        data.tasks data.holdout
        parallel.world_size parallel.expert
        optimizer.lr
        """.split()
    ),
)
