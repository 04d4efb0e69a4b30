"""Are two written answers the same mathematics? Equivalence is math-verify's; this file only hands it clean
input.

math-verify looks for an expression anywhere in a text, so "17 or 18" would count as 18 and an answer could
hedge. Here the whole answer is read as one expression. Words are tolerated only around one number where the
reference is a bare number ("18 dollars" for 18), and none that change it ("18 million", "not 18"); where the
reference has words of its own, the answer must have the same. Answers are read without LaTeX delimiters, and an
interval equals the inequality that describes it. Runs for as long as the answer makes sympy run: call it only in a
worker process that can be killed (pool.py).
"""

# math-verify takes None for no timeout; its annotation says int.
# pyright: reportArgumentType=false

from __future__ import annotations

import re
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse, verify

MAX_ANSWER_CHARACTERS = 2000
"""Longer answers are wrong without reading: no reference answer is near it and parsers are superlinear."""

DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`"), ("**", "**"))
TEXT_COMMAND = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
PERCENT = re.compile(r"\s*(?:\\?%|\bper\s?cent\b)", re.IGNORECASE)
THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,!]|\{,\}|,\\!)(?=[0-9]{3}(?![0-9]))")
WORD = re.compile(r"(?<![\\A-Za-z0-9])[A-Za-z]{2,}")
MATH_WORDS = frozenset(["or", "and", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "inf", "infty"])
SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})")
EQUALS = re.compile(r"(?<![<>!:=])=(?![=<>])")
ODD_EQUALS = re.compile(r"[!:=]=|=[<>]|->")
SOLUTIONS = re.compile(r"\s*(?:[,;]|\bor\b|\band\b)\s*")
SEVERAL = re.compile(
    r"[0-9](?:\s|\\[ ,;:!\\]|\\q?quad|[~$&])+[0-9]"  # math-verify adds up the numbers of "17 \quad 18"
    r"|[0-9]\s*[_']|\\boxed|\.\.\.|…|\\[lc]?dots"  # and reads over these
)
VARIABLE = (
    r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi"
    r"|omega))(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?"
)
ASSIGNMENT = re.compile(rf"(?P<left>(?P<name>{VARIABLE})(?P<of>\([A-Za-z]\))?)\s*=\s*(?P<right>[^=]+)")
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:\s?/\s?[0-9]+)?"
BARE_NUMBER = re.compile(rf"(?P<sign>[-+]?)\s?(?:\\?\$|[€£])?\s?(?P<digits>{DIGITS})(?P<percent>%?)")
PROSE = re.compile(
    r"[A-Za-z\s.,:;!'\"]*?(?<![A-Za-z0-9.,!'])"  # words before
    rf"(?P<sign>[-+]?)(?:\\?\$|[€£])?(?P<digits>{DIGITS})(?P<percent>%?)"
    r"(?![0-9A-Za-z'/^_!:])(?!\s+(?!a\b)[A-Za-z]\b)"  # no other number, and no factor or letter like K
    r"(?:[A-Za-z\s.,:;!'\"]|(?<=[A-Za-z])(?:\^\{?[23]\}?|[²³]|/(?=[A-Za-z])))*"  # words and units after
)
CHANGING_WORDS = frozenset(
    """
    minus negative neg plus no not non nor none never neither cannot cant isnt without except unless wrong false
    incorrect or versus vs instead between than least most less more fewer over under above below almost nearly
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion
    quadrillion zillion dozen gross lakh crore mil mln mn bn tn bil tril point
    half halve quarter third fourth fifth sixth seventh eighth ninth tenth twelfth hundredth thousandth millionth
    billionth permille percentage twice thrice double triple quadruple squared cubed root factorial multiplied divided
    inverse reciprocal opposite imaginary mod modulo
    """.split()  # noqa: SIM905 (a list literal would take 100 lines)
)
"""Words that make another number of the one beside them, or say that it is not the answer. Plurals count too."""


def answers_equal(reference: str, answer: str) -> bool:
    """True if `answer` means the same as `reference`. Never raises for an odd answer; may run long."""
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    reference, answer = _undress(reference), _undress(answer)
    if not answer or not reference:
        return False
    if _plain(reference) == _plain(answer):
        return True
    left, reference = _split_assignment(reference)
    given_left, answer = _split_assignment(answer)
    if left is not None and given_left is not None and left != given_left:
        return False
    if given_left != left and given_left is not None and "(" in given_left:
        return False
    for sign in (EQUALS, ODD_EQUALS, SEVERAL):
        if len(sign.findall(answer)) != len(sign.findall(reference)):
            return False
    if "%" in answer and "%" not in reference:
        return False
    if _words(reference) and not _words(answer):
        return _same_number_in_prose(answer, reference)  # "18 cm" and the number alone
    if _words(reference):
        return _same_words_and_parts(reference, answer)
    if _words(answer):
        return _same_number_in_prose(reference, answer)
    return _same_expression(reference, answer)


def _undress(text: str) -> str:
    """Without surrounding white space, math delimiters, a single \\boxed{} and a final full stop; text commands
    as their text, percent in one spelling."""
    text = THOUSANDS.sub(",", text.replace("\u2212", "-").replace("\u00a0", " "))
    before = None
    while before != text:
        before = text
        text = re.sub(r"(?<!\.)\.$", "", text.strip()).strip()
        for left, right in DELIMITERS:
            if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
                inner = text[len(left) : -len(right)]
                if left not in inner:
                    text = inner
        if text.startswith(r"\boxed{") and text.endswith("}") and text.count(r"\boxed") == 1:
            text = text[len(r"\boxed{") : -1]
        text = PERCENT.sub("%", TEXT_COMMAND.sub(r" \1 ", text))
    return text


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _words(text: str) -> list[str]:
    return [word for word in WORD.findall(text) if word.lower() not in MATH_WORDS]


def _split_assignment(text: str) -> tuple[str | None, str]:
    """`x = 18` as ("x", "18"), `x = 1 or x = 2` as ("x", "1, 2"); (None, text) for all else, `17 = 18` and chains
    included."""
    parts = [ASSIGNMENT.fullmatch(part) for part in SOLUTIONS.split(text)]
    found = [part for part in parts if part is not None]
    if len(found) == len(parts) and len({part["left"] for part in found}) == 1:
        return found[0]["left"], _undress(", ".join(part["right"].strip() for part in found))
    whole = ASSIGNMENT.fullmatch(text)
    return (whole["left"], _undress(whole["right"])) if whole else (None, text)


def _same_words_and_parts(reference: str, answer: str) -> bool:
    """The same words in the same order, and equal mathematics between them: `3 km` and `3.0 km`, not `3 m`."""
    plural = any(character.isdigit() for character in reference)
    words, given_words = (
        [word.casefold().removesuffix("s" if plural and len(word) > 3 else "") for word in WORD.findall(text)]
        for text in (reference, answer)
    )
    if words != given_words:
        return False
    parts, given_parts = WORD.split(reference), WORD.split(answer)
    for part, given in zip(parts, given_parts, strict=True):
        part, given = part.strip(), given.strip()
        if _plain(part) == _plain(given):
            continue
        if not part or not given or "," in part or not _same_expression(part, given):
            return False
    return True


def _same_number_in_prose(bare: str, text: str) -> bool:
    """Is `bare` a bare number, and `text` that number among words which leave it as it is?"""
    number, prose = BARE_NUMBER.fullmatch(bare), PROSE.fullmatch(text)
    if number is None or prose is None or re.search(r"n['\u2019]t\b", text, re.IGNORECASE):
        return False
    given = {word.lower() for word in WORD.findall(text)}
    if (given | {word.removesuffix("s") for word in given}) & CHANGING_WORDS:
        return False
    return number["percent"] == prose["percent"] and _value(number) == _value(prose)


def _value(number: re.Match[str]) -> Fraction | None:
    try:
        numerator, _, denominator = re.sub(r"[\s,]", "", number["digits"]).partition("/")
        value = Fraction(numerator) / Fraction(denominator or 1)
    except ZeroDivisionError:
        return None
    return -value if number["sign"] == "-" else value


def _same_expression(reference: str, answer: str) -> bool:
    gold, given = _read(reference), _read(answer)
    if not gold or not given:
        return False
    # No time limits of its own: those use SIGALRM, which cannot stop C code; the pool's limit can.
    return verify(gold, given, allow_set_relation_comp=True, timeout_seconds=None)


def _read(text: str) -> list:
    """sympy readings of one undressed answer without words."""
    text = SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text).replace("**", "^")
    text = re.sub(r"(?<!\\)\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<!\\)\b(pi|sin|cos|tan|log|ln|exp)\b", r"\\\1", text)
    text = re.sub(r"(?<!\\)%", r"\\%", text.replace(r"\$", "").replace("$", "").replace(r"\ ", " "))
    return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)
