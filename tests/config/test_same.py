"""What counts as the same computation."""

import dataclasses
from pathlib import Path

import pytest

from megatron_r1.config.same import as_json, same_computation
from megatron_r1.recipes.tiny import tiny


def replace(config, path, value):
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: replace(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run_dir", Path("elsewhere")),
        ("checkpoint_every", 17),
        ("deadlines.train", 3.0),
        ("save_every", 3),
        ("parallel.world_size", 4),
        ("rollout.num_engines", 2),
        ("rollout.check_tensors", 0),
        ("mismatch_bound", 0.5),
        ("max_skipped_steps", 99),
        ("train.deterministic", True),
    ],
)
def test_where_it_runs_does_not_matter(path, value):
    assert same_computation(as_json(tiny()), replace(tiny(), path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [("seed", 1), ("algorithm.kl.coef", 0.5), ("rollout.sampling.max_new_tokens", 7), ("data.tasks", ("chain_sum",))],
)
def test_what_it_computes_does(path, value):
    assert not same_computation(as_json(tiny()), replace(tiny(), path, value))


def test_a_field_that_is_newer_than_the_record_must_have_its_default():
    record = as_json(tiny())
    del record["algorithm"]["correction"]
    assert same_computation(record, tiny())
    assert not same_computation(record, replace(tiny(), "algorithm.correction.weight", "token"))


def test_a_field_that_is_no_more_makes_it_another():
    assert not same_computation(as_json(tiny()) | {"gone": 1}, tiny())


@pytest.mark.parametrize(("cap", "same"), [(0.0, True), (2.0, False)])
def test_a_field_that_is_no_more_and_did_nothing_is_passed_over(cap, same):
    record = as_json(tiny())
    record["algorithm"]["truncated_importance_cap"] = cap
    assert same_computation(record, tiny()) is same
