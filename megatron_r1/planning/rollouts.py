"""Rollouts, event by event: servers with continuous batching draw requests from one queue and decode together.

Between two events (a sequence ends, one is admitted) a server's batch is constant, so its steps are summed in one go:
the events are thousands where the steps are millions. A server that runs out of cache sends its newest sequence back to
the queue's head, as vLLM preempts; it is read again with what it had written. Left out: the client and the network.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_r1.planning.decoding import StepCost

ADMIT_BELOW = 0.98
"""Share of a cache above which nothing is admitted, so that running sequences have room to grow (vLLM's watermark)."""


@dataclass(slots=True, kw_only=True)
class Request:
    """One completion to sample. `done` tokens of `length` were sampled before (a continued partial rollout)."""

    index: int
    prompt_tokens: float
    length: int
    done: int = 0

    @property
    def context(self) -> float:
        return self.prompt_tokens + self.done


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One request's time on a server, seconds from the rollout's start."""

    index: int
    server: int
    start: float
    end: float
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What happened. `running` is (seconds, sequences that run on all servers) after each event, in order of time."""

    spans: list[Span]
    running: list[tuple[float, int]]
    seconds: float
    tokens: int
    preemptions: int
    unfinished: list[Request]
    idle_server_seconds: float
    """Time that servers spent without work before the last one ended."""


@dataclass(slots=True)
class _Server:
    """`running` by index, in order of admission, each with the step at which it was admitted and its `done` then. A
    request ends at step `ends`; those sent back to the queue are skipped there."""

    number: int
    steps: int = 0
    context: float = 0.0
    running: dict[int, tuple[Request, int, float]] = field(default_factory=dict)
    ends: list[tuple[int, int]] = field(default_factory=list)
    idle_since: float = 0.0
    segment: tuple[float, float, int] = (0.0, 0.0, 0)
    """Begin, end and decoding steps of the constant batch that is under way."""

    def take(self, request: Request, now: float) -> None:
        self.running[request.index] = (request, self.steps, now)
        self.context += request.context
        heapq.heappush(self.ends, (self.steps + request.length - request.done, request.index))

    def release(self, index: int, undone: int = 0) -> tuple[Request, float]:
        """Give a request up, `undone` steps before the server's; (the request, when it was admitted)."""
        request, admitted, start = self.running.pop(index)
        self.context -= request.context + self.steps - admitted
        request.done += self.steps - admitted - undone
        return request, start

    def next_end(self) -> int:
        """The step at which the next running request ends. Entries of an earlier stay on this server are dropped."""
        while True:
            end, index = self.ends[0]
            if index in self.running:
                request, admitted, _ = self.running[index]
                if end == admitted + request.length - request.done:
                    return end
            heapq.heappop(self.ends)


def simulate(
    requests: Sequence[Request],
    *,
    num_servers: int,
    cost: StepCost,
    max_running: int,
    cache_tokens: int,
    enough: int | None = None,
) -> Timeline:
    """Serve `requests` in their order until `enough` of them (all, if None) have finished; the rest is unfinished.

    `max_running` and `cache_tokens` are of one server. Raises ValueError if a request can never fit in a cache.
    """
    longest = max((request.prompt_tokens + request.length for request in requests), default=0)
    if longest > cache_tokens:
        raise ValueError(f"a sequence of {longest:.0f} tokens does not fit in a cache of {cache_tokens}")
    return _Simulation(requests, num_servers, cost, max_running, cache_tokens, enough).run()


class _Simulation:
    def __init__(
        self,
        requests: Sequence[Request],
        num_servers: int,
        cost: StepCost,
        max_running: int,
        cache_tokens: int,
        enough: int | None,
    ) -> None:
        self.waiting = deque(requests)
        self.servers = [_Server(number) for number in range(num_servers)]
        self.cost, self.max_running, self.cache_tokens = cost, max_running, cache_tokens
        self.enough = len(requests) if enough is None else min(enough, len(requests))
        self.spans: list[Span] = []
        self.running: list[tuple[float, int]] = []
        self.tokens = self.preemptions = self.finished = 0
        self.idle = 0.0

    def run(self) -> Timeline:
        # A server reports when its constant batch ends; the earliest goes on first.
        turns = [(0.0, server.number) for server in self.servers]
        heapq.heapify(turns)
        now = 0.0
        while turns and self.finished < self.enough:
            now, number = heapq.heappop(turns)
            server = self.servers[number]
            self.finish(server, now)
            until = self.advance(server, now)
            self.running.append((now, sum(len(each.running) for each in self.servers)))
            if until is None:
                server.idle_since = now
            else:
                heapq.heappush(turns, (until, number))
        for server in self.servers:
            if not server.running:
                self.idle += now - server.idle_since
        return self.stop(now)

    def finish(self, server: _Server, now: float) -> None:
        while server.running and server.next_end() <= server.steps:
            _, index = heapq.heappop(server.ends)
            self.leave(server, index, now, finished=True)
            self.finished += 1

    def advance(self, server: _Server, now: float) -> float | None:
        """Admit what fits, then decode to the next event; its time, or None if there is nothing to do."""
        read = self.admit(server, now)
        if not server.running:
            return None
        batch, context = len(server.running), server.context
        room = int((self.cache_tokens - context) // batch)
        if room < 1 and batch > 1:
            self.waiting.appendleft(self.leave(server, next(reversed(server.running)), now, finished=False))
            self.preemptions += 1
            return self.advance(server, now)
        steps = max(1, min(server.next_end() - server.steps, room))
        # Every step makes each context one longer: the middle step's cost stands for all.
        seconds = self.cost.prefill(read) + steps * self.cost.decode(batch, context + batch * (steps - 1) / 2)
        server.steps += steps
        server.context += steps * batch
        self.tokens += steps * batch
        server.segment = (now, now + seconds, steps)
        return now + seconds

    def admit(self, server: _Server, now: float) -> float:
        """Take waiting requests while seats and cache last; the prompt tokens to read."""
        read = 0.0
        while self.waiting and len(server.running) < self.max_running:
            request = self.waiting[0]
            if server.running and server.context + request.context + 1 > ADMIT_BELOW * self.cache_tokens:
                break
            server.take(self.waiting.popleft(), now)
            read += request.context
        return read

    def leave(self, server: _Server, index: int, now: float, *, finished: bool, undone: int = 0) -> Request:
        request, start = server.release(index, undone)
        self.spans.append(Span(index=index, server=server.number, start=start, end=now, finished=finished))
        return request

    def stop(self, now: float) -> Timeline:
        left = list(self.waiting)
        for server in self.servers:
            begin, end, steps = server.segment
            # Its batch was decoded to the end of the segment; take back what lies after the stop.
            undone = int(steps * (end - now) / (end - begin)) if end > now else 0
            self.tokens -= undone * len(server.running)
            left += [self.leave(server, index, now, finished=False, undone=undone) for index in list(server.running)]
        return Timeline(
            spans=self.spans,
            running=self.running,
            seconds=now,
            tokens=self.tokens,
            preemptions=self.preemptions,
            unfinished=left,
            idle_server_seconds=self.idle,
        )
