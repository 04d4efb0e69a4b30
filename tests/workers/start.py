"""Start worker scripts under torchrun on 1, 2, ... ranks, one launch after the other.

usage: start.py [SCRIPT], with a request a line on standard input: JSON {"script", "private", "environment",
"launches": [[ranks, [argument, ...]], ...]}. A request is answered by two lines: the process group that does the work
and, when that has ended, `ended`. What launch i says goes to PRIVATE/said-i; its exit status to PRIVATE/status-i; what
is said besides to PRIVATE/output.

Most of a rank's seconds were imports. Here they are done once, before any thread or process group exists, and torchrun
forks its ranks from that (its options --start-method and --run-path): those of SCRIPT, or else of nearly all scripts,
on a patched CPU. Every launch is a process of its own, so that none finds what another left.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

SHARED = ("layouts", "transformers.models.llama.configuration_llama")
"""A script that imports what nearly all do, and what a model with a scaled rotary embedding imports when it is made."""


def main(modules: Sequence[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                serve(**request)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


def serve(script: str, private: str, environment: dict[str, str], launches: list) -> None:
    os.setsid()
    say_into(Path(private, "output"))
    os.environ.clear()
    os.environ.update(environment)
    importlib.import_module(Path(script).stem)
    for number, (ranks, arguments) in enumerate(launches):
        process = multiprocessing.get_context("fork").Process(
            target=torchrun, args=(script, private, number, ranks, arguments)
        )
        process.start()
        process.join()
        Path(private, f"status-{number}").write_text(str(process.exitcode))


def say_into(file: Path) -> None:
    """What this process and its children say from now on."""
    said = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)


def torchrun(script: str, private: str, number: int, ranks: int, arguments: list[str]) -> None:
    """The rendezvous is a file, so tests beside each other need no ports."""
    from torch.distributed import run

    say_into(Path(private, f"said-{number}"))
    words = ["--nnodes=1", f"--nproc-per-node={ranks}", "--start-method=fork", "--run-path"]
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={private}/agent-{number}", "--rdzv-conf=store_type=file"]
    words += [f"--rdzv-id={os.getpid()}-{number}", f"--log-dir={private}/logs-{number}"]
    words += [script, f"{private}/store-{number}", *arguments]
    run.main(words)


if __name__ == "__main__":
    main([Path(script).stem for script in sys.argv[1:]] or SHARED)
