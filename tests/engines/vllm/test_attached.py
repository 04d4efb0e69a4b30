"""A server that another process supervises: asked for, asked again after its death, and over several nodes.

Supervisor and trainer are threads of one process here; what passes between them are the files that they leave for each
other, as it would on two nodes.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
from weight_sources import FolderSource

from megatron_r1.engines.base import EngineSpec
from megatron_r1.engines.vllm.attached import AttachedEngine, Record, Request, ServerFiles
from megatron_r1.engines.vllm.command import NodeSpan, server_command, server_environment
from megatron_r1.engines.vllm.server import LocalEngine
from megatron_r1.engines.vllm.supervise import follow, supervise
from megatron_r1.engines.vllm.sync import WeightSync
from megatron_r1.errors import EngineError

from .conftest import prompt

pytestmark = pytest.mark.timeout(600)


@contextlib.contextmanager
def supervised(config, run_dir, log_dir, attempt="7.0", nodes=1):
    """A supervisor of vllm-0 for each of `nodes` nodes; yields the engines that they own."""
    ended = threading.Event()
    engines, threads = [], []
    for node in range(nodes):
        name = "vllm-0" if node == 0 else f"vllm-0-node{node}"
        engine = LocalEngine(EngineSpec(config=config, model_path=run_dir, run_dir=log_dir, name=name))
        files = ServerFiles(run_dir, "vllm-0", attempt=attempt)
        work, extra = (supervise, {"nodes": nodes}) if node == 0 else (follow, {"nodes": nodes, "node": node})
        threads.append(threading.Thread(target=work, args=(engine, files, ended), kwargs=extra))
        engines.append(engine)
    for thread in threads:
        thread.start()
    try:
        yield engines
    finally:
        ended.set()
        for engine in engines:
            engine.stop()
        for thread in threads:
            thread.join()


def attach(config, model, run_dir, attempt="7.0", **fields):
    spec = EngineSpec(config=config, model_path=model, run_dir=run_dir, **fields)
    return AttachedEngine(spec, attempt=attempt)


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow  # a server, killed and started again
def test_a_supervised_server_is_used_like_one_of_our_own(config, folders, oracles, tmp_path):
    """Started on request, pushed to, killed, restarted, pushed to again, ended."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with supervised(config, run_dir, tmp_path / "logs") as (owned,):
        time.sleep(0.5)
        assert not (run_dir / "servers").exists(), "nothing is written before the trainer asks"
        engine = attach(config, folders[0], run_dir)
        assert not engine.alive()
        engine.start()
        engine.wait_ready()
        assert engine.alive() and engine.starts == 1
        assert engine.where.startswith(f"{owned.host}:{owned.port}, log ")
        assert engine.client.base_url == f"http://{owned.host}:{owned.port}"
        token = run_dir / "servers" / "vllm-0.token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600 and token.read_text() == owned.token
        assert owned.token not in (run_dir / "servers" / "vllm-0.json").read_text()
        sync = WeightSync(config, source=FolderSource(folders[1]), engines=(engine,), model_path=folders[0])
        sync.push(1)
        ids = prompt(20, 3)
        assert abs(engine.client.score(ids) - oracles[1].logprobs(ids)).max() < 1e-3

        os.killpg(owned.pid, signal.SIGKILL)
        wait_until(lambda: not engine.alive())
        wait_until(lambda: "exit code -9" in str(engine.death("died")))  # the supervisor looks four times a second
        assert "died" in str(engine.death("died")) and str(owned.log_path) in str(engine.death("died"))
        engine.restart()
        assert engine.alive() and engine.starts == 2 and engine.client.weight_version() == 0
        sync.push(2)
        assert abs(engine.client.score(ids) - oracles[1].logprobs(ids)).max() < 1e-3
        sync.close()
        engine.stop()
        wait_until(lambda: owned.process is None)
        assert not engine.alive()


