"""The process that grades answers, one at a time, until it is told to stop or killed.

Started by pool.py as `python -m megatron_r1.rewards.worker FD GRADERS PATHS`; speaks JSON over the socket FD. It
imports only what grading needs (never torch) and dies with the thread that started it. No answer is ever run as
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
from collections.abc import Callable, Mapping
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from megatron_r1.config.custom_reward import PREFIX
from megatron_r1.parent import signal_at_parents_death
from megatron_r1.plugins import imported, told
from megatron_r1.rewards import custom

MEMORY_BYTES = 4 << 30
"""Address space of a worker: `10**10**10` alone would take 4 GB of the trainer's memory. sympy and reasoning-gym
together need less than 1 GB."""

PR_SET_NO_NEW_PRIVS = 38


def grade(grader: str, answer: str, reference: str | None, metadata: Mapping[str, Any]) -> float:
    """The answer's score in [0, 1]. The rules that need a worker; exact matches never come here."""
    if grader.startswith(PREFIX):
        return custom.call(_custom(grader), metadata)
    return float(GRADERS[grader](answer, reference, metadata))


def _custom(grader: str) -> Callable[..., Any]:
    return imported(grader.removeprefix(PREFIX), "rewards.custom")


def _grade_math(answer: str, reference: str | None, metadata: Mapping[str, Any]) -> bool:
    from megatron_r1.rewards.math import answers_equal

    return reference is not None and answers_equal(reference, answer, metadata.get("question", ""))


def _grade_reasoning_gym(answer: str, reference: str | None, metadata: Mapping[str, Any]) -> bool:
    """The dataset's own scorer, where it is safe. It gives partial credit (117 for 17 is 0.67) and sometimes more
    than full credit to a wrong answer; only exactly 1.0 is right."""
    from megatron_r1.config.gym_tasks import ARITHMETIC, refusal
    from megatron_r1.rewards import gym

    if (reason := refusal(metadata["task"])) is not None:
        raise ValueError(reason)
    arguments = json.dumps(metadata["arguments"], sort_keys=True)
    dataset = _dataset(metadata["task"], arguments, metadata["seed"], metadata["size"])
    entry = dataset[metadata["index"]]
    if "question" in metadata and entry["question"] != metadata["question"]:
        raise ValueError(f"{metadata['task']} entry {metadata['index']} is not the same in this process")
    if metadata["task"] in ARITHMETIC:
        return gym.solves_puzzle(metadata["task"], answer, entry)
    return gym.may_be_scored(metadata["task"], answer) and float(dataset.score_answer(answer, entry)) == 1.0


def _grade_language(response: str, language: str | None, metadata: Mapping[str, Any]) -> float:
    from megatron_r1.rewards.language import language_consistency

    return language_consistency(response, language or "en")


def _grade_instructions(response: str, reference: str | None, metadata: Mapping[str, Any]) -> bool:
    from megatron_r1.rewards.instructions import follows

    return all(follows(response, name, arguments) for name, arguments in metadata["instructions"])


@lru_cache(maxsize=256)
def _dataset(task: str, arguments: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, size=size, **json.loads(arguments))


GRADERS: Mapping[str, Callable[[str, str | None, Mapping[str, Any]], float]] = {
    "instructions": _grade_instructions,
    "language": _grade_language,
    "math": _grade_math,
    "reasoning_gym": _grade_reasoning_gym,
}
MODULES = {
    "instructions": "megatron_r1.rewards.instructions",
    "language": "megatron_r1.rewards.language",
    "math": "megatron_r1.rewards.math",
    "reasoning_gym": "reasoning_gym",
}
"""What each grader imports; done before the first job so that no answer's limit pays for it."""


def main(arguments: list[str]) -> None:
    """Serve jobs on socket `arguments[0]`, after importing what the graders named in `arguments[1]` (a JSON list) need.
    `arguments[2]` is the starter's sys.path, where user code is found, last and as the starter finds it."""
    signal_at_parents_death(signal.SIGKILL)
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    sys.set_int_max_str_digits(100_000)
    graders: list[str] = json.loads(arguments[1])
    for grader in graders:
        if not grader.startswith(PREFIX):
            importlib.import_module(MODULES[grader])
    sys.path[:] = json.loads(arguments[2])
    for grader in graders:
        if grader.startswith(PREFIX):
            _custom(grader)
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
        connection.send_bytes(json.dumps(_answer(job)).encode())


def _limit(what: int, most: int) -> None:
    """Lower a resource limit for good; a lower hard limit of the parent's stays."""
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def _answer(job: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"id": job["id"], **_verdict(job)}


def _verdict(job: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return {"score": grade(job["grader"], job["answer"], job["reference"], job["metadata"])}
    except Exception as error:
        # Parsers and scorers of third parties raise anything at all on a model's text: such an answer is not
        # right.
        said = told(error) if job["grader"].startswith(PREFIX) else f": {type(error).__name__}: {error}"
        return {"score": 0.0, "error": said.removeprefix(": ").strip()[:500]}


if __name__ == "__main__":
    main(sys.argv[1:])
