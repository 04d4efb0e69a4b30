"""Supervision of real vLLM processes: readable deaths, clean ends."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.config import RolloutConfig
from megatron_r1.engines.base import EngineSpec
from megatron_r1.engines.vllm.command import server_command, server_environment
from megatron_r1.engines.vllm.process_group import kill_group, shared_memory_of
from megatron_r1.engines.vllm.server import LocalEngine, start_engines
from megatron_r1.errors import EngineError


def test_a_server_that_cannot_start_says_why(config: RolloutConfig, folders: list[Path], tmp_path: Path) -> None:
    greedy = dataclasses.replace(config, max_model_len=100_000)
    with pytest.raises(EngineError) as caught:
        start_engines(greedy, model_path=folders[0], run_dir=tmp_path)
    message = str(caught.value)
    assert "exit code 1" in message and "lower rollout.max_model_len" in message
    assert "100000" in message and str(tmp_path / "logs" / "vllm-0.log") in message


def test_a_server_that_takes_too_long_is_stopped(config, folders: list[Path], tmp_path: Path) -> None:
    hasty = dataclasses.replace(config, start_timeout_seconds=0.5)
    engine = LocalEngine(EngineSpec(config=hasty, model_path=folders[0], run_dir=tmp_path))
    engine.start()
    pid = engine.pid
    with pytest.raises(EngineError, match=r"start_timeout_seconds: vllm-0 did not answer within"):
        engine.wait_ready()
    assert not psutil.pid_exists(pid) and engine.private_dir is None


def test_a_server_dies_with_its_trainer(folders: list[Path], tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from megatron_r1.config import RolloutConfig
from megatron_r1.engines.base import EngineSpec
from megatron_r1.engines.vllm.server import LocalEngine
config = RolloutConfig(device="cpu", sync="gloo")
spec = EngineSpec(config=config, model_path=Path({str(folders[0])!r}), run_dir=Path({str(tmp_path)!r}))
engine = LocalEngine(spec)
engine.start()
print(engine.pid, flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    server = psutil.Process(int(trainer.stdout.readline()))
    time.sleep(1.5)
    assert server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 10
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server outlived its trainer"
        time.sleep(0.05)


def test_a_running_server_is_not_started_twice(engine: LocalEngine) -> None:
    with pytest.raises(EngineError, match="already running"):
        engine.start()


def test_the_command_line_follows_the_configuration(folders: list[Path], tmp_path: Path) -> None:
    gpu = RolloutConfig(device="cuda", sync="nccl", tensor_parallel=8, dtype="bf16", memory_fraction=0.7)
    command = server_command(gpu, model_path=folders[0], host="127.0.0.1", port=1, seed=3)
    pairs = dict(itertools.pairwise(command))
    assert pairs["--tensor-parallel-size"] == "8" and pairs["--dtype"] == "bfloat16"
    assert pairs["--weight-transfer-config"] == '{"backend": "shards"}'
    assert pairs["--gpu-memory-utilization"] == "0.7" and "--enforce-eager" not in command
    assert "--load-format" not in command and "--disable-log-stats" not in command
    assert pairs["--distributed-timeout-seconds"] == pairs["--cpu-distributed-timeout-seconds"] == "1800"
    empty = tmp_path / "config-only"
    empty.mkdir()
    assert "dummy" in server_command(gpu, model_path=empty, host="127.0.0.1", port=1, seed=3)


def test_the_environment_holds_the_token_and_none_of_the_trainers_rendezvous(folders, tmp_path: Path) -> None:
    environment = server_environment(
        RolloutConfig(device="cuda", sync="ipc"),
        base={"RANK": "0", "MASTER_PORT": "29500", "HOME": "/x"},
        model_path=folders[0],
        host="127.0.0.1",
        token="secret",
        private_dir=tmp_path,
        visible_devices="4,5",
    )
    assert environment["VLLM_API_KEY"] == "secret" and environment["HOME"] == "/x"
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment  # nothing pickled is sent
    # 900 s and a folder of less than a megabyte; 600 s and 33,792 tokens at 50 a second
    assert environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "901"
    assert environment["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] == "1276"
    assert not {"RANK", "MASTER_PORT"} & set(environment)
    assert "OMP_WAIT_POLICY" not in environment


def test_a_killed_group_leaves_no_shared_memory_and_takes_no_others(tmp_path: Path) -> None:
    """Python's resource tracker, which would remove it, is of the group and is killed with it. The processes have also
    mapped a file whose name is no UTF-8."""
    script = """
