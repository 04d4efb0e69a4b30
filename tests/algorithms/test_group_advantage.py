from __future__ import annotations

import numpy as np
import pytest

from megatron_r1.algorithms.group_advantage import centred_rewards, group_advantages


def test_advantage_is_the_reward_in_units_of_the_groups_deviation():
    # mean 0.5, population deviation 0.5
    np.testing.assert_allclose(group_advantages(np.array([1.0, 0.0, 1.0, 0.0])), [1, -1, 1, -1])
    # mean 1, deviation sqrt(2)
    np.testing.assert_allclose(group_advantages(np.array([0.0, 0.0, 3.0])), [-0.70710678, -0.70710678, 1.41421356])


def test_equal_rewards_give_no_advantage():
    np.testing.assert_array_equal(group_advantages(np.array([0.3, 0.3, 0.3])), [0, 0, 0])
    # 0.1 + 0.2 differs from 0.3 in the last bit only
    np.testing.assert_array_equal(group_advantages(np.array([0.1 + 0.2, 0.3])), [0, 0])


def test_dr_grpo_does_not_divide():
    np.testing.assert_allclose(centred_rewards(np.array([3.0, 1.0])), [1.0, -1.0])


def test_an_empty_group_is_refused():
    with pytest.raises(ValueError, match="without completions"):
        group_advantages(np.array([]))
