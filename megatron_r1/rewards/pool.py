"""Grading in processes that can be killed, so that no answer of a model can stop or slow a run beyond its own
limit.

One thread per worker feeds it one job at a time and waits; when the limit passes, or the answer is not to the job
that was asked, it kills the worker and starts the next one. The limit is one of processor time: on a busy machine an
honest answer takes longer and is not wrong for it. Workers start in the background when the pool is made,
with a bare environment: no token of the trainer's reaches them. Left out: what is right or wrong (worker.py,
rewards/math) and rewards (compose.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import psutil

from megatron_r1.errors import UserError
from megatron_r1.rewards.grader import WorkerFunction

START_SECONDS = 120.0
"""A worker imports sympy or reasoning-gym first: 1 to 3 s alone, more on a busy machine."""

START_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Waits between attempts to start a process while the machine refuses one (no memory, no free process)."""

MAX_REPLY_BYTES = 1 << 16

MOST_WAITING = 20.0
"""Times the limit that a job may take by the clock: a worker that does nothing uses no processor time."""

PASSED_ON = ("LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONHASHSEED", "TZ", "LANG", "LC_ALL", "LC_CTYPE")
"""The only variables of the trainer's environment that a worker sees: what finding and running Python needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One graded answer. `score` is in [0, 1], 1 is right (a reward of the user's own: any number). `timed_out`: the
    limit passed; `error`: the grader raised or died. Either scores 0."""

    score: float
    timed_out: bool = False
    error: str | None = None

    @property
    def correct(self) -> bool:
        return self.score == 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCounts:
    """Cumulative since the start of the pool: answers handed to a worker (`graded`, whatever came of it), those over
    their limit, and those whose grader raised, died or gave no proper reply. An answer never counts as more than one
    of `timeouts` and `errors`."""

    graded: int = 0
    timeouts: int = 0
    errors: int = 0

    def __add__(self, other: PoolCounts) -> PoolCounts:
        return PoolCounts(
            graded=self.graded + other.graded,
            timeouts=self.timeouts + other.timeouts,
            errors=self.errors + other.errors,
        )


class WorkerStartError(UserError, RuntimeError):
    """A worker process could not be started or could not import its graders: the machine or the installation is
    at fault, not an answer."""


