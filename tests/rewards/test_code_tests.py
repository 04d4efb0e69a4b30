"""Which tests of programs are taken, which are refused because they prove nothing, and how the others are run."""

# ruff: noqa: E501  (programs)

import pytest

from megatron_r1.errors import DataError
from megatron_r1.rewards.code import score_code
from megatron_r1.rewards.code_tests import parse_tests
from megatron_r1.rewards.sandbox import Sandbox, SandboxConfig

RIGHT, WRONG, EMPTY = "def f(x): return x + 1", "def f(x): return 2", "x = 1"
HUMANEVAL = "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n"
UNITTEST = (
    "import unittest\nclass TestF(unittest.TestCase):\n    def setUp(self):\n        self.x = 2\n"
    "    def test_one(self):\n        self.assertEqual(f(1), 2)\n"
    "    def test_two(self):\n        self.assertEqual(f(self.x), 3)\n"
)
MAIN = "\nif __name__ == '__main__':\n    unittest.main()\n"


@pytest.fixture(scope="module")
def box():
    with Sandbox(SandboxConfig(allow_unisolated=True, wall_seconds=20.0)) as opened:
        yield opened


def asserts(*texts, entry_point="f"):
    return {"asserts": list(texts), "entry_point": entry_point}


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ({}, "keys"),
        ({"inputs": ["1"], "outputs": ["1"], "asserts": ["assert f(1)"]}, "keys"),
        ({"inputs": ["1"], "outputs": []}, "outputs"),
        ({"inputs": ["1", "2"], "outputs": ["1"]}, "2 inputs and 1 outputs"),
        ({"inputs": [1], "outputs": ["1"]}, "inputs"),
        ({"inputs": ["1"], "outputs": ["1"], "tolerance": -1}, "tolerance"),
        ({"inputs": ["1"], "outputs": ["1"], "tolerance": True}, "tolerance"),
        ({"inputs": ["1"], "outputs": ["1"], "tolerance": float("nan")}, "tolerance"),
        ({"inputs": ["1", "2"], "outputs": ["", "\n"]}, "prints nothing passes"),
        (asserts("assert f(1"), "is not Python"),
        (asserts("assert f(1)\0"), "is not Python"),
        (asserts("assert f(1) == " + "(" * 300), "is not Python"),
        (asserts("assert True"), "never calls f"),
        (asserts("assert f(1)", entry_point="f("), "not an expression"),
        ({"asserts": ["assert f(1)"], "entry_point": None}, "not an expression"),
        (asserts(), "asserts"),
        (
            asserts("import numpy as np\nassert np.all(f(1) == 2)"),
            "imports numpy; the sandbox has the standard library",
        ),
        (asserts("def test_f(tmp_path):\n    assert f(tmp_path) == 2"), "test_f takes arguments"),
    ],
)
def test_malformed_tests_are_named(tests, words):
    with pytest.raises(DataError) as caught:
        parse_tests(tests)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("f(1) == 2", "has no assertion"),
        ("f(1)", "has no assertion"),
        ("print(f(1))", "has no assertion"),
        ("result = f(1) == 2", "has no assertion"),
        ("def check(candidate):\n    candidate(1) == 2", "has no assertion"),
        ("def test_f():\n    return f(1) == 2", "has no assertion"),
        ("assert f", "can fail"),
        ("assert f is not None", "can fail"),
        ("assert f != None", "can fail"),
        ("assert callable(f)", "can fail"),
        ("assert callable(f) and f is not None", "can fail"),
        ("assert (f(1) == 2, 'message')", "can fail"),
        ("assert [f(1) == 2]", "can fail"),
        ("assert f(1) == 2 or True", "can fail"),
        ("assert 'f(1) == 2' and f", "can fail"),
        ("assert f(1) == f(1)", "can fail"),
        ("assert len(f(1)) >= 0", "can fail"),
        ("assert lambda: f(1) == 2", "can fail"),
        ("f(1)\nassert True", "can fail"),
        ("if __name__ == '__main__':\n    assert f(1) == 2", "no assertion that runs"),
        ("if '__main__' == __name__:\n    assert f(1) == 2", "no assertion that runs"),
        ("def main():\n    assert f(1) == 2\nif __name__ == '__main__':\n    main()", "no assertion that runs"),
        ("if False:\n    assert f(1) == 2", "no assertion that runs"),
        ("while 0:\n    assert f(1) == 2", "no assertion that runs"),
        ("if True:\n    f(1)\nelse:\n    assert f(1) == 2", "no assertion that runs"),
        ("for x in []:\n    assert f(x) == 2", "no assertion that runs"),
        ("def verify():\n    assert f(1) == 2", "no assertion that runs"),
        ("def a():\n    b()\ndef b():\n    assert f(1) == 2", "no assertion that runs"),
        ("class Cases:\n    def test(self):\n        assert f(1) == 2", "no assertion that runs"),
        ("def check(candidate):\n    return\n    assert candidate(1) == 2", "no assertion that runs"),
        ("async def test_f():\n    assert f(1) == 2", "no assertion that runs"),
        ("try:\n    assert f(1) == 2\nexcept:\n    pass", "catches its own"),
        ("try:\n    assert f(1) == 2\nexcept Exception as e:\n    print(e)", "catches its own"),
        ("try:\n    assert f(1) == 2\nexcept (ValueError, AssertionError):\n    print('no')", "catches its own"),
        ("try:\n    f(1)\nexcept Exception:\n    pass\nelse:\n    assert f(2) == 3", "catches its own"),
        ("from contextlib import suppress\nwith suppress(AssertionError):\n    assert f(1) == 2", "catches its own"),
        ("def t():\n    assert f(1) == 2\ntry:\n    t()\nexcept AssertionError:\n    pass", "catches its own"),
    ],
)
def test_tests_that_prove_nothing_are_refused(text, reason):
    with pytest.raises(DataError) as caught:
        parse_tests(asserts("assert f(2) == 3", text))
    assert reason in str(caught.value) and "any program would pass it" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        HUMANEVAL,
        HUMANEVAL + "\ncheck(f)\n",
        HUMANEVAL + "\ndef test_check():\n    check(f)\n\ntest_check()\n",
        "def check(candidate, eps=0):\n    assert candidate(1) == 2\n    assert candidate(2) == 3",
        "def check():\n    assert f(1) == 2 and f(2) == 3",
        "assert f(1) == 2 and f(2) == 3",
        "assert (f(1), f(2)) == (2, 3), 'message'",
        "import math\nassert math.isclose(f(1), 2) and math.isclose(f(2), 3)",
        "for x, y in ((1, 2), (2, 3)):\n    assert f(x) == y",
        "x = f(2)\nif x != 3:\n    raise ValueError(x)",
        "import sys\nif f(2) != 3:\n    sys.exit(1)",
        "try:\n    assert f(2) == 3\nexcept AssertionError:\n    print('no')\n    raise",
        "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert f(2) == 3",
        "def verify(g):\n    assert g(2) == 3\nverify(f)",
        "assert all(f(x) == x + 1 for x in range(5))",
        "assert not f(2) != 3",
        "def main():\n    assert f(2) == 3\nmain()",
        "def check(candidate):\n    def inner(x):\n        assert candidate(x) == 3\n    inner(2)",
        "def run(function):\n    function()\n@run\ndef t():\n    assert f(2) == 3",
        "class T:\n    def case(self):\n        assert f(2) == 3\n    def run(self):\n        self.case()\nT().run()",
        "import asyncio\nasync def t():\n    assert f(2) == 3\nasyncio.run(t())",
        "def verify(x):\n    assert f(x) == x + 1\nlist(map(verify, [1, 2]))",
        "if __name__ != '__main__':\n    assert f(2) == 3",
        # pytest's and unittest's forms
        "def test_one():\n    assert f(1) == 2\n\ndef test_two():\n    assert f(2) == 3",
        "from solution import f\n\ndef test_two():\n    assert f(2) == 3",
        "class TestF:\n    def setup_method(self):\n        self.x = 2\n    def test_two(self):\n        assert f(self.x) == 3",
        UNITTEST,
        UNITTEST + MAIN,
        UNITTEST.replace("import unittest", "from unittest import TestCase, main").replace("unittest.", "") + "main()",
        "import unittest\nclass Base(unittest.TestCase): pass\n" + UNITTEST.replace("unittest.TestCase", "Base"),
    ],
)
def test_every_form_tells_right_programs_from_wrong_ones(box, text):
    assert score_code(asserts(text), RIGHT, box).correct
    for program in (WRONG, EMPTY, "def f(*args, **keywords): return None"):
        assert not score_code(asserts(text), program, box).correct


