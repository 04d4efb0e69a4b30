"""Equivalence of written answers: what must be equal, and what must not be talked into being equal."""

import pytest

from megatron_r1.rewards.math import MAX_ANSWER_CHARACTERS, answers_equal

EQUAL = [
    ("18", "18"),
    ("18", " 18. "),
    ("18", "18.00"),
    ("18", "$18$"),
    ("18", "$18"),
    ("18", r"\$18"),
    ("18", r"\boxed{18}"),
    ("18", r"\(18\)"),
    ("18", "18 dollars"),
    ("18", "The answer is 18."),
    ("18", r"18 \text{ eggs}"),
    ("1000", "1,000"),
    ("1000", "1e3"),
    ("1000", "10**3"),
    ("-30", "- 30"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac12", r"$\frac{1}{2}$"),
    (r"\sqrt{2}", r"\sqrt2"),
    (r"\sqrt{2}", "sqrt(2)"),
    (r"2\pi", "2*pi"),
    ("x+1", "1+x"),
    ("(0,1]", r"0<x\le1"),
    (r"\{1,2\}", "2, 1"),
    ("5", "x = 5"),
    ("50%", "0.5"),
    ("Paris", r"\text{paris}"),
    ("B", "(B)"),
]
DIFFERENT = [
    ("18", "17"),
    ("18", "-18"),
    ("18", ""),
    ("18", "17 or 18"),
    ("18", "17, 18"),
    ("18", "17 18"),
    ("18", "it is 17, no, 18"),
    ("18", "17 dollars or 18 dollars"),
    ("18", "18 = 17"),
    ("18", "eighteen or so"),
    ("35", "18 17"),
    ("(0,1]", r"0<x<1"),
    ("x+1", "x-1"),
    ("Paris", "London"),
    ("1/2", "0.6"),
    ("18", "18" + " " * MAX_ANSWER_CHARACTERS),
]


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_same_answer_in_another_spelling_is_equal(reference, answer):
    assert answers_equal(reference, answer)


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_wrong_or_hedged_answer_is_not_equal(reference, answer):
    assert not answers_equal(reference, answer)
