"""Every stage of every recipe takes optimizer steps at its own settings, on a tiny shape (recipe_stages.py), and
recomputed activations change no bit of them."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import Results, run_launches
from recipe_stages import representatives, small_layout, training_stages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STANDS_FOR = representatives()
RUN = sorted(set(STANDS_FOR.values()))
LAUNCHES = {
    ranks: names
    for ranks in (1, 2, 4)
    if (names := [name for name in RUN if small_layout(training_stages()[name].parallel).world_size == ranks])
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("recipes")
    launches = {ranks: [str(folder), ",".join(names)] for ranks, names in LAUNCHES.items()}
    return Results(folder, LAUNCHES, run_launches("recipes.py", launches, timeout_seconds=900))


def test_no_stage_is_left_out():
    assert sorted(name for names in LAUNCHES.values() for name in names) == RUN
    assert {"sft_671b", "r1_671b.helpful", "r1_671b.llama_70b", "grpo_moe_16b"} <= set(STANDS_FOR)


@pytest.mark.parametrize("stage", sorted(STANDS_FOR))
def test_a_stage_takes_steps(results, stage):
    found, recompute = results[STANDS_FOR[stage]], training_stages()[stage].train.recompute
    assert not found[f"{recompute}:skipped"].any()
    assert np.isfinite(found[f"{recompute}:loss"]).all() and (found[f"{recompute}:grad_norm"] > 0).all()


@pytest.mark.parametrize("stage", [name for name in RUN if training_stages()[name].train.recompute != "none"])
def test_recomputing_changes_no_bit(results, stage):
    found, recompute = results[stage], training_stages()[stage].train.recompute
    keys = [key.split(":", 1)[1] for key in found if key.startswith("none:")]
    assert len(keys) > 20
    for key in keys:
        np.testing.assert_array_equal(found[f"{recompute}:{key}"], found[f"none:{key}"], err_msg=key)


def test_the_trained_mtp_layer_is_among_them(results):
    found = results[STANDS_FOR["sft_671b"]]
    frozen = results[STANDS_FOR["grpo_671b"]]
    name = "full:model.layers.3.eh_proj.weight"
    assert found[name].shape == frozen[name].shape == (64, 128)
    assert not np.array_equal(found[name], frozen[name]), "one is trained, the other is as it began"