@pytest.mark.slow  # a server's start
def test_a_server_that_cannot_start_says_why_through_its_supervisor(config, folders, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    wrong = dataclasses.replace(config, max_model_len=100_000, max_restarts=1)
    with supervised(wrong, run_dir, tmp_path / "logs"):
        engine = attach(wrong, folders[0], run_dir)
        engine.start()
        with pytest.raises(EngineError, match="max_model_len to what the model"):
            engine.wait_ready()


def test_without_a_supervisor_the_wait_ends_with_that_reason(config, folders, tmp_path):
    engine = attach(dataclasses.replace(config, start_timeout_seconds=0.5), folders[0], tmp_path)
    engine.start()
    with pytest.raises(EngineError, match="no supervisor took it up"):
        engine.wait_ready()


def test_restarts_are_bounded(config, folders, tmp_path):
    engine = attach(dataclasses.replace(config, max_restarts=0), folders[0], tmp_path)
    engine.start()
    with pytest.raises(EngineError, match=r"rollout\.max_restarts is 0"):
        engine.restart()


def test_what_another_attempt_of_the_job_left_is_not_believed(config, folders, tmp_path):
    engine = attach(config, folders[0], tmp_path, attempt="7.1")
    engine.start()
    old = ServerFiles(tmp_path, "vllm-0", attempt="7.0")
    old.write(Record(attempt="7.0", starts=1, state="ready", host="127.0.0.1", port=1))
    assert not engine.alive() and engine.files.read(Record) is None
    asked = engine.files.read(Request)
    assert asked is not None and (asked.starts, asked.stopped) == (1, False) and old.read(Request) is None
    engine.stop()
    asked = engine.files.read(Request)
    assert asked is not None and asked.stopped


def test_the_parts_of_a_server_over_two_nodes_are_started_without_ray(config, folders):
    """TP16 on two nodes of 8 GPUs: the command lines of both."""
    large = dataclasses.replace(config, device="cuda", sync="nccl", tensor_parallel=16)
    lines = [
        server_command(
            large,
            model_path=folders[0],
            host="10.0.0.5",
            port=8000,
            seed=0,
            span=NodeSpan(nodes=2, node=node, address="10.0.0.5", port=29600),
        )
        for node in (0, 1)
    ]
    for node, line in enumerate(lines):
        flags = dict(itertools.pairwise(line))
        assert flags["--nnodes"] == "2" and flags["--node-rank"] == str(node)
        assert (flags["--master-addr"], flags["--master-port"]) == ("10.0.0.5", "29600")
        assert flags["--tensor-parallel-size"] == "16" and flags["--distributed-executor-backend"] == "mp"
        assert json.loads(flags["--weight-transfer-config"]) == {"backend": "shards"}
        assert ("--headless" in line) == (node == 1)
        assert not any("ray" in word.lower() for word in line)
    alone = server_command(large, model_path=folders[0], host="127.0.0.1", port=8000, seed=0)
    assert "--nnodes" not in alone and "--headless" not in alone


@pytest.mark.slow  # four workers, started twice
def test_a_server_over_two_nodes_answers_and_comes_back_when_one_node_loses_its_part(
    config, folders, oracles, tmp_path, monkeypatch
):
    """TP2 as one worker on each of two nodes, which meet through vLLM's own multi-node start."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    wide = dataclasses.replace(config, tensor_parallel=2, start_timeout_seconds=400.0)
    ids = prompt(20, 3)
    with supervised(wide, run_dir, tmp_path / "logs", nodes=2) as (_, other):
        engine = attach(wide, folders[0], run_dir)
        engine.start()
        engine.wait_ready()
        assert abs(engine.client.score(ids) - oracles[0].logprobs(ids)).max() < 1e-3
        os.killpg(other.pid, signal.SIGKILL)
        wait_until(lambda: not engine.alive())
        wait_until(lambda: "(node 1 of the server) died" in str(engine.death("died")))
        engine.restart()
        assert abs(engine.client.score(ids) - oracles[0].logprobs(ids)).max() < 1e-3


def test_gloo_of_a_server_over_nodes_keeps_the_interface_that_launch_sh_names(config, folders):
    def interface(span):
        return server_environment(
            config,
            base={"GLOO_SOCKET_IFNAME": "ib0"},
            model_path=folders[0],
            host="10.0.0.5",
            token="t" * 40,
            private_dir=Path("/tmp"),
            visible_devices=None,
            span=span,
        )["GLOO_SOCKET_IFNAME"]

    assert interface(None) == "lo"
    assert interface(NodeSpan(nodes=2, node=1, address="10.0.0.5", port=29600)) == "ib0"
