"""The system-call filter of sandboxed programs, as BPF for seccomp.

A list of what is refused, because the interpreter needs most of the rest: what would leave the sandbox (mounts,
namespaces, tracing), reach the network or kernel keyrings, load code into the kernel, or hold memory that no limit
counts (System V segments, memory files). Refused calls fail with EPERM; clone3 fails with ENOSYS, so that the C
library falls back to clone, whose flags a filter can read. Installing it is sandbox_launcher.py's work.
"""

from __future__ import annotations

import errno
import platform
import struct

from megatron_r1.errors import ConfigError
from megatron_r1.parent import PR_SET_PDEATHSIG

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Kernel's AUDIT_ARCH number of each machine that has a filter."""

REFUSED = {
    # name: (x86_64, aarch64); None where the machine has no such call
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "socket": (41, 198),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "personality": (135, 92),
    "settimeofday": (164, 170),
    "adjtimex": (159, 171),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = {"x86_64": 435, "aarch64": 435}
PRCTL = {"x86_64": 157, "aarch64": 167}

NEW_NAMESPACES = 0x7E020000
"""All CLONE_NEW* flags that clone takes."""

X32_CALLS = 0x40000000
"""Calls of the x32 ABI have this bit set and the architecture of x86_64."""

LOAD, JUMP_EQUAL, JUMP_ABOVE, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
AT_CALL, AT_ARCHITECTURE, AT_ARGUMENT_0 = 0, 4, 16
"""Offsets in struct seccomp_data; the low half of an argument comes first on both machines."""
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000


def filter_code(machine: str | None = None) -> bytes:
    """The filter as an array of struct sock_filter (8 bytes each) for `machine`, by default this one.

    ConfigError for a machine other than x86_64 and aarch64.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise ConfigError(f"the sandbox for code has no system-call filter for {machine}; it runs on {known}")
    column = list(ARCHITECTURES).index(machine)
    numbers = [row[column] for row in REFUSED.values() if row[column] is not None]
    # Three tests with a tail of their own come first, then the list, then the four ways out.
    steps: list[tuple[int, str | int, str | int, int]] = [
        (LOAD, 0, 0, AT_ARCHITECTURE),
        (JUMP_EQUAL, 0, "kill", ARCHITECTURES[machine]),
        (LOAD, 0, 0, AT_CALL),
        (JUMP_ABOVE, "refuse", 0, X32_CALLS),
        (JUMP_EQUAL, "absent", 0, CLONE3[machine]),
        (JUMP_EQUAL, 0, 2, CLONE[machine]),
        (LOAD, 0, 0, AT_ARGUMENT_0),
        (JUMP_ANY_BIT, "refuse", "allow", NEW_NAMESPACES),
        (JUMP_EQUAL, 0, 2, PRCTL[machine]),
        (LOAD, 0, 0, AT_ARGUMENT_0),
        (JUMP_EQUAL, "refuse", "allow", PR_SET_PDEATHSIG),
        *((JUMP_EQUAL, "refuse", 0, number) for number in numbers),
    ]
    ways_out = {"allow": ALLOW, "refuse": FAIL | errno.EPERM, "absent": FAIL | errno.ENOSYS, "kill": KILL}
    place = {name: len(steps) + i for i, name in enumerate(ways_out)}

    def distance(target: str | int, here: int) -> int:
        return target if isinstance(target, int) else place[target] - here - 1

    code = [
        struct.pack("=HBBI", operation, distance(true, here), distance(false, here), value)
        for here, (operation, true, false, value) in enumerate(steps)
    ]
    return b"".join([*code, *(struct.pack("=HBBI", RETURN, 0, 0, value) for value in ways_out.values())])
