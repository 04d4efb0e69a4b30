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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, zip_longest
from typing import NamedTuple

from megatron_r1.errors import EngineError
from megatron_r1.resharding.boxes import Box, parts
from megatron_r1.resharding.rounds import Rounds, interleave, layer_order
from megatron_r1.resharding.senders import GRAIN_BYTES, Part, spread

ALIGNMENT_BYTES = 16
"""Every piece begins at a multiple of this in its message, so that its bytes can be viewed as any dtype in place."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A weight on the wire. `layer`: what a server completes together (a decoder layer, or a module beside them)."""

    name: str
    rows: int
    columns: int
    itemsize: int
    layer: str


class Shard(NamedTuple):
    """`box` of tensor number `tensor`, which each of the trainer's `ranks` holds."""

    tensor: int
    box: Box
    ranks: tuple[int, ...]


class Want(NamedTuple):
    """`box` of tensor number `tensor`, which goes into one place of one of a worker's parameters."""

    tensor: int
    box: Box


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


@dataclass(frozen=True)
class Plan:
    """All messages, by round, sender and worker."""

    messages: tuple[Message, ...]

    @cached_property
    def sent(self) -> dict[int, list[Message]]:
        """Those of each sender, in its order."""
        return _by(self.messages, lambda message: message.sender)

    @cached_property
    def received(self) -> dict[int, list[Message]]:
        """Those of each worker, in its order."""
        return _by(self.messages, lambda message: message.worker)

    @property
    def num_bytes(self) -> int:
        return sum(message.num_bytes for message in self.messages)


