"""Do a conversion's tasks in worker processes. Each task leaves a record when its bytes are on the disk."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from megatron_r1.weights.partial import Unfinished
from megatron_r1.weights.pieces import PieceBuffer
from megatron_r1.weights.plan import Plan
from megatron_r1.weights.process import worker_pool
from megatron_r1.weights.writer import WriteBuffers

_POLL_SECONDS = 0.1
_UNFLUSHED_TASKS = 4
"""How far a worker may be ahead of the disk."""


def run_tasks(
    unfinished: Unfinished,
    plan: Plan,
    tasks: Sequence[Sequence[Any]],
    done_before: Collection[int],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Do the tasks that have no record. The first error ends the conversion; finished tasks keep their records."""
    todo = [number for number in range(len(tasks)) if number not in done_before]
    counter = multiprocessing.get_context("fork").Value("Q", 0)
    before = plan.source_bytes * len(done_before) // max(len(tasks), 1)
    setup = (unfinished, plan, tasks, counter)
    remedy = "what is done is kept: repeat the command with --resume, with fewer --workers"
    with worker_pool(min(workers, max(len(todo), 1)), _start_worker, *setup, remedy=remedy) as pool:
        waiting: set[Future[None]] = {pool.submit(_run_task, number) for number in todo}
        while waiting:
            done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()
            if progress is not None:
                progress(min(before + counter.value, plan.source_bytes), plan.source_bytes)


@dataclass(slots=True)
class _Worker:
    """What a worker process keeps between tasks. `keeping`: the records of earlier tasks, on their way to the disk.

    The plan's reader came with the fork. Files that it opens here are this process's own.
    """

    unfinished: Unfinished
    plan: Plan
    tasks: Sequence[Sequence[Any]]
    counter: Any
    buffer: PieceBuffer
    writes: WriteBuffers
    flusher: ThreadPoolExecutor
    keeping: deque[Future[None]]

    def report(self, num_bytes: int) -> None:
        with self.counter.get_lock():
            self.counter.value += num_bytes


_worker: list[_Worker] = []
"""This process's worker; concurrent.futures has no other place for it."""


def _start_worker(unfinished: Unfinished, plan: Plan, tasks: Sequence[Sequence[Any]], counter: Any) -> None:
    os.close(unfinished.lock)
    # What is not waited for may stay in memory, which is faster than the disk.
    writes = WriteBuffers(direct=unfinished.sync)
    _worker[:] = [_Worker(unfinished, plan, tasks, counter, PieceBuffer(), writes, ThreadPoolExecutor(1), deque())]


def _run_task(number: int) -> None:
    worker = _worker[0]
    sink, reader = worker.plan.sink, worker.plan.reader
    record, handle = sink.run(worker.tasks[number], number, reader, worker.buffer, worker.writes, worker.report)
    # The disk is waited for beside the next tasks; the process ends only when its threads have.
    worker.keeping.append(worker.flusher.submit(worker.unfinished.keep_record, number, record, handle))
    while worker.keeping and (len(worker.keeping) > _UNFLUSHED_TASKS or worker.keeping[0].done()):
        worker.keeping.popleft().result()
