"""Grading in processes that can be killed, so that no answer of a model can stop or slow a run beyond its own
limit.

One thread per worker feeds it one job at a time and waits; when the limit passes, it kills the worker and
starts the next one. Workers start in the background when the pool is made. Left out: what is right or wrong
(worker.py, math.py) and rewards (compose.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
"""A worker imports sympy or reasoning-gym first: 1 to 3 s alone, more on a busy machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One graded answer. `timed_out`: the limit passed; `error`: the grader raised or died. Neither is
    correct."""

    correct: bool
    timed_out: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCounts:
    """Since the start of the pool: answers graded by a worker, answers over their limit, answers that
    raised."""

    graded: int = 0
    timeouts: int = 0
    errors: int = 0


class WorkerStartError(RuntimeError):
    """A worker process could not import its graders: the installation is at fault, not an answer."""


class GradingPool:
    """`num_workers` processes. Close it, or use it as a context manager; the processes die with it either
    way."""

    def __init__(self, *, num_workers: int, timeout_seconds: float, graders: Sequence[str] = ("math",)) -> None:
        if num_workers < 1 or timeout_seconds <= 0:
            raise ValueError(
                f"rewards.num_workers: {num_workers}, rewards.timeout_seconds: {timeout_seconds}; "
                "expected at least 1 worker and a positive limit"
            )
        self.timeout_seconds = timeout_seconds
        self.graders = tuple(graders)
        self._jobs: queue.SimpleQueue[tuple[bytes, Future[Verdict]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._graded = self._timeouts = self._errors = 0
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, name=f"grading-{i}", daemon=True) for i in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(
        self, grader: str, answer: str, *, reference: str | None, metadata: Mapping[str, Any] | None = None
    ) -> Future[Verdict]:
        """Queue one answer. The result never raises for a bad answer, only WorkerStartError where no worker
        can be had; ValueError after close()."""
        if self._closing.is_set():
            raise ValueError("the grading pool is closed; submit answers before close()")
        job = {"grader": grader, "answer": answer, "reference": reference, "metadata": dict(metadata or {})}
        future: Future[Verdict] = Future()
        self._jobs.put((json.dumps(job).encode(), future))
        return future

    def counts(self) -> PoolCounts:
        with self._lock:
            return PoolCounts(graded=self._graded, timeouts=self._timeouts, errors=self._errors)

    def close(self) -> None:
        """Finish the jobs in hand, cancel the queued ones, end the workers."""
        self._closing.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        while not self._jobs.empty():
            item = self._jobs.get()
            if item is not None:
                item[1].cancel()

    def _serve(self) -> None:
        worker: _Worker | None = None
        try:
            while not self._closing.is_set():
                if worker is None:
                    worker = _Worker(self.graders)  # early: imports overlap with generation
                item = self._jobs.get()
                if item is None:
                    return
                job, future = item
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    verdict = worker.grade(job, self.timeout_seconds)
                except WorkerStartError as error:
                    worker.kill()
                    worker = None
                    future.set_exception(error)
                    continue
                self._count(verdict)
                if not worker.alive:
                    worker.kill()
                    worker = None
                future.set_result(verdict)
        finally:
            if worker is not None:
                worker.kill()

    def _count(self, verdict: Verdict) -> None:
        with self._lock:
            self._graded += 1
            self._timeouts += verdict.timed_out
            self._errors += verdict.error is not None


class _Worker:
    """One process and its socket, as seen by the one thread that owns it."""

    def __init__(self, graders: Sequence[str]) -> None:
        self.alive = True
        self._ready = False
        self._connection, far_end = Pipe()
        package_root = str(Path(__file__).parents[2])
        # -P: without it the working directory would shadow installed modules. The children see one thread per
        # library.
        environment = dict(os.environ, PYTHONPATH=package_root, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        command = [
            sys.executable,
            "-P",
            "-m",
            "megatron_r1.rewards.worker",
            str(far_end.fileno()),
            ",".join(graders),
        ]
        self._command = " ".join(command)
        self._process = subprocess.Popen(
            command,
            pass_fds=[far_end.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        far_end.close()

    def grade(self, job: bytes, timeout_seconds: float) -> Verdict:
        """Hand over a job and wait. After a timeout or a death `alive` is False and the worker must be
        replaced."""
        self._wait_until_ready()
        try:
            self._connection.send_bytes(job)
            if not self._connection.poll(timeout_seconds):
                self.alive = False
                return Verdict(correct=False, timed_out=True)
            reply = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self.alive = False
            code = self._process.wait()
            return Verdict(correct=False, error=f"the grading worker died (exit status {code})")
        return Verdict(correct=bool(reply.get("correct")), error=reply.get("error"))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        try:
            self._ready = self._connection.poll(START_SECONDS) and self._connection.recv_bytes() == b"ready"
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):  # only for the exit status in the message
                self._process.wait(5)
        if not self._ready:
            raise WorkerStartError(
                f"a grading worker did not start (exit status {self._process.poll()}, waited up to "
                f"{START_SECONDS:g} s); its own message is on standard error; check that math-verify and "
                f"reasoning-gym import: {self._command}"
            )
