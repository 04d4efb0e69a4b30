"""A plan's messages as bytes: where each piece lies in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_r1.agreement import together, trainers
from megatron_r1.resharding.boxes import whole
from megatron_r1.resharding.layers import group_of_tensor
from megatron_r1.resharding.plan import Message, Piece, Plan, Tensor, offsets, rounds_of

ParamSpec = tuple[str, torch.dtype, tuple[int, ...]]
"""(Hugging Face name, dtype on the wire, full shape)."""

PieceWork = Callable[[Piece, torch.Tensor], None]
"""Fills, or takes, a piece's numbers: [rows, columns] of its wire dtype."""


def num_bytes(spec: ParamSpec) -> int:
    _, dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def wire_tensors(specs: Sequence[ParamSpec]) -> list[Tensor]:
    """Announced weights as the planner's tensors."""
    found = []
    for name, dtype, shape in specs:
        box = whole(shape)
        found.append(Tensor(name, box.rows, box.columns, dtype.itemsize, group_of_tensor(name)))
    return found


def views(
    message: Message, buffer: torch.Tensor, specs: Sequence[ParamSpec], tensors: Sequence[Tensor]
) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Each piece with its place in the message's bytes: [rows, columns] of its wire dtype."""
    for piece, begin in zip(message.pieces, offsets(message.pieces, tensors), strict=False):
        _, dtype, _ = specs[piece.tensor]
        end = begin + piece.box.size * dtype.itemsize
        yield piece, buffer[begin:end].view(dtype).view(piece.box.rows, piece.box.columns)


def exchange(
    plan: Plan,
    specs: Sequence[ParamSpec],
    tensors: Sequence[Tensor],
    device: torch.device,
    fill: PieceWork,
    take: PieceWork,
    own: Callable[[], None] = lambda: None,
) -> None:
    """Send and receive what `plan` says among the trainer's ranks, whose numbers are its workers' too; first `own`,
    what a rank does without others. A collective.

    What fails on one rank fails on all, as with `together`: it still sends all its messages, then without their
    numbers, so that nobody waits for it.
    """
    rank = dist.get_rank() if trainers() > 1 else 0
    sent = {group[0].round: group for group in rounds_of(plan.sent.get(rank, []))}
    received = {group[0].round: group for group in rounds_of(plan.received.get(rank, []))}
    work = FirstFailure()
    work.attempt(own)
    for number in sorted({*sent, *received}):
        transfers, coming = [], []
        for message in sent.get(number, []):
            buffer = torch.empty(message.num_bytes, dtype=torch.uint8, device=device)
            for piece, place in views(message, buffer, specs, tensors):
                work.attempt(fill, piece, place)
            transfers.append(dist.P2POp(dist.isend, buffer, message.worker))
        for message in received.get(number, []):
            buffer = torch.empty(message.num_bytes, dtype=torch.uint8, device=device)
            transfers.append(dist.P2POp(dist.irecv, buffer, message.sender))
            coming.append((message, buffer))
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
        for message, buffer in coming:
            for piece, place in views(message, buffer, specs, tensors):
                work.attempt(take, piece, place)
    together(work.settle)


class FirstFailure:
    """Work in steps of which none is done any more once one has failed."""

    def __init__(self) -> None:
        self._error: Exception | None = None

    def attempt(self, step: Callable[..., object], *arguments: object) -> None:
        if self._error is None:
            try:
                step(*arguments)
            except Exception as error:
                self._error = error

    def settle(self) -> None:
        """Raise what the step that failed raised."""
        if self._error is not None:
            raise self._error
