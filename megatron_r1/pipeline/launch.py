"""Start one process a rank on this machine, watch them, and end them together.

torchrun is for clusters, where its agents meet through a TCP store that any user of the machine may connect to. Here
the rendezvous is a file in the run's own folder, gloo's sockets stay on the loopback device, and what ends one rank
ends them all: a failure, a signal to this process, or its death (the ranks ask the kernel for that signal themselves).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.run_folder import STOP
from megatron_r1.errors import PREEMPTED
from megatron_r1.parent import die_with_parent, end_in_order_at_sigterm
from megatron_r1.pipeline.folder import RENDEZVOUS
from megatron_r1.planning.needs import Needs

PARENT_VARIABLE = "MEGATRON_R1_PARENT"
"""Process id of the launcher, for a rank that it started; absent under an outer launcher (torchrun, srun)."""

POLL_SECONDS = 0.2
FOLLOW_SECONDS = 30.0
"""After one rank failed, the others usually fail of it too; they are given this long to say how."""
STOP_SECONDS = 20.0
"""From SIGTERM to SIGKILL: a rank stops its vLLM servers first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """How many processes a stage has, and what they are told."""

    world_size: int
    threads: int
    cpu: bool


def ranks_of(needs: Needs) -> Ranks:
    """Those of a stage: its trainer's, or the one process of a stage without."""
    trainer = needs.trainer
    if trainer is None:
        return Ranks(world_size=1, threads=1, cpu=True)
    world, threads = trainer.parallel.world_size, trainer.train.threads_per_rank
    return Ranks(world_size=world, threads=threads, cpu=trainer.device == "cpu")


def launch_local(run_dir: Path, words: Sequence[str], processes: Ranks, *, command: str = "run") -> int:
    """Run `megatron-r1 COMMAND WORDS` as so many ranks and wait. Returns the exit status: 0, or that of the rank that
    failed first, or 128 + the signal that ended the run. SIGUSR1 asks the run to end after its step, with a
    checkpoint and status PREEMPTED (stages/common/preempt.py)."""
    (run_dir / RENDEZVOUS).mkdir(mode=0o700)
    ranks: list[subprocess.Popen[bytes]] = []
    with _signals() as received, _handler(signal.SIGUSR1, lambda: (run_dir / STOP).touch()):
        try:
            for rank in range(processes.world_size):
                started = [sys.executable, "-m", "megatron_r1", command, *words]
                ranks.append(subprocess.Popen(started, env=_environment(processes, rank), start_new_session=True))
            return _wait(ranks, received)
        finally:
            _end(ranks)


def obey_launcher() -> bool:
    """Whether a launcher of ours started this process, which then ends with it, and in order."""
    parent = int(os.environ.get(PARENT_VARIABLE, "0"))
    if parent:
        die_with_parent(parent, "the launcher")
    end_in_order_at_sigterm()
    return bool(parent)


def _environment(processes: Ranks, rank: int) -> dict[str, str]:
    environment = dict(os.environ) | {
        PARENT_VARIABLE: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes.world_size),
        "LOCAL_WORLD_SIZE": str(processes.world_size),
        "OMP_NUM_THREADS": str(processes.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONWARNINGS": "ignore",
        # glibc otherwise returns large tensors to the kernel and pays page faults for them at every step.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    }
    if processes.cpu:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The termination signals that arrive within, instead of what they would do."""
    received: list[int] = []
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in caught}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _handler(number: int, work: Callable[[], object]) -> Iterator[None]:
    before = signal.signal(number, lambda *_: work())
    try:
        yield
    finally:
        signal.signal(number, before)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> int:
    while not received:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed:
            deadline = time.monotonic() + FOLLOW_SECONDS
            while None in [rank.poll() for rank in ranks] and time.monotonic() < deadline and not received:
                time.sleep(POLL_SECONDS)
            if PREEMPTED in [rank.poll() for rank in ranks]:  # the others only lost it
                return PREEMPTED
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if None not in codes:
            return 0
        time.sleep(POLL_SECONDS)
    print(f"megatron-r1: {signal.Signals(received[0]).name}: ending the run", file=sys.stderr, flush=True)
    return 128 + received[0]


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to every rank that still runs, SIGKILL to those that do not heed it."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
        if rank.poll() is None:
            rank.kill()
            rank.wait()
