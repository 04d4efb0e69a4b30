"""Groups are collected in order, handed over as they come, and survive the death of the server."""

from __future__ import annotations

import dataclasses
import os
import signal

import numpy as np
import psutil
import pytest
from weight_sources import FolderSource

from megatron_r1.config import SamplingConfig
from megatron_r1.engines.base import EngineSpec
from megatron_r1.engines.vllm.server import LocalEngine, start_engines
from megatron_r1.engines.vllm.sync import WeightSync
from megatron_r1.errors import EngineError
from megatron_r1.rollout.collect import collect

from .conftest import MAX_MODEL_LEN, Oracle, prompt


def test_groups_come_back_in_order_and_are_handed_over_as_they_arrive(
    engine: LocalEngine, sync: WeightSync, weights: FolderSource, folders, oracles: list[Oracle]
) -> None:
    weights.show(folders[1])
    sync.push(sync.version + 1)
    prompts = [prompt(8 + 5 * index, index) for index in range(12)]
    arrived = []
    collected = collect(
        (engine,),
        prompts,
        group_size=3,
        sampling=SamplingConfig(max_new_tokens=20),
        seed=50,
        on_group=lambda index, group: arrived.append((index, group)),
    )
    assert sorted(index for index, _ in arrived) == list(range(12))
    assert all(collected.groups[index] is group for index, group in arrived)
    for ids, group in zip(prompts, collected.groups):
        assert len(group) == 3
        for completion in group:
            expected = oracles[1].logprobs(ids + completion.token_ids.tolist())[len(ids) :]
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    assert collected.num_tokens == sum(len(one.token_ids) for group in collected.groups for one in group)
    assert collected.restarts == 0 and collected.seconds > 0
    alone = engine.client.generate(
        prompts[4], num_completions=3, sampling=SamplingConfig(max_new_tokens=20), seed=50 + 4 * 3
    )
    assert [one.token_ids.tolist() for one in alone] == [one.token_ids.tolist() for one in collected.groups[4]]


def test_a_prompt_without_room_stops_everything_before_it_begins(engine: LocalEngine) -> None:
    arrived = []
    with pytest.raises(ValueError, match="leaves no room"):
        collect(
            (engine,),
            [prompt(5, 0), prompt(MAX_MODEL_LEN, 1)],
            group_size=2,
            sampling=SamplingConfig(max_new_tokens=2),
            on_group=lambda index, group: arrived.append(index),
        )
    assert arrived == []


@pytest.mark.slow  # two server starts; `make test` kills the server of a whole run (pipeline/test_run.py)
def test_a_server_killed_in_the_middle_is_replaced_and_nothing_is_lost(
    engine: LocalEngine, sync: WeightSync, weights: FolderSource, folders, oracles: list[Oracle]
) -> None:
    weights.show(folders[2])
    sync.push(sync.version + 1)
    old = psutil.Process(engine.pid)
    old_processes = [old, *old.children(recursive=True)]
    prompts = [prompt(20, index) for index in range(24)]
    arrived: list[int] = []
    pushed: list[int] = []

    def kill_at_the_fourth(index: int, group: object) -> None:
        arrived.append(index)
        if len(arrived) == 4:
            os.kill(engine.pid, signal.SIGKILL)

    def resync(restarted: LocalEngine) -> None:
        assert restarted.client.weight_version() == 0
        pushed.append(sync.push(sync.version, (restarted,)).version)

    collected = collect(
        (engine,),
        prompts,
        group_size=4,
        sampling=SamplingConfig(max_new_tokens=100),
        seed=9,
        on_group=kill_at_the_fourth,
        resync=resync,
    )
    assert collected.restarts == 1 and engine.starts == 2 and pushed == [sync.version]
    assert sorted(arrived) == list(range(24))
    assert not [process for process in old_processes if process.is_running()]
    for ids, group in zip(prompts, collected.groups):
        assert {completion.weight_version for completion in group} == {sync.version}
        whole = ids + group[0].token_ids.tolist()
        np.testing.assert_allclose(group[0].logprobs, oracles[2].logprobs(whole)[20:], atol=1e-4)


@pytest.mark.slow  # three server starts
def test_a_server_that_hangs_is_replaced_and_failures_of_an_earlier_rollout_are_forgiven(
    config, folders, oracles: list[Oracle], tmp_path
) -> None:
    """With one restart allowed it hangs in the first rollout, and is killed in the second."""
    once = dataclasses.replace(config, max_restarts=1, stall_seconds=20.0)
    (engine,) = start_engines(once, model_path=folders[0], run_dir=tmp_path)
    with engine:
        for number, what in enumerate((signal.SIGSTOP, signal.SIGKILL)):
            arrived: list[int] = []

            def hit(index: int, group: object, arrived=arrived, what=what) -> None:
                arrived.append(index)
                if len(arrived) == 2:
                    os.kill(engine.pid, what)

            prompts = [prompt(20, index) for index in range(24)]
            collected = collect(
                (engine,),
                prompts,
                group_size=4,
                sampling=SamplingConfig(max_new_tokens=100),
                seed=9,
                on_group=hit,
                resync=lambda restarted: None,
            )
            assert (collected.restarts, engine.starts, engine.failures) == (1, 2 + number, 0)
            assert sorted(arrived) == list(range(24))
            whole = prompts[0] + collected.groups[0][0].token_ids.tolist()
            np.testing.assert_allclose(collected.groups[0][0].logprobs, oracles[0].logprobs(whole)[20:], atol=1e-4)


def test_a_server_past_its_restarts_ends_the_run_with_its_log(config, folders, tmp_path) -> None:
    never = dataclasses.replace(config, max_restarts=0)
    engine = LocalEngine(EngineSpec(config=never, model_path=folders[0], run_dir=tmp_path))
    with engine:
        engine.start()
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"max_restarts is 0.*exit code -9.*vllm-0.log"):
            collect((engine,), [[5, 6]], group_size=1, sampling=SamplingConfig(max_new_tokens=2))
    assert not engine.alive()
