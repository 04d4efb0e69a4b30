"""Who sends what to whom, in which round: from what ranks hold and what workers want.

    tensors    the weights under their Hugging Face names, in the order in which they are announced
    shards     parts of tensors, each with the trainer's ranks that hold it (replicas)
    wants      per server and worker: the parts of tensors that go into its parameters
        |
    senders.py   one of the replicas for each byte
    rounds.py    a number for each part
        |
    Plan       messages: (round, sender, worker, pieces)

The same numbers give the same plan, so every rank makes it for itself. Workers are numbered over all servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_r1.errors import EngineError
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.parts import ALIGNMENT_BYTES, WANT, Numbers, aligned
from megatron_r1.resharding.rounds import Rounds, chunks_in_turns
from megatron_r1.resharding.senders import GRAIN_BYTES, Holders
from megatron_r1.resharding.takes import Shard, Tensor, Want, Wants, numbers_of, takes

__all__ = [
    "Message", "Piece", "Plan", "Shard", "Tensor", "Want", "check_wanted", "make_plan", "message_bytes", "offsets",
    "rounds_of",
]  # fmt: skip


class Piece(NamedTuple):
    """`box` of a tensor, a part of the worker's want number `want`."""

    want: int
    tensor: int
    box: Box


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank sends one worker in one round: the pieces one after another, each aligned."""

    round: int
    sender: int
    worker: int
    pieces: tuple[Piece, ...]
    num_bytes: int


class Plan:
    """All messages. They are made when they are asked for: those of a large model are millions of pieces."""

    def __init__(self, pieces: Sequence[npt.NDArray[np.int32]], chunks: Numbers) -> None:
        """`pieces`: [6, n] each: want, tensor, box. `chunks`: [7, n]: round, sender, worker, which of `pieces`, first
        and end of its columns, bytes."""
        self._pieces = pieces
        self._chunks = chunks[:, np.lexsort(chunks[2::-1])]

    @property
    def messages(self) -> tuple[Message, ...]:
        """All, by round, sender and worker."""
        return tuple(self.made(self._chunks))

    @cached_property
    def sent(self) -> Mapping[int, list[Message]]:
        """Those of each sender, in its order."""
        return MessagesOf(self, self._chunks, 1)

    @cached_property
    def received(self) -> Mapping[int, list[Message]]:
        """Those of each worker, in its order."""
        return MessagesOf(self, self._chunks, 2)

    @property
    def num_bytes(self) -> int:
        return int(self._chunks[-1].sum())

    @property
    def sizes(self) -> Numbers:
        """int64[4, messages]: round, sender, worker and bytes of each, in their order."""
        ends = self._chunks[:3]
        begins = np.flatnonzero(np.append(True, (ends[:, 1:] != ends[:, :-1]).any(axis=0))[: ends.shape[1]])
        return np.concatenate([ends[:, begins], [np.add.reduceat(self._chunks[-1], begins)]])

    def numbers(self, worker: int) -> Numbers:
        """int64[pieces, 8] of a worker's messages, in their order: round, sender, want, tensor, top, bottom, left,
        right."""
        rows = [np.zeros((0, 8), np.int64)]
        for number, sender, _, which, first, end, _ in self._chunks[:, self._chunks[2] == worker].T.tolist():
            pieces = self._pieces[which][:, first:end].T
            rows.append(np.hstack([np.tile(np.array([number, sender]), (len(pieces), 1)), pieces]))
        return np.concatenate(rows)

    def made(self, chunks: Numbers) -> Iterator[Message]:
        """The messages of some of the chunks, which are in their order."""
        for (number, sender, worker), own in groupby(chunks.T.tolist(), key=lambda chunk: tuple(chunk[:3])):
            pieces, size = [], 0
            for *_, which, first, end, num_bytes in own:
                columns = self._pieces[which][:, first:end].T.tolist()
                pieces += [Piece(want, tensor, Box(*box)) for want, tensor, *box in columns]
                size += num_bytes
            yield Message(number, sender, worker, tuple(pieces), size)


class MessagesOf(Mapping[int, list[Message]]):
    """The messages of each sender or worker, made anew each time."""

    def __init__(self, plan: Plan, chunks: Numbers, row: int) -> None:
        self._plan = plan
        self._chunks = chunks[:, np.argsort(chunks[row], kind="stable")]
        names, starts = np.unique(self._chunks[row], return_index=True)
        ends = np.append(starts, self._chunks.shape[1])[1:]
        self._places = {name: slice(start, end) for name, start, end in zip(names.tolist(), starts, ends, strict=True)}

    def __getitem__(self, name: int) -> list[Message]:
        return list(self._plan.made(self._chunks[:, self._places[name]]))

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def make_plan(
    tensors: Sequence[Tensor],
    shards: Sequence[Shard],
    servers: Sequence[Sequence[Wants]],
    bucket_bytes: int,
    grain: int = GRAIN_BYTES,
) -> Plan:
    """`servers`: the wants of each worker of each. `bucket_bytes`: the most that a rank or worker has on the way in a
    round. `grain`: see senders.py. EngineError, naming the tensor, if nobody holds what a worker wants."""
    limit = bucket_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    holders = Holders(shard.ranks for shard in shards)
    rounds = Rounds(limit, len(holders.loads), sum(len(workers) for workers in servers))
    pieces, chunks = [], [np.zeros((7, 0), np.int64)]
    for wanted in takes(tensors, shards, holders.number, servers):
        parts, order = chunks_in_turns(holders.choose(wanted, grain).split(limit), limit)
        which = np.full(len(order.start), len(pieces))
        pieces.append(parts.table[WANT : WANT + 6].astype(np.int32))
        chunks.append(
            np.stack([rounds.place(order), order.sender, order.worker, which, order.start, order.stop, order.num_bytes])
        )
    return Plan(pieces, np.concatenate(chunks, axis=1))


def check_wanted(tensors: Sequence[Tensor], servers: Sequence[Sequence[Wants]]) -> None:
    """EngineError, naming the first, if a server's workers together do not take some tensor, or a part of it: their
    model is another one, and would serve with what it has there, or without the rest. Rows or columns left out at an
    edge are found, and fewer numbers than there are; not a hole in one part that another part makes up for."""
    full = np.array([(tensor.rows, tensor.columns) for tensor in tensors], np.int64).reshape(-1, 2).T
    known: list[Numbers] = []
    for number, workers in enumerate(servers):
        wanted = [numbers_of(wants) for wants in workers]
        if len(wanted) == len(known) and all(map(np.array_equal, wanted, known)):
            continue  # the same as the last server's
        known = wanted
        size, ends, begins = np.zeros(len(tensors), np.int64), np.zeros_like(full), full.copy()
        for tensor, top, bottom, left, right in (wants.T for wants in wanted):
            np.add.at(size, tensor, (bottom - top) * (right - left))
            for axis, (first, last) in enumerate(((top, bottom), (left, right))):
                np.minimum.at(begins[axis], tensor, first)
                np.maximum.at(ends[axis], tensor, last)
        short = (size < full[0] * full[1]) | (begins > 0).any(axis=0) | (ends < full).any(axis=0)
        if short.any():
            one = int(np.flatnonzero(short)[0])
            (rows, columns), (found_rows, found_columns) = full[:, one].tolist(), (ends - begins)[:, one].tolist()
            taken = f"{found_rows} x {found_columns} of the {rows} x {columns} numbers" if size[one] else "nothing"
            raise EngineError(
                f"weight sync: server {number} takes {taken} of {tensors[one].name} ({int(short.sum())} of "
                f"{len(tensors)} tensors so); serve the model that is trained"
            )


def offsets(pieces: Iterable[Piece], tensors: Sequence[Tensor]) -> Iterator[int]:
    """Where each piece begins in its message, and last the message's length in bytes."""
    end = 0
    for piece in pieces:
        yield end
        end += aligned(piece.box.size * tensors[piece.tensor].itemsize)
    yield end


def message_bytes(pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> int:
    return sum(aligned(piece.box.size * tensors[piece.tensor].itemsize) for piece in pieces)


def rounds_of(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """A sender's or worker's messages, round by round."""
    for _, group in groupby(messages, key=lambda message: message.round):
        yield list(group)
