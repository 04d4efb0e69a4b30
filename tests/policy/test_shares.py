"""Each data-parallel rank gets its own sequences of a rollout and no others, whatever else the layout splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks

LAYOUTS = ("dp4", "tp2", "pp2", "cp2", "ep2", "tp2pp2", "tp2cp2", "cp2pp2")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """By rank, what it got under each layout."""
    folder: Path = tmp_path_factory.mktemp("shares")
    run_ranks("shares.py", str(folder), ranks=4)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_lays_out_what_it_would_have_packed_for_itself(found, layout):
    assert all(rank[layout]["equal"] for rank in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sequence_is_held_by_one_data_parallel_rank(found, layout):
    by_rank = {rank[layout]["data_rank"]: rank[layout]["held"] for rank in found}
    assert len(by_rank) == found[0][layout]["data_ranks"]
    for minibatch in range(2):
        held = [number for shares in by_rank.values() for number in shares[minibatch]]
        assert sorted(held) == list(range(24))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_those_of_the_own_rows(found, layout):
    """A sequence has 13 bytes per token (id, mask, weight, logprob) for 8 of the group (id, logprob) and its text."""
    for rank in found:
        got = rank[layout]
        tokens = got["groups_bytes"] / 9  # nearly
        assert got["share_bytes"] < 1.4 * 13 * tokens / got["data_ranks"] + 4000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_error_of_rank_0_is_raised_on_every_rank_and_answers_are_each_ranks_own(found, layout):
    for number, rank in enumerate(found):
        assert rank[layout]["errors"] == ["rank 0 alone met this"] * 2
        assert rank[layout]["answer"] == [number, 4]
