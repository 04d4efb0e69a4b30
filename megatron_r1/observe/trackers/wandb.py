"""Weights & Biases, in a process of its own (wandb_process.py): the library's threads and its work at exit would hold
up the run where its uploader hangs.

A restarted run goes on as the same one: its id is kept in trackers.json. Steps that are logged a second time cannot be
taken back there, so the horizontal axis is our own `step`, and both points stand at the same place. A value that is not
finite is left out.
"""

from __future__ import annotations

import json
import math
import secrets
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from megatron_r1.observe.trackers import Remember, TrackedRun, Tracker

PROGRAM = "megatron_r1.observe.trackers.wandb_process"


class WeightsAndBiases:
    def __init__(self, run: TrackedRun, remember: Remember) -> None:
        wanted = run.track.wandb
        identity = str(run.known.get("id") or secrets.token_hex(4))
        remember(id=identity)  # before it exists there: a start that dies in between would make a second one
        logs = run.folder / "logs"
        logs.mkdir(exist_ok=True)
        self._folder = run.folder / "wandb"
        self._gone = f"its process has ended, see {logs / 'wandb.log'}"
        with open(logs / "wandb.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the run's; this process ends by what it reads
            )
        self._send(
            {
                "dir": str(run.folder),
                "project": wanted.project,
                "entity": wanted.entity or None,
                "name": wanted.name or run.name,
                "group": run.folder.resolve().parent.name or None,
                "job_type": run.stage,
                "id": identity,
                "mode": wanted.mode,
                "config": dict(run.config),
            }
        )
        url = self._answer()["url"]
        self.about = url or f"{self._folder}, run {identity}; wandb sync uploads it"
        remember(id=identity, url=url)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._send({"step": step, **{name: value for name, value in metrics.items() if math.isfinite(value)}})

    def close(self, seconds: float) -> None:
        assert self._process.stdin is not None
        status: int | None = None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(seconds)
        kill_with_children(self._process.pid)
        self._process.wait()
        if status == 0:
            return
        reason = f"no end within {seconds:g} s" if status is None else f"its process has ended with status {status}"
        try:
            self._answer()
        except RuntimeError as error:
            reason = str(error) if str(error) != self._gone else reason
        raise RuntimeError(f"{reason}: wandb sync {self._folder}/*run-* uploads the rest")

    def _send(self, content: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._answer()
            raise

    def _answer(self) -> dict[str, Any]:
        """The process's next line. RuntimeError with its words if it has failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._gone}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def kill_with_children(pid: int) -> None:
    """The uploader is in a session of its own and may be stopped: no signal but this one reaches it."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def open_tracker(run: TrackedRun, remember: Remember) -> Tracker:
    return WeightsAndBiases(run, remember)
