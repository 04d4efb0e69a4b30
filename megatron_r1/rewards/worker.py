"""The process that grades answers, one at a time, until it is told to stop or killed.

Started by pool.py as `python -m megatron_r1.rewards.worker FD GRADERS`; speaks JSON over the socket FD. It
imports only what grading needs (never torch), limits its own memory, and dies with the thread that started
it. Left out: time limits, which only the parent can enforce, because C code ignores signals until it returns.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

MEMORY_BYTES = 4 << 30
"""Address space of a worker: `10**10**10` alone would take 4 GB of the trainer's memory."""

PR_SET_PDEATHSIG = 1


def grade(grader: str, answer: str, reference: str | None, metadata: Mapping[str, Any]) -> bool:
    """Is `answer` right? The rules that need a worker; exact matches never come here."""
    return GRADERS[grader](answer, reference, metadata)


def _grade_math(answer: str, reference: str | None, metadata: Mapping[str, Any]) -> bool:
    from megatron_r1.rewards.math import answers_equal

    return reference is not None and answers_equal(reference, answer)


def _grade_reasoning_gym(answer: str, reference: str | None, metadata: Mapping[str, Any]) -> bool:
    """The dataset's own scorer. It gives partial credit (117 for 17 is 0.67); only 1.0 is right."""
    arguments = json.dumps(metadata["arguments"], sort_keys=True)
    dataset = _dataset(metadata["task"], arguments, metadata["seed"], metadata["size"])
    entry = dataset[metadata["index"]]
    if "question" in metadata and entry["question"] != metadata["question"]:
        raise ValueError(f"{metadata['task']} entry {metadata['index']} is not the same in this process")
    return float(dataset.score_answer(answer, entry)) >= 1.0


@lru_cache(maxsize=256)
def _dataset(task: str, arguments: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, size=size, **json.loads(arguments))


GRADERS: Mapping[str, Callable[[str, str | None, Mapping[str, Any]], bool]] = {
    "math": _grade_math,
    "reasoning_gym": _grade_reasoning_gym,
}
MODULES = {"math": "megatron_r1.rewards.math", "reasoning_gym": "reasoning_gym"}
"""What each grader imports; done before the first job so that no answer's limit pays for it."""


def main(arguments: list[str]) -> None:
    """Serve jobs on socket `arguments[0]`, after importing what the graders named in `arguments[1]` need."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.set_int_max_str_digits(100_000)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # warns at every answer that it has no time limit
    for grader in arguments[1].split(","):
        importlib.import_module(MODULES[grader])
    connection = Connection(int(arguments[0]))
    connection.send_bytes(b"ready")
    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        connection.send_bytes(json.dumps(_answer(job)).encode())


def _answer(job: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return {"correct": grade(job["grader"], job["answer"], job["reference"], job["metadata"])}
    except Exception as error:
        # Parsers and scorers of third parties raise anything at all on a model's text: such an answer is not
        # right.
        return {"correct": False, "error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    main(sys.argv[1:])
