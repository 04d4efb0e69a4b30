"""Scoring of programs: what is extracted, compared and asserted, and what each outcome is called."""

import json

import pytest

from megatron_r1.rewards import sandbox_values as values
from megatron_r1.rewards.code import outputs_match, score_code
from megatron_r1.rewards.sandbox import Sandbox, SandboxConfig


@pytest.fixture(scope="module")
def box():
    config = SandboxConfig(allow_unisolated=True, cpu_seconds=1, wall_seconds=10.0, memory_mib=256, program_kib=8)
    with Sandbox(config) as opened:
        yield opened


def asserts(*texts, entry_point="f"):
    return {"asserts": list(texts), "entry_point": entry_point}


@pytest.mark.parametrize(
    ("expected", "actual", "tolerance", "same"),
    [
        ("1 2\n3", "1 2  \n3\n\n\n", None, True),
        ("1 2", "1  2", None, False),
        ("1", " 1", None, False),
        ("1\r\n2\r\n", "1\n2", None, True),
        ("", "\n", None, True),
        ("1\n\n2", "1\n2", None, False),
        ("0.5", "0.50", None, False),
        ("0.5", "0.50", 0, True),
        ("0.5 yes", "0.5000001 yes", 1e-6, True),
        ("0.5", "0.51", 1e-6, False),
        ("1000000", "1000000.5", 1e-6, True),
        ("x", "1", 1e-6, False),
        ("1", "nan", 1e-6, False),
        ("nan", "nan", 1e-6, True),
        ("1", "inf", 1e-6, False),
        ("1 2", "1", 1e-6, False),
        ("1", "1" * 500, 1e-6, False),
    ],
)
def test_outputs_are_compared(expected, actual, tolerance, same):
    assert outputs_match(expected, actual, tolerance) is same


def test_each_test_has_its_outcome(box):
    program = (
        "n = int(input())\n"
        "if n == 2: raise ValueError('two')\n"
        "if n == 3: x = bytearray(1 << 40)\n"
        "if n == 4:\n    while True: print('x' * 4096)\n"
        "print(n)"
    )
    tests = {"inputs": ["1", "1", "2", "3", "4"], "outputs": ["1", "7", "2", "3", "4"]}
    verdict = score_code(json.loads(json.dumps(tests)), f"Here:\n```python\n{program}\n```", box)
    assert verdict.outcomes == ("passed", "wrong", "crashed", "memory", "output_limit")
    assert (verdict.passed, verdict.total, verdict.correct) == (1, 5, False)


def test_the_error_of_the_first_failure_is_kept(box):
    verdict = score_code({"inputs": ["", ""], "outputs": ["", "x"]}, "raise KeyError('which')", box)
    assert verdict.stderr.rstrip().endswith("KeyError: 'which'")


@pytest.mark.parametrize("program", ["", " \n", "x = 1\n" * 3000, "print('\ud800')"])
def test_what_is_no_program_is_refused_without_a_run(box, program):
    verdict = score_code({"inputs": ["1", "2"], "outputs": ["1", "2"]}, program, box)
    assert verdict.outcomes == ("refused", "refused") and verdict.stderr


