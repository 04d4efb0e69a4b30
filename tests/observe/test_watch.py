"""Deadlines, stacks and the heartbeat of a rank, with a real thread and short times."""

import json
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron_r1.observe.watch import Watch, collective


@pytest.fixture
def ended():
    return []


@pytest.fixture
def wait(ended):
    def wait():
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)

    return wait


def test_a_phase_past_its_deadline_writes_stacks_and_ends(tmp_path, ended, wait, capsys):
    with Watch(tmp_path, rank=3, deadlines={"train": 0.1}, steps=9, end=ended.append) as watch:
        watch.step(4)
        with watch.phase("train"):
            wait()
    assert ended[0] == 75
    text = (tmp_path / "stacks" / "rank_00003.txt").read_text()
    assert "rank 3: phase train has lasted" in text and "(deadlines.train); done 4 of 9 steps" in text
    assert "waits in no collective" in text
    assert "thread MainThread:" in text and "in wait" in text
    assert "phase train" in capsys.readouterr().err


def test_what_must_be_done_before_the_end_is_done(tmp_path, ended, wait, monkeypatch):
    monkeypatch.setattr("megatron_r1.observe.watch.CLEANUP_SECONDS", 0.5)
    done, never = [], threading.Event()
    with Watch(tmp_path, rank=0, deadlines={"train": 0.1}, end=ended.append) as watch:
        watch.before_the_end(lambda: done.append("stopped"))
        watch.before_the_end(never.wait)  # does not come back
        with watch.phase("train"):
            wait()
    assert done[0] == "stopped" and ended[0] == 75


def test_each_phase_has_a_clock_of_its_own(tmp_path, ended):
    with Watch(tmp_path, rank=0, deadlines={"train": 1.5, "sync": 0.0}, end=ended.append) as watch:
        for _ in range(3):
            with watch.phase("train"):
                time.sleep(0.7)
        with watch.phase("sync"), watch.phase("other"):
            time.sleep(0.7)
    assert ended == []
    assert not (tmp_path / "stacks").exists()


def test_an_inner_phase_stops_the_outer_one(tmp_path, ended, wait):
    with Watch(tmp_path, rank=0, deadlines={"rollout": 0.1, "reward": 30}, end=ended.append) as watch:
        with watch.phase("reward"), watch.phase("rollout"):
            assert watch.current == "rollout"
            wait()
        assert ended
        assert watch.current == "between phases"


def test_it_ends_even_where_nothing_can_be_written(tmp_path, ended, wait):
    (tmp_path / "stacks").write_text("a file where the folder should be")
    (tmp_path / "heartbeat.json").mkdir()
    with Watch(tmp_path, rank=0, deadlines={"train": 0.1}, end=ended.append) as watch, watch.phase("train"):
        wait()
    assert ended == [75]


def test_a_hanging_disk_holds_up_the_heartbeat_only(tmp_path, ended, wait, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr("megatron_r1.observe.watch.write_json", lambda path, content: hangs.wait(60))
    with Watch(tmp_path, rank=0, deadlines={"train": 0.1}, end=ended.append) as watch, watch.phase("train"):
        wait()
        hangs.set()
    assert ended == [75]


def test_a_step_begins_the_clock_anew(tmp_path, ended):
    with Watch(tmp_path, rank=1, deadlines={"train": 1.5}, end=ended.append) as watch, watch.phase("train"):
        for step in range(3):
            time.sleep(0.7)
            watch.step(step)
    assert ended == []


def test_the_heartbeat_says_where_the_run_is(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_r1.observe.watch.HEARTBEAT_SECONDS", 0.05)
    beat = {}
    with Watch(tmp_path, rank=0, deadlines={}, steps=5) as watch:
        watch.step(2)
        with watch.phase("train"):
            deadline = time.monotonic() + 20
            while beat.get("phase") != "train" and time.monotonic() < deadline:
                time.sleep(0.02)
                if (tmp_path / "heartbeat.json").exists():
                    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["phase"], beat["step"], beat["steps"]) == ("train", 2, 5)
    assert abs(beat["time"] - time.time()) < 30


def test_other_ranks_leave_the_heartbeat_alone(tmp_path):
    with Watch(tmp_path, rank=1, deadlines={}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_collective_that_a_rank_waits_in_is_named(tmp_path):
    """Rank 0 of 2 waits in a barrier for rank 1, which comes when rank 0 has been looked at."""
    store = dist.FileStore(str(tmp_path / "store"), 2)
    found = []
    ready, looked = threading.Event(), threading.Event()

    def look():
        ready.wait(20)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not found:
            name = collective(sys._current_frames()[main])
            if name.startswith("recv"):
                found.append(name)
            time.sleep(0.02)
        looked.set()

    main = threading.main_thread().ident
    watcher = threading.Thread(target=look)
    watcher.start()
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path / "store"), str(tmp_path / "go")])
    dist.init_process_group("gloo", store=store, rank=0, world_size=2)
    try:
        ready.set()
        threading.Thread(target=lambda: (looked.wait(20), (tmp_path / "go").touch())).start()
        dist.recv(torch.zeros(1), src=1)
    finally:
        dist.destroy_process_group()
    watcher.join()
    assert other.wait(60) == 0
    assert found and found[0].startswith("recv, called in ") and "test_watch.py" in found[0]


OTHER = """
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=1, world_size=2)
while not Path(sys.argv[2]).exists():
    time.sleep(0.02)
dist.send(torch.zeros(1), dst=0)
dist.destroy_process_group()
"""
