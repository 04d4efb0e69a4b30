"""A server's process group: how it ends, and with it the shared memory that a killed one would leave behind.

vLLM's workers share /dev/shm/psm_* and semaphores, which Python's resource tracker removes when all has ended. It is a
process of the group too: killed with it, it removes nothing. Standard library only: launch.py begins with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

STOP_SECONDS = 10.0
POLL_SECONDS = 0.025
SHARED_MEMORY = Path("/dev/shm")
NAMES = ("psm_*", "sem.mp-*")
"""What Python's multiprocessing makes there."""


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the leader, which ends its children in order; SIGKILL to whatever of the group outlives it."""
    deadline = time.monotonic() + STOP_SECONDS
    shared = shared_memory_of(process.pid)
    if process.poll() is None:
        process.terminate()
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    kill_group(process.pid, shared)
    process.wait()


def kill_group(group: int, shared: Collection[Path] = ()) -> None:
    """SIGKILL to all of the group, which may be this process's own or be gone; nothing that its processes share, nor
    of `shared`, stays in the shared memory."""
    for path in {*shared, *shared_memory_of(group)}:
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(ProcessLookupError):  # nothing of the group is left
        os.killpg(group, signal.SIGKILL)


def shared_memory_of(group: int) -> set[Path]:
    """What of multiprocessing's the group's processes have mapped now. By inode: libc maps a semaphore that it makes
    before it has its name."""
    mapped: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getpgid(int(process.name)) == group:
                lines = (process / "maps").read_bytes().splitlines()  # a path may have any bytes
                mapped.update(int(line.split()[4]) for line in lines if bytes(SHARED_MEMORY) in line)
    found: set[Path] = set()
    for path in (path for pattern in NAMES for path in SHARED_MEMORY.glob(pattern)):
        with contextlib.suppress(OSError):
            if path.stat().st_ino in mapped:
                found.add(path)
    return found
