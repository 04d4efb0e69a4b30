"""Start worker scripts on gloo ranks with torchrun, as the multi-rank tests do."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

WORKERS = Path(__file__).parent / "workers"
SAID_CHARACTERS = 6000


class Results(dict[str, dict]):
    """What each layout's ranks found; asking for one that failed, or was not come to, raises what its ranks said."""

    def __init__(self, folder: Path, launches: dict[int, list[str]], failures: dict[int, str]) -> None:
        """Reads FOLDER/LAYOUT.npz of each layout in `launches`, number of ranks: layouts."""
        super().__init__()
        self.folder, self.failures = folder, failures
        self.ranks = {name: ranks for ranks, names in launches.items() for name in names}
        for name in self.ranks:
            if (folder / f"{name}.npz").exists():
                self[name] = dict(np.load(folder / f"{name}.npz"))

    def __missing__(self, name: str) -> dict:
        raise AssertionError(self.failures[self.ranks[name]])


def environment() -> dict[str, str]:
    return dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(WORKERS.parent), os.environ.get("PYTHONPATH", "")]),
    }


class Starter:
    """A process that has done the imports (workers/start.py) and starts ranks on request."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKERS / "start.py"), *words],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def run(self, request: dict, timeout_seconds: float) -> None:
        """Returns when the launches of a request have ended, or are killed after `timeout_seconds`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        group = None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            group = int(self.process.stdout.readline())
            if not select.select([self.process.stdout], [], [], timeout_seconds)[0]:
                os.killpg(group, signal.SIGKILL)
            assert self.process.stdout.readline() == b"ended\n"
        except BaseException:  # nobody waits for the answer any more
            self.stop(group)
            raise

    def stop(self, group: int | None = None) -> None:
        """Also ends the ranks of `group`."""
        for pid in (group, self.process.pid):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@functools.cache
def shared_starter() -> Starter:
    """One for all tests of this process."""
    return Starter()


def run_ranks(script: str, *arguments: str, ranks: int, timeout_seconds: float = 300.0, shared: bool = True) -> None:
    """Run tests/workers/SCRIPT under torchrun with `ranks` processes. Fails with the output's end if a rank fails."""
    launches = {ranks: list(arguments)}
    for said in run_launches(script, launches, timeout_seconds=timeout_seconds, shared=shared).values():
        raise AssertionError(said)


def run_launches(
    script: str, launches: dict[int, list[str]], *, timeout_seconds: float = 300.0, shared: bool = True
) -> dict[int, str]:
    """Run tests/workers/SCRIPT once for every number of ranks, with its arguments, one launch after the other.

    Returns, by number of ranks, how each launch ended, with the output's end, in which a rank failed or that was not
    over when all had taken `timeout_seconds`. `shared`: ranks are forked from the process that all tests share, whose
    imports found a patched CPU and the environment of the first test; a script that must have its own sets it to False.
    """
    with tempfile.TemporaryDirectory() as private:
        path = str(WORKERS / script)
        starter = shared_starter() if shared else Starter(path)
        try:
            request = {"script": path, "private": private, "launches": list(launches.items())}
            starter.run(request | {"environment": environment()}, timeout_seconds)
        except BaseException:
            shared_starter.cache_clear()
            raise
        finally:
            if not shared:
                starter.stop()
        failures = {}
        for number, ranks in enumerate(launches):
            status, said = Path(private, f"status-{number}"), Path(private, f"said-{number}")
            ended = status.read_text() if status.exists() else f"no status, after at most {timeout_seconds:.0f} s"
            if ended != "0":
                told = said if said.exists() else Path(private, "output")
                end = told.read_text(errors="replace")[-SAID_CHARACTERS:]
                failures[ranks] = f"{script} on {ranks} rank(s) ended with {ended}:\n{end}"
    return failures
