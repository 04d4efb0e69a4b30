"""Collect one step's groups from the engines, all at once, and survive an engine's death.

Prompts wait in one queue that every server draws from, so a fast or restarted server takes more. A group is
handed over as soon as its own completions are there, so that grading overlaps with generation; results keep
the order of the prompts. A server that dies is restarted and, once the caller has pushed the current weights
to it, is given the prompts that it had; each prompt is answered exactly once. What to do with the groups is
the caller's business.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_r1.config import SamplingConfig
from megatron_r1.engines.base import Client, Decode, Engine, check_room
from megatron_r1.errors import EngineError
from megatron_r1.types import Completion

OVERSUBSCRIPTION = 4
"""Groups sent to a server beyond what runs at once, so that short answers leave no empty seats behind long
ones.
"""

Group = tuple[Completion, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One step's groups in the order of its prompts, and what they took."""

    groups: tuple[Group, ...]
    num_tokens: int
    """Sampled tokens."""
    seconds: float
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    """What a worker thread reports: a group, or a failure of one incarnation, or the end of a restart."""

    engine: Engine
    starts: int
    index: int = -1
    group: Group = ()
    error: BaseException | None = None
    restarted: bool = False


def collect(
    engines: Sequence[Engine],
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    sampling: SamplingConfig,
    seed: int | None = None,
    on_group: Callable[[int, Group], None] | None = None,
    resync: Callable[[Engine], None] | None = None,
    decode: Decode | None = None,
    known: Mapping[int, Group] | None = None,
    newest: int | None = None,
) -> Collected:
    """Sample `group_size` completions of every prompt.

    Completion g of prompt i uses random seed `seed + i * group_size + g` (None: the engines' own streams).
    `on_group(i, group)` runs in the calling thread as each group arrives, in order of arrival. The groups that are
    `known` already, by their prompts' places, come first and are not sampled.
    `resync(engine)` runs in the calling thread after a restart and must make the engine serve the current
    weights (it serves version 0); without it only an engine at version 0 may be restarted. Engines must serve one
    version, but that one restarted since the last weight sync may serve the version `newest`. Raises ValueError
    for a prompt without room, before anything is sent; RequestError for a refused request; EngineError when
    an engine is past its restarts, which are counted anew for each call that succeeds.
    """
    for prompt in prompts:
        check_room(prompt, engines[0].config.max_model_len)
    return _Collection(engines, prompts, group_size, sampling, seed, decode, known or {}, newest).run(on_group, resync)


