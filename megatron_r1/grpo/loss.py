"""The GRPO loss per token: clipped ratio, KL penalty, correction for the sampler's numerics; finite for any logprobs.

All functions are element-wise over tensors of one shape [...] and differentiable in `logprobs`. They compute in fp32,
or in the inputs' precision where that is higher.

A log-ratio enters an exponential only up to LOG_RATIO_BOUND, where verl and NeMo-RL clamp theirs. Beyond the bound the
*value* stays at the bound's and the *gradient* goes on as it is at the bound (the clamp is passed straight through):
such a token is the one that has gone furthest astray, and a gradient of zero would leave it there for ever. Below the
bound nothing changes, to the bit. A NaN stays a NaN, so that a broken model is found (the step is skipped and counted).
"""

from __future__ import annotations

import torch

LOG_RATIO_BOUND = 20.0
"""Largest |log(p / q)| that a loss sees: a ratio of 4.9e8. fp32 overflows at 88.7, and sums over tokens before that."""
TEACHER_GAP_BOUND = 50.0
"""Largest |log p_student - log p_teacher| of a token in distillation. vLLM writes a logprob of -inf as -9999."""
LOGPROB_FLOOR = -1e4
"""A lower logprob counts as this one in the value of a loss; its gradient is that of any other."""


class _Bounded(torch.autograd.Function):
    """clamp(values, low, high) whose gradient is 1 everywhere."""

    @staticmethod
    def forward(ctx, values, low, high):
        return values.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


def bounded(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """`values` in [low, high]; the gradient passes as if nothing had been clamped. NaN stays."""
    return _Bounded.apply(values, low, high)  # pyright: ignore[reportReturnType]


def log_ratio(logprobs: torch.Tensor, other: torch.Tensor, bound: float = LOG_RATIO_BOUND) -> torch.Tensor:
    """logprobs - other within [-bound, bound]; where both are -inf it is 0, a constant."""
    difference = _at_least_fp32(logprobs) - _at_least_fp32(other)
    impossible = torch.isneginf(logprobs) & torch.isneginf(other)
    return bounded(difference.masked_fill(impossible, 0.0), -bound, bound)


def _at_least_fp32(values: torch.Tensor) -> torch.Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def weighted_sum(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_t weight_t * logprob_t, a scalar; tokens of weight 0 have no part in it, whatever their logprob is."""
    floored = bounded(_at_least_fp32(logprobs), LOGPROB_FLOOR, torch.inf)
    return (floored * weights).where(weights != 0, 0.0).sum()


def clipped_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logprobs - old_logprobs), and where the clip binds.

    R1 paper, eq. 1; asymmetric clip as in DAPO (arXiv 2503.14476). With `clip_dual` c the objective of A < 0 is not
    below c A (dual clip, arXiv 1912.09729, eq. 5); without it only LOG_RATIO_BOUND bounds it. The second result is
    bool: True where a clip binds, so the token gives no gradient.
    """
    ratio = torch.exp(log_ratio(logprobs, old_logprobs))
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective, binds = torch.minimum(unclipped, clipped), clipped < unclipped
    if clip_dual is None:
        return -objective, binds
    least = clip_dual * advantages
    dual = (advantages < 0) & (objective < least)
    return -torch.where(dual, least, objective), binds | dual


def kl_k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """k3 estimate of KL(policy || reference): exp(d) - d - 1 with d = reference - policy (R1 paper, eq. 2). >= 0.

    With |d| bounded by B = LOG_RATIO_BOUND it is at most exp(B) - B - 1, its gradient in [1 - exp(B), 1)."""
    difference = -log_ratio(logprobs, reference_logprobs)
    return torch.expm1(difference) - difference


def truncated_importance(old_logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(p_old / p_behaviour, cap), no gradient: corrects for an engine that samples from slightly other numbers."""
    return torch.exp(log_ratio(old_logprobs, behaviour_logprobs)).clamp(max=cap).detach()


def grpo_token_loss(
    logprobs: torch.Tensor,
    *,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    clip_dual: float | None = None,
    reference_logprobs: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of each token, its KL to the reference (zeros without one) and where the clip binds (bool).

    loss = importance * surrogate + kl_coef * k3
    """
    surrogate, bound = clipped_surrogate(logprobs, old_logprobs, advantages, clip_low, clip_high, clip_dual)
    if importance is not None:
        surrogate = surrogate * importance
    if reference_logprobs is None:
        return surrogate, torch.zeros_like(logprobs), bound
    kl = kl_k3(logprobs, reference_logprobs)
    return surrogate + kl_coef * kl, kl, bound


def reverse_kl_loss(logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's log p * g with g = log p - log p_teacher a constant, and g (arXiv 2306.13649): its gradient is g.

    |g| is at most TEACHER_GAP_BOUND."""
    gap = log_ratio(logprobs.detach(), teacher_logprobs, TEACHER_GAP_BOUND)
    return bounded(_at_least_fp32(logprobs), LOGPROB_FLOOR, torch.inf) * gap, gap