@pytest.mark.parametrize(
    ("program", "test", "outcome"),
    [
        ("def f(x): return x * 2", "assert f(2) == 4", "passed"),
        ("def f(x): return x * 2", "assert f(2) == 5", "wrong"),
        ("def f(x): return x * 2", "assert f(f(2)) == 8 and f('a') == 'aa'", "passed"),
        ("def f(x): return [x, (1, {2}), {'a': None}]", "assert f(1.5) == [1.5, (1, {2}), {'a': None}]", "passed"),
        ("def f(x): return (1, 2)", "assert f(0) == [1, 2]", "wrong"),
        ("def f(x):\n    yield 1\n    yield 2", "assert list(f(0)) == [1, 2]", "passed"),
        ("def f(x, *, k): return x - k", "import math\nassert math.isclose(f(1, k=0.9), 0.1)", "passed"),
        ("def f(x): return x > 1", "for n in range(4):\n    assert f(n) == (n > 1)", "passed"),
        ("def f(x): raise ValueError(x)", "try:\n    f(1)\n    assert False\nexcept ValueError: pass", "passed"),
        ("def f(x): return 1", "try:\n    f(1)\n    assert False\nexcept ValueError: pass", "wrong"),
        ("def f(x): raise ValueError(x)", "assert f(1) == 1", "crashed"),
        ("def f(x): return bytearray(1 << 40)", "assert f(1) == 1", "memory"),
        ("import os\ndef f(x): os._exit(0)", "try:\n    f(1)\nexcept: pass\nassert f(1)", "crashed"),
        ("def f(x): return open", "assert f(1)", "crashed"),
        ("def g(x): return 1", "assert f(1) == 1", "crashed"),
        ("def f(x): return 1", "assert f(object()) == 1", "refused"),
        ("def f(x):\n    while True: pass", "assert f(1)", "timeout"),
        ("def f(x):\n    while True: print('x' * 4096)", "assert f(1)", "output_limit"),
        ("def f(x): return 'x' * (5 << 20)", "assert len(f(1)) == 5 << 20", "output_limit"),
        ("def f(x): return 10 ** 9", "assert 1 << (f(1) * 100) == 1", "memory"),
        ("def f(x): return x\nif __name__ == '__main__': raise SystemExit", "assert f(1) == 1", "passed"),
        ("print(input())\ndef f(x): return x", "assert f(1) == 1", "crashed"),
        ("def f(x): return 'ß\\ud800' + x", "assert f('a') == 'ß\\ud800a'", "passed"),
    ],
)
def test_assertions_are_put(box, program, test, outcome):
    verdict = score_code(asserts(test), program, box)
    assert verdict.outcomes == (outcome,), verdict


def test_an_entry_point_may_be_a_method(box):
    program = "class Solution:\n    def twice(self, x): return 2 * x"
    verdict = score_code(asserts("assert Solution().twice(4) == 8", entry_point="Solution().twice"), program, box)
    assert verdict.correct


def test_tests_may_name_the_candidate(box):
    text = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\ncheck(f)"
    assert score_code(asserts(text), "def f(x): return x + 1", box).correct
    assert score_code(asserts(text), "def f(x): return 2", box).outcomes == ("wrong",)


def test_a_configuration_opens_a_sandbox_of_its_own():
    config = SandboxConfig(allow_unisolated=True)
    assert score_code({"inputs": ["2"], "outputs": ["4"]}, "print(int(input()) ** 2)", config).correct


class Odd(int):
    def __format__(self, kind):
        return "f00"


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [False, 0, -1, 10**400, 1.5, float("inf"), -0.0, 1 + 2j],
        ("", "a:b", "漢\ud800", b"\0\xff"),
        {1: {"a": [()]}, (1, 2): frozenset([3])},
        {1, 2, 3},
        range(1, 10, 3),
    ],
)
def test_values_keep_their_form(value):
    again = values.decode(values.encode(value))
    assert again == value and type(again) is type(value) and repr(again) == repr(value)


def test_a_subclass_is_sent_as_its_base():
    again = values.decode(values.encode([Odd(7)]))
    assert again == [7] and type(again[0]) is int


@pytest.mark.parametrize("value", [object(), eval, [{1: object()}], (lambda: 0)])
def test_what_has_no_plain_form_is_refused(value):
    with pytest.raises(values.Unsendable, match="cannot be sent"):
        values.encode(value)


def test_bytes_that_are_no_value_are_refused():
    good = values.encode([{"a": (1, 2.5, "x", b"y", {3}, None, range(3), 1j)}])
    assert values.decode(good)
    for end in range(len(good)):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            values.decode(good[:end])
    for bad in (
        good + b"N",
        b"q1:a",
        b"l-1:",
        b"l99999999999:",
        b"c" * 10_000,
        b"d1:N",
        b"d5:l0:NN",
        b"S3:l0:",
        b"i1:z",
    ):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            values.decode(bad)
