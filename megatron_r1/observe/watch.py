"""Watches a rank from threads of its own: a deadline for every phase, a heartbeat for the batch system.

When a phase outlasts its deadline, each rank writes where it is (every thread's Python stack, the phase, the collective
that it waits in) to stacks/rank_N.txt of the run folder and ends at once with status 75; what was sampled lies in the
journal. Rank 0 renews heartbeat.json. A rank that is stopped by the kernel cannot write; the others, which wait for it,
do.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from megatron_r1.errors import PREEMPTED
from megatron_r1.observe.metrics import write_json

HEARTBEAT, STACKS = "heartbeat.json", "stacks"
HEARTBEAT_SECONDS = 5.0
POLL_SECONDS = 0.5
BETWEEN = "between phases"
CLEANUP_SECONDS = 20.0
TORCH = "/torch/distributed/"
COLLECTIVES = f"{TORCH}distributed_c10d.py"
"""The file whose functions are the collectives; others of torch's wrap them."""


class Watch:
    """Of one rank. Use it as a context; `phase` and `step` are called by the rank's main thread."""

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        deadlines: Mapping[str, float],
        steps: int = 0,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """`deadlines`: seconds by phase; 0, and a phase that is not named, have none. `steps`: of the whole run.
        `end(status)` ends the process."""
        self._run_dir, self._rank, self._deadlines, self._end = run_dir, rank, dict(deadlines), end
        self._steps, self._step = steps, 0
        self._cleanups: list[Callable[[], object]] = []
        self._beaten = False
        self._open: list[str] = []
        self._now = (BETWEEN, time.monotonic())
        """The innermost phase and its beginning: one assignment, so that the thread sees both or neither."""
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        # Two threads: a file system that hangs holds up the heartbeat, and must not hold up the deadlines.
        self._threads = [threading.Thread(target=self._run, name="watch", daemon=True)]
        if rank == 0:
            self._threads.append(threading.Thread(target=self._beat_on, name="heartbeat", daemon=True))

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(CLEANUP_SECONDS + POLL_SECONDS)
        if self._rank == 0:
            self._beat()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The rank is in this phase; an inner phase stops the outer one's clock, which begins anew after it."""
        self._open.append(name)
        self._now = (name, time.monotonic())
        try:
            yield
        finally:
            self._open.pop()
            self._now = (self._open[-1] if self._open else BETWEEN, time.monotonic())

    def before_the_end(self, work: Callable[[], object]) -> None:
        """When a deadline has passed, do this too before the process ends: there is no time for `finally` then. Given
        up after CLEANUP_SECONDS."""
        self._cleanups.append(work)

    def step(self, done: int, of: int = 0) -> None:
        """So many steps are done, `of` all if that is known only now. The present phase's clock begins anew: a deadline
        is one step's."""
        self._step, self._steps = done, of or self._steps
        self._now = (self._now[0], time.monotonic())

    @property
    def current(self) -> str:
        """The innermost phase."""
        return self._now[0]

    def _run(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            phase, since = self._now
            lasted, limit = time.monotonic() - since, self._deadlines.get(phase, 0.0)
            if limit and lasted > limit:
                self._give_up(phase, lasted, limit)
                return

    def _beat_on(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS if self._beaten else 0.0):
            self._beat()

    def _beat(self) -> None:
        content = {"time": time.time(), "phase": self.current, "step": self._step, "steps": self._steps}
        with contextlib.suppress(OSError):  # a full disk is the run's own trouble, said by the run
            write_json(self._run_dir / HEARTBEAT, content)
        self._beaten = True

    def _give_up(self, phase: str, lasted: float, limit: float) -> None:
        """Say so as far as that can be done, and end in any case."""
        works = [lambda: self._report(phase, lasted, limit), *self._cleanups]
        threads = [threading.Thread(target=work, daemon=True) for work in works]
        deadline = time.monotonic() + CLEANUP_SECONDS
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._end(PREEMPTED)

    def _report(self, phase: str, lasted: float, limit: float) -> None:
        frames = sys._current_frames()
        head = (
            f"rank {self._rank}: phase {phase} has lasted {lasted:.0f} s, its deadline is {limit:.0f} s "
            f"(deadlines.{phase}); done {self._step} of {self._steps} steps; "
            f"waits in {collective(frames.get(self._main or 0))}"
        )
        target = self._run_dir / STACKS / f"rank_{self._rank:05d}.txt"
        with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more
            print(f"megatron-r1: {head}; Python stacks: {target}", file=sys.stderr, flush=True)
        target.parent.mkdir(exist_ok=True)
        target.write_text(f"{head}\n\n{stacks(frames)}", encoding="utf-8", errors="replace")


def collective(frame: FrameType | None) -> str:
    """The torch.distributed call that a thread is in and where it was made, or "no collective"."""
    found = None
    while frame is not None:
        file = frame.f_code.co_filename.replace(os.sep, "/")
        if file.endswith(COLLECTIVES):
            found = frame.f_code.co_name
        elif found is not None and TORCH not in file:
            return f"{found}, called in {frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return found or "no collective"


def stacks(frames: Mapping[int, FrameType]) -> str:
    """Every thread's Python stack, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in frames.items()
    ]
    return "\n".join(parts)
