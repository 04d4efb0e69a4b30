"""The grader "code": threads that run programs in one sandbox beside everything else, and counts of what happened."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_r1.config.schema import AnswerPlace, RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.observe.progress import duration
from megatron_r1.rewards.code import run_tests
from megatron_r1.rewards.code_extract import extract_program
from megatron_r1.rewards.code_idle import IdlePass, idle_passes
from megatron_r1.rewards.code_tests import CodeTests, parse_tests
from megatron_r1.rewards.exact import GRADER as EXACT
from megatron_r1.rewards.format import after_thought, extract_answer
from megatron_r1.rewards.grader import Attack, Grader, needed
from megatron_r1.rewards.pool import PoolCounts, Verdict
from megatron_r1.rewards.sandbox import Sandbox
from megatron_r1.types import Problem

TELL_SECONDS = 10.0


class CodeGrader:
    """Runs `rewards.num_workers` programs at once. A program is right if it passes every test of its problem."""

    def __init__(self, config: RewardConfig, problems: Sequence[Problem]) -> None:
        """DataError for a problem whose tests are malformed, ConfigError where this machine has no sandbox that the
        configuration allows."""
        self._parsed: dict[int, tuple[Mapping[str, Any], CodeTests]] = {}
        for problem in problems:
            try:
                self._tests(problem.metadata["tests"])
            except DataError as error:
                raise DataError(f"problem {problem.id}: {error}") from None
        self._sandbox = Sandbox(config.sandbox)
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix="code")
        self._lock = threading.Lock()
        self._counts = PoolCounts()

    def submit(self, problem: Problem, answer: str | None) -> Future[Verdict]:
        """Queue one answer; None (no answer was given) is wrong. The future raises DataError for malformed tests and
        SandboxError where the machine fails."""
        return self._threads.submit(self._grade, problem.metadata["tests"], answer)

    def counts(self) -> PoolCounts:
        with self._lock:
            return self._counts

    def close(self) -> None:
        """Cancel what waits, finish what runs, end the sandbox."""
        self._threads.shutdown(cancel_futures=True)
        self._sandbox.close()

    def _tests(self, tests: Mapping[str, Any]) -> CodeTests:
        """The parsed tests; those of a problem are parsed once and not for each answer."""
        known = self._parsed.get(id(tests))
        if known is None:
            known = self._parsed[id(tests)] = (tests, parse_tests(tests))  # kept, so that the id stays its own
        return known[1]

    def _grade(self, tests: Mapping[str, Any], answer: str | None) -> Verdict:
        if answer is None:
            return Verdict(score=0.0)
        found = run_tests(self._tests(tests), extract_program(answer), self._sandbox)
        timed_out = "timeout" in found.outcomes
        with self._lock:
            self._counts += PoolCounts(graded=1, timeouts=int(timed_out))
        return Verdict(score=float(found.correct), timed_out=timed_out)


def check(problem: Problem, _: RewardConfig) -> None:
    """DataError for a problem without tests, or with malformed ones."""
    tests = needed(problem, "tests")
    try:
        parse_tests(tests)
    except DataError as error:
        raise DataError(f"problem {problem.id}: {error}") from None


def reads(response: str, place: AnswerPlace) -> str | None:
    """The answer's tags; else, where answers need none, what follows the thought: programs stand in fences, not in
    boxes."""
    answer = extract_answer(response, "answer")
    return after_thought(response) if answer is None and place != "answer" else answer


def attack(problems: Sequence[Problem], config: RewardConfig, constants: bool) -> list[list[Attack]]:
    """What programs that solve nothing pass, of each problem. Says on standard error how far it is. ConfigError where
    this machine has no sandbox that is allowed."""
    tests = [parse_tests(problem.metadata["tests"]) for problem in problems]
    begun = told = time.monotonic()
    found: list[list[Attack]] = []
    with Sandbox(config.sandbox) as sandbox, ThreadPoolExecutor(config.num_workers) as threads:
        print(f"running {len(tests)} problems' tests against programs that solve nothing", file=sys.stderr, flush=True)
        waiting = threads.map(lambda one: idle_passes(one, sandbox, constants=constants), tests)
        for passes in waiting:
            found.append([Attack(fault=one.fault, words=_words(one)) for one in passes])
            now = time.monotonic()
            if now - told > TELL_SECONDS:
                told = now
                left = (now - begun) / len(found) * (len(tests) - len(found))
                print(f"  {len(found)}/{len(tests)} problems  left {duration(left)}", file=sys.stderr, flush=True)
    return found


def _words(one: IdlePass) -> str:
    places = ", ".join(map(str, one.tests[:10])) + (", ..." if len(one.tests) > 10 else "")
    which = f"test {places}" if len(one.tests) == 1 else f"tests {places}"
    return f"{one.program} passes {which}" + (", so the problem proves nothing" if one.fault else "")


GRADER = Grader(
    name="code",
    check=check,
    reads=reads,
    runner=CodeGrader,
    votes_as=EXACT,
    writes_code=True,
    attack=attack,
)
