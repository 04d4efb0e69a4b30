"""An answer's text as tokens. Left out: the grammar (reader.py)."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_r1.rewards.math.tree import Number

Token = tuple[str, str]
"""Kind (number, text, command, name, mark, matrix or end) and text."""

MAX_TOKENS = 600
MAX_DEPTH = 40
"""Of brackets and powers in one another."""

MAX_DIGITS = 2000

TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+\.\d+|\.\d+|\d+\.?(?!\d))|\\text\{(?P<text>[^{}]*)\}|\\(?P<command>[A-Za-z]+|\\|[{}|%])"
    r"|(?P<letters>[A-Za-z]+)|(?P<mark>\*\*|<=|>=|!=|==|=>|->|[-+*/^_=<>!'|:;,.()\[\]{}&%]))"
)
GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?![\d,])")
SCIENTIFIC = re.compile(r"(?<![A-Za-z\d])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})(?![\dA-Za-z.])")

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc asin acos atan ln log lg "
    "exp max min gcd lcm det arg Re Im sgn sign deg dim ker tr rank Var Cov Pr floor ceil abs lim sup inf".split()
)
WORDS = {"sqrt": "sqrt", "pi": "pi", "infty": "infty", "infinity": "infty", "oo": "infty", "or": "or", "and": "and"}
SAME_FUNCTION = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log", "sign": "sgn"}
DATE = re.compile(r"(?<!\d)[12]\d{3}-[01]\d-[0-3]\d(?!\d)")
REPEATING = re.compile(r"(?<![\d.])(\d{0,9})\.(\d{0,9})\s*\\overline\s*\{\s*(\d{1,18})\s*\}")


class UnreadableError(Exception):
    """The text is no expression that this reader knows."""


def split(text: str) -> list[Token]:
    """The tokens of a text, with an "end" behind them. UnreadableError for a character that is none of ours."""
    text = SCIENTIFIC.sub(r"(\1*10^{\2})", REPEATING.sub(_repeating, text))
    if DATE.search(text):
        raise UnreadableError  # no subtraction
    tokens: list[Token] = []
    place, level = 0, 0
    while place < len(text):
        if text[place:].isspace():
            break
        found = TOKEN.match(text, place)
        if found is None or len(tokens) > MAX_TOKENS:
            raise UnreadableError
        start = found.start("number")
        if level == 0 and start >= 0 and (grouped := GROUPED.match(text, start)):
            tokens.append(("number", grouped[0].replace(",", "")))
            place = grouped.end()
            continue
        place = found.end()
        kind = found.lastgroup
        assert kind is not None
        value = found[kind]
        if kind == "number" and tokens and tokens[-1] == ("mark", "."):
            raise UnreadableError  # ..5
        if kind == "letters":
            tokens += _letters(value)
        elif kind == "text" and (word := " ".join(value.split()).lower()) in ("or", "and"):
            tokens.append(("command", word))
        elif kind == "command" and value.startswith("placeholder"):
            tokens.append(("matrix", value.removeprefix("placeholder")))
        else:
            tokens.append((kind, value))
        level += (value in "([{" and kind in ("mark", "command")) - (value in ")]}" and kind in ("mark", "command"))
    return [*tokens, ("end", "")]


def _letters(run: str) -> list[Token]:
    """A run of letters: a function, a word, or up to three variables side by side."""
    if run in WORDS:
        return [("command", WORDS[run])]
    if run in FUNCTIONS:
        return [("command", run)]
    if len(run) > 3:
        for length in (6, 5, 4, 3, 2):
            if run[:length] in FUNCTIONS and len(run) - length == 1 and run[length] in "xABC":
                return [("command", run[:length]), ("name", run[length])]
        return [("name", run.lower())]
    if run[-2:] in ("pi",) and len(run) == 3:
        return [("name", run[0]), ("command", "pi")]
    if run[:2] in FUNCTIONS and len(run) == 3:  # lnx
        return [("command", run[:2]), ("name", run[2])]
    return [("name", letter) for letter in run]


def number(text: str) -> Number:
    """Of digits with or without a point."""
    if len(text) > MAX_DIGITS:
        raise UnreadableError
    whole, _, after = text.partition(".")
    digits = len((whole + after).lstrip("0"))
    if not after:
        return Number(Fraction(int(whole or "0")), digits=digits)
    return Number(Fraction(int((whole or "0") + after), 10 ** len(after)), places=len(after), digits=digits)


class TokenStream:
    """The tokens of one text and the place of the next one."""

    def __init__(self, tokens: list[Token], depth: int) -> None:
        self._tokens = tokens
        self._place = 0
        self._depth = depth

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._place]

    def _is(self, *values: str) -> bool:
        kind, value = self._tokens[self._place]
        return kind in ("mark", "command") and value in values

    def _take(self) -> str:
        if self._tokens[self._place][0] == "end":
            raise UnreadableError
        self._place += 1
        return self._tokens[self._place - 1][1]

    def _accept(self, *values: str) -> bool:
        if self._is(*values):
            self._place += 1
            return True
        return False

    def _expect(self, *values: str) -> None:
        if not self._accept(*values):
            raise UnreadableError

    def expect_end(self) -> None:
        if self._peek()[0] != "end":
            raise UnreadableError

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError


def _repeating(found: re.Match[str]) -> str:
    r"""0.1\overline{6} as its fraction."""
    once, again = found[2], found[3]
    below = (10 ** len(again) - 1) * 10 ** len(once)
    above = int(found[1] + once + again) - int((found[1] + once) or "0") if found[1] + once else int(again)
    return rf"\frac{{{above}}}{{{below}}}"
