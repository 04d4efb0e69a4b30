"""Look at this machine before anything is installed on it, and find a Python to install with.

Run by the Makefile with whatever python3 exists, so it uses the standard library only and works on Python
3.6. On success it prints the path of a Python 3.11 or 3.12 that can make virtual environments, and nothing
else. Otherwise each line on stderr says what is missing and how to mend it, and the exit status is 1.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys

GIB = 2**30
MEMORY_GIB = 6
DISK_GIB = {"install": 6, "run": 1}
VERSIONS = ((3, 11), (3, 12))
CANDIDATES = ("python3.11", "python3.12", "python3", "python")
PROBE = "import sys, ensurepip, venv; print(sys.version_info[0], sys.version_info[1], sys.executable)"


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("need", choices=sorted(DISK_GIB), help="install: room for .venv too; run: a run's files only")
    parser.add_argument("--python", default="", help="the only interpreter to consider (make PYTHON=...)")
    parser.add_argument("--folder", default=".", help="where .venv and the runs will lie")
    options = parser.parse_args(words)
    faults = platform_faults(platform.system(), platform.machine())
    faults += memory_faults(free_memory())
    faults += disk_faults(shutil.disk_usage(options.folder).free, DISK_GIB[options.need], options.folder)
    python = None
    if options.need == "install":
        python = find_python([options.python] if options.python else CANDIDATES)
        if python is None:
            faults.append(python_fault(options.python))
    for fault in faults:
        sys.stderr.write("check_machine: " + fault + "\n")
    if faults:
        return 1
    if python is not None:
        print(python)
    return 0


def platform_faults(system, machine):
    if system == "Linux" and machine in ("x86_64", "AMD64"):
        return []
    return [
        f"this is {system} on {machine}; the pinned wheels are for Linux on x86-64: use such a machine or container"
    ]


def memory_faults(free):
    """`free` in bytes, or None where the system does not tell."""
    if free is None or free >= MEMORY_GIB * GIB:
        return []
    return [
        f"{free / GIB:.1f} GB of memory is free, {MEMORY_GIB} GB is needed: stop other programs, or raise "
        "the container's limit"
    ]


def disk_faults(free, need_gib, folder):
    if free >= need_gib * GIB:
        return []
    return [
        f"{free / GIB:.1f} GB of disk is free in {os.path.abspath(folder)}, {need_gib} GB is needed: "
        "make room, or move the checkout to a larger disk"
    ]


def free_memory(proc="/proc/meminfo", cgroup="/sys/fs/cgroup"):
    """Bytes that a new program can have: the host's MemAvailable, or what a container's limit leaves."""
    host = None
    try:
        with open(proc) as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    host = int(line.split()[1]) * 1024
    except OSError:
        return None
    limits = [host] if host is not None else []
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = (int(_read(os.path.join(cgroup, name))) for name in (limit, used))
        except (OSError, ValueError):  # no such cgroup, or "max": no limit
            continue
        # The page cache is counted as used but given back when needed.
        statistics = os.path.join(cgroup, os.path.dirname(limit), "memory.stat")
        limits.append(most - now + _statistic(statistics, cache))
    return min(limits) if limits else None


def find_python(candidates):
    """The first candidate that starts, has a fitting version and can make virtual environments; its path.

    Starting it matters: a version manager's shim is found by name even where the version behind it is absent.
    """
    for candidate in candidates:
        try:
            done = subprocess.run(
                [candidate, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        words = done.stdout.decode("utf-8", "replace").strip().split(" ", 2)
        if done.returncode == 0 and len(words) == 3 and (int(words[0]), int(words[1])) in VERSIONS:
            return words[2]
    return None


def python_fault(asked):
    remedy = "install it with its venv module (Debian, Ubuntu: apt-get install python3.11 python3.11-venv)"
    if asked:
        return f"PYTHON={asked} is not a Python 3.11 or 3.12 with the venv module: {remedy}"
    return f"no Python 3.11 or 3.12 with the venv module was found: {remedy}, or give make PYTHON=/path/to/python3.11"


def _read(path):
    with open(path) as file:
        return file.read().strip()


def _statistic(path, name):
    try:
        for line in _read(path).splitlines():
            if line.startswith(name + " "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