def make_plan(
    tensors: Sequence[Tensor],
    shards: Sequence[Shard],
    servers: Sequence[Sequence[Sequence[Want]]],
    bucket_bytes: int,
    grain: int = GRAIN_BYTES,
) -> Plan:
    """`servers`: the wants of each worker of each. `bucket_bytes`: the most that a rank or worker has on the way in a
    round. `grain`: see senders.py. EngineError, naming the tensor, if nobody holds what a worker wants."""
    rounds = Rounds(bucket_bytes)
    messages: dict[tuple[int, int, int], list[Piece]] = {}
    for sender, part in transfers(tensors, shards, servers, grain):
        for box in parts(part.box, bucket_bytes // part.itemsize):
            size = aligned(box.size * part.itemsize)
            number = rounds.place(("rank", sender), ("worker", part.worker), min(size, bucket_bytes))
            messages.setdefault((number, sender, part.worker), []).append(Piece(part.want, part.tensor, box))
    return Plan(
        tuple(
            Message(number, sender, worker, tuple(pieces), message_bytes(pieces, tensors))
            for (number, sender, worker), pieces in sorted(messages.items())
        )
    )


def check_wanted(tensors: Sequence[Tensor], servers: Sequence[Sequence[Sequence[Want]]]) -> None:
    """EngineError, naming the first, if a server's workers together take nothing of some tensors: they would be left as
    they are."""
    for number, workers in enumerate(servers):
        wanted = {want.tensor for wants in workers for want in wants}
        left = [tensor.name for index, tensor in enumerate(tensors) if index not in wanted]
        if left:
            raise EngineError(
                f"weight sync: server {number} takes nothing of {left[0]} ({len(left)} of {len(tensors)} tensors so); "
                "serve the model that is trained"
            )


def transfers(
    tensors: Sequence[Tensor],
    shards: Sequence[Shard],
    servers: Sequence[Sequence[Sequence[Want]]],
    grain: int = GRAIN_BYTES,
) -> Iterator[tuple[int, Part]]:
    """(sender, part) for everything that is wanted, in the order of sending."""
    held: dict[int, list[Shard]] = {}
    holders: dict[str, set[int]] = {tensor.layer: set() for tensor in tensors}
    for shard in shards:
        held.setdefault(shard.tensor, []).append(shard)
        holders[tensors[shard.tensor].layer].update(shard.ranks)
    layers = {layer: frozenset(ranks) for layer, ranks in holders.items()}
    wanted = _by_layer(tensors, servers)
    loads: dict[int, int] = {}
    orders = [layer_order(layers, number, len(servers)) for number in range(len(servers))]
    for at_once in zip_longest(*orders):
        for layer, taking in _alike(at_once).items():
            wants = {worker: own for server in taking for worker, own in wanted.get((server, layer), {}).items()}
            lines = _lines(tensors, held, wants)
            chosen: dict[int, dict[int, list[Part]]] = {}
            for ranks in sorted(lines, key=lambda ranks: (len(ranks), ranks)):
                for sender, part in spread(lines[ranks], ranks, loads, grain):
                    chosen.setdefault(sender, {}).setdefault(part.worker, []).append(part)
            yield from _in_turns(chosen)


def _alike(layers: Sequence[str]) -> dict[str, list[int]]:
    """Layer -> the servers that take it now."""
    taking: dict[str, list[int]] = {}
    for server, layer in enumerate(layers):
        taking.setdefault(layer, []).append(server)
    return taking


def _by_layer(
    tensors: Sequence[Tensor], servers: Sequence[Sequence[Sequence[Want]]]
) -> dict[tuple[int, str], dict[int, list[tuple[int, Want]]]]:
    """(server, layer) -> worker -> its wants there, with their numbers."""
    found: dict[tuple[int, str], dict[int, list[tuple[int, Want]]]] = {}
    first = 0
    for server, workers in enumerate(servers):
        for worker, wants in enumerate(workers, first):
            for number, want in enumerate(wants):
                layer = tensors[want.tensor].layer
                found.setdefault((server, layer), {}).setdefault(worker, []).append((number, want))
        first += len(workers)
    return found


def _lines(
    tensors: Sequence[Tensor], held: dict[int, list[Shard]], wanted: dict[int, list[tuple[int, Want]]]
) -> dict[tuple[int, ...], list[Part]]:
    """What each set of replicas has to send, worker by worker."""
    lines: dict[tuple[int, ...], list[Part]] = {}
    for worker, wants in wanted.items():
        for number, (tensor, box) in wants:
            missing = box.size
            for shard in held.get(tensor, ()):
                if (common := shard.box.meet(box)) is not None:
                    part = Part(worker, number, tensor, common, tensors[tensor].itemsize)
                    lines.setdefault(shard.ranks, []).append(part)
                    missing -= common.size
            if missing:
                raise EngineError(
                    f"weight sync: a server's worker wants {box.size} numbers of {tensors[tensor].name}, of which the "
                    f"trainer's ranks hold {box.size - missing}"
                )
    return lines


def _in_turns(chosen: dict[int, dict[int, list[Part]]]) -> Iterator[tuple[int, Part]]:
    """Senders begin with different workers: at any time each has another to send to."""
    queues = []
    for position, (sender, by_worker) in enumerate(sorted(chosen.items())):
        workers = sorted(by_worker)
        first = position % len(workers)
        order = workers[first:] + workers[:first]
        queues.append([(sender, part) for worker in order for part in by_worker[worker]])
    return interleave(queues)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def offsets(pieces: Iterable[Piece], tensors: Sequence[Tensor]) -> Iterator[int]:
    """Where each piece begins in its message, and last the message's length in bytes."""
    end = 0
    for piece in pieces:
        yield end
        end += aligned(piece.box.size * tensors[piece.tensor].itemsize)
    yield end


def message_bytes(pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> int:
    return sum(aligned(piece.box.size * tensors[piece.tensor].itemsize) for piece in pieces)


def _by(messages: Iterable[Message], key: Callable[[Message], int]) -> dict[int, list[Message]]:
    found: dict[int, list[Message]] = {}
    for message in messages:
        found.setdefault(key(message), []).append(message)
    return found


def rounds_of(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """A sender's or worker's messages, round by round."""
    for _, group in groupby(messages, key=lambda message: message.round):
        yield list(group)
