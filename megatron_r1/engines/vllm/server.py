"""Start, watch and stop vLLM api servers on this host, one process group each.

A LocalEngine owns one server process and everything below it, its log file, its token and its private folder
(mode 0700: unix sockets, rendezvous files, temporary files). Servers on other hosts are attached.py and supervise.py;
TLS is not here.

What listens on a running server, and who can reach it: the HTTP port on `host` (token on every route); ZMQ
sockets between vLLM's processes are unix sockets in the private folder; torch's rendezvous is a file there
too. What remains: gloo and NCCL open TCP listeners of their own (gloo on loopback) that have no
authentication, so another user of the machine could disturb a transfer, though not read the weights without
joining its private rendezvous.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psutil

from megatron_r1.config import RolloutConfig
from megatron_r1.engines.base import EngineSpec, Progress, start_all
from megatron_r1.engines.vllm.auth import new_token
from megatron_r1.engines.vllm.command import NodeSpan, server_command, server_environment
from megatron_r1.engines.vllm.engine import Engine
from megatron_r1.engines.vllm.process_group import end_group
from megatron_r1.errors import EngineError

LOG_TAIL_LINES = 30
POLL_SECONDS = 0.1
PORT_ATTEMPTS = 5
MAX_SOCKET_DIRECTORY = 60
"""A unix socket's path holds 107 bytes; vLLM appends a 36-character name, torch a little more."""

CAUSE = re.compile(r"(EngineCore|Worker).*ERROR.*\b\w+(Error|Exception): ")

REMEDIES = {
    "address already in use": "another process took the port; start again",
    "out of memory": "lower rollout.memory_fraction or rollout.max_num_seqs",
    "less than desired": "lower rollout.memory_fraction",
    "for kv cache": "raise or lower rollout.kv_cache_gib to fit rollout.max_model_len and the host's memory",
    "kv cache is needed": "raise rollout.kv_cache_gib or lower rollout.max_model_len",
    "max_model_len": "lower rollout.max_model_len to what the model's config.json allows",
    "unrecognized arguments": "mend rollout.vllm_args",
    "must be divisible": "choose rollout.tensor_parallel so that it divides the attention heads",
}


