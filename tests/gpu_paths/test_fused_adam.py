"""Transformer Engine's FusedAdam goes on after a restart as if there had been none. Its kernel is replaced by the same
arithmetic in torch; counting, state and what Megatron does with them are theirs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ranks import run_launches

from megatron_r1.recipes.tiny import TINY_V3

pytestmark = [pytest.mark.gpu_paths, pytest.mark.timeout(900)]
JOBS = {1: ["one:save", "one:one"], 2: ["ep2:save", "ep2:ep2"]}


@pytest.fixture(scope="module")
def folder(transformer_engine, tmp_path_factory):
    made = tmp_path_factory.mktemp("fused_adam")
    (made / "config.json").write_bytes((TINY_V3 / "config.json").read_bytes())
    failures = run_launches("fused_adam.py", {ranks: [str(made), "te", *jobs] for ranks, jobs in JOBS.items()})
    assert not failures, next(iter(failures.values()))
    return made


@pytest.mark.parametrize("layout", ["one", "ep2"])
def test_the_next_updates_are_those_of_the_run_that_went_on(folder, layout):
    straight, resumed = (dict(np.load(folder / f"{layout}-{start}.npz")) for start in ("save", layout))
    assert straight.keys() == resumed.keys() and len(straight) > 100
    for name in straight:
        np.testing.assert_array_equal(straight[name], resumed[name], err_msg=name)


@pytest.mark.parametrize("layout", ["one", "ep2"])
def test_the_steps_taken_are_saved(folder, layout):
    assert json.loads((folder / f"saved-{layout}" / "policy.json").read_text())["adam_steps"] == 2.0
