"""What the worker processes of conversions and comparisons have in common: they end with the process they work for."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from megatron_r1.errors import CheckpointError
from megatron_r1.parent import signal_at_parents_death


@contextmanager
def worker_pool(
    workers: int, start: Callable[..., None], *arguments: Any, remedy: str
) -> Iterator[ProcessPoolExecutor]:
    """A pool of forked processes that run `start(*arguments)` first. They leave Ctrl-C to this process, and are killed
    with it. CheckpointError with `remedy` if one of them is killed alone."""
    # fork: workers share the parent's libraries in memory, and start at once. No thread runs in this process yet.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(os.getpid(), start, arguments)
    ) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise CheckpointError(f"a worker process was killed (is memory short?); {remedy}") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def imports_kept() -> Iterator[None]:
    """Keep garbage collections from walking what is there already (torch's objects, mostly): it is not
    garbage, and in forked processes the walk would copy it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _begin(parent: int, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal_at_parents_death(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it was killed before this process could ask
    gc.freeze()
    torch.set_num_threads(1)
    start(*arguments)
