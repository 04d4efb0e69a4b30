"""The process that grades answers, one at a time, until it is told to stop or killed.

Started by pool.py as `python -m megatron_r1.rewards.worker FD FUNCTIONS PATHS`; speaks JSON over the socket FD. It
imports only what its functions need (never torch) and dies with the thread that started it. No answer is ever run as
code (gym.py); in case a library does so after all, the process has a bare environment and cannot write files,
start processes or take much memory. Left out: time limits, which only the parent can enforce, because C code
ignores signals until it returns.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from megatron_r1.parent import signal_at_parents_death
from megatron_r1.plugins import imported, told

MEMORY_BYTES = 4 << 30
"""Address space of a worker: `10**10**10` alone would take 4 GB of the trainer's memory. sympy and reasoning-gym
together need less than 1 GB."""

PR_SET_NO_NEW_PRIVS = 38


class Functions:
    """The functions that this worker was started with, by name."""

    def __init__(self, given: Sequence[Mapping[str, Any]], users_path: Sequence[str]) -> None:
        """Imports what they need: ours as this process finds it, then users' as the starter finds it."""
        for one in given:
            for module in (*one["imports"], one["function"].partition(":")[0]):
                importlib.import_module(module)
        sys.path[:] = users_path
        self._given = {one["name"]: one for one in given}
        for one in given:
            if one["user"]:
                imported(one["user"], one["field"])

    def is_users(self, name: str) -> bool:
        return name in self._given and bool(self._given[name]["user"])

    def grade(self, name: str, answer: str, reference: str | None, metadata: Mapping[str, Any]) -> float:
        """The answer's score. The rules that need a worker; exact matches never come here."""
        one = self._given[name]
        module, _, function = one["function"].partition(":")
        users = (imported(one["user"], one["field"]),) if one["user"] else ()
        return float(getattr(sys.modules[module], function)(*users, answer, reference, metadata))


def main(arguments: list[str]) -> None:
    """Serve jobs on socket `arguments[0]`, after importing the functions of `arguments[1]` (WorkerFunctions, as JSON).
    `arguments[2]` is the starter's sys.path, where user code is found, last and as the starter finds it."""
    signal_at_parents_death(signal.SIGKILL)
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    sys.set_int_max_str_digits(100_000)
    functions = Functions(json.loads(arguments[1]), json.loads(arguments[2]))
    # After the imports, so that a failing one can still say why in a log file.
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NPROC, 0)  # root is exempt from this one
    connection = Connection(int(arguments[0]))
    connection.send_bytes(b"ready")
    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        connection.send_bytes(json.dumps({"id": job["id"], **_verdict(functions, job)}).encode())


def _limit(what: int, most: int) -> None:
    """Lower a resource limit for good; a lower hard limit of the parent's stays."""
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def _verdict(functions: Functions, job: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return {"score": functions.grade(job["grader"], job["answer"], job["reference"], job["metadata"])}
    except Exception as error:
        # Parsers and scorers of third parties raise anything at all on a model's text: such an answer is not
        # right.
        users = functions.is_users(job["grader"])
        said = told(error) if users else f": {type(error).__name__}: {error}"
        return {"score": 0.0, "error": said.removeprefix(": ").strip()[:500]}


if __name__ == "__main__":
    main(sys.argv[1:])
