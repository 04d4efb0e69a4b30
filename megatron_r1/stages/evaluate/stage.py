"""Evaluation as a kind of stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_r1.config.schema import ModelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.needs import Needs
from megatron_r1.planning.summary import describe_model, describe_servers
from megatron_r1.planning.workload import sampled
from megatron_r1.stages.evaluate.config import EvaluateConfig, validate_evaluation
from megatron_r1.stages.evaluate.names import SUMMARY_NAMES
from megatron_r1.stages.stage import Stage


def needs(config: EvaluateConfig) -> Needs:
    """Servers of its own, or none where one already runs."""
    own = not config.server.url
    return Needs(
        name=config.name,
        run_dir=config.run_dir,
        model=ModelConfig(path=config.model),
        rollout=config.rollout if own else None,
        work=sampled(config.samples, config.rollout.sampling.max_new_tokens) if own else None,
        files=config.data.files,
        tasks=bool(config.data.tasks),
        exports=0,
    )


def describe(config: EvaluateConfig, asked: Needs, shape: ModelShape) -> list[str]:
    where = config.server.url or describe_servers(config.rollout)
    return [describe_model(config.name, shape), f"sampling: {where}; {config.samples} samples a problem"]


def load() -> Callable[..., dict[str, Any]]:
    from megatron_r1.stages.evaluate.run import evaluate

    return evaluate


STAGE = Stage(
    name="evaluation",
    config=EvaluateConfig,
    validate=validate_evaluation,
    describe=describe,
    needs=needs,
    load=load,
    outputs=("results.json",),
    summary=SUMMARY_NAMES,
    common=tuple(
        """
        model run_dir if_exists limit samples pass_k consensus_k seed
        data.tasks data.files data.template
        rewards.answer_from
        rollout.num_engines rollout.tensor_parallel rollout.max_model_len
        rollout.sampling.temperature rollout.sampling.top_p rollout.sampling.max_new_tokens rollout.device
        server
        """.split()
    ),
)
