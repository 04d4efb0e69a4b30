"""The dry run: the resolved configuration and the numbers that follow from it."""

from __future__ import annotations

import dataclasses

from megatron_r1.config.model_folder import mtp_left_out
from megatron_r1.config.schema import RolloutConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.needs import Needs
from megatron_r1.planning.parameters import count_parameters
from megatron_r1.planning.plan import planned_shape, setups_of
from megatron_r1.planning.trainer import fullest_state


def describe_model(name: str, shape: ModelShape) -> str:
    """A model in one line."""
    count = count_parameters(shape)
    mtp = f", {_short(count.mtp)} more in MTP layers" if count.mtp else ""
    return (
        f"{name}: {shape.architecture}, {_short(count.total)} parameters, {_short(count.active)} active per token{mtp}"
    )


def describe_trainer(needs: Needs, shape: ModelShape) -> list[str]:
    """The model and the trainer's ranks, a line each. `shape`: of the model that the stage starts from."""
    trainer, model = needs.trainer, needs.model
    assert trainer is not None and model is not None
    parallel, shape = trainer.parallel, planned_shape(needs, shape)
    layout = {
        "TP": parallel.tensor,
        "PP": parallel.pipeline_parallel,
        "VPP": parallel.virtual_pipeline,
        "CP": parallel.context,
        "EP": parallel.expert,
        "ETP": parallel.expert_tensor,
    }
    used = " ".join(f"{name}{size}" for name, size in layout.items() if size > 1) or "one rank"
    setup, _ = setups_of(needs)
    assert setup is not None
    state = fullest_state(shape, setup)
    left_out = mtp_left_out(model.path)
    return [
        describe_model(needs.name, shape),
        *([left_out] if left_out else []),
        f"trainer: {parallel.world_size} rank(s), {used}, data parallel {parallel.data}, {trainer.train.dtype}; "
        f"{state.total / 2**30:.3g} GiB for weights, gradients and optimizer on the fullest rank",
    ]


def describe_servers(rollout: RolloutConfig) -> str:
    """A stage's rollout servers, in a few words."""
    return f"{rollout.num_engines} server(s), TP{rollout.tensor_parallel}, {rollout.dtype}, {rollout.device}"


def describe_fields(config: object) -> str:
    """Every field of the resolved configuration, one a line, by its path."""
    lines: list[str] = []

    def walk(value: object, path: str) -> None:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                walk(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
        else:
            lines.append(f"  {path} = {value}")

    walk(config, "")
    return "\n".join(lines)


def _short(count: int) -> str:
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}"
    return str(count)
