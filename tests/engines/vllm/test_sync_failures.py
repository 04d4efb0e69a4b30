"""A trainer rank that fails in a push of two ranks: both hear why, soon, and the next push is whole.

Servers that fail: test_sync.py.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from weight_sources import HalvesSource

from megatron_r1.config import RolloutConfig
from megatron_r1.engines.vllm import shard_channel
from megatron_r1.engines.vllm.peers import check_place
from megatron_r1.engines.vllm.server import LocalEngine
from megatron_r1.engines.vllm.sync import WeightSync
from megatron_r1.resharding.boxes import Box

from .conftest import Oracle, prompt

SOON_SECONDS = 60
"""Members that nobody releases wait for five minutes."""


class Failing(HalvesSource):
    """`fails`: rank 1 cannot read its rows, from some on."""

    fails, reads = False, 0

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        self.reads += 1
        if self.fails and self.rank == 1 and self.reads > 20:
            raise KeyError("rank 1 holds no such weights")
        return super().read(tensor, box)


def two_pushes(store: str, config: RolloutConfig, folder: Path, rank: int, engines, first: int, fault: str) -> list:
    """The first fails on rank 1, as `fault` says. Returns the seconds that it took, and its error's type and words."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    source = Failing(folder, rank)
    sync = WeightSync(config, source=source, engines=engines, model_path=folder, rank=rank)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1 and fault == "room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))  # as a full /dev/shm
    if rank == 1 and fault == "place":
        elsewhere = str(folder / "of_another_machine" / "meet")
        shard_channel.check_place = lambda meeting: check_place(dataclasses.replace(meeting, place=elsewhere))
    source.fails = fault == "read"
    begun, failure = time.monotonic(), None
    try:
        sync.push(first)
    except Exception as error:
        failure = error
    seconds = time.monotonic() - begun
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    source.fails, shard_channel.check_place = False, check_place
    try:
        dist.barrier()
        sync.push(first + 1)
        sync.close()
    finally:
        dist.destroy_process_group()
    return [seconds, type(failure).__name__, str(failure)]


def second_rank(pipe, *arguments) -> None:
    pipe.send(two_pushes(*arguments))


@pytest.mark.parametrize(
    ("fault", "way", "types", "words"),
    [
        ("read", "gloo", ["RuntimeError", "KeyError"], "rank 1 holds no such weights"),
        ("read", "ipc", ["RuntimeError", "KeyError"], "rank 1 holds no such weights"),
        ("place", "gloo", ["EngineError", "NoneType"], "trainer and servers must share one machine"),
        ("room", "ipc", ["NoRoomError", "NoneType"], "MiB in /dev/shm for this rank"),
    ],
)
def test_both_ranks_hear_soon_why_one_failed(
    fault: str,
    way: str,
    types: list[str],
    words: str,
    engine: LocalEngine,
    sync: WeightSync,
    config: RolloutConfig,
    folders: list[Path],
    oracles: list[Oracle],
    tmp_path: Path,
) -> None:
    sync.disconnect()
    config = dataclasses.replace(config, sync=way)  # type: ignore[arg-type]
    store, version = str(tmp_path / "store"), sync.version + 1
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=second_rank, args=(theirs, store, config, folders[2], 1, (), version, fault))
    other.start()
    try:
        found = [two_pushes(store, config, folders[2], 0, (engine,), version, fault), ours.recv()]
    finally:
        other.join(30)
        if other.is_alive():
            other.kill()
    assert [kind for _, kind, _ in found] == types
    assert words in found[0][2]
    assert all(seconds < SOON_SECONDS for seconds, _, _ in found)
    ids = prompt(100, 7)
    np.testing.assert_allclose(engine.client.score(ids), oracles[2].logprobs(ids), atol=1e-4)
    sync.push(version + 2)
