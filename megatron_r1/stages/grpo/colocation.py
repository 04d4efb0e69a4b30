"""Whose turn it is on GPUs that trainer and servers share (rollout.sync ipc).

Sampling: the servers have their weights and cache, what `train.offload` names of the trainer is in host memory.
Training: the servers sleep (`rollout.sleep_level`), the trainer has everything. Between them, a sync: the servers have
room for their weights and not yet for their cache, the trainer has its weights. Every method is a collective over the
trainer's ranks; rank 0 talks to the servers. Left out: whether it all fits, which the planner says.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
import torch.distributed as dist

from megatron_r1.agreement import on_rank_zero, together
from megatron_r1.config.schema import RolloutConfig, TrainConfig
from megatron_r1.engines.base import Client, Engine, RequestError
from megatron_r1.engines.source import ShardedSource
from megatron_r1.errors import EngineError
from megatron_r1.policy.offload import Offload
from megatron_r1.policy.policy import Policy
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Shard
from megatron_r1.weights.wire import ParamSpec

POLL_SECONDS, UNHEALTHY = 5.0, 3
"""How often a server is asked for its health while it goes to sleep or wakes, and what number of bad answers in a row
ends it."""


class Colocation:
    """One on every rank. `engines` on rank 0 only. Where nothing is configured to move, nothing is done."""

    def __init__(
        self,
        rollout: RolloutConfig,
        train: TrainConfig,
        policy: Policy,
        engines: Sequence[Engine],
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`say` is told of servers that would not sleep or wake."""
        self.level = rollout.sleep_level
        self.engines, self.say = engines, say
        self.offload = Offload(policy, train.offload)
        self.turn: Literal["both", "sampling", "training"] = "both"
        """Servers that sleep at their start are the trainer's turn: see `started_asleep`."""

    @property
    def idle(self) -> bool:
        return not self.level and not self.offload.parts

    def started_asleep(self) -> None:
        """The servers were put to sleep before the policy was built."""
        if self.level:
            self.turn = "training"

    def for_sampling(self) -> None:
        """Servers serve; the weights that they had when they fell asleep, or that a sync has brought since."""
        if self.idle or self.turn == "sampling":
            return
        asleep, self.turn = self.turn == "training", "both"
        self.offload.to_host()
        dist.barrier()
        if asleep and self.level:
            self._each(lambda client: client.wake("weights"))
            self._each(lambda client: client.wake("kv_cache"))
        self.turn = "sampling"

    def for_training(self, *, keep_weights: bool = False) -> None:
        """The trainer has all of its memory. `keep_weights`: the servers will be woken without a sync."""
        if self.idle:
            return
        if self.level and self.turn != "training":
            self.turn = "both"
            self._each(lambda client: client.sleep(1 if keep_weights else self.level))
        self.offload.to_device()
        self.turn = "training"

    @contextlib.contextmanager
    def for_sync(self) -> Iterator[None]:
        """Within, weights can go from one to the other; afterwards it is the servers' turn."""
        if self.idle:
            yield
            return
        asleep, self.turn = self.turn == "training", "both"
        self.offload.to_host(("gradients", "optimizer"))
        dist.barrier()
        if asleep and self.level:
            self._each(lambda client: client.wake("weights"))
        yield
        self.offload.to_host(("weights",))
        dist.barrier()
        if asleep and self.level:
            self._each(lambda client: client.wake("kv_cache"))
        self.turn = "sampling"

    def revive(self, fallen: Callable[[], Sequence[Engine]]) -> None:
        """Start the servers again that `fallen` names on rank 0. A start takes all the memory that a server has when it
        serves: what moves of the trainer is on the host meanwhile, and where others sleep these do afterwards. Raises
        EngineError on every rank if one does not start."""
        again: list[Engine] = []

        def count() -> int:
            again.extend(fallen())
            return len(again)

        def start() -> None:
            for engine in again:
                engine.restart()
                if self.level and self.turn == "training":
                    engine.client.sleep(1)  # deeper than 1 it would lose weights that nothing has replaced

        if on_rank_zero(count):
            self.offload.to_host()
            dist.barrier()
            on_rank_zero(start)

    def _each(self, call: Callable[[Client], None]) -> None:
        """Rank 0 asks every living server at once; all ranks wait. One that fails is stopped: a rollout or the next
        sync starts it again, as one that died."""

        def ask(engine: Engine) -> None:
            try:
                with _ended_with(engine):
                    call(engine.client)
            except (EngineError, RequestError) as error:
                self.say(f"{engine.name} is stopped, and started again when it is needed: {error}")
                engine.stop()

        def ask_all() -> None:
            living = [engine for engine in self.engines if engine.alive()]
            with ThreadPoolExecutor(max(1, len(living))) as threads:
                list(threads.map(ask, living))

        on_rank_zero(ask_all)


@contextlib.contextmanager
def _ended_with(engine: Engine) -> Iterator[None]:
    """Within, a request ends soon after the engine behind it: vLLM leaves one open that waits for an engine which has
    died, and its HTTP process then waits for that request before it goes."""
    answered = threading.Event()

    def watch() -> None:
        ill = 0
        while ill < UNHEALTHY and not answered.wait(POLL_SECONDS):
            ill = 0 if engine.client.healthy() else ill + 1
        if not answered.is_set():
            engine.stop()

    watcher = threading.Thread(target=watch, name="turns", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        answered.set()
        watcher.join()


class ResidentSource:
    """`source` of the policy's weights, which are on the device while a pass lasts, wherever they were before: a server
    that was restarted in a rollout is given them then."""

    def __init__(self, source: ShardedSource, offload: Offload) -> None:
        self._source, self._offload = source, offload

    def metadata(self) -> Sequence[ParamSpec]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self._resident():
            yield from self._source

    @property
    def shards(self) -> Sequence[Shard]:
        return self._source.shards

    @property
    def device(self) -> torch.device:
        return self._source.device

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with contextlib.ExitStack() as resident:
            together(lambda: resident.enter_context(self._resident()))  # what follows may be a collective
            with self._source.reading():
                yield

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        return self._source.read(tensor, box)

    @contextlib.contextmanager
    def _resident(self) -> Iterator[None]:
        were_away = "weights" in self._offload.away
        self._offload.to_device(("weights",))
        try:
            yield
        finally:
            if were_away:
                self._offload.to_host(("weights",))
