"""When the reference policy is refreshed, and which seeds a step samples with."""

import numpy as np
import pytest

from megatron_r1.recipes import RECIPES
from megatron_r1.stages.grpo.sampling import step_seed
from megatron_r1.stages.grpo.sequences import refresh_now


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
    assert [step for step in range(8) if refresh_now(step * minibatches, minibatches, every)] == refreshed


def test_the_papers_reference_lasts_400_optimizer_steps():
    config = RECIPES["grpo_671b"]()
    loop, every = config, config.algorithm.needs.kl.refresh_steps
    refreshed = [step for step in range(loop.steps) if refresh_now(step * loop.minibatches, loop.minibatches, every)]
    assert refreshed[:3] == [25, 50, 75]  # 400 optimizer steps are 25 rollouts of 16 minibatches


def test_seeds_of_neighbouring_steps_and_runs_do_not_meet():
    seeds = sorted(step_seed(seed, step) for seed in range(20) for step in range(500))
    assert len(set(seeds)) == 10_000
    assert min(np.diff(np.array(seeds))) > 8192  # more than a step's samples
    assert seeds[0] >= 0 and seeds[-1] < 2**62
    assert step_seed(3, 5) == step_seed(3, 5, 0) != step_seed(3, 5, 1) != step_seed(3, 5, 2)
