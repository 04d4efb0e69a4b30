"""Runs programs that a model wrote: no network, no files but a private folder, hard limits, nothing left behind.

A launcher process (sandbox_launcher.py) starts one program at a time in namespaces of its own; this file keeps a pool
of launchers, hands them programs as file descriptors, reads output up to a cap and ends what runs too long. A level
without isolation is used only where the configuration allows it by name. Left out: what a right answer is (code.py).
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import marshal
import os
import platform
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Literal

from megatron_r1.config.sandbox import SandboxConfig
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.rewards import sandbox_inside as inside
from megatron_r1.rewards.sandbox_launcher import DEVICES, UNPRIVILEGED_ID
from megatron_r1.rewards.sandbox_seccomp import filter_code
from megatron_r1.syntax import parse

Level = Literal["bubblewrap", "namespaces", "none"]
Ending = Literal["exited", "timeout", "memory", "crashed", "output_limit"]

REMEDY = (
    "install bubblewrap (apt-get install bubblewrap), or allow unprivileged user namespaces (sysctl "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp "
    "profile that permits unshare and mount), or set allow_unisolated=True where every program may be trusted"
)
BOOT_MODULES = tuple(f"megatron_r1.rewards.sandbox_{name}" for name in ("values", "objects", "inside"))
LAUNCHER_MODULES = ("megatron_r1.parent", "megatron_r1.rewards.sandbox_launcher")
START_SECONDS = 60.0
"""For a launcher to start, and to answer an order to kill: both take milliseconds on a machine that is not stuck."""

CHUNK_BYTES = 1 << 16
STDERR_TAIL_BYTES = 2000
SEALED = 0xF  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
STACK_MIB = 64
OPEN_FILES = 64


class SandboxError(UserError, RuntimeError):
    """The machine could not start or end a program: no verdict on the program."""


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


class Sandbox:
    """Runs programs from any number of threads; close it, or use it as a context manager.

    ConfigError where this machine offers no level that the configuration allows. `level` is the one in use.
    """

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._idle: list[_Launcher] = []
        self._closed = False
        self._boot = _sealed(marshal.dumps(boot_code()))
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
        with _Resources() as resources:
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
        come to the test. Returns how the test ended (exit statuses of sandbox_inside.check) and how the program did;
        SandboxError where the machine fails."""
        with _Resources() as resources:
            calls, calls_end = resources.pipe()
            replies, replies_end = resources.pipe()
            job = inside.encode((entry_point, test, list(names), list(exceptions), objects))
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

    def _start(self, resources: _Resources, mode: str, program: bytes, stdin: bytes, *pipes: int) -> _Running:
        launcher = self._take()
        resources.at_end(lambda: self._give(launcher))
        stdout, stdout_end = resources.pipe()
        stderr, stderr_end = resources.pipe()
        files = [resources.file(stdin), resources.file(program)]
        supplied = "+" if self.config.supply_imports and mode != "check" else ""
        launcher.ask(mode + supplied, [files[0], stdout_end, stderr_end, files[1], *pipes])
        for end in (stdout_end, stderr_end, *files):
            resources.close(end)
        return _Running(launcher, stdout, stderr)

    def _take(self) -> _Launcher:
        with self._lock:
            if self._closed:
                raise ValueError("the sandbox is closed; run programs before close()")
            while self._idle:
                launcher = self._idle.pop()
                if launcher.alive:
                    return launcher
                launcher.close()
        return _Launcher(self.level, self.config, self._boot)

    def _give(self, launcher: _Launcher) -> None:
        with self._lock:
            if not self._closed and not launcher.busy:
                self._idle.append(launcher)
                return
        launcher.close()

    def _watch(self, runs: Sequence[_Running]) -> None:
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


class _Resources(contextlib.ExitStack):
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
        descriptor = _sealed(content)
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


class _Running:
    """One program on its launcher, until the launcher reports its end."""

    def __init__(self, launcher: _Launcher, stdout: int, stderr: int) -> None:
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


