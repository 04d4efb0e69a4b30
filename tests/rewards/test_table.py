"""The table of graders: every entry is whole, and one that is not is refused in a sentence."""

from __future__ import annotations

import importlib

import pytest

from megatron_r1.rewards.grader import Grader, WorkerFunction
from megatron_r1.rewards.math_grader import LONGEST_ANSWER
from megatron_r1.rewards.table import GRADERS, by_name


def check(problem, config):
    """Anything may be graded."""


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (lambda: Grader(name="mine"), "missing 1 required keyword-only argument: 'check'"),
        (lambda: Grader(name="mine", check=check), "grader 'mine' has no way to a verdict: give it quick, a worker"),
        (
            lambda: Grader(name="mine", check=check, worker=WorkerFunction(name="mine", function="somewhere")),
            "its worker's function is 'somewhere'; write module:function",
        ),
        (lambda: by_name(GRADERS["math"], GRADERS["math"]), "two graders of the table are called 'math'"),
        (lambda: by_name(check), "entry 0 of the table is <function check"),
    ],
)
def test_an_entry_that_lacks_something_is_refused(missing, says):
    with pytest.raises((TypeError, ValueError)) as caught:
        missing()
    assert says in str(caught.value)


@pytest.mark.parametrize("grader", GRADERS.values(), ids=GRADERS)
def test_what_a_worker_is_told_to_import_is_there(grader):
    if grader.worker is not None:
        module, _, function = grader.worker.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_longest_reference_is_the_longest_answer():
    from megatron_r1.rewards.math import MAX_ANSWER_CHARACTERS

    assert LONGEST_ANSWER == MAX_ANSWER_CHARACTERS
