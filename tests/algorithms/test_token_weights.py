from __future__ import annotations

import numpy as np
import pytest

from megatron_r1.algorithms.token_weights import constant, sequence_mean, token_mean


def test_sequence_mean_gives_every_sequence_the_same_weight():
    np.testing.assert_allclose(sequence_mean([2, 8]), [1 / 4, 1 / 16])


def test_token_mean_gives_every_token_the_same_weight():
    np.testing.assert_allclose(token_mean([2, 8]), [1 / 10, 1 / 10])


def test_a_constant_divides_by_the_longest_answer():
    np.testing.assert_allclose(constant([2, 8], 16), [1 / 32, 1 / 32])
    with pytest.raises(ValueError, match="max_new_tokens"):
        constant([2], 0)


@pytest.mark.parametrize("weights", [sequence_mean, token_mean])
def test_weights_of_all_tokens_sum_to_one(weights):
    lengths = [3, 1, 17, 240]
    assert np.dot(weights(lengths), lengths) == pytest.approx(1.0)


@pytest.mark.parametrize("weights", [sequence_mean, token_mean, lambda lengths: constant(lengths, 4)])
def test_nothing_to_weigh_is_refused(weights):
    with pytest.raises(ValueError, match="no sequences"):
        weights([])
