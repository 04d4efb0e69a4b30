"""Hand-computed values, and gradients against float64 autograd of the formula written out."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.grpo.loss import clipped_surrogate, grpo_token_loss, kl_k3, truncated_importance

LN2 = math.log(2.0)


def test_surrogate_inside_the_clip_is_minus_ratio_times_advantage():
    logprobs = torch.tensor([math.log(1.1), math.log(0.9)], dtype=torch.float64)
    loss, bound = clipped_surrogate(logprobs, torch.zeros(2), torch.tensor([2.0, -3.0]), 0.2, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-2.2, 2.7], dtype=torch.float64))
    assert bound.tolist() == [False, False]


def test_clip_binds_only_where_it_lowers_the_objective():
    # ratios 2 and 1/2; advantages +1 and -1 of each
    logprobs = torch.tensor([LN2, LN2, -LN2, -LN2], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss, bound = clipped_surrogate(logprobs, torch.zeros(4, dtype=torch.float64), advantages, 0.2, 0.5)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.5, 2.0, -0.5, 0.8], dtype=torch.float64))
    assert bound.tolist() == [True, False, False, True]
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 2.0, -0.5, 0.0], dtype=torch.float64))


def test_k3_is_the_paper_s_estimator():
    # reference twice as likely: 2 - ln 2 - 1; half as likely: 1/2 + ln 2 - 1
    kl = kl_k3(torch.tensor([0.0, 0.0, -3.0]), torch.tensor([LN2, -LN2, -3.0]))
    torch.testing.assert_close(kl, torch.tensor([1 - LN2, LN2 - 0.5, 0.0]))


def test_k3_keeps_its_digits_near_zero():
    """exp(d) - d - 1 in fp32 would be 0 or noise; d^2 / 2 is the truth."""
    kl = kl_k3(torch.zeros(1, dtype=torch.float32), torch.full((1,), 1e-3))
    assert kl.item() == pytest.approx(5.0e-7, rel=0.02)


def test_k3_is_unbiased_for_the_divergence():
    """E_p[k3] = KL(p || q) exactly, for two distributions over four tokens."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    torch.testing.assert_close((p * kl_k3(p.log(), q.log())).sum(), (p * (p / q).log()).sum())


def test_truncated_importance_is_capped_and_carries_no_gradient():
    old = torch.tensor([LN2, 0.0, -LN2], requires_grad=True)
    weight = truncated_importance(old, torch.zeros(3), cap=1.5)
    torch.testing.assert_close(weight, torch.tensor([1.5, 1.0, 0.5]))
    assert not weight.requires_grad


def test_token_loss_puts_the_parts_together():
    loss, kl, bound = grpo_token_loss(
        torch.tensor([math.log(1.1)]),
        old_logprobs=torch.zeros(1),
        advantages=torch.tensor([2.0]),
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.5,
        reference_logprobs=torch.tensor([math.log(2.2)]),
        importance=torch.tensor([0.5]),
    )
    assert kl.item() == pytest.approx(1 - LN2, abs=1e-6)
    assert loss.item() == pytest.approx(-1.1 + 0.5 * (1 - LN2), abs=1e-6)
    assert bound.tolist() == [False]


def test_without_a_reference_there_is_no_kl():
    loss, kl, _ = grpo_token_loss(
        torch.zeros(2), old_logprobs=torch.zeros(2), advantages=torch.tensor([1.0, -1.0]),
        clip_low=0.2, clip_high=0.2, kl_coef=0.5,
    )  # fmt: skip
    assert kl.tolist() == [0.0, 0.0]
    assert loss.tolist() == [-1.0, 1.0]


def test_gradient_in_fp32_equals_float64_autograd():
    generator = torch.Generator().manual_seed(0)
    draw = lambda scale: torch.randn(500, generator=generator, dtype=torch.float64) * scale  # noqa: E731
    logprobs, old, reference, advantages = draw(1.0) - 2, None, None, draw(1.0)
    old, reference = logprobs + draw(0.3), logprobs + draw(0.5)

    exact = logprobs.clone().requires_grad_()
    ratio = torch.exp(exact - old)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    gap = reference - exact
    (-surrogate + 0.04 * (gap.exp() - gap - 1)).sum().backward()

    single = logprobs.float().requires_grad_()
    loss, _, _ = grpo_token_loss(
        single, old_logprobs=old.float(), advantages=advantages.float(), clip_low=0.2, clip_high=0.3, kl_coef=0.04,
        reference_logprobs=reference.float(),
    )  # fmt: skip
    loss.sum().backward()
    torch.testing.assert_close(single.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
