"""Whether a server that has work gets on with it: the deadline of requests that may last for hours.

While requests are outstanding a thread reads the server's counters of tokens (/metrics). If none has moved for the
stall time, no request was answered and the server is not paused, it is stuck: the watch cuts the connections, and
every request that waits raises EngineError. A server that cannot be asked has not moved. Left out: what is done about
it (collect.py restarts the server).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
"""vLLM's, of each engine of a server: they only grow."""
POLL_SECONDS = 10.0


def count_tokens(metrics: str) -> float | None:
    """The sum of the counters in the text of /metrics; None if they are not there."""
    lines = [line for line in metrics.splitlines() if line.startswith(COUNTERS)]
    return sum(float(line.rpartition(" ")[2]) for line in lines) if lines else None


class ProgressWatch:
    """Of one server. `work()` is entered around every request that makes tokens; safe to use from many threads."""

    def __init__(
        self,
        *,
        stall_seconds: float,
        count: Callable[[float], float | None],
        paused: Callable[[float], bool],
        cut: Callable[[], None],
    ) -> None:
        """`count(timeout)` reads the counters, None if it cannot; `paused(timeout)`: whether the server takes no
        work on purpose; `cut()` ends all requests that wait."""
        self.stall_seconds = stall_seconds
        self._count, self._paused, self._cut = count, paused, cut
        self._lock = threading.Condition()
        self._outstanding = self._draining = 0
        self._thread: threading.Thread | None = None
        self._moved = 0.0
        self.stalled = False

    @contextlib.contextmanager
    def work(self, *, draining: bool = False) -> Iterator[None]:
        """A request is outstanding. `draining`: it waits for running ones to end, and a pause is no excuse."""
        with self._lock:
            if not self._outstanding:
                self._moved, self.stalled = time.monotonic(), False
            self._outstanding += 1
            self._draining += draining
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._outstanding -= 1
                self._draining -= draining
                self._moved = time.monotonic()
                self._lock.notify_all()

    def explain(self) -> str:
        return (
            f"no token has moved on the vLLM server for {self.stall_seconds:.0f} s while it had work "
            "(rollout.stall_seconds): it is stuck"
        )

    def _run(self) -> None:
        poll, known = min(POLL_SECONDS, self.stall_seconds / 8), None
        while True:
            with self._lock:
                self._lock.wait_for(lambda: not self._outstanding, poll)
                # A moment without work does not end the thread: requests may come one after another.
                if not self._outstanding and not self._lock.wait_for(lambda: self._outstanding, poll):
                    self._thread = None
                    return
                moved = self._moved
            count = self._count(self.stall_seconds / 4)
            if count is not None and count != known:
                known, moved = count, time.monotonic()
            elif not self._draining and self._paused(self.stall_seconds / 4):
                moved = time.monotonic()
            with self._lock:
                if moved > self._moved:
                    self._moved, self.stalled = moved, False  # it works again: a later failure is another one
                late = bool(self._outstanding) and time.monotonic() - self._moved > self.stall_seconds
                if late:
                    self.stalled, self._moved = True, time.monotonic()
            if late:
                self._cut()


class Wires:
    """A connection pool whose open connections another thread can cut."""

    def __init__(self, size: int) -> None:
        wires, lock = self._sockets, self._lock = (set[Any](), threading.Lock())

        class Plain(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                with lock:
                    wires.add(self.sock)

            def close(self) -> None:
                with lock:
                    wires.discard(self.sock)
                super().close()

        class Secure(Plain, HTTPSConnection): ...

        class PlainPool(urllib3.HTTPConnectionPool):
            ConnectionCls = Plain  # pyright: ignore[reportAssignmentType] - a subclass of the declared ones

        class SecurePool(urllib3.HTTPSConnectionPool):
            ConnectionCls = Secure  # pyright: ignore[reportAssignmentType]

        self.pool = urllib3.PoolManager(maxsize=size, retries=False)
        self.pool.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}

    def cut(self) -> None:
        """End every exchange that is under way; its thread gets an error."""
        with self._lock:
            for wire in self._sockets:
                with contextlib.suppress(OSError):  # it ends by itself
                    wire.shutdown(socket.SHUT_RDWR)
