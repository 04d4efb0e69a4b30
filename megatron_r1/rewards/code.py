"""Rewards for code: does a model's program pass the tests of its problem?

Programs run in the sandbox (sandbox.py), which never sees an expected output. Tests on standard input and output are
compared here. Assertions run in a second sandbox, where the program's function is a stand-in that asks the program's
process for values: a pass takes values that satisfy the assertion, whatever else the program does. Left out: fetching
problems, and partial credit (RewardConfig decides what a verdict is worth).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1.rewards import sandbox_tested as tested
from megatron_r1.rewards.code_extract import extract_program
from megatron_r1.rewards.code_tests import Check, CodeTests, parse_tests
from megatron_r1.rewards.sandbox import Execution, Sandbox, SandboxConfig

Outcome = Literal["passed", "wrong", "timeout", "memory", "crashed", "output_limit", "refused"]

MAX_NUMBER_CHARACTERS = 400
"""Longer tokens are compared as text even under a tolerance; the largest double has 309 digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeVerdict:
    """One program against the tests of its problem, in their order.

    "wrong" is a wrong output, value or exception; "crashed" a non-zero exit or an exception of the program's;
    "refused" a program that is empty, longer than program_kib or no text, or a test whose arguments cannot be sent.
    stderr: the end of the first failing test's standard error.
    """

    passed: int
    total: int
    outcomes: tuple[Outcome, ...]
    stderr: str

    @property
    def correct(self) -> bool:
        return self.passed == self.total


def score_code(tests: Mapping[str, Any], answer: str, sandbox: Sandbox | SandboxConfig) -> CodeVerdict:
    """Runs the program in `answer` against every test. Safe to call from several threads with one Sandbox.

    With a SandboxConfig a sandbox is opened for this call alone, which costs some tenths of a second. DataError for
    malformed tests; ConfigError where no sandbox is to be had; SandboxError where the machine fails.
    """
    if isinstance(sandbox, SandboxConfig):
        with Sandbox(sandbox) as opened:
            return score_code(tests, answer, opened)
    return run_tests(parse_tests(tests), extract_program(answer), sandbox)


def run_tests(parsed: CodeTests, program: str, sandbox: Sandbox) -> CodeVerdict:
    """Runs `program` against every test. SandboxError where the machine fails."""
    total = len(parsed.cases) + len(parsed.checks)
    if (reason := _refusal(program, sandbox.config)) is not None:
        refused: list[Outcome] = ["refused"] * total
        return CodeVerdict(passed=0, total=total, outcomes=tuple(refused), stderr=reason)
    if parsed.prefix and "from __future__" not in program:  # which must stand first
        program = f"{parsed.prefix}\n\n{program}"
    results: list[tuple[Outcome, str]] = [_run_case(sandbox, program, *case, parsed.tolerance) for case in parsed.cases]
    results += [_run_check(sandbox, program, parsed.entry_point, check) for check in parsed.checks]
    outcomes: tuple[Outcome, ...] = tuple(outcome for outcome, _ in results)
    failures = [text for outcome, text in results if outcome != "passed"]
    return CodeVerdict(
        passed=outcomes.count("passed"), total=total, outcomes=outcomes, stderr=failures[0] if failures else ""
    )


def outputs_match(expected: str, actual: str, tolerance: float | None = None) -> bool:
    """Equal but for white space at the ends of lines and empty lines at the end.

    With a tolerance, lines are also equal whose words are, or are finite numbers that differ by at most
    `tolerance`, absolute or relative to the expected one.
    """
    expected_lines, actual_lines = _lines(expected), _lines(actual)
    if len(expected_lines) != len(actual_lines):
        return False
    return all(
        left == right or (tolerance is not None and _words_match(left.split(), right.split(), tolerance))
        for left, right in zip(expected_lines, actual_lines, strict=True)
    )


def _refusal(program: str, config: SandboxConfig) -> str | None:
    """Why a program is not run at all, or None."""
    if not program.strip():
        return "the answer holds no program"
    try:
        size = len(program.encode())
    except UnicodeEncodeError:
        return "the program is not valid text (it holds half a surrogate pair)"
    if size > config.program_kib << 10:
        return f"the program has {size} bytes; program_kib allows {config.program_kib << 10}"
    return None


def _run_case(
    sandbox: Sandbox, program: str, given: str, expected: str, tolerance: float | None
) -> tuple[Outcome, str]:
    done = sandbox.run(program, given)
    text = _tail(done)
    if done.ending != "exited":
        return done.ending, text
    matches = outputs_match(expected, done.stdout.decode(errors="replace"), tolerance)
    return ("passed" if matches else "wrong"), text


def _run_check(sandbox: Sandbox, program: str, entry_point: str, check: Check) -> tuple[Outcome, str]:
    checked, done = sandbox.check(
        program,
        entry_point,
        check.statements,
        names=check.names,
        exceptions=check.exceptions,
        objects=check.objects,
    )
    if checked.ending == "crashed" and checked.exit_status == tested.PASSED:
        return "passed", ""
    outcome = _failure(checked, done)
    return outcome, _tail(done if outcome == "crashed" and checked.exit_status == tested.GONE else checked)


def _failure(checked: Execution, done: Execution) -> Outcome:
    if checked.ending != "crashed":  # the limits of the test's own process: a value too large to handle, say
        return "wrong" if checked.ending == "exited" else checked.ending
    if checked.exit_status == tested.OVERSIZED:
        return "output_limit"
    if checked.exit_status == tested.UNSENDABLE:
        return "refused"
    if checked.exit_status == tested.RAISED:
        return "memory" if checked.stderr.startswith(b"MemoryError") else "crashed"
    if checked.exit_status == tested.GONE:
        return "crashed" if done.ending == "exited" else done.ending
    return "wrong"


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n").split("\n")


def _words_match(expected: list[str], actual: list[str], tolerance: float) -> bool:
    return len(expected) == len(actual) and all(
        left == right or _numbers_match(left, right, tolerance) for left, right in zip(expected, actual, strict=True)
    )


def _numbers_match(expected: str, actual: str, tolerance: float) -> bool:
    if max(len(expected), len(actual)) > MAX_NUMBER_CHARACTERS:
        return False
    try:
        left, right = float(expected), float(actual)
    except ValueError:
        return False
    if not math.isfinite(left) or not math.isfinite(right):
        return False
    return abs(left - right) <= tolerance * max(1.0, abs(left))


def _tail(done: Execution) -> str:
    return done.stderr.decode(errors="replace")
