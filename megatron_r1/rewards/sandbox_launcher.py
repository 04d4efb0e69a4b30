"""The process that starts sandboxed programs, one at a time, until its socket closes.

Run by sandbox_process.py as `python -I -S -c SOURCE FD`; SOURCE holds parent.py too, and both use the standard library
only. It prepares its own namespaces and root folder once (or finds them prepared by bubblewrap), so that a program
costs one clone with a new process and mount namespace, one private tmpfs and one exec. Nothing of a program passes
through this process: text and input travel as file descriptors that it never reads, so no program can find another
one's in what it inherits. Left out: reading output and the wall clock (sandbox.py).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys

from megatron_r1.parent import signal_at_parents_death

NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
CLONE_PIDFD = 0x1000
CLONE_CALL = {"x86_64": 56, "aarch64": 220}
PIVOT_ROOT_CALL = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR_CALL = 442
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAPABILITY_VERSION = 0x20080522
SECCOMP_MODE_FILTER = 2
LAST_CAPABILITY = 63

UNPRIVILEGED_ID = 65534
"""User and group inside a user namespace."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
FIRST_FREE, FAULT_FD, HIGH_FD = 6, 10, 32
"""Descriptors of a program end below FIRST_FREE; FAULT_FD tells this process why a program was not started."""

