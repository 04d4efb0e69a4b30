"""Megatron's optimizer (Adam, fp32 master weights, moments in fp32 or bf16, optionally sharded over data-parallel
ranks) and its schedule."""

# Megatron's annotations are narrower than what it takes.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_r1.config.schema import OptimizerConfig

MOMENT_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of `total_steps`: linear warm-up, then constant, linear or cosine decay.

    Cosine: min + (lr - min) * (1 + cos(pi * t)) / 2 with t from 0 to 1 over the steps after the warm-up.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    share = 1.0 - progress if config.schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
    return config.min_lr + (config.lr - config.min_lr) * share


def build_optimizer(
    config: OptimizerConfig, chunks: Sequence[DistributedDataParallel], dtype: torch.dtype
) -> MegatronOptimizer:
    """Adam over the chunks' trainable parameters. Weights must be loaded before: fp32 masters are copied from them,
    here or, with moments in bf16, at the first step (Transformer Engine's Adam holds them then)."""
    moments = MOMENT_DTYPE[config.moments]
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.distributed,
            use_precision_aware_optimizer=config.moments == "bf16",
            exp_avg_dtype=moments,
            exp_avg_sq_dtype=moments,
            # Whole fp32 masters: their lower halves alone would save 2 bytes more, and be no tensor that can be read.
            store_param_remainders=False,
        ),
        list(chunks),
        use_gloo_process_groups=False,
    )


def step_if_finite(optimizer: MegatronOptimizer, *, rate: float, weight_decay: float) -> tuple[bool, float]:
    """Clip and step at learning rate `rate`; (whether it stepped, gradient norm before clipping).

    Megatron skips bad gradients only under fp16 loss scaling; here a norm that is not finite skips the step in every
    precision, on all ranks alike (the norm is theirs in common), and leaves weights and moments as they were.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        # Norm weights and biases carry wd_mult 0.
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
    if optimizer.prepare_grads():
        return False, math.inf
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return False, norm
    stepped, _, _ = optimizer.step()
    return bool(stepped), norm
