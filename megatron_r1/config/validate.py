"""Every fault of a configuration, found together and before torch is imported.

`find_faults` returns sentences of the form: field, value, law, remedy. An empty list means that the run may start.
Faults of content (a malformed jsonl line, a missing tensor) are found later, where the content is read.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
from pathlib import Path

from megatron_r1.config.gym_tasks import task_faults
from megatron_r1.config.run_folder import folder_faults
from megatron_r1.config.schema import RunConfig
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.errors import ConfigError

AT_LEAST: dict[str, float] = {
    "seed": 0,
    "train.threads_per_rank": 1,
    "train.logprob_chunk_tokens": 1,
    "model.router_bias_update_rate": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 0,
    "data.seed": 0,
    "data.task_size": 1,
    "data.holdout": 1,
    "data.validation": 0,
    "rollout.num_engines": 1,
    "rollout.tensor_parallel": 1,
    "rollout.max_num_seqs": 1,
    "rollout.threads": 1,
    "rollout.sync_bucket_mib": 1,
    "rollout.max_restarts": 0,
    "rollout.sampling.max_new_tokens": 1,
    "rewards.num_workers": 1,
    "rewards.accuracy_weight": 0,
    "rewards.format_weight": 0,
    "rewards.language_weight": 0,
    "grpo.steps": 1,
    "grpo.prompts_per_step": 1,
    "grpo.kl_coef": 0,
    "grpo.truncated_importance_cap": 0,
    "grpo.mismatch_bound": 0,
    "grpo.reference_refresh_steps": 0,
    "grpo.max_skipped_steps": 0,
    "grpo.eval_every": 0,
    "grpo.save_every": 0,
    "grpo.rollouts_logged_per_step": 0,
    "sft.steps": 0,
    "sft.batch_size": 1,
    "sft.optimizer.warmup_steps": 0,
    "sft.optimizer.weight_decay": 0,
}
"""The least value of a field; infinity and NaN are refused too."""

LANGUAGE_CODE = re.compile(r"[a-z]{2,3}")

ABOVE_ZERO = (
    "rollout.kv_cache_gib",
    "rollout.memory_fraction",
    "rollout.start_timeout_seconds",
    "rollout.request_timeout_seconds",
    "rewards.timeout_seconds",
    "train.collective_timeout_seconds",
)


def validate(config: RunConfig, *, folder: bool = True) -> ModelShape:
    """The model's shape, if the configuration is sound. Raises ConfigError listing every fault.

    `folder`: whether run_dir may be used is looked at too (not by a rank whose folder has just been made)."""
    faults: list[str] = []
    shape: ModelShape | None = None
    try:
        shape = load_shape(config.model.path)
    except ConfigError as error:
        faults += error.faults
    if shape is not None:
        faults += _weight_faults(config, shape)
    faults += _bound_faults(config)
    faults += _parallel_faults(config, shape)
    faults += _train_faults(config, shape)
    faults += _rollout_faults(config, shape)
    faults += _grpo_faults(config)
    faults += _data_faults(config)
    if folder:
        faults += folder_faults(config)
    if faults or shape is None:
        raise ConfigError(faults)
    return shape


def has_module(name: str) -> bool:
    """Whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


def _bound_faults(config: RunConfig) -> list[str]:
    read = {path: functools.reduce(getattr, path.split("."), config) for path in (*AT_LEAST, *ABOVE_ZERO)}
    faults = [
        f"{path} is {read[path]}; it must be at least {least}"
        for path, least in AT_LEAST.items()
        if not least <= read[path] < math.inf  # pyright: ignore[reportOperatorIssue]
    ]
    return faults + [
        f"{path} is {read[path]}; it must be above 0"
        for path in ABOVE_ZERO
        if not 0 < read[path] < math.inf  # pyright: ignore[reportOperatorIssue]
    ]


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
    multiple = math.lcm(parallel.row_multiple, parallel.segment_multiple)
    if train.tokens_per_microbatch % multiple:
        faults.append(
            f"train.tokens_per_microbatch is {train.tokens_per_microbatch}; it must be a multiple of {multiple} here "
            "(of 2 * context, and with sequence parallelism of tensor * context)"
        )
    if train.tokens_per_microbatch < config.rollout.max_model_len:
        faults.append(
            f"train.tokens_per_microbatch is {train.tokens_per_microbatch}; one row must hold the longest sequence, "
            f"rollout.max_model_len = {config.rollout.max_model_len}"
        )
    for name, optimizer in (("optimizer", config.optimizer), ("sft.optimizer", config.sft.optimizer)):
        if not 0 <= optimizer.min_lr <= optimizer.lr < math.inf:
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
    if rollout.devices and len(rollout.devices) != rollout.num_engines:
        faults.append(
            f"rollout.devices has {len(rollout.devices)} entries; give one for each of rollout.num_engines = "
            f"{rollout.num_engines} servers, such as 4,5,6,7, or none"
        )
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
    if not 0 < sampling.temperature < math.inf:
        faults.append(f"rollout.sampling.temperature is {sampling.temperature}; training needs samples: use 1.0")
    if sampling.top_p != 1.0 or sampling.top_k not in (0, -1):
        faults.append(
            "rollout.sampling.top_p and top_k must be 1.0 and 0 in training: the trainer computes probabilities over "
            "the whole vocabulary"
        )
    return faults


def _grpo_faults(config: RunConfig) -> list[str]:
    grpo, faults = config.grpo, []
    if grpo.group_size < 2:
        faults.append(f"grpo.group_size is {grpo.group_size}; an advantage relative to the group needs at least 2")
    if not 1 <= grpo.minibatches <= grpo.prompts_per_step:
        faults.append(
            f"grpo.minibatches is {grpo.minibatches}; it must be 1 to prompts_per_step = {grpo.prompts_per_step}"
        )
    if not 0 < grpo.clip_low <= 1 or not 0 < grpo.clip_high < math.inf:
        faults.append(f"grpo.clip_low {grpo.clip_low} must be in (0, 1] and grpo.clip_high {grpo.clip_high} above 0")
    if not 0 <= grpo.target_accuracy <= 1:
        faults.append(f"grpo.target_accuracy is {grpo.target_accuracy}; it is a share between 0 and 1")
    if grpo.target_accuracy > 0 and not grpo.eval_every:
        faults.append(f"grpo.target_accuracy is {grpo.target_accuracy}; it needs grpo.eval_every > 0")
    if grpo.eval_every and not config.data.validation:
        faults.append(f"grpo.eval_every is {grpo.eval_every}; it needs data.validation > 0 problems to evaluate on")
    rewards = config.rewards
    if rewards.accuracy_weight == rewards.format_weight == rewards.language_weight == 0:
        faults.append("rewards.accuracy_weight, format_weight and language_weight are all 0; every reward would be 0")
    if rewards.language_weight and not LANGUAGE_CODE.fullmatch(rewards.language):
        faults.append(
            f"rewards.language is {rewards.language!r}; it is a code of two or three letters, such as en or zh"
        )
    return faults


def _data_faults(config: RunConfig) -> list[str]:
    data, faults = config.data, []
    if bool(data.tasks) == bool(data.files):
        faults.append("data.tasks and data.files: give one of them, reasoning-gym tasks or jsonl files")
    faults += task_faults(data.tasks)
    faults += [f"data.files: {file} does not exist" for file in data.files if not Path(file).is_file()]
    if config.sft.steps and not 0 <= config.sft.noise <= 1:
        faults.append(f"sft.noise is {config.sft.noise}; it is a share between 0 and 1")
    return faults
