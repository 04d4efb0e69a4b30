"""The ways of rollout.sync without servers: every number that workers want comes, and is right, at every update."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from megatron_r1.engines.vllm.nccl_peers import NcclPeers, within
from megatron_r1.engines.vllm.peers import Meeting, join
from megatron_r1.engines.vllm.shared_peers import SHARED_MEMORY, allocate, map_memory, remove_left_over
from megatron_r1.errors import EngineError

WANTED = {2: 48 * 20 * 2 + 48 + 48 * 33, 3: 48 * 20 * 2 + 48 + 48 * 33, 4: 48 * 40 * 2 + 48 + 96 * 33}
"""Numbers, by worker: half of two matrices, a norm and half of the head; all of everything."""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, dict[str, list[list[int]]]]:
    folder = tmp_path_factory.mktemp("peers")
    run_ranks("peers.py", str(folder), ranks=5)
    return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(5)}


@pytest.mark.parametrize("way", ["gloo", "ipc", "nccl"])
def test_all_comes_and_is_right(found, way):
    for rank in range(5):
        assert found[rank][way] == ([[WANTED[rank], 0]] * 2 if rank in WANTED else [])


def test_nothing_stays_in_the_shared_memory(found):
    assert found and not list(SHARED_MEMORY.glob("mr1-weights-meet-ipc-*"))


def test_too_little_shared_memory_is_said():
    path = SHARED_MEMORY / f"mr1-weights-{uuid.uuid4().hex}-0"
    with pytest.raises(EngineError, match=r"rollout.sync ipc needs .* MiB in /dev/shm.*--shm-size.*sync_bucket_mib"):
        allocate(path, 1 << 50)
    assert not path.exists()


def test_memory_that_is_not_there_is_not_made():
    path = SHARED_MEMORY / f"mr1-weights-{uuid.uuid4().hex}-0"
    with pytest.raises(FileNotFoundError, match="trainer and servers must share /dev/shm"):
        map_memory(path, 4096)
    assert not path.exists()


def test_what_a_killed_rank_left_is_removed_and_what_is_in_use_is_not():
    old, new, other = (
        SHARED_MEMORY / f"{name}-{uuid.uuid4().hex}-0" for name in ("mr1-weights", "mr1-weights", "mine")
    )
    try:
        for path in (old, new, other):
            allocate(path, 4096)
        for path in (old, other):
            os.utime(path, (time.time() - 601, time.time() - 601))
        remove_left_over(older_than_seconds=600)
        assert [path.exists() for path in (old, new, other)] == [False, True, True]
    finally:
        for path in (old, new, other):
            path.unlink(missing_ok=True)


class Refusing:
    """A communicator that refuses to send, as NCCL does where the buffer or the member is none of its own."""

    open_groups = 0

    def group_start(self) -> None:
        self.open_groups += 1

    def group_end(self) -> None:
        self.open_groups -= 1

    def send(self, buffer: torch.Tensor, dst: int, stream: object) -> None:
        raise AssertionError("this communicator is made for another device")


def test_a_refused_call_leaves_no_group_of_nccl_calls_open():
    meeting = Meeting(sync="nccl", place="", trainers=1, workers=1, timeout_seconds=5)
    communicator = Refusing()
    peers = NcclPeers(meeting, 0, torch.device("cpu"), communicator)
    with pytest.raises(AssertionError, match="another device"):
        peers.send([(1, torch.zeros(4, dtype=torch.uint8))], 0)
    assert communicator.open_groups == 0


def test_a_member_that_never_comes_to_nccl_is_not_waited_for_for_ever():
    never = threading.Event()
    with pytest.raises(RuntimeError, match="not all members have entered the NCCL communicator in 0 s"):
        within(0.05, never.wait)
    left = [thread for thread in threading.enumerate() if thread.name == "nccl-meeting"]
    never.set()
    assert left
    assert all(thread.daemon for thread in left)


def test_what_meeting_over_nccl_raises_is_raised_here():
    assert within(5.0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> list[dict[str, tuple[float, str]]]:
    folder = tmp_path_factory.mktemp("broken")
    run_ranks("peers_fail.py", str(folder), ranks=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", ["gloo", "ipc"])
@pytest.mark.parametrize("raises", [0, 1])
def test_who_leaves_releases_the_other_though_its_error_is_kept(broken, way, raises):
    (_, own), (seconds, heard) = (broken[rank][f"{way} {raises}"] for rank in (raises, 1 - raises))
    assert (own, heard) == ("ValueError", "RuntimeError")
    assert seconds < 10  # of 30, after which an operation ends by itself


@pytest.mark.parametrize("sync", ["gloo", "ipc"])
def test_a_worker_on_another_machine_is_told_what_to_use(tmp_path, sync):
    place = tmp_path / "elsewhere" / "meet"
    meeting = Meeting(sync=sync, place=str(place), trainers=1, workers=1, timeout_seconds=5)
    with pytest.raises(EngineError, match=rf"rollout.sync {sync} trainer and servers must share one machine \(nccl"):
        join(meeting, 1, torch.device("cpu"))
    assert not Path(place).parent.exists()
