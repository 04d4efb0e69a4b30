"""Simulated rollouts by hand, and against rollouts that were measured (timeline.json)."""

import json
from pathlib import Path

import numpy as np
import pytest
import simulate_cluster as cluster

from megatron_r1.planning.decoding import LinearCost
from megatron_r1.planning.rollouts import Request, simulate

SECOND = LinearCost(step=1.0, token=0.0)


def requests(*lengths, prompt=0):
    return [Request(index=i, prompt_tokens=prompt, length=length) for i, length in enumerate(lengths)]


def run(lengths, *, servers=1, seats=99, cache=10**9, cost=SECOND, prompt=0, enough=None):
    return simulate(
        requests(*lengths, prompt=prompt),
        num_servers=servers,
        cost=cost,
        max_running=seats,
        cache_tokens=cache,
        enough=enough,
    )


def ends(done):
    return {span.index: span.end for span in done.spans if span.finished}


def test_with_seats_for_all_each_ends_after_its_own_length():
    done = run([3, 7, 5])
    assert ends(done) == {0: 3.0, 1: 7.0, 2: 5.0}
    assert (done.seconds, done.tokens, done.preemptions, done.unfinished) == (7.0, 15, 0, [])


def test_a_seat_goes_to_the_next_as_soon_as_it_is_free():
    # Two seats: 3 and 7 begin; at 3 the third takes the seat and ends at 8; at 7 the fourth, at 9.
    assert ends(run([3, 7, 5, 2], seats=2)) == {0: 3.0, 1: 7.0, 2: 8.0, 3: 9.0}


def test_servers_draw_from_one_queue():
    # One seat each: 4 | 1, then the second server takes 2 and 3.
    done = run([4, 1, 2, 3], servers=2, seats=1)
    assert ends(done) == {0: 4.0, 1: 1.0, 2: 3.0, 3: 6.0}
    assert done.idle_server_seconds == 2.0  # the first, from 4 to 6


def test_a_step_costs_what_its_batch_costs_and_prompts_are_read_once():
    cost = LinearCost(step=1.0, token=0.5, prompt_token=0.1)
    # Two prompts of 10: 2 s. Three steps of two tokens: 3 * 2 s. Two more of one: 2 * 1.5 s.
    assert run([3, 5], cost=cost, prompt=10).seconds == pytest.approx(2 + 6 + 3)


def test_a_full_cache_sends_the_newest_back_and_nothing_is_lost():
    # 2 x 50 prompt tokens in a cache of 120: ten steps each fill it, then the second waits for the first to end.
    done = run([40, 40], cache=120, prompt=50)
    assert done.preemptions == 1
    assert ends(done)[0] == 40.0
    assert ends(done)[1] == 40.0 + 30.0  # ten of its tokens were there
    assert done.tokens == 80
    assert sum(span.index == 1 for span in done.spans) == 2


def test_stopping_early_leaves_the_rest_with_what_they_had():
    done = run([3, 10, 20], enough=1)
    assert done.seconds == 3.0 and ends(done) == {0: 3.0}
    assert sorted((left.index, left.done) for left in done.unfinished) == [(1, 3), (2, 3)]
    assert done.tokens == 9
    again = simulate(done.unfinished, num_servers=1, cost=SECOND, max_running=9, cache_tokens=10**9)
    assert ends(again) == {1: 7.0, 2: 17.0}


def test_stopping_in_the_middle_of_another_servers_batch_takes_its_steps_back():
    # One seat a server: the first ends at 4; the second is then 4 of 10 tokens far.
    done = run([4, 10], servers=2, seats=1, enough=1)
    assert [(left.index, left.done) for left in done.unfinished] == [(1, 4)]
    assert done.tokens == 8


def test_what_can_never_fit_is_refused():
    with pytest.raises(ValueError, match="110 tokens does not fit in a cache of 100"):
        run([100], cache=100, prompt=10)


def test_many_requests_with_little_cache_all_finish_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 400, 200).tolist()
    done = run(lengths, servers=3, seats=16, cache=1500, prompt=20)
    assert done.preemptions > 0 and not done.unfinished
    assert sorted(ends(done)) == list(range(200))
    assert done.tokens == sum(lengths)
    assert done.seconds >= max(lengths)


def test_the_fit_finds_the_costs_that_made_a_timeline():
    rng = np.random.default_rng(1)
    cost = LinearCost(step=0.02, token=0.001)
    rows = [
        {"seats": seats, "step": step, "prompt_tokens": 0, "lengths": rng.integers(5, 60, 64).tolist()}
        for seats in (8, 64)
        for step in range(3)
    ]
    for row in rows:
        row["seconds"] = cluster.predicted(row, cost).seconds
    found = cluster.calibrate(rows)
    assert (found.step, found.token) == (pytest.approx(0.02, rel=1e-3), pytest.approx(0.001, rel=1e-3))


def test_measured_rollouts_are_predicted_from_others():
    """Calibrated on half of the steps with the fewest and the most seats; the seats between were never seen."""
    rows = json.loads((Path(__file__).parent / "timeline.json").read_text())
    seen, unseen = cluster.split(rows)
    between = sorted({row["seats"] for row in rows})[1:-1]
    assert between and {row["seats"] for row in seen}.isdisjoint(between)
    cost = cluster.calibrate(seen)
    assert cost.step > 0 and cost.token > 0
    errors = {seats: [] for seats in {row["seats"] for row in unseen}}
    for row in unseen:
        errors[row["seats"]].append(abs(cluster.predicted(row, cost).seconds / row["seconds"] - 1))
    assert max(np.mean(found) for found in errors.values()) < BOUND


BOUND = 0.20
"""Mean error for each number of seats; two shared cores are noisy. docs/planner.md has the errors themselves."""
