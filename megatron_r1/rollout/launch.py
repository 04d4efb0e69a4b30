"""The first lines of a server process: die with the trainer, then become vLLM's api server.

A process of its own, because the death signal must be asked for by the child itself. Usage: `python -m
megatron_r1.rollout.launch PARENT_PID VLLM_ARGUMENTS...`. vLLM's own processes below it notice their parent's
end by themselves.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGTERM when the parent ends; exit now if it already has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        sys.exit(f"the trainer (process {parent_pid}) ended before this server began")


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    os.umask(0o077)
    sys.argv = ["vllm", *sys.argv[2:]]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main()
