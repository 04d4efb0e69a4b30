"""A request's deadline is its server's progress: other processes that are slow, paused, stuck or stopped.

What happens then takes seconds of waiting, so all of it happens at the same time, and each test asks how it went."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.config.deadlines import folder_bytes, stall_seconds, start_seconds, transfer_seconds
from megatron_r1.engines.vllm.client import EngineClient
from megatron_r1.engines.vllm.progress import count_tokens
from megatron_r1.errors import EngineError

NEVER = 1000.0


@contextlib.contextmanager
def server(moves: float, answers: float, stall: float = 1.0) -> Iterator[tuple[EngineClient, int]]:
    """A client of a process of stuck_server.py, and that process."""
    command = [sys.executable, str(Path(__file__).with_name("stuck_server.py")), str(moves), str(answers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    config = RolloutConfig(max_model_len=64, stall_seconds=stall)
    try:
        yield EngineClient(f"http://127.0.0.1:{int(process.stdout.readline())}", token="t", config=config), process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(client: EngineClient) -> object:
    return client.generate([5], num_completions=1, sampling=SamplingConfig(max_new_tokens=2))[0].finish_reason


def a_request_may_last_for_as_long_as_tokens_move():
    with server(moves=NEVER, answers=5.0) as (client, _):
        begun = time.monotonic()
        assert ask(client) == "stop"
        assert time.monotonic() - begun > 3.5  # several times the stall time


def all_requests_of_a_server_whose_tokens_stand_still_end_with_that_reason():
    with server(moves=1.0, answers=NEVER) as (client, _), ThreadPoolExecutor(8) as pool:
        begun = time.monotonic()
        waiting = [pool.submit(ask, client) for _ in range(8)]
        for future in waiting:
            with pytest.raises(EngineError, match=r"no token has moved .* for 1 s .*rollout\.stall_seconds.*stuck"):
                future.result(30)
        assert 1.0 < time.monotonic() - begun < 10


def a_server_that_cannot_even_be_asked_is_stuck_too():
    with server(moves=NEVER, answers=NEVER) as (client, pid):
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match="no token has moved"):
            ask(client)


def a_paused_server_is_waited_for_and_a_pause_that_waits_for_stuck_requests_is_not():
    with server(moves=0.0, answers=NEVER) as (client, _), ThreadPoolExecutor(1) as pool:
        client.request("POST", "/set/paused")
        waiting = pool.submit(ask, client)
        time.sleep(3.0)
        assert not waiting.done()
        client.request("POST", "/set/running")
        with pytest.raises(EngineError, match="no token has moved"):
            waiting.result(20)
        client.request("POST", "/set/paused")
        with pytest.raises(EngineError, match=r"POST /pause.*no token has moved"):
            client.pause()


def a_request_that_a_paused_server_refuses_waits_for_the_end_of_the_pause():
    with server(moves=0.0, answers=0.0) as (client, _), ThreadPoolExecutor(1) as pool:
        client.request("POST", "/set/refusing")
        waiting = pool.submit(ask, client)
        time.sleep(3.0)
        assert not waiting.done()
        client.request("POST", "/set/running")
        assert waiting.result(20) == "stop"


def the_clock_begins_with_the_work():
    with server(moves=0.0, answers=NEVER, stall=2.0) as (client, _):
        for pause in (0.0, 2.5):
            time.sleep(pause)
            begun = time.monotonic()
            with pytest.raises(EngineError, match="no token has moved"):
                ask(client)
            assert time.monotonic() - begun > 1.9


CASES = (
    a_request_may_last_for_as_long_as_tokens_move,
    all_requests_of_a_server_whose_tokens_stand_still_end_with_that_reason,
    a_server_that_cannot_even_be_asked_is_stuck_too,
    a_paused_server_is_waited_for_and_a_pause_that_waits_for_stuck_requests_is_not,
    a_request_that_a_paused_server_refuses_waits_for_the_end_of_the_pause,
    the_clock_begins_with_the_work,
)


@pytest.fixture(scope="module")
def running() -> Iterator[dict[Callable, Future]]:
    with ThreadPoolExecutor(len(CASES)) as pool:
        yield {case: pool.submit(case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_deadline(running, case):
    running[case].result()


def test_counters_of_all_engines_are_added():
    text = (
        "# TYPE vllm:prompt_tokens counter\n"
        'vllm:prompt_tokens_total{engine="0",model_name="m"} 100.0\n'
        'vllm:prompt_tokens_total{engine="1",model_name="m"} 20.0\n'
        'vllm:prompt_tokens_created{engine="0"} 1.7e9\n'
        'vllm:generation_tokens_total{engine="0",model_name="m"} 3.0\n'
        'vllm:request_success_total{engine="0",finished_reason="stop"} 0.5\n'
    )
    assert count_tokens(text) == 123.5
    assert count_tokens("# TYPE process_cpu_seconds counter\nprocess_cpu_seconds_total 3\n") is None


def test_deadlines_follow_from_sizes(tmp_path):
    large = RolloutConfig(max_model_len=33_792)
    # 1,342 GB at 0.5 GB/s, and the longest prompt at 50 tokens/s
    assert start_seconds(large, 1342e9) == 900 + 2684 and transfer_seconds(large, 1342e9) == 300 + 2684
    assert stall_seconds(large) == pytest.approx(600 + 675.84)
    assert stall_seconds(RolloutConfig(max_model_len=256)) == pytest.approx(600 + 163.84)
    said = RolloutConfig(start_timeout_seconds=70.0, stall_seconds=5.0, weights_gb_per_second=2.0)
    assert (start_seconds(said, 1e9), stall_seconds(said), transfer_seconds(said, 4e9)) == (70.0, 5.0, 302.0)
    for name, size in (("a.safetensors", 30), ("b.safetensors", 12), ("config.json", 5)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert folder_bytes(tmp_path) == 42 and folder_bytes(tmp_path / "none") == 0
