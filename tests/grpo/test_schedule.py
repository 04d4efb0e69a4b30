"""When the reference policy is refreshed, and which seeds a step samples with."""

import numpy as np
import pytest

from megatron_r1.config.schema import GRPOConfig
from megatron_r1.recipes import RECIPES
from megatron_r1.stages.grpo import disagreement, refresh_now, step_seed


@pytest.mark.parametrize(
    ("every", "minibatches", "refreshed"),
    [
        (0, 1, []),
        (1, 1, [1, 2, 3, 4, 5, 6, 7]),
        (3, 1, [3, 6]),
        (4, 2, [2, 4, 6]),  # rollouts 2, 4, 6 begin after 4, 8, 12 optimizer steps
        (3, 2, [2, 3, 5, 6]),  # multiples of 3 are passed at 4, 6, 10 and 12 steps
        (5, 16, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_reference_is_refreshed_every_n_optimizer_steps(every, minibatches, refreshed):
    config = GRPOConfig(reference_refresh_steps=every, minibatches=minibatches, prompts_per_step=32)
    assert [step for step in range(8) if refresh_now(step * minibatches, config)] == refreshed


def test_the_papers_reference_lasts_400_optimizer_steps():
    config = RECIPES["grpo_671b"]().grpo
    refreshed = [step for step in range(config.steps) if refresh_now(step * config.minibatches, config)]
    assert refreshed[:3] == [25, 50, 75]  # 400 optimizer steps are 25 rollouts of 16 minibatches


def test_seeds_of_neighbouring_steps_and_runs_do_not_meet():
    seeds = sorted(step_seed(seed, step) for seed in range(20) for step in range(500))
    assert len(set(seeds)) == 10_000
    assert min(np.diff(np.array(seeds))) > 8192  # more than a step's samples
    assert seeds[0] >= 0 and seeds[-1] < 2**62
    assert step_seed(3, 5) == step_seed(3, 5)


@pytest.mark.parametrize(("mismatch", "told"), [(0.0, False), (0.05, False), (0.0501, True), (float("nan"), True)])
def test_servers_that_drift_from_the_trainer_are_told_of(mismatch, told):
    text = disagreement(4, mismatch, 0.05)
    assert (text is not None) == told
    if text:
        assert text.startswith("step 5: ")
