"""Processes that end with the one that started them, and in order when they are told to. Linux's death signal; standard
library only, since the sandbox's launcher runs this source where no package is visible."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def signal_at_parents_death(number: int) -> None:
    """Ask the kernel for signal `number` when the thread that started this process ends; not if it already has. It must
    be asked for by the child itself, and a fork forgets it. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def die_with_parent(parent_pid: int, who: str = "the trainer") -> None:
    """SIGTERM when the parent ends; exit now if it already has."""
    signal_at_parents_death(signal.SIGTERM)
    if os.getppid() != parent_pid:
        sys.exit(f"{who} (process {parent_pid}) ended before this process began")


def end_in_order_at_sigterm() -> None:
    """SIGTERM raises SystemExit, so that what this process has started is stopped on the way out. Once: Slurm tells the
    launcher and its ranks, and the launcher tells its ranks again, which must not interrupt that."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
