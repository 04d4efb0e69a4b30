"""Worker: rank 0 is a trainer's rank and rank 1 a vLLM worker; one of them raises in a round, and leaves while it keeps
its error, as a rank does that tells the others of it.

usage: peers_fail.py STORE FOLDER. FOLDER/RANK.json: by way, who raised and in which round: seconds until the member had
left, and its error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.engines.vllm.messages import prepare_to_receive, prepare_to_send, receive_all, send_all
from megatron_r1.engines.vllm.peers import Meeting, SyncWay, join
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Shard, Want, make_plan
from megatron_r1.weights.wire import wire_tensors

ROUNDS = 6
BUCKET = 1 << 20
BOX = Box(0, 1024, 0, 256)
SPECS = [(f"{number}.weight", torch.float32, (1024, 256)) for number in range(ROUNDS)]  # a round's bytes each


def one_way(way: SyncWay, folder: Path, rank: int, raises: int, at: int) -> tuple[float, str]:
    tensors = wire_tensors(SPECS)
    numbers = range(ROUNDS)
    plan = make_plan(tensors, [Shard(n, BOX, (0,)) for n in numbers], [[[Want(n, BOX) for n in numbers]]], BUCKET)
    place = str(folder / f"meet-{way}-{raises}-{at}")
    meeting = Meeting(sync=way, place=place, trainers=1, workers=1, timeout_seconds=30)
    peers = join(meeting, rank, torch.device("cpu"))
    done = 0

    def work(*_: Any) -> None:
        nonlocal done
        done += 1
        if rank == raises and done == at:
            raise ValueError("raised on purpose")

    prepare = prepare_to_receive if rank else prepare_to_send
    prepare(peers, plan.received[0] if rank else plan.sent[0])
    begun, kept = time.monotonic(), None
    try:
        if rank:
            receive_all(peers, plan.received[0], SPECS, tensors, work)
        else:
            send_all(peers, plan.sent[0], SPECS, tensors, work, lambda: False)
    except Exception as error:
        kept = error
        peers.close()
    seconds = time.monotonic() - begun
    dist.barrier()
    peers.close()
    return seconds, type(kept).__name__


def main(store: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    cases: list[tuple[SyncWay, int, int]] = [("gloo", 0, 5), ("gloo", 1, 1), ("ipc", 0, 5), ("ipc", 1, 1)]
    found = {f"{way} {raises}": one_way(way, folder, rank, raises, at) for way, raises, at in cases}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
