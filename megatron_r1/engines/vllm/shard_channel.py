"""Weights shard to shard: the trainer's side, on every rank of it.

Opening a channel: rank 0 asks every worker what it wants of the weights (recorded.py), all ranks and workers meet in
one group, every rank makes the plan (resharding/plan.py), rank 0 tells each worker its messages. An update: every rank
sends what the plan says, rank 0 asks the servers to receive. What fails on one rank fails on all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch

from megatron_r1.agreement import Alarm, on_rank_zero, sum_over_ranks, together, trainers
from megatron_r1.engines.base import RequestError
from megatron_r1.engines.source import ShardedSource
from megatron_r1.engines.vllm.checks import Taken, compare, own_fingerprints, parts_of, tensors_drawn
from megatron_r1.engines.vllm.control import ControlPlane
from megatron_r1.engines.vllm.engine import Engine
from megatron_r1.engines.vllm.messages import REFUSAL, prepare_to_send, send_all
from megatron_r1.engines.vllm.peers import Meeting, Peers, SyncWay, check_place, join
from megatron_r1.errors import EngineError
from megatron_r1.resharding.plan import Message, Piece, Plan, check_wanted, make_plan
from megatron_r1.weights.wire import ParamSpec, wire_tensors

MEETING_SECONDS = 300.0
SETTLE_SECONDS = 5.0
WHOLE_UPDATES = 2
"""Of which all tensors are compared. A run's first brings what its servers started from, so a kernel that has kept its
old copy is right until the second."""


class ShardChannel:
    """An open channel for weights `specs` to `engines` (empty but on rank 0). Constructing it and sending are
    collectives over the trainer's ranks; EngineError or RequestError, on all of them, if a server fails."""

    def __init__(
        self,
        engines: Sequence[Engine],
        source: ShardedSource,
        specs: Sequence[ParamSpec],
        *,
        sync: SyncWay,
        rank: int,
        bucket_bytes: int,
        private_dir: Path | None,
        check_tensors: int = 0,
    ) -> None:
        """`private_dir`, on rank 0: where members of gloo and ipc meet. `check_tensors`: how many are compared after an
        update, of the first two all; 0: none."""
        self.specs, self.source, self.rank = list(specs), source, rank
        self.sync: SyncWay = sync
        self.tensors = wire_tensors(specs)
        self.control = ControlPlane(engines) if rank == 0 else None
        self.peers: Peers | None = None
        self.place = ""
        self.updates, self.check_tensors = 0, check_tensors
        self.names = [engine.name for engine in engines]
        try:
            self.place = on_rank_zero(lambda: self.announce(private_dir))
            self.servers: list[list[np.ndarray]] = []
            """What each worker of each server wants, as numbers."""
            self.plan = self.meet(len(engines), bucket_bytes)
        except BaseException:
            self.close()
            raise

    def announce(self, private_dir: Path | None) -> str:
        """Rank 0: tell the workers what will be sent; they find out what they want of it. Returns where to meet."""
        assert self.control is not None and private_dir is not None
        self.control.weight_versions()  # a dead server is found here; at the meeting one would wait for it
        announced = {
            "names": [name for name, _, _ in self.specs],
            "dtype_names": [str(dtype).removeprefix("torch.") for _, dtype, _ in self.specs],
            "shapes": [list(shape) for _, _, shape in self.specs],
        }
        self.control.init_weight_transfer_engine(announced)
        if self.sync == "nccl":
            from megatron_r1.engines.vllm.nccl_peers import new_identifier

            return new_identifier()
        return str(private_dir / uuid4().hex)

    def meet(self, num_engines: int, bucket_bytes: int) -> Plan:
        """Enter the group with all workers, hear what they want, plan, and tell them their messages."""
        per_engine = on_rank_zero(lambda: [self.control.workers_per_engine] * num_engines)  # type: ignore[union-attr]
        meeting = Meeting(
            sync=self.sync,
            place=self.place,
            trainers=trainers(),
            workers=sum(per_engine),
            timeout_seconds=MEETING_SECONDS,
        )
        together(lambda: check_place(meeting))
        workers = None
        if self.control is not None:
            info = {"meeting": meeting.as_info(), "first_worker": 0}
            workers = in_background(lambda: self.control.init_weight_transfer_engine(info))  # type: ignore[union-attr]
        together(lambda: self.enter(meeting, workers))
        wanted = on_rank_zero(lambda: self.hear(meeting, workers))
        first = 0
        for count in per_engine:
            self.servers.append(wanted[first : first + count])
            first += count
        try:
            check_wanted(self.tensors, self.servers)
            plan = together(lambda: make_plan(self.tensors, self.source.shards, self.servers, bucket_bytes))
        except Exception:
            self.refuse(meeting)
            raise
        together(lambda: self.tell(plan, meeting, workers))
        return plan

    def enter(self, meeting: Meeting, workers: Future[None] | None) -> None:
        with explained(workers):
            self.peers = join(meeting, self.rank, self.source.device)

    def hear(self, meeting: Meeting, workers: Future[None] | None) -> list[np.ndarray]:
        """Rank 0: what each worker wants, as numbers."""
        with explained(workers):
            return [self.joined.receive_numbers(of=meeting.trainers + i).numpy() for i in range(meeting.workers)]

    def refuse(self, meeting: Meeting) -> None:
        """Let the workers end their wait for messages: that this rank leaves does not end it with NCCL."""
        for worker in range(meeting.workers if self.control is not None else 0):
            with contextlib.suppress(RuntimeError):  # the server has died
                self.joined.send_numbers(REFUSAL, to=meeting.trainers + worker)

    def tell(self, plan: Plan, meeting: Meeting, workers: Future[None] | None) -> None:
        with self.or_leave(), explained(workers):
            for worker in range(meeting.workers if workers is not None else 0):
                numbers = torch.from_numpy(plan.numbers(worker))
                self.joined.send_numbers(numbers, to=meeting.trainers + worker)
            prepare_to_send(self.joined, plan.sent.get(self.rank, []))
            if workers is not None:
                workers.result()

    @property
    def joined(self) -> Peers:
        if self.peers is None:
            raise EngineError("weight sync: this rank has left the group")
        return self.peers

    @cached_property
    def own_messages(self) -> list[Message]:
        return self.plan.sent.get(self.rank, [])

    def send(self) -> None:
        """One whole update. EngineError, naming the tensor, if a worker then holds something else."""
        together(lambda: self.control.start_weight_update() if self.control else None)
        checked = self.tensors_to_check()
        parts = parts_of(list(chain(*self.servers)), checked)
        self.updates += 1
        try:
            own, reports = together(lambda: self.transfer(checked, parts))
        except BaseException:
            self.leave()
            raise
        together(lambda: self.control.finish_weight_update() if self.control else None)
        if checked:
            expected = sum_over_ranks(own).cpu().numpy()
            on_rank_zero(lambda: compare(reports, expected, parts, self.specs, self.workers_named()))

    def tensors_to_check(self) -> list[int]:
        """Of the first updates all, of later ones others every time."""
        if not self.check_tensors or self.updates < WHOLE_UPDATES:
            return list(range(len(self.tensors) if self.check_tensors else 0))
        return tensors_drawn(self.tensors, self.updates, self.check_tensors)

    def workers_named(self) -> list[str]:
        return [
            f"worker {number} of {name}"
            for name, workers in zip(self.names, self.servers, strict=True)
            for number in range(len(workers))
        ]

    def transfer(self, checked: Sequence[int], parts: Taken) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Send all. Returns this rank's share of the fingerprints of the parts, and on rank 0 what each worker says
        that it has of the tensors in `checked`."""
        control = self.control
        alarm = Alarm(f"weight sync {self.place} {self.updates}")
        update = {"checked": list(checked)}
        received = in_background(lambda: control.update_weights(update)) if control is not None else None

        def given_up() -> bool:
            return alarm.heard() or (received is not None and received.done() and received.exception() is not None)

        try:
            with self.or_leave(), self.source.reading(), explained(received):
                send_all(self.joined, self.own_messages, self.specs, self.tensors, self.fill, given_up)
                own, reports = own_fingerprints(parts.rows, self.source, self.specs, self.rank), []
                for worker in range(sum(map(len, self.servers)) if checked and control is not None else 0):
                    reports.append(self.joined.receive_numbers(of=trainers() + worker))
        except BaseException:
            alarm.ring()
            raise
        if received is not None:
            received.result()
        return own, reports

    def fill(self, piece: Piece, place: torch.Tensor) -> None:
        """Raises ValueError where the source reads another shape than it has announced."""
        values = self.source.read(piece.tensor, piece.box)
        if values.shape != place.shape:
            name, (rows, columns) = self.specs[piece.tensor][0], place.shape
            raise ValueError(
                f"the weight source announced {rows} x {columns} numbers of {name} and read {list(values.shape)}"
            )
        place.copy_(values)

    @contextlib.contextmanager
    def or_leave(self) -> Iterator[None]:
        """Leave the group if the block fails, before other ranks are told: they may wait for this one in the block."""
        try:
            yield
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """End this rank's connections, which releases who waits for it."""
        if self.peers is not None:
            self.peers.close()
            self.peers = None

    def close(self) -> None:
        """Leave the group, and have the workers leave where all is in order. Safe to call twice."""
        in_order = self.peers is not None
        self.leave()
        if self.control is not None:
            if in_order:
                with contextlib.suppress(EngineError, RequestError):  # a dead server has nothing to leave
                    self.control.shutdown_weight_transfer_engine()
            self.control.close()
            if self.sync != "nccl" and self.place:
                Path(self.place).unlink(missing_ok=True)


def in_background(request: Callable[[], None]) -> Future[None]:
    """A request that servers answer when this thread has done its part."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="weight-sync")
    future = pool.submit(request)
    pool.shutdown(wait=False)
    return future


@contextlib.contextmanager
def explained(answer: Future[None] | None) -> Iterator[None]:
    """gloo's errors as what the servers say of them, if they say anything within a few seconds."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, (EngineError, torch.OutOfMemoryError)):
            raise  # this rank's own
        cause = settled_error(answer) if answer is not None else None
        if cause is not None:
            raise cause from None
        raise EngineError(f"weight sync: a trainer rank or vLLM worker left in the middle of it ({error})") from error


def settled_error(answer: Future[None]) -> BaseException | None:
    """The receivers' error if they report one within a few seconds of the sender's."""
    try:
        return answer.exception(timeout=SETTLE_SECONDS)
    except TimeoutError:
        return None