class LocalEngine(Engine):
    """One vLLM server whose process is this one's child.

    `log_path`: of all incarnations; `log_begin`, where the current one's part begins (bytes); `span`: the node's part
    of a server over several nodes (set before `start`).
    """

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.host = spec.host
        self.span: NodeSpan | None = None
        self.log_path = spec.run_dir / "logs" / f"{self.name}.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_begin = 0
        self.port = 0
        self.token = ""
        self.private_dir: tempfile.TemporaryDirectory[str] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.exit_code: int | None = None

    def start(self) -> None:
        """Start the process; returns at once (see wait_ready). Raises EngineError if it is already
        running.
        """
        if self.alive():
            raise EngineError(f"{self.name} is already running (process {self.pid}); stop it first.")
        self.starts += 1
        self.log_begin = self.log_path.stat().st_size if self.log_path.exists() else 0
        self.port = free_port(self.host)
        self.token = new_token()
        self.private_dir = private_directory()
        self.client = self.connect(f"{self.host}:{self.port}", self.token)
        command = server_command(
            self.config,
            model_path=self.spec.model_path,
            host=self.host,
            port=self.port,
            seed=self.spec.seed,
            reward_model=self.spec.reward_model,
            span=self.span,
        )
        environment = server_environment(
            self.config,
            base=os.environ,
            model_path=self.spec.model_path,
            host=self.host,
            token=self.token,
            private_dir=Path(self.private_dir.name),
            visible_devices=self.spec.visible_devices,
            span=self.span,
        )
        born = threading.Event()
        failure: list[OSError] = []

        def own_process() -> None:
            # The kernel's death signal watches the thread that forked, so that thread must live as long as
            # the child.
            try:
                with self.log_path.open("ab") as log:
                    process = self.process = subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
            except OSError as error:
                failure.append(error)
                return
            finally:
                born.set()
            process.wait()

        threading.Thread(target=own_process, name=f"{self.name}", daemon=True).start()
        born.wait()
        if failure:
            raise EngineError(f"{self.name} could not be started: {failure[0]}") from failure[0]

    @property
    def where(self) -> str:
        """Its address and its log."""
        return f"{self.host}:{self.port}, log {self.log_path}"

    def wait_ready(self, progress: Progress | None = None) -> float:
        """Block until the server answers; returns the seconds waited.

        `progress` is called about every 5 s with a sentence. A port taken by another process meanwhile is
        retried. Raises EngineError when the process dies or `start_seconds` pass.
        """
        limit = self.start_seconds
        begun, attempts, told = time.monotonic(), 1, time.monotonic()
        while not (self.owns_port() and self.client.healthy()):
            waited = time.monotonic() - begun
            if not self.alive():
                if "address already in use" not in self.log_tail().lower() or attempts == PORT_ATTEMPTS:
                    raise self.death("died while starting")
                attempts += 1
                self.stop()
                self.start()
            if waited > limit:
                tail = self.log_tail()
                self.stop()
                raise EngineError(
                    f"rollout.start_timeout_seconds: {self.name} did not answer within {limit:.0f} s; raise it, or "
                    f"lower rollout.weights_gb_per_second where storage is slower, or see {self.log_path}:\n{tail}"
                )
            if progress is not None and time.monotonic() - told > 5:
                told = time.monotonic()
                progress(f"{self.name} starting, {waited:.0f} s")
            time.sleep(POLL_SECONDS)
        return time.monotonic() - begun

    def alive(self) -> bool:
        """Whether the process runs (it may not answer yet)."""
        return self.process is not None and self.process.poll() is None

    def owns_port(self) -> bool:
        """Whether it is our server that listens: the token must not be sent to whoever took the port first."""
        if not self.alive():
            return False
        try:
            leader = psutil.Process(self.pid)
            return any(
                connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.port
                for process in (leader, *leader.children(recursive=True))
                for connection in process.net_connections("inet")
            )
        except psutil.Error:  # a process ended while it was looked at
            return False

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    def death(self, what: str) -> EngineError:
        """The error that tells how this server ended: exit code, tail of its log, remedy."""
        code = self.process.poll() if self.process is not None else self.exit_code
        tail = self.log_tail()
        found = [remedy for sign, remedy in REMEDIES.items() if sign in tail.lower()]
        remedy = found[0] if found else "read the log from its first error on"
        return EngineError(f"{self.name} {what} (exit code {code}). Remedy: {remedy}. {self.log_path} ends:\n{tail}")

    def log_tail(self) -> str:
        """The last lines of the log, led by the last exception of a child process if it is further up."""
        with self.log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(self.log_begin, log.tell() - 65_536))
            lines = log.read().decode(errors="replace").splitlines()
        causes = [line for line in lines[:-LOG_TAIL_LINES] if CAUSE.search(line)]
        return "\n".join(causes[-1:] + lines[-LOG_TAIL_LINES:])

    def stop(self) -> None:
        """End the process group that `start` made and remove its private folder. Safe to call twice."""
        process, private_dir = self.process, self.private_dir  # another thread may be stopping it too
        if process is not None:
            end_group(process)
            self.exit_code, self.process = process.returncode, None
        if private_dir is not None:
            private_dir.cleanup()
            self.private_dir = None


def start_engines(config: RolloutConfig, *, model_path: Path, run_dir: Path, seed: int = 0) -> tuple[LocalEngine, ...]:
    """rollout.num_engines servers on this host, ready. If one fails, all are stopped and its EngineError is raised."""
    first = EngineSpec(config=config, model_path=model_path, run_dir=run_dir, seed=seed)
    specs = [dataclasses.replace(first, index=index, seed=seed + index) for index in range(config.num_engines)]
    return start_all([LocalEngine(spec) for spec in specs])


def free_port(host: str) -> int:
    """A TCP port that is free on `host` now; another process may take it before the server binds it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def private_directory() -> tempfile.TemporaryDirectory[str]:
    """A new folder, mode 0700, with a path short enough for unix sockets; removed by `cleanup` or at exit."""
    root = tempfile.gettempdir() if len(tempfile.gettempdir()) < MAX_SOCKET_DIRECTORY - 13 else "/tmp"
    return tempfile.TemporaryDirectory(prefix="mr1-", dir=root, ignore_cleanup_errors=True)
