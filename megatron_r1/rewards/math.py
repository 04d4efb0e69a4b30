"""Are two written answers the same mathematics? Equivalence is math-verify's; this file only hands it clean
input.

math-verify looks for an expression anywhere in a text, so "17 or 18" would count as 18 and an answer could
hedge. Here the whole answer is read as one expression; prose is allowed only around a single number ("18
dollars"). Answers are read without LaTeX delimiters, and an interval equals the inequality that describes it.
Runs for as long as the answer makes sympy run: call it only in a worker process that can be killed (pool.py).
"""

# math-verify takes None for no timeout; its annotation says int.
# pyright: reportArgumentType=false

from __future__ import annotations

import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MAX_ANSWER_CHARACTERS = 2000
"""Longer answers are wrong without reading: no reference answer is near it and parsers are superlinear."""

DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`"), ("**", "**"))
TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mbox|textbf|operatorname)\s*\{([^{}]*)\}")
NUMBER = re.compile(r"(?<![\w.^])-?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?")
WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}")
MATH_WORDS = frozenset(["or", "and", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "inf", "infty"])
SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})")


def answers_equal(reference: str, answer: str) -> bool:
    """True if `answer` means the same as `reference`. Never raises for an odd answer; may run long."""
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    reference, answer = _undress(reference), _undress(answer)
    if not answer or not reference:
        return False
    if _as_words(reference) == _as_words(answer):
        return True
    gold, given = _read(reference), _read(answer)
    if not gold or not given:
        return False
    # No time limits of its own: those use SIGALRM, which cannot stop C code; the pool's limit can.
    return verify(gold, given, allow_set_relation_comp=True, timeout_seconds=None)


def _undress(text: str) -> str:
    """Without surrounding white space, math delimiters, a single \\boxed{} and a final full stop."""
    before = None
    while before != text:
        before = text
        text = text.strip().removesuffix(".").strip()
        for left, right in DELIMITERS:
            if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
                inner = text[len(left) : -len(right)]
                if left not in inner:
                    text = inner
        if text.startswith(r"\boxed{") and text.endswith("}") and text.count(r"\boxed") == 1:
            text = text[len(r"\boxed{") : -1]
    return text


def _read(text: str) -> list:
    """sympy readings of one undressed answer; empty where it is prose or holds several loose numbers."""
    words = [word for word in WORD.findall(TEXT_COMMAND.sub("", text)) if word.lower() not in MATH_WORDS]
    if words:
        numbers = {re.sub(r"[\s,]", "", number) for number in NUMBER.findall(text)}
        return parse(numbers.pop(), [ExprExtractionConfig()], parsing_timeout=None) if len(numbers) == 1 else []
    if re.search(r"\d\s+\d", text):
        return []
    text = SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text).replace("**", "^")
    text = re.sub(r"(?<!\\)\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<!\\)\b(pi|sin|cos|tan|log|ln|exp)\b", r"\\\1", text)
    text = text.replace(r"\$", "").replace("$", "").replace(r"\ ", " ")
    return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)


def _as_words(text: str) -> str:
    return " ".join(TEXT_COMMAND.sub(r"\1", text).casefold().split())
