"""Worker: ranks 0 and 1 hold halves of weights, ranks 2 to 4 are vLLM workers that want parts of them; all ways of
rollout.sync bring them, twice.

usage: peers.py STORE FOLDER. FOLDER/WORKER.json: by way, how many numbers came at each update and how many were wrong.
For nccl gloo stands in for the communicator, with NCCL's order: a group of calls ends before the next begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.engines.vllm.messages import (
    messages_of,
    prepare_to_receive,
    prepare_to_send,
    receive_all,
    send_all,
)
from megatron_r1.engines.vllm.nccl_peers import NcclPeers
from megatron_r1.engines.vllm.peers import GlooPeers, Meeting, Peers, join
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Shard, Want, make_plan
from megatron_r1.weights.wire import wire_tensors

TRAINERS, WORKERS = 2, 3
BUCKET = 4096
SPECS = [
    ("model.layers.0.q.weight", torch.bfloat16, (48, 40)),
    ("model.layers.0.norm.weight", torch.float32, (48,)),
    ("model.layers.1.q.weight", torch.bfloat16, (48, 40)),
    ("lm_head.weight", torch.float32, (96, 33)),  # 12,672 bytes: more than a round may have
]
SHARDS = [
    Shard(0, Box(0, 24, 0, 40), (0,)), Shard(0, Box(24, 48, 0, 40), (1,)), Shard(1, Box(0, 48, 0, 1), (0, 1)),
    Shard(2, Box(0, 48, 0, 20), (0,)), Shard(2, Box(0, 48, 20, 40), (1,)), Shard(3, Box(0, 96, 0, 33), (1,)),
]  # fmt: skip
HALVES = [(Box(0, 48, 20 * half, 20 * half + 20), Box(48 * half, 48 * half + 48, 0, 33)) for half in range(2)]
SERVERS = [
    [[Want(0, columns), Want(1, Box(0, 48, 0, 1)), Want(2, columns), Want(3, head)] for columns, head in HALVES],
    [[Want(number, Box(0, shape[0], 0, (*shape, 1)[1])) for number, (_, _, shape) in enumerate(SPECS)]],
]


class GlooGroups:
    """The calls that NcclPeers makes of vLLM's PyNcclCommunicator."""

    def __init__(self, peers: GlooPeers) -> None:
        self.peers, self.calls = peers, []

    def group_start(self) -> None:
        assert not self.calls

    def send(self, buffer: torch.Tensor, dst: int, stream: Any) -> None:
        assert stream is None
        self.calls.append(("send", dst, buffer))

    def recv(self, buffer: torch.Tensor, src: int, stream: Any) -> None:
        assert stream is None
        self.calls.append(("recv", src, buffer))

    def group_end(self) -> None:
        calls, self.calls = self.calls, []
        waits = [self.peers.send([(to, buffer)], 0) for kind, to, buffer in calls if kind == "send"]
        for arrived in self.peers.receive([(of, buffer) for kind, of, buffer in calls if kind == "recv"], 0):
            arrived()
        for settled in waits:
            settled()

    def destroy(self) -> None:
        self.peers.close()


def weights(update: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(update)
    return [torch.randn(shape, generator=generator).to(dtype).view(shape[0], -1) for _, dtype, shape in SPECS]


def open_peers(way: str, place: Path, rank: int) -> Peers:
    sync = "gloo" if way == "nccl" else way
    meeting = Meeting(sync=sync, place=str(place), trainers=TRAINERS, workers=WORKERS, timeout_seconds=60)  # type: ignore[arg-type]
    peers = join(meeting, rank, torch.device("cpu"))
    if way != "nccl":
        return peers
    assert isinstance(peers, GlooPeers)
    return NcclPeers(meeting, rank, torch.device("cpu"), GlooGroups(peers))


def one_way(way: str, folder: Path, rank: int) -> list[tuple[int, int]]:
    tensors = wire_tensors(SPECS)
    peers = open_peers(way, folder / f"meet-{way}", rank)
    found = []
    if rank < TRAINERS:
        plan = make_plan(tensors, SHARDS, SERVERS, BUCKET, grain=64)
        for worker in range(WORKERS if rank == 0 else 0):
            peers.send_numbers(torch.from_numpy(plan.numbers(worker)), to=TRAINERS + worker)
        prepare_to_send(peers, plan.sent[rank])
        for update in range(2):
            held = weights(update)
            send_all(
                peers, plan.sent[rank], SPECS, tensors,
                lambda piece, place: place.copy_(held[piece.tensor][rows(piece.box)]),  # noqa: B023
                lambda: False,
            )  # fmt: skip
    else:
        worker = rank - TRAINERS
        wants = [want for server in SERVERS for want in server][worker]
        messages = messages_of(peers.receive_numbers(of=0), worker, tensors)
        prepare_to_receive(peers, messages)
        for update in range(2):
            held = weights(update)
            got: list[tuple[Any, torch.Tensor]] = []
            receive_all(peers, messages, SPECS, tensors, lambda piece, values: got.append((piece, values.clone())))  # noqa: B023
            assert all(wants[piece.want].box.meet(piece.box) == piece.box for piece, _ in got)
            wrong = [int((values != held[piece.tensor][rows(piece.box)]).sum()) for piece, values in got]
            found.append((sum(values.numel() for _, values in got), sum(wrong)))
    dist.barrier()
    peers.close()
    with contextlib.suppress(RuntimeError):
        peers.send([(0, torch.zeros(1, dtype=torch.uint8))], 0)
        found.append((-1, -1))  # a member that has left must not send
    return found


def rows(box: Box) -> tuple[slice, slice]:
    return slice(box.top, box.bottom), slice(box.left, box.right)


def main(store: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=TRAINERS + WORKERS)
    found = {way: one_way(way, folder, rank) for way in ("gloo", "ipc", "nccl")}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
