"""Hand-computed values, and gradients against float64 autograd of the formula written out."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.algorithms.base import Tokens
from megatron_r1.algorithms.clip import Clip
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.kl import KL
from megatron_r1.algorithms.token_losses import clipped_loss, clipped_surrogate, kl_estimate

LN2 = math.log(2.0)


def test_surrogate_inside_the_clip_is_minus_ratio_times_advantage():
    logprobs = torch.tensor([math.log(1.1), math.log(0.9)], dtype=torch.float64)
    loss, bound = clipped_surrogate(logprobs, torch.tensor([2.0, -3.0]), Clip())
    torch.testing.assert_close(loss, torch.tensor([-2.2, 2.7], dtype=torch.float64))
    assert bound.tolist() == [False, False]


def test_clip_binds_only_where_it_lowers_the_objective():
    # ratios 2 and 1/2; advantages +1 and -1 of each
    logprobs = torch.tensor([LN2, LN2, -LN2, -LN2], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss, bound = clipped_surrogate(logprobs, advantages, Clip(high=0.5))
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.5, 2.0, -0.5, 0.8], dtype=torch.float64))
    assert bound.tolist() == [True, False, False, True]
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 2.0, -0.5, 0.0], dtype=torch.float64))


def test_k3_is_the_paper_s_estimator():
    # reference twice as likely: 2 - ln 2 - 1; half as likely: 1/2 + ln 2 - 1
    kl = kl_estimate(torch.tensor([0.0, 0.0, -3.0]), torch.tensor([LN2, -LN2, -3.0]))
    torch.testing.assert_close(kl, torch.tensor([1 - LN2, LN2 - 0.5, 0.0]))


def test_k3_keeps_its_digits_near_zero():
    """exp(d) - d - 1 in fp32 would be 0 or noise; d^2 / 2 is the truth."""
    kl = kl_estimate(torch.zeros(1, dtype=torch.float32), torch.full((1,), 1e-3))
    assert kl.item() == pytest.approx(5.0e-7, rel=0.02)


def test_k3_is_unbiased_for_the_divergence():
    """E_p[k3] = KL(p || q) exactly, for two distributions over four tokens."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    torch.testing.assert_close((p * kl_estimate(p.log(), q.log())).sum(), (p * (p / q).log()).sum())


def tokens(logprobs: torch.Tensor, **given: torch.Tensor) -> Tokens:
    """A row of trained tokens; logprobs that are not given are zeros, as in a packed row."""
    zeros = torch.zeros_like(logprobs.detach())
    fields = ("old_logprobs", "behaviour_logprobs", "reference_logprobs", "teacher_logprobs", "advantages")
    return Tokens(
        logprobs=logprobs,
        mask=torch.ones_like(zeros, dtype=torch.bool),
        sequence_mean=lambda values: values.mean().expand_as(values),
        sequence_sum=lambda values: values.sum().expand_as(values),
        **{name: given.get(name, zeros) for name in fields},
    )


def test_token_loss_puts_the_parts_together():
    loss, metrics = clipped_loss(
        tokens(
            torch.tensor([math.log(1.1)]),
            advantages=torch.tensor([2.0]),
            reference_logprobs=torch.tensor([math.log(2.2)]),
            behaviour_logprobs=torch.tensor([LN2]),
        ),
        Clip(),
        kl=KL(coef=0.5),
        correction=Correction(weight="token"),
    )
    assert metrics["kl"].item() == pytest.approx(1 - LN2, abs=1e-6)
    assert loss.item() == pytest.approx(-2.2 * 0.5 + 0.5 * (1 - LN2), abs=1e-6)
    assert metrics["clip_fraction"].tolist() == [0.0]


@pytest.mark.parametrize("kl", [None, KL(coef=0.0), KL(coef=0.5, place="reward")])
def test_without_a_penalty_in_the_loss_there_is_none(kl):
    far = torch.full((2,), 3.0)
    loss, metrics = clipped_loss(
        tokens(torch.zeros(2), advantages=torch.tensor([1.0, -1.0]), reference_logprobs=far), Clip(), kl=kl
    )
    assert loss.tolist() == [-1.0, 1.0]
    expected = math.exp(3.0) - 4 if kl is not None and kl.coef else 0.0
    assert metrics["kl"].tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize(("estimator", "value", "slope"), [("k1", -0.5, 1.0), ("k2", 0.125, -0.5)])
def test_the_other_estimators(estimator, value, slope):
    """d = log p_reference - log p = 0.5; slopes are by log p."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    found = kl_estimate(logprobs, torch.tensor([-0.5], dtype=torch.float64), estimator)
    (gradient,) = torch.autograd.grad(found.sum(), logprobs)
    assert (found.item(), gradient.item()) == pytest.approx((value, slope))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_mean_gradients_of_the_estimators(estimator):
    """Over a policy's own samples: k2's mean gradient is the divergence's, k1's is 0."""
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([1.5, 0.1, -0.5], dtype=torch.float64), 0)
    policy = torch.log_softmax(logits, 0)
    (truth,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    mean = (policy.exp().detach() * kl_estimate(policy, reference, estimator)).sum()
    (found,) = torch.autograd.grad(mean, logits)
    if estimator == "k1":
        torch.testing.assert_close(found, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    elif estimator == "k2":
        torch.testing.assert_close(found, truth)
    else:
        assert torch.dot(found, truth) > 0 and not torch.allclose(found, truth)


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
    row = tokens(single, old_logprobs=old.float(), advantages=advantages.float(), reference_logprobs=reference.float())
    loss, _ = clipped_loss(row, Clip(high=0.3), kl=KL(coef=0.04))
    loss.sum().backward()
    torch.testing.assert_close(single.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
