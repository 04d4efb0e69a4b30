"""Grades programs beside everything else: threads that run them in one sandbox, and counts of what happened."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_r1.config.schema import RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.rewards.code import run_tests
from megatron_r1.rewards.code_extract import extract_program
from megatron_r1.rewards.code_tests import CodeTests, parse_tests
from megatron_r1.rewards.pool import PoolCounts, Verdict
from megatron_r1.rewards.sandbox import Sandbox
from megatron_r1.types import Problem


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

    def submit(self, tests: Mapping[str, Any], answer: str | None) -> Future[Verdict]:
        """Queue one answer; None (no answer was given) is wrong. The future raises DataError for malformed tests and
        SandboxError where the machine fails."""
        return self._threads.submit(self._grade, tests, answer)

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
