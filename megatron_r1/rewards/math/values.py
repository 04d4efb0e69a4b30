"""What an expression is worth: an exact fraction where arithmetic is all there is, else a number of stated precision.

Nothing is simplified, so nothing can run for long: fractions are bounded in bits, and what would be larger becomes a
floating-point number with an unbounded exponent (mpmath), for which `10^{10^{10}}` is as cheap as 10. What is too large
even for that raises TooLargeError. A sum that swallows one of its terms raises AbsorbedError, because two values that
differ in that term would look equal; the caller then asks for more precision.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath

from megatron_r1.rewards.math.tree import Apply, Node, Number, Symbol

MAX_EXACT_BITS = 1 << 17
MAX_EXACT_FACTORIAL = 3000
MAX_FACTORIAL = 10**7
MAX_GAMMA_BITS = 1500
"""Of precision, for factorials and binomials that are not exact: they take seconds beyond."""

MAX_MAGNITUDE_BITS = 1 << 12
"""Of the exponent of two of any value: larger ones have more digits in their exponent than an answer could mean."""

CONSTANTS = frozenset(["pi", "e", "i"])
NOT_VARIABLES = CONSTANTS | {"infty"}

Value = Any
"""Fraction (exact), mpf or mpc."""


class NoValueError(Exception):
    """The tree has no number: undefined there, or no expression."""


class TooLargeError(NoValueError):
    """Its value could not be held, or not be had in a moment."""


class AbsorbedError(NoValueError):
    """A term is too small beside the others for this precision."""


@functools.lru_cache(maxsize=8)
def context(bits: int) -> Any:
    """mpmath's arithmetic with `bits` bits."""
    made = mpmath.mp.clone()
    made.prec = bits
    return made


