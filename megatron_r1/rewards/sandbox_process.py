"""One launcher process of the sandbox (sandbox_launcher.py): how it is started at each level, and what is said to it.

It is handed programs as file descriptors and runs one at a time. Left out: which launcher runs what (sandbox.py), and
what a program wrote (sandbox_running.py).
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, Literal

from megatron_r1.config.sandbox import SandboxConfig
from megatron_r1.errors import UserError
from megatron_r1.rewards.sandbox_launcher import DEVICES, UNPRIVILEGED_ID
from megatron_r1.rewards.sandbox_seccomp import filter_code
from megatron_r1.syntax import parse

Level = Literal["bubblewrap", "namespaces", "none"]

BOOT_MODULES = tuple(
    f"megatron_r1.rewards.sandbox_{name}" for name in ("values", "objects", "peer", "tested", "inside")
)
LAUNCHER_MODULES = ("megatron_r1.parent", "megatron_r1.rewards.sandbox_launcher")
START_SECONDS = 60.0
"""For a launcher to start, and to answer an order to kill: both take milliseconds on a machine that is not stuck."""

SEALED = 0xF  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
STACK_MIB = 64
OPEN_FILES = 64


class SandboxError(UserError, RuntimeError):
    """The machine could not start or end a program: no verdict on the program."""


class Launcher:
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


def boot_code() -> CodeType:
    """What every sandboxed interpreter runs first."""
    flags = annotations.compiler_flag  # else every annotation would be evaluated
    return compile(_joined(BOOT_MODULES), "sandbox", "exec", flags=flags, dont_inherit=True)


def _joined(modules: Sequence[str]) -> ast.Module:
    """One module of several, one after the other, without what they import of each other."""
    body: list[ast.stmt] = []
    for name in modules:
        source = Path(__file__).parents[1].joinpath(*name.split(".")[1:]).with_suffix(".py")
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


def sealed(content: bytes) -> int:
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