import mmap, os, sys
from multiprocessing import get_context, shared_memory
memory = shared_memory.SharedMemory(create=True, size=4096)
odd = open(os.path.join(sys.argv[1].encode(), b"\\xff"), "w+b")
odd.write(b"x")
odd.flush()
mapped = mmap.mmap(odd.fileno(), 1)
lock = get_context("spawn").Lock()
print(memory.name, flush=True)
input()
"""
    words = [sys.executable, "-c", script, str(tmp_path)]
    killed, other = (
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(2)
    )
    try:
        for process in (killed, other):
            assert process.stdout is not None and process.stdout.readline().startswith("psm_")
        shared = shared_memory_of(killed.pid)
        assert [path.name[:4] for path in sorted(shared)] == ["psm_", "sem."] and all(path.exists() for path in shared)
        kill_group(killed.pid)
        assert killed.wait(10) == -signal.SIGKILL and not any(path.exists() for path in shared)
        assert len(shared_memory_of(other.pid)) == 2 and all(path.exists() for path in shared_memory_of(other.pid))
        kill_group(killed.pid)  # it is gone
    finally:
        for process in (killed, other):
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_server_of_two_workers_that_hangs_leaves_no_shared_memory(config, folders, tmp_path: Path) -> None:
    two = dataclasses.replace(config, tensor_parallel=2, threads=1)
    (engine,) = start_engines(two, model_path=folders[0], run_dir=tmp_path)
    try:
        assert engine.pid is not None
        shared = shared_memory_of(engine.pid)
        assert any(path.name.startswith("psm_") for path in shared)
        os.kill(engine.pid, signal.SIGSTOP)
    finally:
        engine.stop()
    assert not [path for path in shared if path.exists()]


@pytest.mark.slow
def test_a_port_taken_meanwhile_is_replaced(config: RolloutConfig, folders: list[Path], tmp_path: Path) -> None:
    import socket

    engine = LocalEngine(EngineSpec(config=config, model_path=folders[0], run_dir=tmp_path))
    with engine, socket.socket() as thief:
        engine.start()
        taken = engine.port
        thief.bind(("127.0.0.1", taken))
        thief.listen()
        engine.wait_ready()
        assert engine.port != taken and engine.client.weight_version() == 0


@pytest.mark.slow
def test_a_paused_server_with_a_hanging_request_dies_with_its_trainer(folders: list[Path], tmp_path: Path) -> None:
    """vLLM's own shutdown waits for such a request for ever."""
    script = f"""
import sys, threading, time
from pathlib import Path
from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.engines.base import EngineSpec
from megatron_r1.engines.vllm.server import LocalEngine
config = RolloutConfig(device="cpu", sync="gloo", dtype="fp32", max_model_len=64, memory_fraction=0.2, kv_cache_gib=0.1)
spec = EngineSpec(config=config, model_path=Path({str(folders[0])!r}), run_dir=Path({str(tmp_path)!r}))
engine = LocalEngine(spec)
engine.start()
engine.wait_ready()
engine.client.request("POST", "/pause?mode=wait&clear_cache=true")
ask = lambda: engine.client.generate([5, 6, 7], num_completions=1, sampling=SamplingConfig(max_new_tokens=4))
threading.Thread(target=ask, daemon=True).start()
time.sleep(1.0)
print(engine.pid, flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    server = psutil.Process(int(trainer.stdout.readline()))
    family = [server, *server.children(recursive=True)]
    assert server.is_running()
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], "the server outlived its trainer"
    assert gone or alive
