"""The 1F1B schedule by hand, and the closed form of its bubble."""

from itertools import pairwise

import pytest

from megatron_r1.config import ParallelConfig
from megatron_r1.planning.schedule import one_forward_one_backward
from megatron_r1.planning.trainer import in_flight


def end(slots):
    return max(slot.end for slot in slots)


def test_two_ranks_two_microbatches_by_hand():
    # rank 0: F0 0-1, F1 1-2, B0 4-6, B1 7-9; rank 1: F0 1-2, B0 2-4, F1 4-5, B1 5-7.
    slots = one_forward_one_backward([1, 1], [2, 2], 2)
    found = {(s.rank, s.microbatch, s.forward): (s.start, s.end) for s in slots}
    assert found == {
        (0, 0, True): (0, 1),
        (0, 1, True): (1, 2),
        (0, 0, False): (4, 6),
        (0, 1, False): (7, 9),
        (1, 0, True): (1, 2),
        (1, 0, False): (2, 4),
        (1, 1, True): (4, 5),
        (1, 1, False): (5, 7),
    }


@pytest.mark.parametrize(("ranks", "count"), [(1, 3), (2, 8), (4, 4), (16, 5), (8, 64)])
def test_equal_ranks_take_the_closed_forms_time(ranks, count):
    slots = one_forward_one_backward([1.0] * ranks, [2.0] * ranks, count)
    assert end(slots) == pytest.approx(3.0 * (count + ranks - 1))
    for rank in range(ranks):
        own = sorted((slot for slot in slots if slot.rank == rank), key=lambda slot: slot.start)
        assert len(own) == 2 * count
        assert all(a.end <= b.start for a, b in pairwise(own))


def test_a_slow_rank_sets_the_pace():
    slots = one_forward_one_backward([1, 2, 1], [2, 4, 2], 50)
    assert 50 * 6 <= end(slots) <= 50 * 6 + 2 * (1 + 2) + 6


@pytest.mark.parametrize(("ranks", "count"), [(4, 8), (4, 2), (16, 5)])
def test_kept_microbatches_are_those_the_planner_counts(ranks, count):
    slots = one_forward_one_backward([1.0] * ranks, [2.0] * ranks, count)
    for rank in range(ranks):
        live = most = 0
        for slot in sorted((s for s in slots if s.rank == rank), key=lambda slot: slot.start):
            live += 1 if slot.forward else -1
            most = max(most, live)
        assert in_flight(ParallelConfig(pipeline_parallel=ranks, world_size=ranks), rank, count) == most
