"""The dry run: the resolved configuration and the numbers that follow from it."""

from __future__ import annotations

import dataclasses

from megatron_r1.config.model_folder import mtp_left_out
from megatron_r1.config.rejection import RejectionConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.schema import OptimizerConfig, RunConfig, TrainerStage
from megatron_r1.config.sft import SFTRunConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.parameters import bytes_per_rank, count_parameters


def describe(config: RunConfig, shape: ModelShape) -> str:
    """Derived numbers, then every field; plain text."""
    grpo, rollout = config.grpo, config.rollout
    samples = grpo.prompts_per_step * grpo.group_size
    lines = [
        *_model_and_trainer(config, config.optimizer, shape),
        f"rollout: {rollout.num_engines} server(s), TP{rollout.tensor_parallel}, {rollout.dtype}, {rollout.device}",
        f"step: {grpo.prompts_per_step} prompts x {grpo.group_size} = {samples:,} samples, at most "
        f"{samples * rollout.max_model_len:,} tokens, {grpo.minibatches} optimizer step(s); {grpo.steps:,} steps",
        f"run folder: {config.run_dir}",
    ]
    return "\n".join(lines)


def describe_sft(config: SFTRunConfig, shape: ModelShape) -> str:
    """A supervised stage, in derived numbers; plain text."""
    data = config.data
    return "\n".join(
        [
            *_model_and_trainer(config, config.optimizer, shape),
            f"data: {len(data.files)} file(s), {data.epochs} epoch(s), batches of {data.batch_sequences} examples, at "
            f"most {data.max_tokens:,} tokens each, {data.loss.replace('_', ' ')}, reader {data.reader}",
            f"run folder: {config.run_dir}",
        ]
    )


def describe_reward_model(config: RewardModelConfig, shape: ModelShape) -> str:
    """Reward model training, in derived numbers; plain text. `shape`: of the model that it starts from."""
    data, shape = config.data, dataclasses.replace(shape, reward_head=True, num_mtp_layers=0)
    return "\n".join(
        [
            *_model_and_trainer(config, config.optimizer, shape),
            f"data: {len(data.files)} file(s), {data.epochs} epoch(s), batches of {data.batch_pairs} pairs, judged by "
            f"the {data.part}",
            f"run folder: {config.run_dir}",
        ]
    )


def describe_rejection(config: RejectionConfig, shape: ModelShape) -> str:
    """A rejection sampling stage, in a few lines."""
    rollout = config.rollout
    return "\n".join(
        [
            describe_model(config.name, shape),
            f"sampling: {rollout.num_engines} server(s), TP{rollout.tensor_parallel}, {rollout.dtype}, "
            f"{rollout.device}; {config.samples} samples a problem, at most {config.keep_per_problem} kept",
            f"run folder: {config.run_dir}",
        ]
    )


def describe_model(name: str, shape: ModelShape) -> str:
    """A model in one line."""
    count = count_parameters(shape)
    mtp = f", {_short(count.mtp)} more in MTP layers" if count.mtp else ""
    return f"{name}: {shape.architecture}, {_short(count.total)} parameters, {_short(count.active)} active a token{mtp}"


def _model_and_trainer(config: TrainerStage, optimizer: OptimizerConfig, shape: ModelShape) -> list[str]:
    parallel = config.parallel
    layout = {
        "TP": parallel.tensor,
        "PP": parallel.pipeline,
        "VPP": parallel.virtual_pipeline,
        "CP": parallel.context,
        "EP": parallel.expert,
        "ETP": parallel.expert_tensor,
    }
    used = " ".join(f"{name}{size}" for name, size in layout.items() if size > 1) or "one rank"
    fp32, distributed = config.train.dtype == "fp32", optimizer.distributed
    rank_bytes = bytes_per_rank(
        shape, parallel, fp32=fp32, distributed_optimizer=distributed, moments=optimizer.moments
    )
    left_out = mtp_left_out(config.model.path)
    return [
        describe_model(config.name, shape),
        *([left_out] if left_out else []),
        f"trainer: {parallel.world_size} rank(s), {used}, data parallel {parallel.data}, {config.train.dtype}; "
        f"{rank_bytes / 2**30:.3g} GiB a rank for weights, gradients and optimizer",
    ]


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
