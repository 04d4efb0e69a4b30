"""Weights that correct for the policy that sampled: by hand, at the ends of the numbers, over sequences."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from megatron_r1.algorithms.base import Tokens
from megatron_r1.algorithms.clip import Clip
from megatron_r1.algorithms.correction import METRICS, Correction
from megatron_r1.algorithms.kl import KL
from megatron_r1.algorithms.token_losses import (
    LOG_RATIO_BOUND,
    clipped_loss,
    correction_weight,
    sequence_clipped_loss,
    weighted_policy_loss,
)
from megatron_r1.policy.batch import DeviceBatch

LN2 = math.log(2.0)


def row(log_weights: list[float], *, edges: tuple[int, ...] = (), mask: list[bool] | None = None, **given) -> Tokens:
    """Tokens with these log(p_old / p_rollout); segments [edges[i], edges[i + 1]) are sequences, by default one."""
    behaviour = -torch.tensor([log_weights], dtype=torch.float64)
    zeros = torch.zeros_like(behaviour)
    trained = torch.tensor([mask or [True] * len(log_weights)])
    fields = {field.name: None for field in dataclasses.fields(DeviceBatch)}
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor(edges or (0, len(log_weights)), dtype=torch.int32))
    batch = DeviceBatch(
        **fields | {"packed": packed, "positions": torch.arange(len(log_weights)), "loss_mask": trained}
    )
    names = ("logprobs", "old_logprobs", "reference_logprobs", "teacher_logprobs", "advantages")
    return Tokens(
        behaviour_logprobs=behaviour,
        mask=trained,
        sequence_mean=batch.sequence_mean,
        sequence_sum=batch.sequence_sum,
        **{name: given.get(name, zeros) for name in names},
    )


def weights(correction: Correction, tokens: Tokens) -> tuple[list[float], list[bool]]:
    weight, cut = correction_weight(tokens, correction)
    assert not weight.requires_grad and weight.shape == tokens.mask.shape
    return weight[0].tolist(), cut[0].tolist()


FOUR = [3 * LN2, LN2 / 2, -LN2 / 2, -2 * LN2]
"""Tokens of weight 8, sqrt 2, sqrt 1/2 and 1/4; their product is 2, its fourth root 2 ** 0.25."""
R = math.sqrt(2.0)
G = 2**0.25


@pytest.mark.parametrize(
    ("correction", "expected", "cut"),
    [
        (Correction(), [1, 1, 1, 1], [0, 0, 0, 0]),
        (Correction(ratio_against="rollout"), [1, 1, 1, 1], [0, 0, 0, 0]),
        (Correction(weight="token"), [2, R, 1 / R, 1 / 4], [1, 0, 0, 0]),
        (Correction(weight="token", beyond="mask"), [0, R, 1 / R, 0], [1, 0, 0, 1]),
        (Correction(weight="token", beyond="mask", low=0.0, high=9.0), [8, R, 1 / R, 1 / 4], [0, 0, 0, 0]),
        (Correction(weight="token", high=1e9), [8, R, 1 / R, 1 / 4], [0, 0, 0, 0]),
        (Correction(weight="sequence", high=5.0), [2] * 4, [0] * 4),
        (Correction(weight="sequence", high=1.5), [1.5] * 4, [1] * 4),
        (Correction(weight="sequence", beyond="mask", high=1.5), [0] * 4, [1] * 4),
        (Correction(weight="geometric"), [G] * 4, [0] * 4),
        (Correction(weight="geometric", high=1.1), [1.1] * 4, [1] * 4),
        (Correction(weight="geometric", beyond="mask", high=1.1), [0] * 4, [1] * 4),
    ],
)
def test_weights_of_one_sequence(correction, expected, cut):
    found, where = weights(correction, row(FOUR))
    assert found == pytest.approx(expected) and where == [bool(one) for one in cut]


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (Correction(), [2, R, 1 / R, 1 / 4]),
        (Correction(beyond="mask"), [0, R, 1 / R, 0]),
        (Correction(ratio_against="rollout"), [1, 1, 1, 1]),
        (Correction(weight="none"), [1, 1, 1, 1]),
    ],
)
def test_by_default_stale_samples_are_weighed_and_fresh_ones_are_not(correction, expected):
    stale = dataclasses.replace(row(FOUR), stale=True)
    assert weights(correction, stale)[0] == pytest.approx(expected)
    assert weights(correction, row(FOUR))[0] == [1, 1, 1, 1]


def test_sequences_are_weighed_by_their_own_trained_tokens():
    """Weights 2, 4 | 1/2 and a prompt's token | nothing trained."""
    tokens = row(
        [LN2, 2 * LN2, -LN2, math.inf, math.nan, 7.0], edges=(0, 2, 4, 6), mask=[True, True, True, False, False, False]
    )
    assert weights(Correction(weight="sequence", high=9.0), tokens)[0] == pytest.approx([8, 8, 0.5, 0.5, 1, 1])
    assert weights(Correction(weight="geometric", high=9.0), tokens)[0] == pytest.approx(
        [2**1.5, 2**1.5, 0.5, 0.5, 1, 1]
    )


