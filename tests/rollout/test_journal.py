"""What was sampled lies on disk and comes back exactly."""

import dataclasses

import numpy as np
import pytest

from megatron_r1.rollout.journal import Journal, record
from megatron_r1.types import Completion, Problem

PROBLEMS = [Problem(id=f"p{number}", domain="math", messages=()) for number in range(3)]


def group(seed):
    random = np.random.default_rng(seed)
    return tuple(
        Completion(
            token_ids=random.integers(0, 2**31 - 1, length, dtype=np.int32),
            logprobs=np.log(random.random(length, dtype=np.float32)),
            finish_reason="stop",
            weight_version=seed,
            text="5 \u2260 7",
        )
        for length in (4, 0, 1)
    )


def with_routes(seed):
    """The same completions, of a mixture of 300 experts in three layers, two for a token."""
    random = np.random.default_rng(seed)
    return tuple(
        dataclasses.replace(
            one, routes=random.integers(0, 300, (5 + max(len(one.token_ids) - 1, 0), 3, 2)).astype(np.uint16)
        )
        for one in group(seed)
    )


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path)


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
        assert one.token_ids.dtype == np.int32 and one.logprobs.dtype == np.float32
        assert (one.finish_reason, one.weight_version, one.text) == ("stop", other.weight_version, "5 \u2260 7")


def test_groups_come_back_bit_for_bit(journal):
    with journal.open(7) as file:
        record(file, 2, PROBLEMS[2], group(2))
        record(file, 0, PROBLEMS[0], group(0))
    found = journal.known(7, PROBLEMS)
    assert sorted(found) == [0, 2]
    same(found[0], group(0))
    same(found[2], group(2))
    assert journal.known(8, PROBLEMS) == {}


def test_routes_come_back_with_their_form(journal):
    with journal.open(7) as file:
        record(file, 0, PROBLEMS[0], with_routes(1))
        record(file, 1, PROBLEMS[1], group(1))
    found = journal.known(7, PROBLEMS)
    for one, other in zip(found[0], with_routes(1), strict=True):
        assert one.routes is not None and one.routes.dtype == np.uint16
        np.testing.assert_array_equal(one.routes, other.routes)
    assert all(one.routes is None for one in found[1])


def test_a_killed_write_costs_only_its_own_group(journal, tmp_path):
    with journal.open(1) as file:
        record(file, 0, PROBLEMS[0], group(0))
        record(file, 1, PROBLEMS[1], group(1))
    path = tmp_path / "journal" / "step_00000001.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert sorted(journal.known(1, PROBLEMS)) == [0]
    with journal.open(1) as file:
        record(file, 1, PROBLEMS[1], group(1))
    assert sorted(journal.known(1, PROBLEMS)) == [0, 1]


def test_another_problem_in_its_place_is_not_answered_by_it(journal):
    with journal.open(1) as file:
        record(file, 0, PROBLEMS[1], group(0))
        record(file, 5, PROBLEMS[0], group(0))
    assert journal.known(1, PROBLEMS) == {}


def test_steps_that_a_checkpoint_has_made_past_are_forgotten(journal, tmp_path):
    for step in (1, 2, 3):
        with journal.open(step) as file:
            record(file, 0, PROBLEMS[0], group(step))
    journal.forget(3)
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["step_00000003.jsonl"]
    journal.clear()
    journal.clear()
    assert not (tmp_path / "journal").exists()


def test_what_was_sampled_after_a_gap_is_not_used(journal, tmp_path):
    """Steps 5 and 6 follow the checkpoint at 5; 8 was sampled from weights that step 7, whose rollout is gone, made."""
    for step in (5, 6, 8, 9):
        with journal.open(step) as file:
            record(file, 0, PROBLEMS[0], group(step))
    journal.keep_from(5)
    names = sorted(path.name for path in (tmp_path / "journal").iterdir())
    assert names == ["step_00000005.jsonl", "step_00000006.jsonl"]
    journal.keep_from(4)
    assert list((tmp_path / "journal").iterdir()) == []


def test_a_spoilt_line_is_sampled_again(journal, tmp_path):
    with journal.open(1) as file:
        record(file, 0, PROBLEMS[0], group(0))
    path = tmp_path / "journal" / "step_00000001.jsonl"
    path.write_bytes(path.read_bytes() + b"\0\0\0\n")
    assert sorted(journal.known(1, PROBLEMS)) == [0]
