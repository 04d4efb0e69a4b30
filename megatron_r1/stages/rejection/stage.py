"""Rejection sampling as a kind of stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_r1.config.schema import ModelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.needs import Needs
from megatron_r1.planning.summary import describe_model, describe_servers
from megatron_r1.planning.workload import sampled
from megatron_r1.stages.rejection.config import RejectionConfig, validate_rejection
from megatron_r1.stages.rejection.names import SUMMARY_NAMES
from megatron_r1.stages.stage import Stage


def needs(config: RejectionConfig) -> Needs:
    return Needs(
        name=config.name,
        run_dir=config.run_dir,
        model=ModelConfig(path=config.model),
        rollout=config.rollout,
        work=sampled(config.samples, config.rollout.sampling.max_new_tokens),
        files=config.data.files,
        tasks=bool(config.data.tasks),
        exports=0,
    )


def describe(config: RejectionConfig, asked: Needs, shape: ModelShape) -> list[str]:
    return [
        describe_model(config.name, shape),
        f"sampling: {describe_servers(config.rollout)}; {config.samples} samples a problem, at most "
        f"{config.keep_per_problem} kept",
    ]


def load() -> Callable[..., dict[str, Any]]:
    from megatron_r1.stages.rejection.run import run_rejection

    return run_rejection


STAGE = Stage(
    name="rejection sampling",
    config=RejectionConfig,
    validate=validate_rejection,
    describe=describe,
    needs=needs,
    load=load,
    outputs=("kept.jsonl",),
    summary=SUMMARY_NAMES,
    common=tuple(
        """
        run_dir if_exists seed model num_problems samples keep_per_problem decontaminate
        data.tasks data.files data.template
        filters
        rollout.num_engines rollout.tensor_parallel rollout.max_model_len
        rollout.sampling.temperature rollout.sampling.max_new_tokens rollout.device
        """.split()
    ),
)