def test_a_length_of_a_thousand_tokens_is_in_the_product_and_not_in_the_mean():
    tokens = row([0.005] * 1000)
    assert weights(Correction(weight="sequence", high=1e9), tokens)[0][0] == pytest.approx(math.exp(5.0))
    assert weights(Correction(weight="geometric"), tokens)[0][0] == pytest.approx(math.exp(0.005))


@pytest.mark.parametrize("of", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("beyond", ["truncate", "mask"])
@pytest.mark.parametrize(("far", "large"), [(500.0, True), (math.inf, True), (-500.0, False), (-math.inf, False)])
def test_extreme_log_ratios_count_as_the_bound(
    of: Literal["token", "sequence", "geometric"], beyond: Literal["truncate", "mask"], far: float, large: bool
):
    found, cut = weights(Correction(weight=of, beyond=beyond, high=3.0), row([far]))
    bound = math.exp(-LOG_RATIO_BOUND)
    assert found == pytest.approx([0.0 if beyond == "mask" else 3.0 if large else bound])
    assert cut == [beyond == "mask" or large]
    sums, _ = weights(Correction(weight="sequence", high=1e9), row([far, far]))
    assert sums == pytest.approx([math.exp(LOG_RATIO_BOUND) if large else bound] * 2)


def test_a_token_that_is_impossible_for_both_weighs_one():
    tokens = row([math.inf], old_logprobs=torch.full((1, 1), -math.inf, dtype=torch.float64))
    assert tokens.behaviour_logprobs.item() == -math.inf
    for of in ("token", "sequence", "geometric"):
        assert weights(Correction(weight=of), tokens) == ([1.0], [False])


@pytest.mark.parametrize("of", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("beyond", ["truncate", "mask"])
def test_a_nan_is_not_masked_away(of, beyond):
    """It is a broken model, and the step that has it is skipped and counted."""
    found, _ = weights(Correction(weight=of, beyond=beyond), row([math.nan]))
    assert math.isnan(found[0])


def test_value_and_gradient_of_a_weighed_loss():
    """A ratio of 1.1 at advantage 2: truncated, masked, kept; the penalty is not weighed."""
    logprobs = torch.full((1, 3), math.log(1.1), dtype=torch.float64, requires_grad=True)
    tokens = row(
        [3 * LN2, -2 * LN2, LN2 / 2],
        logprobs=logprobs,
        advantages=torch.full((1, 3), 2.0, dtype=torch.float64),
        reference_logprobs=torch.full((1, 3), math.log(2.2), dtype=torch.float64),
    )
    penalty, slope = 1 - LN2, -1.0  # k3 of d = ln 2, and its gradient 1 - exp(d)
    for correction, w in (
        (Correction(weight="token"), [2, 1 / 4, R]),
        (Correction(weight="token", beyond="mask"), [0, 0, R]),
    ):
        loss, metrics = clipped_loss(tokens, Clip(), kl=KL(coef=0.5), correction=correction)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        assert loss[0].tolist() == pytest.approx([-2.2 * each + 0.5 * penalty for each in w])
        assert gradient[0].tolist() == pytest.approx([-2.2 * each + 0.5 * slope for each in w])
        assert metrics["correction_weight"][0].tolist() == pytest.approx(w)
        assert metrics["correction_cut"][0].tolist() == [1.0, float(w[1] == 0), 0.0]
        assert set(METRICS) <= set(metrics)


def test_the_ratio_is_against_the_policy_that_is_named():
    """p / p_old = 1.1 and p / p_rollout = 1.1 * 2, at a clip of 0.2 and 0.2."""
    logprobs = torch.full((1, 1), math.log(1.1), dtype=torch.float64, requires_grad=True)
    ones = torch.ones((1, 1), dtype=torch.float64)
    tokens = row([LN2], logprobs=logprobs, advantages=ones)
    for against, value, slope, bound in (("trainer", -1.1, -1.1, 0.0), ("rollout", -1.2, 0.0, 1.0)):
        correction = Correction(ratio_against=against)
        for loss, metrics in (
            clipped_loss(tokens, Clip(), correction=correction),
            sequence_clipped_loss(tokens, Clip(), correction=correction),
        ):
            (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
            assert (loss.item(), gradient.item()) == pytest.approx((value, slope))
            assert metrics["clip_fraction"].item() == bound
        loss, metrics = weighted_policy_loss(tokens, ratio_cap=2.0, correction=correction)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        ratio = min(2.0, 1.1 if against == "trainer" else 2.2)
        assert (loss.item(), gradient.item()) == pytest.approx((-ratio * math.log(1.1), -ratio))


def test_a_decoupled_loss_is_unbiased_for_samples_of_another_policy():
    """E over p_rollout of w * r = E over p_old of r = E over p of 1, whatever the three policies are."""
    policies = torch.log_softmax(
        torch.randn(3, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), -1
    )
    present, old, rollout = policies
    advantages = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0, 0.0]], dtype=torch.float64)
    tokens = row((old - rollout)[0].tolist(), logprobs=present - old, advantages=advantages)  # only differences count
    loss, _ = clipped_loss(tokens, Clip(low=1.0, high=1e9), correction=Correction(weight="token", high=1e9))
    found = (rollout.exp() * loss).sum()
    torch.testing.assert_close(found, -(present.exp() * advantages).sum())
