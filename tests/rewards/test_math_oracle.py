"""The math reward beside sympy: expressions that sympy rewrites are equal, the same with a small change are not, and
numbers have the values that sympy gives them."""

import random

import pytest
import sympy

from megatron_r1.rewards.math import answers_equal
from megatron_r1.rewards.math.reader import read
from megatron_r1.rewards.math.text import normalise
from megatron_r1.rewards.math.values import Evaluation

X, Y = sympy.symbols("x y")


def expression(draw: random.Random, depth: int) -> sympy.Expr:
    """A random tree of sums, products, quotients, powers and roots of x, y and small integers."""
    if depth == 0 or draw.random() < 0.2:
        return draw.choice(
            [X, Y, sympy.Integer(draw.randint(1, 9)), sympy.Rational(draw.randint(1, 9), draw.randint(2, 9))]
        )
    left, right = expression(draw, depth - 1), expression(draw, depth - 1)
    return draw.choice([
        lambda: left + right, lambda: left - right, lambda: left * right, lambda: left / (right**2 + 1),
        lambda: left ** draw.randint(2, 3), lambda: sympy.sqrt(left**2 + right**2 + 1), lambda: sympy.sin(left) + right,
    ])()  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_what_sympy_rewrites_is_equal_and_what_it_changes_is_not(seed):
    draw = random.Random(seed)
    made = expression(draw, 3)
    written = sympy.latex(made)
    assert answers_equal(written, sympy.latex(sympy.expand(made)))
    assert answers_equal(written, sympy.latex(sympy.together(made)))
    assert not answers_equal(written, sympy.latex(sympy.expand(made) + sympy.Rational(1, 10**6)))
    assert not answers_equal(written, sympy.latex(made * sympy.Rational(1001, 1000) + 1))
    if made.has(X):
        assert not answers_equal(written, sympy.latex(made.subs(X, X + 1) + X**5))


NUMBERS = [
    sympy.Rational(22, 7), sympy.sqrt(2) + sympy.sqrt(3), sympy.pi**2 / 6, sympy.exp(-40), sympy.log(10), sympy.sin(1),
    sympy.factorial(20), sympy.binomial(30, 12), sympy.Integer(2) ** 300, sympy.sqrt(sympy.Integer(10) ** 40 + 1),
    sympy.atan(2), sympy.cosh(1), sympy.cbrt(5), sympy.Abs(sympy.Integer(-3)), sympy.floor(sympy.pi), sympy.log(8, 2),
    1 / sympy.factorial(100), sympy.tan(sympy.pi / 5), sympy.E**sympy.pi, -sympy.Rational(1, 3) ** 60,
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_numbers_have_their_values(number):
    tree = read(normalise(sympy.latex(number, ln_notation=True)))  # log is of base 10 here
    point = Evaluation(bits=200)
    value = point.number(point.value(tree))
    expected = point.mp.mpf(str(sympy.N(number, 50)))
    assert abs(value - expected) <= abs(expected) * point.mp.mpf(10) ** -45


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_a_relative_difference_of_1e_minus_30_is_a_difference(number):
    other = number * (1 + sympy.Rational(1, 10**30))
    assert not answers_equal(sympy.latex(number), sympy.latex(other))
    assert answers_equal(sympy.latex(number), sympy.latex(sympy.Mul(number, 7, evaluate=False)) + "/7")
