"""Do a conversion's tasks in worker processes. Each task leaves a record when its bytes are on the disk."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.weights.folders import open_checkpoint, open_raw
from megatron_r1.weights.partial import Unfinished, keep_record
from megatron_r1.weights.pieces import PieceBuffer
from megatron_r1.weights.plan import Plan
from megatron_r1.weights.process import worker_pool
from megatron_r1.weights.reader import CheckpointReader

_POLL_SECONDS = 0.1
_UNFLUSHED_TASKS = 4
"""How far a worker may be ahead of the disk."""


def run_tasks(
    source: Path,
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
    setup = (source, unfinished, plan, tasks, counter)
    remedy = "what is done is kept: go on with --resume, with fewer --workers"
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
    """What a worker process keeps between tasks. `keeping`: the records of earlier tasks, on their way to the disk."""

    source: Path
    folder: Path
    plan: Plan
    tasks: Sequence[Sequence[Any]]
    counter: Any
    buffer: PieceBuffer
    flusher: ThreadPoolExecutor
    keeping: deque[Future[None]]
    opened: CheckpointReader | None = None

    @property
    def reader(self) -> CheckpointReader:
        if self.opened is None:
            self.opened = (open_raw if self.plan.raw else open_checkpoint)(self.source, self.plan.shape)
        return self.opened

    def report(self, num_bytes: int) -> None:
        with self.counter.get_lock():
            self.counter.value += num_bytes


_worker: list[_Worker] = []
"""This process's worker; concurrent.futures has no other place for it."""


def _start_worker(
    source: Path, unfinished: Unfinished, plan: Plan, tasks: Sequence[Sequence[Any]], counter: Any
) -> None:
    os.close(unfinished.lock)
    _worker[:] = [
        _Worker(source, unfinished.folder, plan, tasks, counter, PieceBuffer(), ThreadPoolExecutor(1), deque())
    ]


def _run_task(number: int) -> None:
    worker = _worker[0]
    record, handle = worker.plan.sink.run(worker.tasks[number], number, worker.reader, worker.buffer, worker.report)
    # The disk is waited for beside the next tasks; the process ends only when its threads have.
    worker.keeping.append(worker.flusher.submit(keep_record, worker.folder, number, record, handle))
    while worker.keeping and (len(worker.keeping) > _UNFLUSHED_TASKS or worker.keeping[0].done()):
        worker.keeping.popleft().result()