BOOT = "import marshal,posix\nexec(marshal.loads(posix.pread(4,1<<20,0)))"

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """A function of the C library; OSError where it fails."""
    result = getattr(libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def set_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    """Adds mount attributes at `path`. OSError before Linux 5.12."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    call("syscall", MOUNT_SETATTR_CALL, AT_FDCWD, path.encode(), flags, ctypes.byref(wanted), ctypes.sizeof(wanted))


def enter_namespaces(user: int) -> int | None:
    """New mount, network, IPC and UTS namespaces; inside a new user namespace where this process may not have them
    otherwise. Returns the user id that programs must change to, None where they already have an unprivileged one."""
    wanted = NEW_MOUNTS | NEW_NET | NEW_IPC | NEW_UTS
    if os.geteuid() == 0:
        try:
            call("unshare", wanted)
            return user
        except PermissionError:  # root of a container without CAP_SYS_ADMIN
            become(user)
            call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self/uid_map belongs to root
    outside = os.geteuid(), os.getegid()
    call("unshare", wanted | NEW_USER)
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{UNPRIVILEGED_ID} {outside[0]} 1"),
        ("gid_map", f"{UNPRIVILEGED_ID} {outside[1]} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as handle:
            handle.write(text)
    return None


def become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def build_root(visible: list[tuple[str, str]], machine: str) -> None:
    """A root folder with nothing but `visible`, five devices and an empty /tmp, all read-only."""
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755,size=1m")
    os.mkdir("/tmp/.old")
    call("syscall", PIVOT_ROOT_CALL[machine], b"/tmp", b"/tmp/.old")
    os.chdir("/")
    for real, path in (*visible, *((device, device) for device in DEVICES)):
        source = "/.old" + real
        if os.path.isdir(source):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w"):
                pass
        call("mount", source.encode(), path.encode(), None, MS_BIND | MS_REC, None)
        kind = ATTR_NOEXEC if path in DEVICES else ATTR_NODEV
        set_attributes(path, ATTR_RDONLY | ATTR_NOSUID | kind, recursive=True)
    call("umount2", b"/.old", MNT_DETACH)
    os.rmdir("/.old")
    os.makedirs("/tmp", exist_ok=True)
    set_attributes("/", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, recursive=False)


class Launcher:
    """`setup` as sandbox_process.py sends it; `boot`: a descriptor of the compiled code that programs start with."""

    def __init__(self, setup: dict, boot: int, connection: socket.socket) -> None:
        self.connection = connection
        self.boot = boot
        self.isolated = setup["prepare"] != "none"
        self.scratch: str = setup["scratch"]  # the private folder: a tmpfs, or made and removed for each program
        self.temporary_options = f"mode=777,size={setup['file_mib']}m,nr_inodes=1024".encode()
        self.clone_call = CLONE_CALL[setup["machine"]]
        self.clone_flags = CLONE_PIDFD | signal.SIGCHLD | (NEW_PIDS | NEW_MOUNTS if self.isolated else 0)
        self.limits = [(getattr(resource, f"RLIMIT_{name}"), most) for name, most in setup["limits"].items()]
        self.command = [setup["python"], "-I", "-S", "-B", "-X", "utf8", "-X", "int_max_str_digits=0", "-c", BOOT]
        self.user: int | None = None
        filter_code = bytes.fromhex(setup["filter"])
        self.filter_buffer = ctypes.create_string_buffer(filter_code, len(filter_code))
        self.filter = (ctypes.c_uint64 * 2)(len(filter_code) // 8, ctypes.addressof(self.filter_buffer))
        if setup["prepare"] == "namespaces":
            self.user = enter_namespaces(setup["user"])
            build_root(setup["visible"], setup["machine"])
        elif setup["prepare"] == "bubblewrap":
            self.user = setup["user"]
        else:
            call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for capability in range(LAST_CAPABILITY + 1):
            libc.prctl(
                PR_CAPBSET_DROP, capability, 0, 0, 0
            )  # fails for a number unknown to the kernel, and without privilege
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

    def serve(self) -> None:
        """Starts what is asked for until the other end closes the socket."""
        while True:
            request, descriptors, _, _ = socket.recv_fds(self.connection, 4096, FIRST_FREE)
            if not request:
                return
            if request == b"kill":  # for a program that had ended meanwhile
                continue
            self.connection.send(json.dumps(self.run(request.decode(), descriptors)).encode())

    def run(self, mode: str, descriptors: list[int]) -> dict:
        """Runs one program to its end, or to the order to kill it: its wait status and CPU seconds, or an error."""
        if not self.isolated:
            os.mkdir(self.scratch, 0o700)
        fault, fault_end = os.pipe()
        process_end = ctypes.c_int(-1)
        pid = libc.syscall(self.clone_call, self.clone_flags, None, ctypes.byref(process_end), None, None)
        if pid == 0:
            try:
                self.become_program(mode, descriptors, fault_end)
            except BaseException as error:
                os.write(fault_end, f"{type(error).__name__}: {error}".encode()[:1000])
            finally:
                os._exit(127)
        number = ctypes.get_errno()
        for descriptor in (*descriptors, fault_end):
            os.close(descriptor)
        if pid < 0:
            os.close(fault)
            return {"error": f"clone: {os.strerror(number)}"}
        with open(fault, "rb") as file:
            error = file.read()  # empty as soon as the program's exec has closed the other end
        if self.wait(process_end.value):
            signal.pidfd_send_signal(process_end.value, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        os.close(process_end.value)
        if not self.isolated:
            self.end_the_rest()
            shutil.rmtree(self.scratch, ignore_errors=True)
        if error:
            return {"error": error.decode(errors="replace")}
        return {"status": status, "cpu": usage.ru_utime + usage.ru_stime}

    def wait(self, process: int) -> bool:
        """Waits for the program's end (False) or for a message, which can only mean to kill it (True)."""
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.register(self.connection, select.POLLIN)
        return process not in dict(poll.poll())

    def end_the_rest(self) -> None:
        """Kills what a program without a process namespace left behind: its orphans become this process's children."""
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                rest = [int(word) for word in file.read().split()]
            for pid in rest:
                os.kill(pid, signal.SIGKILL)
            for pid in rest:
                os.waitpid(pid, 0)
            if not rest:
                return

    def become_program(self, mode: str, descriptors: list[int], fault_end: int) -> None:
        """In the new process: everything private and limited, then exec. Returns only by an exception."""
        os.setsid()
        if self.isolated:
            call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, self.temporary_options)
        os.chdir(self.scratch)
        stdin, stdout, stderr, program, *pipes = descriptors
        wanted = [stdin, stdout, stderr, program, self.boot, *pipes]
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, HIGH_FD) for descriptor in wanted]
        fault_end = fcntl.fcntl(fault_end, fcntl.F_DUPFD, HIGH_FD)
        os.dup2(fault_end, FAULT_FD, inheritable=False)
        for number, descriptor in enumerate(high):
            os.dup2(descriptor, number)
        os.closerange(len(high), FAULT_FD)
        os.closerange(FAULT_FD + 1, 1 << 20)
        for what, most in self.limits:
            hard = resource.getrlimit(what)[1]
            least = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (least, least))
        os.umask(0o077)
        if self.user is not None:
            become(self.user)
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
        call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
        signal_at_parents_death(signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # ignored here; exec would pass that on
            signal.signal(number, signal.SIG_DFL)
        call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(self.filter), 0, 0)
        os.execve(self.command[0], [*self.command, mode], {"HOME": self.scratch, "LANG": "C.UTF-8"})


def main(arguments: list[str]) -> None:
    connection = socket.socket(fileno=int(arguments[0]))
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    try:
        launcher = Launcher(json.loads(message), descriptors[0], connection)
    except Exception as error:  # whatever this machine refuses is the reason why the level is not there
        connection.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    connection.send(json.dumps({"ready": True}).encode())
    launcher.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