class Evaluation:
    """One point and one precision: variables get pseudo-random rational values from their names and `trial`, the same
    ones for both sides of a comparison."""

    def __init__(self, *, bits: int, trial: int = 0, sign: int = 1) -> None:
        self.mp = context(bits)
        self.bits = bits
        self.saw_complex = False
        """Was any part of what was evaluated no real number?"""
        self._trial = trial
        self._sign = sign
        self._variables: dict[str, Fraction] = {}

    def value(self, node: Node) -> Value:
        """Fraction, mpf or mpc. NoValueError where there is none."""
        match node:
            case Number(value):
                return value
            case Symbol(name):
                return self._symbol(name)
            case Apply("add", arguments):
                return self._sum([self.value(argument) for argument in arguments])
            case Apply("degree", (inside,)):
                return self._binary("mul", self.value(inside), self.mp.pi / 180)
            case Apply("cup" | "cap" | "setminus" | "pm" | "mp", _):
                raise NoValueError
            case Apply(name, arguments) if name.startswith("call "):
                inside = ",".join(self._key(self.value(argument)) for argument in arguments)
                return self.variable(f"{name[5:]}({inside})")
            case Apply(name, arguments):
                values = [self.value(argument) for argument in arguments]
                return self._checked(self._apply(name, values))
        raise NoValueError

    def variable(self, name: str) -> Fraction:
        """The value of a variable at this point: about 0.1 to 2.1, with this point's sign for
        some of the names; with sign 0 a whole number from 1 to 12."""
        if name not in self._variables:
            digest = hashlib.blake2b(f"{self._trial}:{name}".encode(), digest_size=8).digest()
            value = Fraction(101 + int.from_bytes(digest[:4]) % 1997, 997)
            if self._sign == 0:
                value = Fraction(1 + int.from_bytes(digest[:4]) % 12)
            negative = self._sign < -1 or (self._sign < 0 and digest[4] % 2 == 0)
            self._variables[name] = -value if negative else value
        return self._variables[name]

    def number(self, value: Value) -> Value:
        """The value as mpf or mpc."""
        if isinstance(value, Fraction):
            return self.mp.mpf(value.numerator) / value.denominator
        return value

    def _key(self, value: Value) -> str:
        if isinstance(value, Fraction):
            return f"{value.numerator:x}/{value.denominator:x}"
        return self.mp.nstr(self.number(value), 30)

    def _symbol(self, name: str) -> Value:
        if name == "pi":
            return +self.mp.pi
        if name == "e":
            return +self.mp.e
        if name == "i":
            return self.mp.mpc(0, 1)
        if name == "infty":
            return self.mp.inf
        return self.variable(name)

    def _sum(self, terms: list[Value]) -> Value:
        if all(isinstance(term, Fraction) for term in terms):
            return _bounded(sum(terms, Fraction(0)))
        numbers = [self.number(term) for term in terms]
        sizes = [self.mp.mag(number) for number in numbers if number != 0]
        total = self.mp.fsum(numbers) if all(map(self.mp.isfinite, numbers)) else sum(numbers)
        if all(map(self.mp.isfinite, numbers)) and sizes and max(sizes) - min(sizes) > self.bits - 40:
            raise AbsorbedError
        return self._checked(total)

    def _apply(self, name: str, values: list[Value]) -> Value:
        mp = self.mp
        if name in ("mul", "div", "pow"):
            return self._binary(name, *values)
        if name == "neg":
            return -values[0]
        if name == "percent":
            return self._binary("div", values[0], Fraction(100))
        if name == "root":
            return self._root(*values)
        if name in ("factorial", "factorial2"):
            return self._factorial(name, values[0])
        if name == "binom":
            return self._binomial(*values)
        if name == "log":
            base = values[1] if len(values) > 1 else Fraction(10)
            return self._log(values[0], base)
        if name in ("floor", "ceil") and isinstance(values[0], Fraction):
            return Fraction(math.floor(values[0]) if name == "floor" else math.ceil(values[0]))
        if name in ("gcd", "lcm"):
            return self._whole(name, values)
        if name in ("max", "min"):
            return self._extreme(name, values)
        if name == "abs" and isinstance(values[0], Fraction):
            return abs(values[0])
        function = FUNCTIONS.get(name)
        if function is None or len(values) != 1:
            raise NoValueError
        number = self.number(values[0])
        if mp.isfinite(number) and number != 0 and mp.mag(number) > MAX_MAGNITUDE_BITS:
            raise TooLargeError
        try:
            return function(mp, number)
        except (ValueError, ZeroDivisionError, OverflowError, TypeError) as error:
            raise NoValueError from error

    def _binary(self, name: str, left: Value, right: Value) -> Value:
        exact = isinstance(left, Fraction) and isinstance(right, Fraction)
        if name == "pow":
            return self._power(left, right)
        if name == "div" and right == 0:
            raise NoValueError
        if exact:
            return _bounded(left * right if name == "mul" else left / right)
        left, right = self.number(left), self.number(right)
        return left * right if name == "mul" else left / right

    def _power(self, base: Value, exponent: Value) -> Value:
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            power = exponent.numerator
            if base == 0:
                if power <= 0:
                    raise NoValueError
                return Fraction(0)
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits <= 1 or (abs(power) <= MAX_EXACT_BITS and bits * abs(power) <= MAX_EXACT_BITS):
                if bits <= 1:  # 1 or -1
                    return Fraction(base.numerator ** (power % 2 or 2))
                return base**power
        first, second = self.number(base), self.number(exponent)
        if first == 0:
            if isinstance(second, self.mp.mpf) and second > 0:
                return Fraction(0)
            raise NoValueError
        if not (self.mp.isfinite(first) and self.mp.isfinite(second)):
            raise NoValueError
        if second == 0:
            return Fraction(1)
        grown = self.mp.mag(second) + max(0, self.mp.mag(self.mp.log(first)) if first != 1 else 0)
        if grown > MAX_MAGNITUDE_BITS:
            raise TooLargeError
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            return self.mp.power(first, exponent.numerator)
        if grown > 64:  # digits of a huge logarithm are digits of the exponent: the value needs them all
            with self.mp.workprec(self.bits + grown):
                return self.mp.exp(second * self.mp.log(first))
        return self.mp.power(first, second)

    def _root(self, value: Value, degree: Value) -> Value:
        if not isinstance(degree, Fraction) or degree == 0:
            return self._power(value, self._binary("div", Fraction(1), degree))
        if degree == 2 and isinstance(value, Fraction) and value >= 0:
            above, below = math.isqrt(value.numerator), math.isqrt(value.denominator)
            if above * above == value.numerator and below * below == value.denominator:
                return Fraction(above, below)
        number = self.number(value)
        if degree == 2:
            return self.mp.sqrt(number)
        if degree.denominator == 1 and degree.numerator % 2 and isinstance(number, self.mp.mpf) and number < 0:
            return -self._power(-value, 1 / degree)  # the real root
        return self._power(value, 1 / degree)

    def _log(self, value: Value, base: Value) -> Value:
        number, below = self.number(value), self.number(base)
        if number == 0 or below in (0, 1):
            raise NoValueError
        found = self.mp.log(number) / self.mp.log(below)
        if isinstance(value, Fraction) and isinstance(base, Fraction) and isinstance(found, self.mp.mpf):
            near = int(self.mp.nint(found))
            if abs(near) < 10_000 and base.denominator == 1 and self._power(base, Fraction(near)) == value:
                return Fraction(near)
        return found

    def _factorial(self, name: str, value: Value) -> Value:
        if isinstance(value, Fraction) and value.denominator == 1 and value <= MAX_EXACT_FACTORIAL:
            whole = value.numerator
            if whole < 0:
                raise NoValueError
            return Fraction(math.factorial(whole) if name == "factorial" else math.prod(range(whole, 0, -2)))
        number = self.number(value)
        if name == "factorial2" or not isinstance(number, self.mp.mpf) or number <= -1:
            raise NoValueError
        if number > MAX_FACTORIAL or self.bits > MAX_GAMMA_BITS:
            raise TooLargeError
        return self.mp.gamma(number + 1)

    def _binomial(self, above: Value, below: Value) -> Value:
        if isinstance(above, Fraction) and isinstance(below, Fraction) and above.denominator == below.denominator == 1:
            n, k = above.numerator, below.numerator
            if 0 <= k <= n:
                k = min(k, n - k)
                if k * n.bit_length() <= MAX_EXACT_BITS // 4:
                    return Fraction(math.comb(n, k))
                if n > 10**12 or self.bits > MAX_GAMMA_BITS:
                    raise TooLargeError
                return self.mp.binomial(n, k)
        first, second = self.number(above), self.number(below)
        if self.bits > MAX_GAMMA_BITS or max(abs(first), abs(second)) > MAX_FACTORIAL:
            raise TooLargeError
        return self.mp.binomial(first, second)

    def _whole(self, name: str, values: list[Value]) -> Fraction:
        if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
            raise NoValueError
        numbers = [value.numerator for value in values]
        return Fraction(math.gcd(*numbers) if name == "gcd" else math.lcm(*numbers))

    def _extreme(self, name: str, values: list[Value]) -> Value:
        numbers = [self.number(value) for value in values]
        if not all(isinstance(number, self.mp.mpf) for number in numbers):
            raise NoValueError
        best = (max if name == "max" else min)(range(len(numbers)), key=numbers.__getitem__)
        return values[best]

    def _checked(self, value: Value) -> Value:
        """A complex number with no imaginary part is real; nothing is not a number."""
        if isinstance(value, Fraction):
            return value
        if isinstance(value, self.mp.mpc):
            if value.imag == 0:
                value = value.real
            else:
                self.saw_complex = True
        if self.mp.isnan(value):
            raise NoValueError
        return value


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 8 * MAX_EXACT_BITS:
        raise TooLargeError
    return value


FUNCTIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "sin": lambda mp, x: mp.sin(x), "cos": lambda mp, x: mp.cos(x), "tan": lambda mp, x: mp.tan(x),
    "cot": lambda mp, x: mp.cot(x), "sec": lambda mp, x: mp.sec(x), "csc": lambda mp, x: mp.csc(x),
    "sinh": lambda mp, x: mp.sinh(x), "cosh": lambda mp, x: mp.cosh(x), "tanh": lambda mp, x: mp.tanh(x),
    "coth": lambda mp, x: mp.coth(x), "arcsin": lambda mp, x: mp.asin(x), "arccos": lambda mp, x: mp.acos(x),
    "arctan": lambda mp, x: mp.atan(x), "arccot": lambda mp, x: mp.acot(x), "arcsec": lambda mp, x: mp.asec(x),
    "arccsc": lambda mp, x: mp.acsc(x), "ln": lambda mp, x: mp.log(x), "exp": lambda mp, x: mp.exp(x),
    "abs": lambda mp, x: mp.fabs(x), "floor": lambda mp, x: mp.floor(x), "ceil": lambda mp, x: mp.ceil(x),
    "arg": lambda mp, x: mp.arg(x), "Re": lambda mp, x: mp.re(x), "Im": lambda mp, x: mp.im(x),
    "sgn": lambda mp, x: mp.sign(x),
}  # fmt: skip
