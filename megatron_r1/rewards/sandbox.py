"""Runs programs that a model wrote: no network, no files but a private folder, hard limits, nothing left behind.

A launcher process (sandbox_process.py) starts one program at a time in namespaces of its own; this file keeps a pool of
launchers and hands each program to one, reads its output (sandbox_running.py) and ends what runs too long. A level
without isolation is used only where the configuration allows it by name. Left out: what a right answer is (code.py).
"""

from __future__ import annotations

import marshal
import os
import select
import threading
import time
from collections.abc import Callable, Sequence

from megatron_r1.config.sandbox import SandboxConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rewards.sandbox_process import START_SECONDS, Launcher, Level, SandboxError, boot_code, sealed
from megatron_r1.rewards.sandbox_running import Execution, Resources, Running
from megatron_r1.rewards.sandbox_values import encode

REMEDY = (
    "install bubblewrap (apt-get install bubblewrap), or allow unprivileged user namespaces (sysctl "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp "
    "profile that permits unshare and mount), or set allow_unisolated=True where every program may be trusted"
)


class Sandbox:
    """Runs programs from any number of threads; close it, or use it as a context manager.

    ConfigError where this machine offers no level that the configuration allows. `level` is the one in use.
    """

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._idle: list[Launcher] = []
        self._closed = False
        self._boot = sealed(marshal.dumps(boot_code()))
        self.level: Level = "none"
        try:
            self._choose_level()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, program: str, stdin: str = "") -> Execution:
        """Runs `program` as a script with `stdin`. SandboxError where the machine fails."""
        with Resources() as resources:
            started = self._start(resources, "main", _bytes(program), _bytes(stdin))
            self._watch([started])
            return started.execution(self.config)

    def check(
        self,
        program: str,
        entry_point: str,
        test: str,
        *,
        names: Sequence[str] = (),
        exceptions: Sequence[str] = (),
        objects: bool = False,
    ) -> tuple[Execution, Execution]:
        """Runs the statements `test`, in which `candidate` stands for `entry_point` of `program`, in one sandbox and
        the program in another. `names` and `exceptions` of the program's may be used too; `objects` of its classes may
        come to the test. Returns how the test ended (exit statuses of sandbox_tested.check) and how the program did;
        SandboxError where the machine fails."""
        with Resources() as resources:
            calls, calls_end = resources.pipe()
            replies, replies_end = resources.pipe()
            job = encode((entry_point, test, list(names), list(exceptions), objects))
            checker = self._start(resources, "check", job, b"", replies, calls_end)
            program_run = self._start(resources, "serve", _bytes(program), b"", calls, replies_end)
            for end in (calls, calls_end, replies, replies_end):
                resources.close(end)  # each end lives in one process now, so that its death is seen by the other
            self._watch([checker, program_run])
            return checker.execution(self.config), program_run.execution(self.config)

    def close(self) -> None:
        """Ends every idle launcher, and those in use as soon as they are idle."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            boot, self._boot = self._boot, -1
        for launcher in idle:
            launcher.close()
        if boot >= 0:
            os.close(boot)

    def _choose_level(self) -> None:
        """Takes the first level at which a program runs. No guess from versions or settings: only a run shows it."""
        wanted = self.config.isolation
        levels: list[Level] = ["bubblewrap", "namespaces"] if wanted == "auto" else [wanted]
        if wanted == "auto" and self.config.allow_unisolated:
            levels.append("none")
        reasons = []
        for level in levels:
            self.level = level
            try:
                found = self.run("print(6 * 7)")
            except SandboxError as error:
                reasons.append(f"{level}: {error}")
                continue
            if found.stdout == b"42\n":
                return
            reasons.append(f"{level}: a first program ended as {found.ending}: {found.stderr[-300:]!r}")
            self._drop_idle()
        raise ConfigError(f"the sandbox for code cannot run programs here ({'; '.join(reasons)}): {REMEDY}")

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for launcher in idle:
            launcher.close()

    def _start(self, resources: Resources, mode: str, program: bytes, stdin: bytes, *pipes: int) -> Running:
        launcher = self._take()
        resources.at_end(lambda: self._give(launcher))
        stdout, stdout_end = resources.pipe()
        stderr, stderr_end = resources.pipe()
        files = [resources.file(stdin), resources.file(program)]
        supplied = "+" if self.config.supply_imports and mode != "check" else ""
        launcher.ask(mode + supplied, [files[0], stdout_end, stderr_end, files[1], *pipes])
        for end in (stdout_end, stderr_end, *files):
            resources.close(end)
        return Running(launcher, stdout, stderr)

    def _take(self) -> Launcher:
        with self._lock:
            if self._closed:
                raise ValueError("the sandbox is closed; run programs before close()")
            while self._idle:
                launcher = self._idle.pop()
                if launcher.alive:
                    return launcher
                launcher.close()
        return Launcher(self.level, self.config, self._boot)

    def _give(self, launcher: Launcher) -> None:
        with self._lock:
            if not self._closed and not launcher.busy:
                self._idle.append(launcher)
                return
        launcher.close()

    def _watch(self, runs: Sequence[Running]) -> None:
        """Reads output until every run has ended. The first one is the one that counts: the others end with it."""
        deadline = time.monotonic() + self.config.wall_seconds
        poll = select.poll()
        handlers: dict[int, Callable[[], bool]] = {}
        for run in runs:
            for descriptor, handler in run.handlers(self.config.output_kib << 10):
                poll.register(descriptor, select.POLLIN)
                handlers[descriptor] = handler
        while any(not run.ended for run in runs):
            left = deadline - time.monotonic()
            if left <= 0:
                for run in runs:
                    run.kill("timeout")
                left = START_SECONDS
                if time.monotonic() > deadline + START_SECONDS:
                    raise SandboxError(f"a killed program did not end within {START_SECONDS:g} s")
            for descriptor, _ in poll.poll(left * 1000):
                if not handlers[descriptor]():
                    poll.unregister(descriptor)
            if runs[0].ended:
                for run in runs[1:]:
                    run.stop()
        for run in runs:
            run.drain(self.config.output_kib << 10)


def available_levels() -> dict[Level, str | None]:
    """Each isolating level, with None where it works on this machine and else the reason why not. Found by trying."""
    found: dict[Level, str | None] = {}
    levels: Sequence[Level] = ("bubblewrap", "namespaces")
    for level in levels:
        try:
            Sandbox(SandboxConfig(isolation=level)).close()
            found[level] = None
        except ConfigError as error:
            found[level] = str(error)
    return found


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
