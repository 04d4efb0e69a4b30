"""Losses per token, in torch: clipped ratios, KL penalty, weights that correct for the sampler; finite throughout.

All functions are element-wise over tensors of one shape [...] and differentiable in `logprobs`. They compute in fp32,
or in the inputs' precision where that is higher.

A log-ratio enters an exponential only up to LOG_RATIO_BOUND, where verl and NeMo-RL clamp theirs. Beyond the bound the
*value* stays at the bound's and the *gradient* goes on as it is at the bound (the clamp is passed straight through):
such a token is the one that has gone furthest astray, and a gradient of zero would leave it there for ever. Below the
bound nothing changes, to the bit. A NaN stays a NaN, so that a broken model is found (the step is skipped and counted).
"""

from __future__ import annotations

import torch

from megatron_r1.algorithms.base import TokenLoss, Tokens
from megatron_r1.algorithms.clip import Clip
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.kl import KL, LOG_RATIO_BOUND, Estimator

UNCORRECTED = Correction(weight="none")
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
    log_ratios: torch.Tensor, advantages: torch.Tensor, clip: Clip
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = exp(log_ratios), and where the clip binds.

    R1 paper, eq. 1; asymmetric clip as in DAPO (arXiv 2503.14476). With `clip.dual` c the objective of A < 0 is not
    below c A (dual clip, arXiv 1912.09729, eq. 5); without it only LOG_RATIO_BOUND bounds it. The second result is
    bool: True where a clip binds, so the token gives no gradient.
    """
    ratio = torch.exp(log_ratios)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip.low, 1.0 + clip.high) * advantages
    objective, binds = torch.minimum(unclipped, clipped), clipped < unclipped
    if clip.dual is None:
        return -objective, binds
    least = clip.dual * advantages
    dual = (advantages < 0) & (objective < least)
    return -torch.where(dual, least, objective), binds | dual


def kl_estimate(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: Estimator = "k3") -> torch.Tensor:
    """k1, k2 or k3 (kl.py) of KL(policy || reference) at each token; k2 and k3 are >= 0.

    With |d| bounded by B = LOG_RATIO_BOUND k3 is at most exp(B) - B - 1, its gradient in [1 - exp(B), 1)."""
    difference = -log_ratio(logprobs, reference_logprobs)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference * difference / 2
    return torch.expm1(difference) - difference


def correction_weight(tokens: Tokens, correction: Correction) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight w of each token by correction.py's table, and where it was truncated or masked (bool); no gradient.

    Each token's log-ratio is within LOG_RATIO_BOUND, and so is a sequence's sum of them. A collective over context-
    parallel ranks where weights are of sequences."""
    old, behaviour = tokens.old_logprobs.detach(), tokens.behaviour_logprobs
    log_weight = log_ratio(old, behaviour)
    kind = correction.weight_of(stale=tokens.stale)
    if kind == "none":
        return torch.ones_like(log_weight), torch.zeros_like(log_weight, dtype=torch.bool)
    if kind == "sequence":
        log_weight = tokens.sequence_sum(log_weight).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    elif kind == "geometric":
        log_weight = tokens.sequence_mean(log_weight)
    weight = torch.exp(log_weight)
    if correction.beyond == "truncate":
        return weight.clamp(max=correction.high), weight > correction.high
    outside = (weight < correction.low) | (weight > correction.high)  # never of a NaN, which stays
    return weight.masked_fill(outside, 0.0), outside


def clipped_loss(
    tokens: Tokens, clip: Clip, *, kl: KL | None = None, correction: Correction = UNCORRECTED
) -> TokenLoss:
    """w * surrogate + kl.coef * KL, each token with a ratio of its own; w is the correction's weight."""
    own = log_ratio(tokens.logprobs, _divisor(tokens, correction))
    return _corrected(tokens, *clipped_surrogate(own, tokens.advantages, clip), kl, correction)


def sequence_clipped_loss(
    tokens: Tokens, clip: Clip, *, kl: KL | None = None, correction: Correction = UNCORRECTED
) -> TokenLoss:
    """The clipped surrogate of the sequence's ratio, exp of the mean of its tokens' log-ratios (GSPO, eq. 7 and 17)."""
    own = log_ratio(tokens.logprobs, _divisor(tokens, correction))
    of_sequence = tokens.sequence_mean(own.detach())
    # The value is the sequence's, the gradient each token's own.
    surrogate, binds = clipped_surrogate(of_sequence + (own - own.detach()), tokens.advantages, clip)
    return _corrected(tokens, surrogate, binds, kl, correction)


def weighted_policy_loss(tokens: Tokens, *, ratio_cap: float, correction: Correction = UNCORRECTED) -> TokenLoss:
    """-w * min(r, cap) * A * log p with r = p / p_old (or p / p_rollout) a constant (CISPO, eq. 4)."""
    ratio = torch.exp(log_ratio(tokens.logprobs.detach(), _divisor(tokens, correction)))
    logprobs = bounded(_at_least_fp32(tokens.logprobs), LOGPROB_FLOOR, torch.inf)
    loss = -ratio.clamp(max=ratio_cap) * tokens.advantages * logprobs
    weight, cut = correction_weight(tokens, correction)
    metrics = {"clip_fraction": (ratio > ratio_cap).float(), "correction_weight": weight, "correction_cut": cut.float()}
    return TokenLoss(loss * weight, metrics)


def _divisor(tokens: Tokens, correction: Correction) -> torch.Tensor:
    """The logprobs that the ratio is against."""
    return tokens.old_logprobs if correction.ratio_against == "trainer" else tokens.behaviour_logprobs


def _corrected(
    tokens: Tokens, surrogate: torch.Tensor, binds: torch.Tensor, kl: KL | None, correction: Correction
) -> TokenLoss:
    """The surrogate with its weight and the penalty, and their metrics."""
    weight, cut = correction_weight(tokens, correction)
    loss = surrogate * weight
    estimate = torch.zeros_like(tokens.logprobs)
    if kl is not None and kl.coef > 0:
        estimate = kl_estimate(tokens.logprobs, tokens.reference_logprobs, kl.estimator)
        if kl.place == "loss":
            loss = loss + kl.coef * estimate
    metrics = {"kl": estimate.detach(), "clip_fraction": binds.float()}
    return TokenLoss(loss, {**metrics, "correction_weight": weight, "correction_cut": cut.float()})


def reverse_kl_loss(logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's log p * g with g = log p - log p_teacher a constant, and g (arXiv 2306.13649): its gradient is g.

    |g| is at most TEACHER_GAP_BOUND."""
    gap = log_ratio(logprobs.detach(), teacher_logprobs, TEACHER_GAP_BOUND)
    return bounded(_at_least_fp32(logprobs), LOGPROB_FLOOR, torch.inf) * gap, gap
