"""Every fault of a configuration, found together and before torch is imported.

`find_faults` returns sentences of the form: field, value, law, remedy. An empty list means that the run may start.
Faults of content (a malformed jsonl line, a missing tensor) are found later, where the content is read.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

from megatron_r1.config.schema import RunConfig
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.errors import ConfigError


def validate(config: RunConfig) -> ModelShape:
    """The model's shape, if the configuration is sound. Raises ConfigError listing every fault."""
    faults: list[str] = []
    shape: ModelShape | None = None
    try:
        shape = load_shape(config.model.path)
    except ConfigError as error:
        faults += error.faults
    if shape is not None:
        faults += _weight_faults(config, shape)
    faults += _parallel_faults(config, shape)
    faults += _train_faults(config, shape)
    faults += _rollout_faults(config, shape)
    faults += _grpo_faults(config)
    faults += _data_faults(config)
    faults += _folder_faults(config)
    if faults or shape is None:
        raise ConfigError(faults)
    return shape


def has_module(name: str) -> bool:
    """Whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


def _weight_faults(config: RunConfig, shape: ModelShape) -> list[str]:
    model, faults = config.model, []
    if shape.fp8_block is not None:
        faults.append(
            f"model.path: {model.path} is FP8, and rollouts would start in FP8; take a folder with the same tokenizer "
            "and config.json but for quantization_config, and give this one as model.load_from; or convert it: "
            "tools/convert_checkpoint.py hf-to-hf SRC DST --precision bf16"
        )
    if model.load_from is None:
        return faults
    if model.initialise == "random":
        faults.append(f"model.load_from is {model.load_from}, and model.initialise is random; leave one of them out")
    try:
        source = load_shape(model.load_from)
    except ConfigError as error:
        return faults + [fault.replace("model.path", "model.load_from", 1) for fault in error.faults]
    if dataclasses.replace(source, fp8_block=None) != dataclasses.replace(shape, fp8_block=None):
        faults.append(
            f"model.load_from: {model.load_from} holds another model than model.path {model.path}; their config.json "
            "must agree in everything but dtype and quantization_config"
        )
    return faults


def _parallel_faults(config: RunConfig, shape: ModelShape | None) -> list[str]:
    parallel, faults = config.parallel, []
    sizes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "world_size")
    for name in sizes:
        if getattr(parallel, name) < 1:
            faults.append(f"parallel.{name} is {getattr(parallel, name)}; it must be at least 1")
    if faults:
        return faults
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if parallel.world_size % model_ranks:
        faults.append(
            f"parallel.world_size is {parallel.world_size}; it must be a multiple of tensor * pipeline * context = "
            f"{model_ranks}"
        )
    expert_ranks = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if parallel.world_size % parallel.pipeline == 0 and parallel.world_size % expert_ranks:
        faults.append(
            f"parallel.expert is {parallel.expert}; expert * expert_tensor * pipeline = {expert_ranks} must divide "
            f"world_size {parallel.world_size}"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        faults.append(f"parallel.virtual_pipeline is {parallel.virtual_pipeline}; it needs parallel.pipeline > 1")
    return faults + (_shape_faults(config, shape) if shape is not None else [])


def _shape_faults(config: RunConfig, shape: ModelShape) -> list[str]:
    parallel, faults = config.parallel, []

    def must_divide(field: str, value: int, sizes: dict[str, int]) -> None:
        wrong = {what: size for what, size in sizes.items() if size % value}
        if wrong:
            common = math.gcd(*sizes.values())
            divisors = [str(d) for d in range(1, common + 1) if common % d == 0 and d <= 64]
            laws = " and ".join(f"the {what} {size}" for what, size in wrong.items())
            faults.append(f"parallel.{field} is {value}; it must divide {laws}: use {', '.join(divisors)}")

    split_by_tensor = {
        "number of attention heads": shape.num_heads,
        "number of key-value heads": shape.num_kv_heads,
        "feed-forward size": shape.ffn_size,
    }
    must_divide("tensor", parallel.tensor, split_by_tensor)
    if not parallel.pipeline_layout:
        stages = parallel.pipeline * parallel.virtual_pipeline
        if shape.num_layers % stages:
            faults.append(
                f"parallel.pipeline * virtual_pipeline is {stages}; it must divide the number of layers "
                f"{shape.num_layers}, or set parallel.pipeline_layout"
            )
    if shape.moe is None:
        if parallel.expert > 1:
            faults.append(f"parallel.expert is {parallel.expert}; {shape.architecture} has no experts: use 1")
        return faults
    must_divide("expert", parallel.expert, {"number of experts": shape.moe.num_experts})
    must_divide("expert_tensor", parallel.expert_tensor, {"expert feed-forward size": shape.moe.expert_ffn_size})
    if parallel.tensor > 1 and not parallel.sequence:
        faults.append(
            "parallel.sequence is False; mixture of experts and latent attention with tensor parallelism need it: "
            "use --parallel.sequence"
        )
    if parallel.tensor > 1 and parallel.expert == 1 and parallel.expert_tensor != parallel.tensor:
        faults.append(
            f"parallel.expert_tensor is {parallel.expert_tensor} with expert = 1 and tensor = {parallel.tensor}; "
            "Megatron would not sum the experts' gradients over tensor ranks: use expert_tensor = tensor, or expert > 1"
        )
    return faults


def _train_faults(config: RunConfig, shape: ModelShape | None) -> list[str]:
    train, parallel, faults = config.train, config.parallel, []
    if train.dtype == "fp8" and not has_module("transformer_engine"):
        faults.append(
            "train.dtype is fp8, but Transformer Engine is not installed; install megatron-r1[gpu] on a machine with "
            "an H100 or newer, or use --train.dtype bf16"
        )
    multiple = math.lcm(
        parallel.tensor if parallel.sequence else 1, 2 * parallel.context if parallel.context > 1 else 1
    )
    if train.tokens_per_microbatch % multiple:
        faults.append(
            f"train.tokens_per_microbatch is {train.tokens_per_microbatch}; it must be a multiple of {multiple} here "
            "(tensor, or 2 * context)"
        )
    if train.tokens_per_microbatch < config.rollout.max_model_len:
        faults.append(
            f"train.tokens_per_microbatch is {train.tokens_per_microbatch}; one row must hold the longest sequence, "
            f"rollout.max_model_len = {config.rollout.max_model_len}"
        )
    if train.threads_per_rank < 1 or train.logprob_chunk_tokens < 1:
        faults.append("train.threads_per_rank and train.logprob_chunk_tokens must be at least 1")
    for name, optimizer in (("optimizer", config.optimizer), ("sft.optimizer", config.sft.optimizer)):
        if not 0 <= optimizer.min_lr <= optimizer.lr:
            faults.append(f"{name}.min_lr is {optimizer.min_lr}; it must be between 0 and lr = {optimizer.lr}")
    if config.model.train_mtp and shape is not None and not shape.num_mtp_layers:
        faults.append("model.train_mtp is True, but config.json has no num_nextn_predict_layers")
    return faults


def _rollout_faults(config: RunConfig, shape: ModelShape | None) -> list[str]:
    rollout, sampling, faults = config.rollout, config.rollout.sampling, []
    if rollout.device == "cpu" and rollout.sync != "gloo":
        faults.append(f"rollout.sync is {rollout.sync}; on rollout.device cpu only gloo works")
    if rollout.device == "cuda" and rollout.sync == "gloo":
        faults.append("rollout.sync is gloo; on rollout.device cuda use nccl (separate GPUs) or ipc (shared GPUs)")
    if rollout.num_engines < 1:
        faults.append(f"rollout.num_engines is {rollout.num_engines}; it must be at least 1")
    if shape is not None and rollout.max_model_len > shape.max_positions:
        faults.append(
            f"rollout.max_model_len is {rollout.max_model_len}; the model has max_position_embeddings = "
            f"{shape.max_positions}"
        )
    if sampling.max_new_tokens >= rollout.max_model_len:
        faults.append(
            f"rollout.sampling.max_new_tokens is {sampling.max_new_tokens}; it leaves no room for a prompt in "
            f"rollout.max_model_len = {rollout.max_model_len}"
        )
    if sampling.temperature <= 0:
        faults.append(f"rollout.sampling.temperature is {sampling.temperature}; training needs samples: use 1.0")
    if sampling.top_p != 1.0 or sampling.top_k not in (0, -1):
        faults.append(
            "rollout.sampling.top_p and top_k must be 1.0 and 0 in training: the trainer computes probabilities over "
            "the whole vocabulary"
        )
    return faults


def _grpo_faults(config: RunConfig) -> list[str]:
    grpo, faults = config.grpo, []
    if grpo.steps < 1 or grpo.prompts_per_step < 1:
        faults.append(f"grpo.steps {grpo.steps} and grpo.prompts_per_step {grpo.prompts_per_step} must be at least 1")
    if grpo.group_size < 2:
        faults.append(f"grpo.group_size is {grpo.group_size}; an advantage relative to the group needs at least 2")
    if not 1 <= grpo.minibatches <= grpo.prompts_per_step:
        faults.append(
            f"grpo.minibatches is {grpo.minibatches}; it must be 1 to prompts_per_step = {grpo.prompts_per_step}"
        )
    if not 0 < grpo.clip_low <= 1 or grpo.clip_high <= 0:
        faults.append(f"grpo.clip_low {grpo.clip_low} must be in (0, 1] and grpo.clip_high {grpo.clip_high} above 0")
    for name in ("kl_coef", "truncated_importance_cap", "mismatch_bound", "reference_refresh_steps"):
        if getattr(grpo, name) < 0:
            faults.append(f"grpo.{name} is {getattr(grpo, name)}; it must not be negative")
    if grpo.target_accuracy > 0 and not grpo.eval_every:
        faults.append(f"grpo.target_accuracy is {grpo.target_accuracy}; it needs grpo.eval_every > 0")
    if config.rewards.num_workers < 1 or config.rewards.timeout_seconds <= 0:
        faults.append("rewards.num_workers must be at least 1 and rewards.timeout_seconds above 0")
    return faults


def _data_faults(config: RunConfig) -> list[str]:
    data, faults = config.data, []
    if bool(data.tasks) == bool(data.files):
        faults.append("data.tasks and data.files: give one of them, reasoning-gym tasks or jsonl files")
    faults += [f"data.files: {file} does not exist" for file in data.files if not Path(file).is_file()]
    if data.holdout < 1:
        faults.append(f"data.holdout is {data.holdout}; the evaluation needs at least 1 problem")
    if config.sft.steps and not 0 <= config.sft.noise <= 1:
        faults.append(f"sft.noise is {config.sft.noise}; it is a share between 0 and 1")
    return faults


def _folder_faults(config: RunConfig) -> list[str]:
    folder = config.run_dir
    if folder.exists() and not folder.is_dir():
        return [f"run_dir: {folder} is a file"]
    if config.if_exists == "refuse" and folder.is_dir() and any(folder.iterdir()):
        return [f"run_dir: {folder} is not empty; choose another --run-dir, or --if-exists archive to move it aside"]
    return []
