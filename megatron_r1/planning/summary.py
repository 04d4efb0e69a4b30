"""The dry run: the resolved configuration and the numbers that follow from it."""

from __future__ import annotations

import dataclasses

from megatron_r1.config.schema import RunConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.parameters import bytes_per_rank, count_parameters


def describe(config: RunConfig, shape: ModelShape) -> str:
    """Derived numbers, then every field; plain text."""
    parallel, grpo, rollout = config.parallel, config.grpo, config.rollout
    count = count_parameters(shape)
    samples = grpo.prompts_per_step * grpo.group_size
    layout = {
        "TP": parallel.tensor,
        "PP": parallel.pipeline,
        "VPP": parallel.virtual_pipeline,
        "CP": parallel.context,
        "EP": parallel.expert,
        "ETP": parallel.expert_tensor,
    }
    used = " ".join(f"{name}{size}" for name, size in layout.items() if size > 1) or "one rank"
    fp32, distributed = config.train.dtype == "fp32", config.optimizer.distributed
    rank_bytes = bytes_per_rank(shape, parallel, fp32=fp32, distributed_optimizer=distributed)
    lines = [
        f"{config.name}: {shape.architecture}, {_short(count.total)} parameters, {_short(count.active)} active a token"
        + (f", {_short(count.mtp)} more in MTP layers" if count.mtp else ""),
        f"trainer: {parallel.world_size} rank(s), {used}, data parallel {parallel.data}, {config.train.dtype}; "
        f"{rank_bytes / 2**30:.3g} GiB a rank for weights, gradients and optimizer",
        f"rollout: {rollout.num_engines} server(s), TP{rollout.tensor_parallel}, {rollout.dtype}, {rollout.device}",
        f"step: {grpo.prompts_per_step} prompts x {grpo.group_size} = {samples:,} samples, at most "
        f"{samples * rollout.max_model_len:,} tokens, {grpo.minibatches} optimizer step(s); {grpo.steps:,} steps",
        f"run folder: {config.run_dir}",
    ]
    return "\n".join(lines)


def describe_fields(config: RunConfig) -> str:
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
