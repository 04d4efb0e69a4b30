from __future__ import annotations

import numpy as np
import pytest

from megatron_r1.grpo.weights import token_weights


def test_sequence_mean_gives_every_sequence_the_same_weight():
    np.testing.assert_allclose(token_weights([2, 8], "sequence_mean"), [1 / 4, 1 / 16])


def test_token_mean_gives_every_token_the_same_weight():
    np.testing.assert_allclose(token_weights([2, 8], "token_mean"), [1 / 10, 1 / 10])


def test_dr_grpo_divides_by_a_constant():
    np.testing.assert_allclose(token_weights([2, 8], "dr_grpo", max_new_tokens=16), [1 / 32, 1 / 32])
    with pytest.raises(ValueError, match="max_new_tokens"):
        token_weights([2], "dr_grpo")


@pytest.mark.parametrize("kind", ["sequence_mean", "token_mean"])
def test_weights_of_all_tokens_sum_to_one(kind):
    lengths = [3, 1, 17, 240]
    assert np.dot(token_weights(lengths, kind), lengths) == pytest.approx(1.0)


def test_nothing_to_weigh_is_refused():
    with pytest.raises(ValueError, match="no sequences"):
        token_weights([], "token_mean")
