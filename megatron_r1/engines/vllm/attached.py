"""A server that another process of the same job supervises, on another node: the trainer's side of it.

The two sides (the other is supervise.py) talk through small files on the shared file system, each replaced in one
piece: in RUN_DIR/servers, NAME.request says which incarnation the trainer wants and of which model, NAME.json how the
server stands and its address, and NAME.token (mode 0600) holds the token of its present incarnation. Both sides name
the job's attempt, so that what an earlier start of the job left is not taken for this one's. Requests travel over
plain HTTP with the token: without TLS whoever can read the network between the nodes can read it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_r1.engines.base import EngineSpec, Progress
from megatron_r1.engines.vllm.engine import Engine
from megatron_r1.errors import EngineError
from megatron_r1.files import write_whole
from megatron_r1.observe.metrics import write_json

SERVERS = "servers"
POLL_SECONDS = 0.25
SUPERVISOR_SECONDS = 60.0
"""A supervisor that has taken a server up is given so much longer than the server, to say why it did not start."""
HEALTH_ATTEMPTS = 3
"""A server that is loading weights may miss one answer; a dead one misses all."""

State = Literal["starting", "ready", "failed", "dead", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the trainer wants: incarnation number `starts` of a server of this model, or none (`stopped`)."""

    attempt: str
    starts: int
    model_path: str
    seed: int
    stopped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """How the server stands. `message`: how it ended. `log`: the file that its process writes. `meeting`: where the
    workers of its nodes meet, host and port."""

    attempt: str
    starts: int
    state: State
    host: str
    port: int
    model_path: str = ""
    seed: int = 0
    message: str = ""
    log: str = ""
    meeting: tuple[str, int] = ("", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A node's part of a server over several nodes has ended by itself."""

    attempt: str
    starts: int
    message: str


T = TypeVar("T", Request, Record, Lost)


class ServerFiles:
    """The files of one server of one attempt."""

    def __init__(self, run_dir: Path, name: str, *, attempt: str) -> None:
        self.folder, self.name, self.attempt = Path(run_dir) / SERVERS, name, attempt

    def make_folder(self) -> None:
        """By the trainer's rank 0 alone, in the run folder that it has prepared."""
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def write(self, content: Request | Record | Lost) -> None:
        write_json(self._path(type(content)), asdict(content))

    def read(self, kind: type[T]) -> T | None:
        """The last one of this attempt; None if there is none."""
        try:
            fields: dict[str, Any] = json.loads(self._path(kind).read_text(encoding="utf-8"))
        except OSError:  # not there yet, or replaced on a network file system while it was opened
            return None
        if "meeting" in fields:
            fields["meeting"] = tuple(fields["meeting"])
        content = kind(**fields)
        return content if content.attempt == self.attempt else None

    def write_token(self, token: str) -> None:
        write_whole(self.folder / f"{self.name}.token", token, mode=0o600)

    def read_token(self) -> str:
        return (self.folder / f"{self.name}.token").read_text(encoding="utf-8")

    def _path(self, kind: type) -> Path:
        return self.folder / f"{self.name}.{'json' if kind is Record else kind.__name__.lower()}"


class AttachedEngine(Engine):
    """A vLLM server whose process a supervisor on another node starts, watches and ends at our request."""

    def __init__(self, spec: EngineSpec, *, attempt: str) -> None:
        super().__init__(spec)
        self.files = ServerFiles(spec.run_dir, self.name, attempt=attempt)
        self._running = False

    @property
    def where(self) -> str:
        """Its address and its log, once it is ready."""
        record = self._record()
        return "no address yet" if record is None else f"{record.host}:{record.port}, log {record.log}"

    def start(self) -> None:
        """Ask for the next incarnation; returns at once (see wait_ready)."""
        self.files.make_folder()
        self.starts += 1
        self._running = True
        self._ask()

    def wait_ready(self, progress: Progress | None = None) -> float:
        """Block until the server answers; returns the seconds waited. EngineError if it cannot start, or if nobody
        starts it within `start_seconds`. The supervisor's wait is as long and begins later: it has the last word."""
        limit = self.start_seconds
        begun = told = time.monotonic()
        while True:
            record, waited = self._record(), time.monotonic() - begun
            if record is not None and record.state == "ready":
                self.client = self.connect(f"{record.host}:{record.port}", self.files.read_token())
                if self.client.healthy():
                    return waited
            if record is not None and record.state in ("failed", "dead"):
                raise self.death("died while starting")
            if waited > limit + (SUPERVISOR_SECONDS if record is not None else 0.0):
                known = f"its supervisor says {record.state}" if record is not None else "no supervisor took it up"
                raise EngineError(
                    f"rollout.start_timeout_seconds: {self.name} did not answer within "
                    f"{waited:.0f} s ({known}); see the logs of the job's server nodes"
                )
            if progress is not None and time.monotonic() - told > 5:
                told = time.monotonic()
                progress(f"{self.name} starting, {waited:.0f} s")
            time.sleep(POLL_SECONDS)

    def alive(self) -> bool:
        """Whether the supervisor counts it as running and it answers. (A node that went away takes both with it, and
        the supervisor's last word stays: hence the question.)"""
        record = self._record()
        if not self._running or record is None or record.state != "ready":
            return False
        return any(self.client.healthy() for _ in range(HEALTH_ATTEMPTS))

    def death(self, what: str) -> EngineError:
        """The error that tells how this server ended, in its supervisor's words."""
        record = self._record()
        said = record.message if record is not None and record.message else "see the logs of the job's server nodes"
        return EngineError(f"{self.name} {what} on its node: {said}")

    def stop(self) -> None:
        """Ask for its end; the supervisor does the rest. Safe to call twice."""
        if self._running:
            self._running = False
            self._ask()

    def _ask(self) -> None:
        self.files.write(
            Request(
                attempt=self.files.attempt,
                starts=self.starts,
                model_path=str(self.spec.model_path),
                seed=self.spec.seed,
                stopped=not self._running,
            )
        )

    def _record(self) -> Record | None:
        """The supervisor's word on this incarnation."""
        record = self.files.read(Record)
        return record if record is not None and record.starts == self.starts else None
