"""A plan's messages as numbers and as bytes: what trainer ranks and workers must agree on beside the plan itself.

vLLM is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_r1.engines.vllm.peers import IN_FLIGHT, Part, Peers
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Message, Piece, Tensor, Want, message_bytes, rounds_of
from megatron_r1.weights.wire import ParamSpec, PieceWork, views

REFUSAL = torch.zeros(0, 1, dtype=torch.int64)
"""In the place of a worker's messages: there will be none."""


def wants_as_numbers(wants: Sequence[Want]) -> torch.Tensor:
    """int64[wants, 5]: tensor, top, bottom, left, right."""
    return torch.tensor([(want.tensor, *want.box) for want in wants], dtype=torch.int64).reshape(-1, 5)


def messages_of(numbers: torch.Tensor, worker: int, tensors: Sequence[Tensor]) -> list[Message]:
    """A worker's messages, of Plan.numbers. RuntimeError for a refusal."""
    if numbers.shape == REFUSAL.shape:
        raise RuntimeError("weight sync: the trainer will not send these weights to this server; its error says why")
    pieces: dict[tuple[int, int], list[Piece]] = {}
    for number, sender, want, tensor, *box in numbers.tolist():
        pieces.setdefault((number, sender), []).append(Piece(want, tensor, Box(*box)))
    return [
        Message(number, sender, worker, tuple(own), message_bytes(own, tensors))
        for (number, sender), own in pieces.items()
    ]


def prepare_to_send(peers: Peers, messages: Sequence[Message]) -> None:
    """A trainer rank's part of Peers.prepare."""
    receivers = sorted({peers.meeting.trainers + message.worker for message in messages})
    peers.prepare(largest_round(messages), to=receivers, of=())


def prepare_to_receive(peers: Peers, messages: Sequence[Message]) -> None:
    """A worker's part of Peers.prepare."""
    peers.prepare(0, to=(), of=sorted({message.sender for message in messages}))


def largest_round(messages: Sequence[Message]) -> int:
    """Bytes."""
    return max((sum(message.num_bytes for message in group) for group in rounds_of(messages)), default=0)


def cut(buffer: torch.Tensor, group: Sequence[Message], members: Sequence[int]) -> list[Part]:
    """Each message's part of a round's buffer, with the member that it goes to or comes from."""
    parts, begin = [], 0
    for message, member in zip(group, members, strict=True):
        parts.append((member, buffer[begin : begin + message.num_bytes]))
        begin += message.num_bytes
    return parts


def send_all(
    peers: Peers,
    messages: Sequence[Message],
    specs: Sequence[ParamSpec],
    tensors: Sequence[Tensor],
    fill: PieceWork,
    given_up: Callable[[], bool],
) -> None:
    """A trainer rank's part of an update: round by round, packing one while the last is on its way."""
    buffers = peers.outbox(largest_round(messages))
    on_the_way: list[Callable[[], None]] = [lambda: None for _ in buffers]
    for number, group in enumerate(rounds_of(messages)):
        slot = number % IN_FLIGHT
        on_the_way[slot]()
        parts = cut(buffers[slot], group, [peers.meeting.trainers + message.worker for message in group])
        for message, (_, part) in zip(group, parts, strict=True):
            for piece, place in views(message, part, specs, tensors):
                fill(piece, place)
        on_the_way[slot] = peers.send(parts, group[0].round)
    for settled in on_the_way:
        settled()
    peers.finish(given_up)


def receive_all(
    peers: Peers,
    messages: Sequence[Message],
    specs: Sequence[ParamSpec],
    tensors: Sequence[Tensor],
    take: PieceWork,
) -> None:
    """A worker's part of an update: `take` has each piece while the next round is on its way."""
    buffers = peers.inbox(largest_round(messages))
    groups = list(rounds_of(messages))
    parts = [
        cut(buffers[number % IN_FLIGHT], group, [message.sender for message in group])
        for number, group in enumerate(groups)
    ]
    coming = [peers.receive(own, group[0].round) for own, group in zip(parts[:IN_FLIGHT], groups, strict=False)]
    for number, group in enumerate(groups):
        for message, arrived in zip(group, coming[number], strict=True):
            for piece, place in views(message, arrived(), specs, tensors):
                take(piece, place)
        peers.taken(parts[number], group[0].round)
        if (later := number + IN_FLIGHT) < len(groups):
            coming.append(peers.receive(parts[later], groups[later][0].round))
    peers.finish(lambda: False)


def pieces_by_layer(messages: Sequence[Message], tensors: Sequence[Tensor]) -> Mapping[str, int]:
    """How many pieces of each layer come."""
    counts: dict[str, int] = {}
    for message in messages:
        for piece in message.pieces:
            layer = tensors[piece.tensor].layer
            counts[layer] = counts.get(layer, 0) + 1
    return counts
