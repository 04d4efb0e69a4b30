"""A plan's messages as numbers and as bytes: what trainer ranks and workers must agree on beside the plan itself.

vLLM is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_r1.engines.buckets import ParamSpec
from megatron_r1.engines.vllm.peers import Peers
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Message, Piece, Tensor, Want, message_bytes, rounds_of
from megatron_r1.weights.wire import PieceWork, views

IN_FLIGHT = 2
"""Rounds that a rank or worker has on the way: one is packed (or unpacked) while the other travels."""


def wants_as_numbers(wants: Sequence[Want]) -> torch.Tensor:
    """int64[wants, 5]: tensor, top, bottom, left, right."""
    return torch.tensor([(want.tensor, *want.box) for want in wants], dtype=torch.int64).reshape(-1, 5)


def wants_of(numbers: torch.Tensor) -> list[Want]:
    return [Want(tensor, Box(*box)) for tensor, *box in numbers.tolist()]


def messages_as_numbers(messages: Sequence[Message]) -> torch.Tensor:
    """int64[pieces, 8]: round, sender, want, tensor, top, bottom, left, right; in the messages' order."""
    rows = [
        (message.round, message.sender, piece.want, piece.tensor, *piece.box)
        for message in messages
        for piece in message.pieces
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 8)


def messages_of(numbers: torch.Tensor, worker: int, tensors: Sequence[Tensor]) -> list[Message]:
    """A worker's messages again."""
    pieces: dict[tuple[int, int], list[Piece]] = {}
    for number, sender, want, tensor, *box in numbers.tolist():
        pieces.setdefault((number, sender), []).append(Piece(want, tensor, Box(*box)))
    return [
        Message(number, sender, worker, tuple(own), message_bytes(own, tensors))
        for (number, sender), own in pieces.items()
    ]


def buffers_for(messages: Sequence[Message]) -> list[torch.Tensor]:
    """u8 buffers for the rounds on the way."""
    largest = max((sum(message.num_bytes for message in group) for group in rounds_of(messages)), default=0)
    return [torch.empty(largest, dtype=torch.uint8) for _ in range(IN_FLIGHT)]


def send_all(
    peers: Peers, messages: Sequence[Message], specs: Sequence[ParamSpec], tensors: Sequence[Tensor], fill: PieceWork
) -> None:
    """A trainer rank's part of an update: round by round, packing one while the last is on its way."""
    buffers = buffers_for(messages)
    on_the_way: list[list[torch.distributed.Work]] = [[] for _ in buffers]
    for number, group in enumerate(rounds_of(messages)):
        buffer, works = buffers[number % IN_FLIGHT], on_the_way[number % IN_FLIGHT]
        wait(works)
        begin = 0
        for message in group:
            part = buffer[begin : begin + message.num_bytes]
            for piece, place in views(message, part, specs, tensors):
                fill(piece, place)
            works.append(peers.send(part, peers.meeting.trainers + message.worker, message.round))
            begin += message.num_bytes
    for works in on_the_way:
        wait(works)


def receive_all(
    peers: Peers,
    messages: Sequence[Message],
    specs: Sequence[ParamSpec],
    tensors: Sequence[Tensor],
    take: PieceWork,
) -> None:
    """A worker's part of an update: `take` has each piece while the next round is on its way."""
    buffers = buffers_for(messages)
    groups = list(rounds_of(messages))

    def begin(number: int) -> list[tuple[Message, torch.Tensor, torch.distributed.Work]]:
        started, first = [], 0
        for message in groups[number]:
            part = buffers[number % IN_FLIGHT][first : first + message.num_bytes]
            started.append((message, part, peers.receive(part, message.sender, message.round)))
            first += message.num_bytes
        return started

    coming = {number: begin(number) for number in range(min(IN_FLIGHT, len(groups)))}
    for number in range(len(groups)):
        for message, part, work in coming.pop(number):
            work.wait()
            for piece, place in views(message, part, specs, tensors):
                take(piece, place)
        if number + IN_FLIGHT < len(groups):
            coming[number + IN_FLIGHT] = begin(number + IN_FLIGHT)


def wait(works: list[torch.distributed.Work]) -> None:
    while works:
        works.pop(0).wait()


def pieces_by_layer(messages: Sequence[Message], tensors: Sequence[Tensor]) -> Mapping[str, int]:
    """How many pieces of each layer come."""
    counts: dict[str, int] = {}
    for message in messages:
        for piece in message.pieces:
            layer = tensors[piece.tensor].layer
            counts[layer] = counts.get(layer, 0) + 1
    return counts