def test_a_module_that_only_the_program_imports_is_the_tests_own(box):
    tests = asserts("assert f(1) == sys.getsizeof(1) and math.isclose(math.sqrt(4), 2)")
    assert score_code(tests, "import sys\ndef f(x): return sys.getsizeof(x)", box).correct
    forged = "class sys:\n    getsizeof = staticmethod(lambda x: 0)\ndef f(x): return 0"
    assert not score_code(tests, forged, box).correct


def test_what_stands_before_every_program(box):
    """HumanEval's prompt, with its imports and helpers, as in HumanEval's own harness."""
    prefix = "from typing import List\ndef half(x): return x / 2\ndef f(x: List[int]):\n    'Doc.'\n"
    tests = {**asserts("assert f([4]) == 2"), "prefix": prefix}
    assert score_code(tests, "def f(x: List[int]): return half(x[0])", box).correct
    assert score_code(tests, "from __future__ import annotations\ndef f(x): return 2", box).correct
    assert not score_code(tests, "x = 1", box).correct
    with pytest.raises(DataError, match="prefix 3"):
        parse_tests({**tests, "prefix": 3})


def test_a_helper_of_the_tests_own_is_not_the_programs(box):
    """HumanEval's prompts define helpers that its tests use: they come with the test."""
    text = "def double(x): return 2 * x\nassert f(double(2)) == 5"
    assert score_code(asserts(text), RIGHT + "\ndef double(x): return 1", box).correct
    assert not score_code(asserts(text), "def f(x): return 4\ndef double(x): return 3", box).correct


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("class Solution:\n    def f(self, xs: List[int]) -> Optional[int]:\n        return max(xs)", "passed"),
        ("class Solution:\n    def f(self, xs):\n        heapify(xs)\n        return [heappop(xs) for _ in range(3)][2]", "passed"),
        ("class Solution:\n    @lru_cache(None)\n    def g(self, x): return gcd(x, 6)\n    def f(self, xs): return xs[-1]", "passed"),
        ("from __future__ import annotations\nclass Solution:\n    def f(self, xs: List[int]): return deque(xs).pop()", "passed"),
        ("def List(x): return 3\nclass Solution:\n    def f(self, xs): return List(xs)", "passed"),
        ("class Solution:\n    def f(self, xs): return unknown(xs)", "crashed"),
    ],
)  # fmt: skip
def test_imports_are_supplied_where_the_configuration_says_so(program, outcome):
    tests = asserts("assert Solution().f([1, 2, 3]) == 3", entry_point="Solution().f")
    with Sandbox(SandboxConfig(allow_unisolated=True, supply_imports=True)) as box:
        assert score_code(tests, program, box).outcomes == (outcome,)
        assert score_code({"inputs": [""], "outputs": ["[2]"]}, "x: List[int] = [2]\nprint(x)", box).correct
    with Sandbox(SandboxConfig(allow_unisolated=True)) as box:
        assert score_code({"inputs": [""], "outputs": ["[2]"]}, "x: List[int] = [2]\nprint(x)", box).outcomes == (
            "crashed",
        )