@dataclass
class _Collection:
    """The state of one collect call: prompts that wait, groups that came, engines that are being restarted."""

    engines: Sequence[Engine]
    prompts: Sequence[Sequence[int]]
    group_size: int
    sampling: SamplingConfig
    seed: int | None
    decode: Decode | None
    known: Mapping[int, Group]
    newest: int | None
    events: queue.Queue[_Event] = field(default_factory=queue.Queue)
    groups: dict[int, Group] = field(default_factory=dict)
    restarting: set[int] = field(default_factory=set)
    restarts: int = 0
    version: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.waiting = deque(index for index in range(len(self.prompts)) if index not in self.known)
        seats = OVERSUBSCRIPTION * math.ceil(self.engines[0].config.max_num_seqs / self.group_size)
        self.threads_per_engine = min(seats, len(self.waiting))

    def run(self, on_group: Callable[[int, Group], None] | None, resync: Callable[[Engine], None] | None) -> Collected:
        begun = time.perf_counter()
        self.version = served_version(self.engines, self.newest)
        try:
            for index, group in self.known.items():
                self.groups[index] = group
                if on_group is not None:
                    on_group(index, group)
            for engine in self.engines:
                self.draw(engine, self.threads_per_engine)
            while len(self.groups) < len(self.prompts):
                event = self.events.get()
                if event.restarted:
                    self.readmit(event, resync)
                elif event.error is not None:
                    self.fail(event)
                else:
                    self.groups[event.index] = event.group
                    if on_group is not None:
                        on_group(event.index, event.group)
        finally:
            self.cancelled.set()
        for engine in self.engines:
            engine.forgive()
        groups = tuple(self.groups[index] for index in range(len(self.prompts)))
        return Collected(
            groups=groups,
            num_tokens=sum(len(completion.token_ids) for group in groups for completion in group),
            seconds=time.perf_counter() - begun,
            restarts=self.restarts,
        )

    def draw(self, engine: Engine, num_threads: int) -> None:
        """Let `num_threads` threads feed waiting prompts to this incarnation of `engine`."""
        for _ in range(num_threads):
            arguments = (engine, engine.starts, engine.client)
            threading.Thread(target=self.feed, args=arguments, name="rollout", daemon=True).start()

    def feed(self, engine: Engine, starts: int, client: Client) -> None:
        """Thread: one prompt after another, until none waits or the server fails (the prompt then waits
        again).
        """
        while not self.cancelled.is_set():
            try:
                index = self.waiting.popleft()
            except IndexError:
                return
            try:
                group = client.generate(
                    self.prompts[index],
                    num_completions=self.group_size,
                    sampling=self.sampling,
                    seed=None if self.seed is None else self.seed + index * self.group_size,
                    decode=self.decode,
                )
            except Exception as error:
                self.waiting.appendleft(index)
                self.events.put(_Event(engine=engine, starts=starts, error=error))
                return
            self.events.put(_Event(engine=engine, starts=starts, index=index, group=group))

    def fail(self, event: _Event) -> None:
        """A thread's failure: begin a restart, or put its prompt back in motion if one is over or under
        way.
        """
        engine = event.engine
        if not isinstance(event.error, EngineError):
            assert event.error is not None
            raise event.error
        if engine.index in self.restarting:
            return
        if event.starts != engine.starts:  # a late report of an incarnation that has been replaced
            self.draw(engine, 1)
            return
        self.restarting.add(engine.index)
        self.restarts += 1
        threading.Thread(target=self.revive, args=(engine, event.error), name="restart", daemon=True).start()

    def revive(self, engine: Engine, cause: EngineError) -> None:
        """Thread: restart `engine` and report it."""
        failure: BaseException | None = None
        try:
            engine.restart()
        except Exception as error:
            error.__cause__ = cause
            failure = error
        self.events.put(_Event(engine=engine, starts=engine.starts, error=failure, restarted=True))

    def readmit(self, event: _Event, resync: Callable[[Engine], None] | None) -> None:
        """Bring a restarted server to the current weights and let it draw prompts again."""
        engine = event.engine
        if event.error is not None:
            raise event.error
        try:
            if resync is not None:
                resync(engine)
            served = engine.client.weight_version()
        except EngineError as error:  # it died again while it was given the weights
            self.restarts += 1
            threading.Thread(target=self.revive, args=(engine, error), name="restart", daemon=True).start()
            return
        if self.version is not None and served not in (self.version, self.newest):
            raise EngineError(
                f"{engine.name} serves weight version {served} after its restart, this rollout began "
                f"with {self.version}; give collect a `resync` that pushes the current weights"
            )
        self.restarting.discard(engine.index)
        self.draw(engine, self.threads_per_engine)


def served_version(engines: Sequence[Engine], newest: int | None = None) -> int | None:
    """The oldest weight version that an answering engine serves; None if none answers. Raises EngineError if they
    differ, but for those that serve `newest`.
    """
    versions: dict[str, int] = {}
    for engine in engines:
        try:
            versions[engine.name] = engine.client.weight_version()
        except EngineError:
            continue  # dead before the rollout began: its first request fails and restarts it
    if len(set(versions.values()) - {newest}) > 1:
        raise EngineError(f"the engines serve different weights: {versions}; push the current weights to all first")
    return min(versions.values(), default=None)
