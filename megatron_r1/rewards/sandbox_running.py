"""One program of the sandbox while it runs: its descriptors, its output up to a cap, and how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1.config.sandbox import SandboxConfig
from megatron_r1.rewards.sandbox_process import Launcher, sealed

Ending = Literal["exited", "timeout", "memory", "crashed", "output_limit"]

CHUNK_BYTES = 1 << 16
STDERR_TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How one program ended. exit_status: as subprocess has it, -N for signal N; ending "exited" means status 0.

    stdout: at most output_kib. stderr: its last STDERR_TAIL_BYTES bytes. cpu_seconds: of the program and the children
    that it waited for.
    """

    ending: Ending
    exit_status: int
    stdout: bytes
    stderr: bytes
    cpu_seconds: float
    wall_seconds: float


class Resources(contextlib.ExitStack):
    """File descriptors of one run, closed at its end if not before."""

    def __init__(self) -> None:
        super().__init__()
        self._open: set[int] = set()

    def at_end(self, action: Callable[[], None]) -> None:
        self.callback(action)

    def pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._keep(*ends)
        return ends

    def file(self, content: bytes) -> int:
        descriptor = sealed(content)
        self._keep(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:  # type: ignore[override]
        if descriptor in self._open:
            self._open.discard(descriptor)
            os.close(descriptor)

    def _keep(self, *descriptors: int) -> None:
        for descriptor in descriptors:
            self._open.add(descriptor)
            self.callback(self.close, descriptor)


class Running:
    """One program on its launcher, until the launcher reports its end."""

    def __init__(self, launcher: Launcher, stdout: int, stderr: int) -> None:
        self.launcher = launcher
        self.ended = False
        self._outputs = {stdout: bytearray(), stderr: bytearray()}
        self._stdout, self._stderr = stdout, stderr
        self._began = time.monotonic()
        self._killed: Ending | None = None
        self._stopped = False
        self._report: Mapping[str, Any] = {}
        self._seconds = 0.0
        for descriptor in self._outputs:
            os.set_blocking(descriptor, False)

    def handlers(self, most: int) -> list[tuple[int, Callable[[], bool]]]:
        """(descriptor, what to do when it is ready); False from that means that nothing more will come."""
        return [
            (self._stdout, lambda: self._read(self._stdout, most)),
            (self._stderr, lambda: self._read(self._stderr, most)),
            (self.launcher.fileno(), self._hear),
        ]

    def kill(self, reason: Ending) -> None:
        if not self.ended and self._killed is None:
            self._killed = reason
            self.launcher.kill()

    def stop(self) -> None:
        """Ends a program that is no longer needed, which is no fault of its own."""
        if not self.ended and not self._stopped:
            self._stopped = True
            self.launcher.kill()

    def drain(self, most: int) -> None:
        """After the end: what is still in the pipes."""
        for descriptor in self._outputs:
            while self._read(descriptor, most):
                pass

    def execution(self, config: SandboxConfig) -> Execution:
        status = os.waitstatus_to_exitcode(self._report["status"])
        return Execution(
            ending=self._ending(status, config),
            exit_status=status,
            stdout=bytes(self._outputs[self._stdout]),
            stderr=bytes(self._outputs[self._stderr][-STDERR_TAIL_BYTES:]),
            cpu_seconds=self._report["cpu"],
            wall_seconds=self._seconds,
        )

    def _ending(self, status: int, config: SandboxConfig) -> Ending:
        if self._killed is not None:
            return self._killed
        if status == 0:
            return "exited"
        if status in (-signal.SIGKILL, -signal.SIGXCPU):
            if self._report["cpu"] >= config.cpu_seconds - 0.2:
                return "timeout"
            return "crashed" if self._stopped else "memory"  # only the kernel kills else, where memory runs out
        last = bytes(self._outputs[self._stderr][-STDERR_TAIL_BYTES:]).rstrip().rpartition(b"\n")[2]
        return "memory" if last.startswith(b"MemoryError") else "crashed"

    def _read(self, descriptor: int, most: int) -> bool:
        try:
            chunk = os.read(descriptor, CHUNK_BYTES)
        except BlockingIOError:
            return False
        output = self._outputs[descriptor]
        output += chunk[: most - len(output) + 1]
        if len(output) > most:
            del output[most:]
            self.kill("output_limit")
            if self.ended and self._killed is None:
                self._killed = "output_limit"
            return False
        return bool(chunk)

    def _hear(self) -> bool:
        self._report = self.launcher.report()
        self._seconds = time.monotonic() - self._began
        self.ended = True
        return False
