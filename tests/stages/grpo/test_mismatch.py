"""The mismatch of engine and trainer: hand-computed values, and what the gate does with it."""

import dataclasses
import math

import numpy as np
import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_r1.data.packing import RowLayout, pack
from megatron_r1.errors import MismatchError
from megatron_r1.policy import topology
from megatron_r1.stages.grpo.mismatch import Gate, Mismatch, measure
from megatron_r1.types import PackedMicrobatch, TrainingSequence


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    topology.finalise()


def a_row(engine: list[float]) -> PackedMicrobatch:
    """A prompt of one token and a completion whose tokens the engine gave these logprobs; padding behind."""
    logprobs = np.array([0.0, *engine], np.float32)
    sequence = TrainingSequence(
        token_ids=np.arange(10, 11 + len(engine), dtype=np.int32),
        loss_mask=np.arange(len(logprobs)) > 0,
        token_weight=np.ones(len(logprobs), np.float32),
        behaviour_logprobs=logprobs,
    )
    ((row,),) = pack([sequence], RowLayout(tokens_per_microbatch=16, full_rows=True))
    return row


def trainer_of(row: PackedMicrobatch, own: list[float]) -> np.ndarray:
    """f32[S]: `own` at the trained positions, and numbers that must not matter elsewhere."""
    values = np.full(row.num_tokens, 1e9, np.float32)
    values[row.loss_mask[0]] = own
    return values


def mismatch_of(engine: list[float], own: list[float]) -> Mismatch:
    row = a_row(engine)
    return measure([row], [trainer_of(row, own)])


def test_values_by_hand():
    # d = log 2, -log 2, 0: w = 2, 1/2, 1
    found = mismatch_of([-2.0, -2.0, -2.0], [-2.0 + math.log(2), -2.0 - math.log(2), -2.0])
    log2 = math.log(2)
    assert found.mean == pytest.approx(2 * log2 / 3)
    assert found.largest == pytest.approx(log2)
    assert found.kl_rollout == pytest.approx(((2 - 1 - log2) + (0.5 - 1 + log2)) / 3)  # E[w - 1 - d]
    assert found.kl_trainer == pytest.approx(((2 * log2 - 1) + (-0.5 * log2 + 0.5)) / 3)  # E[w d - w + 1]
    assert found.effective_samples == pytest.approx(3.5**2 / (3 * 5.25))
    assert log2 * 0.999 < found.p99 <= found.largest


def test_two_that_agree_differ_by_nothing():
    found = mismatch_of([-0.5, -3.25, -1e-3], [-0.5, -3.25, -1e-3])
    assert found == Mismatch(mean=0.0, p99=0.0, largest=0.0, kl_rollout=0.0, kl_trainer=0.0, effective_samples=1.0)


def test_rows_count_by_their_tokens():
    one, two = a_row([-1.0]), a_row([-1.0, -1.0, -1.0])
    found = measure([one, two], [trainer_of(one, [-1.5]), trainer_of(two, [-1.1, -1.1, -1.1])])
    assert found.mean == pytest.approx((0.5 + 0.3) / 4)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 3.0, 100.0])
def test_the_99th_percentile_is_within_one_percent(scale):
    """Of 100 differences the smallest that 99 do not exceed is the 99th."""
    rng = np.random.default_rng(1)
    sizes = rng.permutation(np.linspace(0.1, 1.0, 100) * scale)
    rows = [a_row([0.0] * 10) for _ in range(10)]
    own = [trainer_of(row, list(part)) for row, part in zip(rows, sizes.reshape(10, 10), strict=True)]
    exact = float(np.sort(np.float32(sizes))[98])
    assert exact * (1 - 1e-6) <= measure(rows, own).p99 <= exact * 1.0101


def test_a_token_that_both_hold_impossible_is_no_difference():
    assert mismatch_of([-math.inf, -1.0], [-math.inf, -1.0]).mean == 0.0


def test_a_token_that_one_holds_impossible_is_infinitely_wrong():
    found = mismatch_of([-1.0, -1.0], [-math.inf, -1.0])
    assert found.mean == found.largest == found.p99 == math.inf
    assert found.effective_samples == pytest.approx(0.5), "its weight is 0"


def test_a_logprob_that_is_no_number_spoils_all():
    found = mismatch_of([-1.0, -1.0], [math.nan, -1.0])
    assert math.isnan(found.mean) and math.isnan(found.effective_samples) and math.isnan(found.largest)


def test_a_weight_is_bounded_as_in_a_loss():
    found = mismatch_of([-500.0, -1.0], [-1.0, -1.0])
    assert found.mean == pytest.approx(249.5)
    assert math.isfinite(found.kl_trainer) and found.effective_samples == pytest.approx(0.5)


def test_no_tokens_are_no_measurement():
    row = a_row([-1.0])
    empty = dataclasses.replace(row, loss_mask=np.zeros_like(row.loss_mask))
    found = measure([empty], [np.zeros(row.num_tokens, np.float32)])
    assert all(math.isnan(value) for value in found.metrics().values())


def decode(token_ids) -> str:
    return " ".join(map(str, token_ids))


def test_the_gate_names_the_tokens_that_differ_most():
    row = a_row([-1.0, -1.0, -1.0])
    gate = Gate(0.1, decode, pytest.fail, restarted=False)
    with pytest.raises(MismatchError) as caught:
        gate.look([row], [trainer_of(row, [-1.0, -1.25, -3.0])])
    lines = str(caught.value).splitlines()
    assert "mean |logprob difference| is 0.7500, grpo.mismatch_bound is 0.1" in lines[0]
    assert lines[1:] == [
        "  '13' after '10 11 12': rollout -1.0000, trainer -3.0000",
        "  '12' after '10 11': rollout -1.0000, trainer -1.2500",
        "  '11' after '10': rollout -1.0000, trainer -1.0000",
    ]


def test_the_gate_is_passed_once_and_a_growing_mismatch_is_told_once():
    row, told = a_row([-1.0]), []
    gate = Gate(0.1, decode, told.append, restarted=False)
    for step, own in enumerate([-1.05, -1.05, -1.5, -1.6]):
        gate.next_step()
        assert not gate.looked
        gate.look([row], [trainer_of(row, [own])])
        gate.warn_if_grown(step)
    assert len(told) == 1 and told[0].startswith("step 3: rollout and trainer differ by 0.5000")


def test_of_recorded_rollouts_no_weight_sync_is_blamed():
    """There is none: the model is another, or has been trained otherwise since."""
    row, told = a_row([-1.0]), []
    gate = Gate(0.1, decode, told.append, restarted=False, recorded=True)
    with pytest.raises(MismatchError, match=r"Check whether model.path and model.load_from are what the recorded run"):
        gate.look([row], [trainer_of(row, [-3.0])])
    gate = Gate(0.1, decode, told.append, restarted=False, recorded=True)
    for step, own in enumerate([-1.05, -1.5]):
        gate.next_step()
        gate.look([row], [trainer_of(row, [own])])
        gate.warn_if_grown(step)
    assert len(told) == 1 and "weight sync" not in told[0]
    assert "trained otherwise than the one that sampled" in told[0] and "algorithm.correction.weight token" in told[0]


def test_a_step_without_tokens_is_not_told_of():
    gate = Gate(0.1, decode, pytest.fail, restarted=False)
    gate.next_step()
    gate.warn_if_grown(0)
    assert math.isnan(gate.found.mean)
