"""Start a worker script under torchrun on 1, 2, ... ranks, one launch after the other.

usage: start.py SCRIPT PRIVATE, with the launches on standard input: JSON [[ranks, [argument, ...]], ...]. What launch
i says goes to PRIVATE/said-i; its exit status to PRIVATE/status-i when it ends.

Most of a rank's seconds were imports. Here the script's are done once, before any thread or process group exists, and
torchrun forks its ranks from that (its options --start-method and --run-path). Every launch is a process of its own, so
that none finds what another left.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from pathlib import Path


def main(script: Path, private: Path) -> None:
    importlib.import_module(script.stem)
    launches = json.load(sys.stdin)
    for number, (ranks, arguments) in enumerate(launches):
        process = multiprocessing.get_context("fork").Process(
            target=torchrun, args=(script, private, number, ranks, arguments)
        )
        process.start()
        process.join()
        (private / f"status-{number}").write_text(str(process.exitcode))


def torchrun(script: Path, private: Path, number: int, ranks: int, arguments: list[str]) -> None:
    """The rendezvous is a file, so tests beside each other need no ports."""
    from torch.distributed import run

    said = os.open(private / f"said-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    words = ["--nnodes=1", f"--nproc-per-node={ranks}", "--start-method=fork", "--run-path"]
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={private}/agent-{number}", "--rdzv-conf=store_type=file"]
    words += [f"--rdzv-id={os.getpid()}-{number}", f"--log-dir={private}/logs-{number}"]
    words += [str(script), f"{private}/store-{number}", *arguments]
    run.main(words)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
