"""Programs that solve nothing, to run a problem's tests against: what passes there proves nothing.

Two kinds. An idle program does nothing, or gives back what no problem asks for: if it passes, any program might, and
training on the problem rewards noise. A constant one returns True, 0 or the like: that is an answer to some questions,
so a pass is told, and is no fault. Reading tests (code_proof.py) finds the plain cases; this finds the others.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from megatron_r1.rewards.code import run_tests
from megatron_r1.rewards.code_tests import CodeTests
from megatron_r1.rewards.sandbox import Sandbox
from megatron_r1.syntax import parse

ODD_TEXT, ODD_NUMBER = "'no problem asks for this text'", "-7340033.625"

IDLE = (
    ("a program that defines nothing", None),
    ("a program that returns None", "return None"),
    ("a program that always returns one odd text", f"return {ODD_TEXT}"),
    ("a program that always returns one odd number", f"return {ODD_NUMBER}"),
    ("a program that always raises an error of its own", "raise Odd('nothing is done')"),
)
CONSTANTS = (
    *(
        (f"a program that always returns {value}", f"return {value}")
        for value in ("True", "False", "0", "1", "''", "[]")
    ),
    ("a program that returns its argument", "return (*arguments, *keywords.values())[0]"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdlePass:
    """`program` in words passes `tests` (their places from 1) of a problem; `fault`: it may pass none."""

    program: str
    tests: tuple[int, ...]
    fault: bool


def idle_passes(tests: CodeTests, sandbox: Sandbox, *, constants: bool = False) -> list[IdlePass]:
    """Which programs that solve nothing pass all tests of a problem, and which tests pass where nothing is defined.
    SandboxError where the machine fails."""
    found = []
    if not tests.prefix:
        verdict = run_tests(tests, "x = 1", sandbox)
        places = tuple(place for place, outcome in enumerate(verdict.outcomes, start=1) if outcome == "passed")
        if places:
            found.append(IdlePass(program=IDLE[0][0], tests=places, fault=True))
    if tests.cases or found:
        return found
    for words, body in (*IDLE[1:], *(CONSTANTS if constants else ())):
        if _passes_all(tests, _program(tests, str(body)), sandbox):
            places = tuple(range(1, len(tests.checks) + 1))
            found.append(IdlePass(program=words, tests=places, fault=(words, body) in IDLE))
    return found


def _passes_all(tests: CodeTests, program: str, sandbox: Sandbox) -> bool:
    """One test after the other, up to the first that fails: nearly always the first."""
    for check in tests.checks:
        alone = CodeTests(checks=(check,), entry_point=tests.entry_point, prefix=tests.prefix)
        if not run_tests(alone, program, sandbox).correct:
            return False
    return True


def _program(tests: CodeTests, body: str) -> str:
    """A program in which every name that the tests use is there and does `body`: functions, and classes whose methods
    all do."""
    entry = parse(tests.entry_point, mode="eval")
    names = {node.id for node in ast.walk(entry) if isinstance(node, ast.Name)}
    names |= {name for check in tests.checks for name in check.names}
    lines = [
        "class Odd(Exception): pass",
        f"def idle(*arguments, **keywords): {body}",
        "class Idle:",
        "    def __init__(self, *arguments, **keywords): pass",
        "    def __getattr__(self, name): return idle",
        *(f"{name} = {'Idle' if name[:1].isupper() else 'idle'}" for name in sorted(names)),
    ]
    return "\n".join(lines)