class _Launcher:
    """One launcher process. SandboxError where it cannot be started at this level."""

    def __init__(self, level: Level, config: SandboxConfig, boot: int) -> None:
        self.busy = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._folder = tempfile.mkdtemp(prefix="megatron_r1_sandbox_") if level == "none" else None
        self._connection, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with far_end:
                self._process = subprocess.Popen(
                    [*_prefix(level), *_launcher_command(), str(far_end.fileno())],
                    pass_fds=[far_end.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    env={"LANG": "C.UTF-8"},
                    start_new_session=True,
                )
            setup = json.dumps(_setup(level, config, self._folder)).encode()
            socket.send_fds(self._connection, [setup], [boot])
            self._connection.settimeout(START_SECONDS)
            self.report()
            self._connection.settimeout(None)
        except OSError as error:
            words = self._last_words
            self.close()
            raise SandboxError(f"no launcher could be started ({error}){words}") from error
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def fileno(self) -> int:
        return self._connection.fileno()

    def ask(self, mode: str, descriptors: Sequence[int]) -> None:
        """Starts a program; `report` tells when it has ended."""
        try:
            socket.send_fds(self._connection, [mode.encode()], descriptors)
        except OSError as error:
            self.busy = True
            raise SandboxError(f"a sandbox launcher has died ({error})") from error
        self.busy = True

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # a dead launcher has taken its program with it; report() says so
            self._connection.send(b"kill")

    def report(self) -> Mapping[str, Any]:
        """The next message. SandboxError where it is a failure of the launcher's or none comes."""
        reply = self._connection.recv(1 << 16)
        if not reply:
            if self._process is not None:
                self._process.wait(START_SECONDS)
            raise SandboxError(f"a sandbox launcher has died{self._last_words}")
        fields = json.loads(reply)
        if "error" in fields:
            raise SandboxError(f"the launcher could not prepare a program: {fields['error']}")
        self.busy = False
        return fields

    def close(self) -> None:
        """Ends the launcher and with it whatever it still runs."""
        self._connection.close()
        if self._process is not None:
            try:
                self._process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._errors.close()

    @property
    def _last_words(self) -> str:
        self._errors.seek(0)
        text = self._errors.read()[-500:].decode(errors="replace").strip()
        return f": {text}" if text else ""


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


def boot_code() -> CodeType:
    """What every sandboxed interpreter runs first."""
    flags = annotations.compiler_flag  # else every annotation would be evaluated
    return compile(_joined(BOOT_MODULES), "sandbox", "exec", flags=flags, dont_inherit=True)


def _joined(modules: Sequence[str]) -> ast.Module:
    """One module of several, one after the other, without what they import of each other."""
    body: list[ast.stmt] = []
    for name in modules:
        source = Path(inside.__file__).parents[1].joinpath(*name.split(".")[1:]).with_suffix(".py")
        nodes = parse(source.read_bytes(), source.name).body
        own = ("__future__", *modules)
        body += [node for node in nodes if not (isinstance(node, ast.ImportFrom) and node.module in own)]
    return ast.Module(body=body, type_ignores=[])


def _launcher_command() -> list[str]:
    source = "from __future__ import annotations\n" + ast.unparse(_joined(LAUNCHER_MODULES))
    return [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", source]


def _prefix(level: Level) -> list[str]:
    """The words before the launcher's command: bubblewrap's, or none. SandboxError where it is not installed."""
    if level != "bubblewrap":
        return []
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("bwrap is not on the PATH")
    command = [program, "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-pid", "--as-pid-1"]
    if os.geteuid() != 0:
        command += ["--unshare-user", "--uid", str(UNPRIVILEGED_ID), "--gid", str(UNPRIVILEGED_ID)]
    for source, target in _visible():
        for parent in list(Path(target).parents)[-2::-1]:
            command += ["--perms", "0755", "--dir", str(parent)]  # else 0700 under a parent that is so outside
        command += ["--ro-bind", source, target]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    return [*command, "--dir", "/tmp", "--remount-ro", "/", "--cap-add", "ALL", "--"]


def _visible() -> list[tuple[str, str]]:
    """(real path, path inside) of what an interpreter needs: itself, its library and the system's."""
    paths = [os.path.realpath(sys.executable), os.path.dirname(sysconfig.get_path("stdlib")), *SYSTEM_LIBRARIES]
    wanted: list[str] = []
    for path in sorted({path for path in paths if os.path.exists(path)}):
        if not any(path.startswith(parent + "/") for parent in wanted):
            wanted.append(path)
    return [(os.path.realpath(path), path) for path in wanted]


def _setup(level: Level, config: SandboxConfig, folder: str | None) -> dict[str, Any]:
    mib = 1 << 20
    return {
        "prepare": level,
        "machine": platform.machine(),
        "python": os.path.realpath(sys.executable),
        "visible": _visible(),
        "user": _unused_user() if os.geteuid() == 0 else None,
        "file_mib": config.file_mib,
        "scratch": "/tmp" if folder is None else f"{folder}/program",
        "filter": filter_code().hex(),
        "limits": {
            "CPU": config.cpu_seconds,
            "AS": config.memory_mib * mib,
            "STACK": min(STACK_MIB, config.memory_mib // 4) * mib,
            "FSIZE": config.file_mib * mib,
            "NOFILE": OPEN_FILES,
            "NPROC": config.processes,
            "CORE": 0,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
        },
    }


def _unused_user() -> int:
    """A user id that nobody has, so that the count of its processes is one program's alone."""
    with open("/proc/self/uid_map") as file:
        ids = int(file.readline().split()[2])
    # A container may map few ids; Debian reserves 65000 to 65533 and gives them to nobody.
    return (1 << 30) + secrets.randbelow(1 << 29) if ids > 1 << 31 else 65000 + secrets.randbelow(500)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _sealed(content: bytes) -> int:
    """A descriptor of a file in memory that holds `content`, read from its beginning, and can never change."""
    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALED)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
