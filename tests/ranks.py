"""Start worker scripts on gloo ranks with torchrun, as the multi-rank tests do."""

from __future__ import annotations

import json
import os
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
        self.failures = failures
        self.ranks = {name: ranks for ranks, names in launches.items() for name in names}
        for name in self.ranks:
            if (folder / f"{name}.npz").exists():
                self[name] = dict(np.load(folder / f"{name}.npz"))

    def __missing__(self, name: str) -> dict:
        raise AssertionError(self.failures[self.ranks[name]])


def run_ranks(script: str, *arguments: str, ranks: int, timeout_seconds: float = 300.0) -> None:
    """Run tests/workers/SCRIPT under torchrun with `ranks` processes. Fails with the output's end if a rank fails."""
    for said in run_launches(script, {ranks: list(arguments)}, timeout_seconds=timeout_seconds).values():
        raise AssertionError(said)


def run_launches(script: str, launches: dict[int, list[str]], *, timeout_seconds: float = 300.0) -> dict[int, str]:
    """Run tests/workers/SCRIPT once for every number of ranks, with its arguments, one launch after the other.

    Returns, by number of ranks, how each launch ended, with the output's end, in which a rank failed or that was not
    over when all had taken `timeout_seconds`.
    """
    with tempfile.TemporaryDirectory() as private:
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": os.pathsep.join([str(WORKERS.parent), os.environ.get("PYTHONPATH", "")]),
        }
        with subprocess.Popen(
            [sys.executable, str(WORKERS / "start.py"), str(WORKERS / script), private],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(json.dumps(list(launches.items())), timeout=timeout_seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        failures = {}
        for number, ranks in enumerate(launches):
            status, said = Path(private, f"status-{number}"), Path(private, f"said-{number}")
            ended = status.read_text() if status.exists() else f"nothing in {timeout_seconds:.0f} s"
            if ended != "0":
                told = said.read_text(errors="replace") if said.exists() else output
                failures[ranks] = f"{script} on {ranks} rank(s) ended with {ended}:\n{told[-SAID_CHARACTERS:]}"
    return failures