class GradingPool:
    """`num_workers` processes. Close it, or use it as a context manager; the processes die with it either
    way."""

    def __init__(self, *, num_workers: int, timeout_seconds: float, functions: Sequence[WorkerFunction]) -> None:
        if num_workers < 1 or timeout_seconds <= 0:
            raise ValueError(
                f"rewards.num_workers: {num_workers}, rewards.timeout_seconds: {timeout_seconds}; "
                "expected at least 1 worker and a positive limit"
            )
        self.timeout_seconds = timeout_seconds
        self.functions = tuple(functions)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._graded = self._timeouts = self._errors = 0
        self._closing = threading.Event()
        self._started: list[Future[None]] = [Future() for _ in range(num_workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(started,), name=f"grading-{i}", daemon=True)
            for i, started in enumerate(self._started)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(
        self,
        grader: str,
        answer: str,
        *,
        reference: str | None,
        metadata: Mapping[str, Any] | None = None,
        bounded: bool = True,
    ) -> Future[Verdict]:
        """Queue one answer for the function that `grader` names; `bounded`: its score must lie in [0, 1]. The result
        never raises for a bad answer, only WorkerStartError where no worker can be had; ValueError after close()."""
        job_id = secrets.token_hex(16)  # the reply must name it: nothing else can pass for the verdict on this job
        job = {
            "id": job_id,
            "grader": grader,
            "answer": answer,
            "reference": reference,
            "metadata": dict(metadata or {}),
        }
        content = json.dumps(job).encode()
        future: Future[Verdict] = Future()
        with self._lock:  # a job queued behind close() would never be answered
            if self._closing.is_set():
                raise ValueError("the grading pool is closed; submit answers before close()")
            self._jobs.put(_Job(job_id, content, future, bounded))
        return future

    def check_started(self) -> None:
        """Wait until every worker has imported its graders. WorkerStartError if one cannot: call it before a long
        run."""
        for started in self._started:
            started.result()

    def counts(self) -> PoolCounts:
        with self._lock:
            return PoolCounts(graded=self._graded, timeouts=self._timeouts, errors=self._errors)

    def close(self) -> None:
        """Finish the jobs in hand, cancel the queued ones, end the workers."""
        with self._lock:
            self._closing.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        while not self._jobs.empty():
            item = self._jobs.get()
            if item is not None:
                item.future.cancel()

    def _serve(self, started: Future[None]) -> None:
        """The life of one thread: nothing that happens to a worker ends it before close()."""
        worker: _Worker | None = None
        refused = False
        while not self._closing.is_set():
            if worker is None and not refused:  # early: imports overlap with generation
                worker, failure = self._start_worker()
                refused = worker is None
                if not started.done():
                    started.set_exception(failure) if failure is not None else started.set_result(None)
            item = self._jobs.get()
            if item is None:
                break
            future = item.future
            if not future.set_running_or_notify_cancel():
                continue
            if worker is None:
                worker, failure = self._start_worker()  # the machine may have recovered since
                if worker is None:
                    future.set_exception(failure)
                    continue
                refused = False
            try:
                verdict = worker.grade(item, self.timeout_seconds)
            except Exception as error:  # a fault of this file or of the machine: the caller must hear of it
                worker.kill()
                worker = None
                future.set_exception(error)
                continue
            self._count(verdict)
            if not worker.alive:
                worker.kill()
                worker = None
            future.set_result(verdict)
        if worker is not None:
            worker.kill()
        if not started.done():
            started.set_exception(WorkerStartError("the grading pool was closed before this worker had started"))

    def _start_worker(self) -> tuple[_Worker, None] | tuple[None, WorkerStartError]:
        """A worker that has imported its graders, or why there is none. Tries again while the machine refuses to
        make a process, not where the imports fail."""
        refusal: OSError | None = None
        for wait in (*START_RETRY_SECONDS, None):
            try:
                worker = _Worker(self.functions)
            except OSError as error:
                refusal = error
                if wait is None or self._closing.wait(wait):
                    break
                continue
            try:
                worker.wait_until_ready(self._closing)
            except WorkerStartError as error:
                worker.kill()
                return None, error
            return worker, None
        return None, WorkerStartError(
            f"no grading worker could be started, because the system refused a new process ({refusal}) "
            f"for {sum(START_RETRY_SECONDS):g} s; free memory, processes or file descriptors, or lower "
            "rewards.num_workers"
        )

    def _count(self, verdict: Verdict) -> None:
        with self._lock:
            self._graded += 1
            self._timeouts += verdict.timed_out
            self._errors += verdict.error is not None


@dataclass(frozen=True, slots=True)
class _Job:
    id: str
    content: bytes
    future: Future[Verdict]
    bounded: bool


class _Worker:
    """One process and its socket, as seen by the one thread that owns it. OSError where none can be made."""

    def __init__(self, functions: Sequence[WorkerFunction]) -> None:
        self.alive = True
        self._connection, far_end = Pipe()
        # -P: without it the working directory would shadow installed modules.
        command = [
            sys.executable,
            "-P",
            "-m",
            "megatron_r1.rewards.worker",
            str(far_end.fileno()),
            json.dumps([function.plain() for function in functions]),
            json.dumps(sys.path),
        ]
        self._command = " ".join(command[:-1])
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[far_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=worker_environment(),
            )
        except BaseException:
            self._connection.close()
            raise
        finally:
            far_end.close()

    def wait_until_ready(self, closing: threading.Event) -> None:
        """Return when the graders are imported. WorkerStartError where they are not, or the pool closes."""
        deadline = time.monotonic() + START_SECONDS
        ready = False
        try:
            while not (found := self._connection.poll(0.2)) and time.monotonic() < deadline:
                if closing.is_set():
                    raise WorkerStartError("the grading pool was closed before this worker had started")
            ready = found and self._connection.recv_bytes() == b"ready"
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):  # only for the exit status in the message
                self._process.wait(5)
        if not ready:
            raise WorkerStartError(
                f"a grading worker did not start (exit status {self._process.poll()}, waited up to "
                f"{START_SECONDS:g} s); its own message is on standard error; check that mpmath, "
                f"reasoning-gym and the modules of rewards.custom and rewards.graders import: {self._command}"
            )

    def grade(self, job: _Job, timeout_seconds: float) -> Verdict:
        """Hand over a job and wait. After a timeout, a death or a wrong reply `alive` is False and the worker must
        be replaced."""
        try:
            used_before = self._cpu_seconds()
            self._connection.send_bytes(job.content)
            deadline = time.monotonic() + MOST_WAITING * timeout_seconds
            left = timeout_seconds
            while not self._connection.poll(left):
                left = timeout_seconds - (self._cpu_seconds() - used_before)
                if left <= 0 or time.monotonic() > deadline:
                    self.alive = False
                    return Verdict(score=0.0, timed_out=True)
                left = max(left, 0.02)
            reply = self._connection.recv_bytes(MAX_REPLY_BYTES)
        except (EOFError, OSError):
            self.alive = False
            self._process.kill()  # a worker that closed its socket, or sent too much, may still run
            code = self._process.wait()
            return Verdict(score=0.0, error=f"the grading worker died (exit status {code})")
        verdict = read_reply(reply, job.id, bounded=job.bounded)
        if verdict is None:
            self.alive = False
            return Verdict(score=0.0, error="the grading worker gave no proper reply to this job; it was ended")
        return verdict

    def _cpu_seconds(self) -> float:
        """Processor time that the worker has used. EOFError if it is gone."""
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error as error:
            raise EOFError from error
        return times.user + times.system

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


def read_reply(reply: bytes, job_id: str, *, bounded: bool = True) -> Verdict | None:
    """The verdict in a worker's reply; None unless it is well formed and names the job that was asked."""
    try:
        fields = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or fields.get("id") != job_id:
        return None
    score, error = fields.get("score"), fields.get("error")
    if not isinstance(score, float) or (bounded and not 0.0 <= score <= 1.0):
        return None
    return Verdict(score=score if error is None else 0.0, error=None if error is None else str(error))


def worker_environment() -> dict[str, str]:
    """What a worker sees of the environment: nothing but how to find and run Python."""
    return {
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONWARNINGS": "ignore",  # reasoning-gym's dependencies compile with warnings
        "PYTHONDONTWRITEBYTECODE": "1",  # it may not write files
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
