"""Faults of what every stage that trains has: a model, a layout, a precision, an optimizer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from megatron_r1.bounds import number_faults
from megatron_r1.config.model_folder import mtp_left_out, tensor_names
from megatron_r1.config.packages import has_module
from megatron_r1.config.pipeline_layout import layout_stages
from megatron_r1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_r1.config.shape import ModelShape, shape_or_faults
from megatron_r1.errors import ConfigError


def reward_model_faults(shape: ModelShape, folder: Path, field: str) -> list[str]:
    """For a stage whose model has to write text."""
    return [f"{field}: {folder} is a reward model; this stage needs one that writes text"] if shape.reward_head else []


def weight_faults(model: ModelConfig, shape: ModelShape) -> list[str]:
    """Whether the folders that a stage starts from hold weights that it can take."""
    faults = reward_model_faults(shape, model.path, "model.path")
    if shape.fp8_block is not None:
        faults.append(
            f"model.path: {model.path} is FP8, and training and its servers start in bf16; make the bf16 folder: "
            f"tools/prepare_checkpoint.py {model.path} TARGET (sbatch slurm/prepare_671b.sh {model.path} TARGET), and "
            "give this one as rollout.fp8_folder where rollouts should be FP8"
        )
    if model.load_from is None:
        return faults
    if model.initialise == "random":
        faults.append(f"model.load_from is {model.load_from}, and model.initialise is random; leave one of them out")
    source, found = shape_or_faults(model.load_from, "model.load_from")
    if source is None:
        return faults + found
    if dataclasses.replace(source, fp8_block=None) != dataclasses.replace(shape, fp8_block=None):
        faults.append(
            f"model.load_from: {model.load_from} holds another model than model.path {model.path}; their config.json "
            "must agree in everything but dtype and quantization_config"
        )
    return faults


def mtp_faults(model: ModelConfig, shape: ModelShape) -> list[str]:
    """Whether the first weights include every MTP layer of `shape`, which has none where all are missing from
    model.path (load_shape): those of model.load_from may be, or some of them."""
    folder = model.load_from or model.path
    names = tensor_names(folder)
    if not shape.num_mtp_layers or model.initialise == "random" or not names:
        return []
    missing = [
        layer
        for layer in range(shape.num_layers, shape.num_layers + shape.num_mtp_layers)
        if f"model.layers.{layer}.eh_proj.weight" not in names
    ]
    if not missing:
        return []
    field = "model.path" if model.load_from is None else "model.load_from"
    return [
        f"{field}: config.json has num_nextn_predict_layers = {shape.num_mtp_layers}, and {folder} holds no weights of "
        f"model.layers.{missing[0]} (transformers leaves multi-token-prediction layers out when it saves); take the "
        f"publisher's folder, or set num_nextn_predict_layers to {shape.num_mtp_layers - len(missing)} in its "
        "config.json"
    ]


def parallel_faults(parallel: ParallelConfig, shape: ModelShape | None) -> list[str]:
    """Whether the layout divides the world and, if `shape` is known, the model. Sizes below 1 are bounds.py's."""
    if number_faults(parallel):
        return []  # they are told of already; nothing can be divided by them
    faults: list[str] = []
    model_ranks = parallel.tensor * parallel.pipeline_parallel * parallel.context
    if parallel.world_size % model_ranks:
        faults.append(
            f"parallel.world_size is {parallel.world_size}; it must be a multiple of tensor * pipeline_parallel * "
            f"context = {model_ranks}"
        )
    expert_ranks = parallel.expert * parallel.expert_tensor * parallel.pipeline_parallel
    if parallel.world_size % parallel.pipeline_parallel == 0 and parallel.world_size % expert_ranks:
        faults.append(
            f"parallel.expert is {parallel.expert}; expert * expert_tensor * pipeline = {expert_ranks} must divide "
            f"world_size {parallel.world_size}"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline_parallel == 1:
        faults.append(
            f"parallel.virtual_pipeline is {parallel.virtual_pipeline}; it needs parallel.pipeline_parallel > 1"
        )
    return faults + (_shape_faults(parallel, shape) if shape is not None else [])


def _shape_faults(parallel: ParallelConfig, shape: ModelShape) -> list[str]:
    faults: list[str] = []

    def must_divide(field: str, value: int, sizes: dict[str, int]) -> None:
        wrong = {what: size for what, size in sizes.items() if size % value}
        if wrong:
            common = math.gcd(*sizes.values())
            divisors = [str(d) for d in range(1, common + 1) if common % d == 0 and d <= 64]
            laws = " and ".join(f"the {what} {size}" for what, size in wrong.items())
            faults.append(f"parallel.{field} is {value}; it must divide {laws}: use {', '.join(divisors)}")

    split_by_tensor = {"number of attention heads": shape.num_heads, "feed-forward size": shape.ffn_size}
    if parallel.tensor % shape.num_kv_heads:  # else ranks share a key-value head
        split_by_tensor["number of key-value heads"] = shape.num_kv_heads
    elif shape.mla is None:
        split_by_tensor["rows of the keys' and values' projections"] = 2 * shape.num_kv_heads * shape.head_dim
    must_divide("tensor", parallel.tensor, split_by_tensor)
    if parallel.pipeline_layout:
        try:
            layout_stages(shape, parallel)
        except ConfigError as error:
            faults += error.faults
    else:
        stages = parallel.pipeline_parallel * parallel.virtual_pipeline
        if shape.num_layers % stages:
            faults.append(
                f"parallel.pipeline_parallel * virtual_pipeline is {stages}; it must divide the number of layers "
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


def train_faults(
    train: TrainConfig, parallel: ParallelConfig, model: ModelConfig, shape: ModelShape | None
) -> list[str]:
    faults: list[str] = []
    if train.dtype == "fp8" and not has_module("transformer_engine"):
        faults.append(
            "train.dtype is fp8, but Transformer Engine is not installed; make install-gpu on a machine with "
            "an H100 or newer, or use --train.dtype bf16"
        )
    if train.dtype == "fp8":
        faults += _fp8_faults(train, parallel, shape)
    multiple = math.lcm(parallel.row_multiple, parallel.segment_multiple)
    if train.tokens_per_microbatch % multiple:
        faults.append(
            f"train.tokens_per_microbatch is {train.tokens_per_microbatch}; it must be a multiple of {multiple} here "
            "(of 2 * context, and with sequence parallelism of tensor * context)"
        )
    if model.train_mtp and shape is not None and not shape.num_mtp_layers:
        left_out = mtp_left_out(model.path)
        why = f"{left_out}; take the published folder, or leave train_mtp out" if left_out else ""
        faults.append(f"model.train_mtp is True, but {why or 'config.json has no num_nextn_predict_layers'}")
    return faults


FP8_ROWS = 32
"""Tokens of a rank in FP8 products come in multiples of it: 16 for Hopper's, 32 for mxfp8's blocks."""


def _fp8_faults(train: TrainConfig, parallel: ParallelConfig, shape: ModelShape | None) -> list[str]:
    fp8, faults = train.fp8, []
    kept = fp8.first_layers_bf16 + fp8.last_layers_bf16
    if shape is not None and kept > shape.num_layers:
        faults.append(
            f"train.fp8.first_layers_bf16 {fp8.first_layers_bf16} and last_layers_bf16 {fp8.last_layers_bf16} must be "
            f"together at most the number of layers {shape.num_layers}"
        )
    if kept and fp8.recipe == "delayed":
        faults.append("train.fp8.recipe delayed keeps no layers in bf16 (Megatron-Core refuses it): use another recipe")
    if fp8.parameters:
        faults.append(
            "train.fp8.parameters is True; Megatron-Core takes the fp32 master weights of FP8 parameters from their "
            "random initial values, not from the weights that are loaded: use --train.fp8.no-parameters"
        )
    rows = FP8_ROWS * parallel.tensor * parallel.context
    if train.tokens_per_microbatch % rows:
        faults.append(
            f"train.tokens_per_microbatch is {train.tokens_per_microbatch}; FP8 needs a multiple of {FP8_ROWS} tokens "
            f"per rank: use a multiple of {rows}"
        )
    return faults


def row_faults(train: TrainConfig, longest: int, field: str) -> list[str]:
    """A packed row holds the longest sequence, whose length in tokens is `field`."""
    if train.tokens_per_microbatch >= longest:
        return []
    return [
        f"train.tokens_per_microbatch is {train.tokens_per_microbatch}; one row must hold the longest sequence, "
        f"{field} = {longest}"
    ]


def optimizer_faults(
    optimizer: OptimizerConfig, train: TrainConfig, device: str, field: str = "optimizer"
) -> list[str]:
    """`device`: cpu or cuda, where the trainer's ranks are."""
    faults = []
    if optimizer.min_lr > optimizer.lr:
        faults.append(f"{field}.min_lr is {optimizer.min_lr}; it must be between 0 and lr = {optimizer.lr}")
    if optimizer.moments == "bf16":
        faults += _moment_faults(optimizer, train, device, field)
    return faults


def _moment_faults(optimizer: OptimizerConfig, train: TrainConfig, device: str, field: str) -> list[str]:
    """What Megatron's precision-aware optimizer asks for (megatron.core.optimizer.OptimizerConfig), and what makes it
    worth while."""
    flag = f"--{field}.moments fp32".replace("_", "-")
    said = f"{field}.moments is bf16"
    faults = []
    if device == "cpu":
        faults.append(f"{said}; only Transformer Engine's Adam has it, on GPUs: use {flag}")
    elif not has_module("transformer_engine"):
        faults.append(
            f"{said}, but Transformer Engine, whose Adam has it, is not installed: make install-gpu, or use {flag}"
        )
    if not optimizer.distributed:
        faults.append(
            f"{said}; Megatron-Core has it in the distributed optimizer only: use --{field}.distributed, or {flag}"
        )
    if train.dtype == "fp32":
        faults.append(
            f"{said} and train.dtype fp32; Transformer Engine would keep second master weights beside fp32 weights: "
            f"use --train.dtype bf16, or {flag}"
        )
    return faults


def checkpoint_faults(checkpoint_every: int, optimizer: OptimizerConfig) -> list[str]:
    if not checkpoint_every or optimizer.distributed:
        return []
    return [
        f"checkpoint_every is {checkpoint_every}, but only the distributed optimizer can be saved: use "
        "--optimizer.distributed, or --checkpoint-every 0"
    ]
