"""The GRPO loss per token: clipped ratio, KL penalty, correction for the sampler's numerics.

All functions are element-wise over tensors of one shape [...] and differentiable in `logprobs`.
"""

from __future__ import annotations

import torch


def clipped_surrogate(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logprobs - old_logprobs), and where the clip binds.

    R1 paper, eq. 1; asymmetric clip as in DAPO (arXiv 2503.14476). The second result is bool: True where the clipped
    term is the smaller, so the token gives no gradient.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def kl_k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """k3 estimate of KL(policy || reference): exp(d) - d - 1 with d = reference - policy (R1 paper, eq. 2). >= 0."""
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference


def truncated_importance(old_logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(p_old / p_behaviour, cap), no gradient: corrects for an engine that samples from slightly other numbers."""
    return torch.exp(old_logprobs - behaviour_logprobs).clamp(max=cap).detach()


def grpo_token_loss(
    logprobs: torch.Tensor,
    *,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    reference_logprobs: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of each token, its KL to the reference (zeros without one) and where the clip binds (bool).

    loss = importance * surrogate + kl_coef * k3
    """
    surrogate, bound = clipped_surrogate(logprobs, old_logprobs, advantages, clip_low, clip_high)
    if importance is not None:
        surrogate = surrogate * importance
    if reference_logprobs is None:
        return surrogate, torch.zeros_like(logprobs), bound
    kl = kl_k3(logprobs, reference_logprobs)
    return surrogate + kl_coef * kl, kl, bound
