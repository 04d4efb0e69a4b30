"""The GRPO loop on two ranks with rewards that are not numbers: as if their completions had not been sampled."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from ranks import run_ranks

from megatron_r1.recipes.tiny import TINY_V3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("loop")
    (made / "config.json").write_bytes((TINY_V3 / "config.json").read_bytes())
    run_ranks("grpo_loop.py", str(made), ranks=2)
    return made


def test_the_weights_are_those_of_a_run_without_them_to_the_bit(folder):
    found = dict(np.load(folder / "found.npz"))
    names = [key.removeprefix("clean:") for key in found if key.startswith("clean:")]
    assert len(names) > 50
    for name in names:
        assert np.isfinite(found[f"broken:{name}"]).all()
        np.testing.assert_array_equal(found[f"broken:{name}"], found[f"clean:{name}"], err_msg=name)


def test_they_are_counted_and_a_minibatch_of_which_nothing_is_left_is_skipped(folder):
    first, second, third = json.loads((folder / "metrics.json").read_text())
    counts = [
        (row["completions_left_out"], row["groups_left_out"], row["skipped_steps"]) for row in (first, second, third)
    ]
    assert counts == [(0, 0, 0), (2, 0, 0), (3, 1, 1)]
    assert second["reward_mean"] == pytest.approx((1.0 + 0.0 + 0.5 + 1.0) / 4)
    assert all(
        math.isfinite(row[key]) for row in (first, second, third) for key in ("loss", "kl", "grad_norm", "mismatch")
    )
    assert int(np.load(folder / "found.npz")["taken"]) == 6, "the skipped one counts in the schedule"


def test_the_gate_waits_for_the_first_minibatch_that_is_trained(folder):
    assert "rollout and trainer disagree" in str(np.load(folder / "found.npz")["gate"])
