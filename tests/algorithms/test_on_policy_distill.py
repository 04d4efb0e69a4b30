"""On-policy distillation's loss against the divergence that it estimates, and the loop's part in it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_r1.algorithms import OnPolicyDistill
from megatron_r1.algorithms.base import Setting
from megatron_r1.algorithms.checks import algorithm_faults
from megatron_r1.algorithms.teacher import Teacher
from megatron_r1.model.policy_model import TokenScores
from megatron_r1.policy.batch import DeviceBatch
from megatron_r1.stages.grpo.loss import policy_loss
from megatron_r1.stages.grpo.sequences import to_sequences
from megatron_r1.stages.grpo.usable import advantages_of
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup

ALGORITHM = OnPolicyDistill(teacher=Teacher(model=Path("teacher")))
LOSS = policy_loss(ALGORITHM, own_is_old=True)


def batch(teacher, weights, mask=None):
    """A DeviceBatch with what the loss reads; the rest is absent."""
    fields = {field.name: None for field in dataclasses.fields(DeviceBatch)}
    size = len(teacher)
    return DeviceBatch(
        **fields
        | {
            "loss_mask": torch.tensor([mask or [True] * size]),
            "token_weight": torch.tensor([weights]),
            "teacher_logprobs": torch.tensor([teacher]),
            "behaviour_logprobs": torch.zeros(1, size),
        }
    )


def scores(logprobs):
    return TokenScores(logprobs, torch.zeros_like(logprobs))


def test_the_expected_gradient_is_the_reverse_divergences():
    # One token, three choices: the mean of the loss's gradient over the student's own samples, in float64.
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.tensor([1.5, 0.1, -0.5], dtype=torch.float64), 0)
    student = torch.log_softmax(logits, 0)
    divergence = (student.exp() * (student - teacher)).sum()
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    found = torch.zeros(3, dtype=torch.float64)
    for token in range(3):
        logprobs = torch.log_softmax(logits, 0)[token].reshape(1, 1)
        loss = LOSS(scores(logprobs), batch([teacher[token].item()], [1.0])).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        found += student[token].exp().detach() * gradient
    # The teacher's logprobs pass through float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_loss_and_its_metric_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
    result = LOSS(scores(logprobs), batch([-1.5, -1.0, 5.0], [0.5, 0.25, 0.0], [True, True, False]))
    # 0.5 * -1 * (-1 + 1.5) + 0.25 * -2 * (-2 + 1)
    assert result.loss.item() == pytest.approx(-0.25 + 0.5)
    assert result.sums["kl"].item() == pytest.approx(0.5 - 1.0)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert gradient.tolist() == [[0.25, -0.25, 0.0]]


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(LOSS(scores(logprobs), batch([-1.0, -2.0], [0.5, 0.5])).loss, logprobs)
    assert gradient.tolist() == [[0.0, 0.0]]


def test_the_teachers_logprobs_stand_at_their_tokens():
    completion = Completion(
        token_ids=np.array([7, 8], np.int32),
        logprobs=np.array([-0.1, -0.2], np.float32),
        finish_reason="stop",
        weight_version=0,
        teacher_logprobs=np.array([-0.5, -0.6], np.float32),
    )
    group = RolloutGroup(
        problem=Problem(id="p", domain="math", messages=()),
        prompt_ids=np.array([1, 2, 3], np.int32),
        completions=(completion,),
        rewards=(Reward(total=1.0, parts={}),),
    )
    (sequence,) = to_sequences([(group, np.zeros(1))], ALGORITHM, max_new_tokens=2)
    assert sequence.teacher_logprobs is not None and sequence.reference_logprobs is None
    np.testing.assert_allclose(sequence.teacher_logprobs, [0, 0, 0, -0.5, -0.6], rtol=1e-6)
    assert sequence.loss_mask.tolist() == [False, False, False, True, True]


def test_rewards_train_nothing_whatever_they_are():
    np.testing.assert_array_equal(advantages_of(ALGORITHM, np.array([np.nan, 1.0, np.inf])), [0.0, 0.0, 0.0])


def test_its_rules():
    setting = Setting(minibatches=2, max_new_tokens=8, temperature=0.7, sync_every=3, recorded_stale=True)
    faults = algorithm_faults(OnPolicyDistill(), setting)
    assert [fault.split()[0] for fault in faults] == [
        "minibatches",
        "sync_every",
        "train_only:",
        "rollout.sampling.temperature",
        "algorithm.teacher.model",
    ]
    assert (
        algorithm_faults(
            ALGORITHM, dataclasses.replace(setting, minibatches=1, temperature=1.0, sync_every=1, recorded_stale=False)
        )
        == []
    )
