"""Multiple choice: `A`, `(A) 5`, `Option A`, `The answer is (A).` and, for several right letters, `ABD`, `A, B, D`."""

from __future__ import annotations

import re

from megatron_r1.rewards.math.text import TEXT
from megatron_r1.rewards.math.vocabulary import NEGATIONS
from megatron_r1.rewards.math.words import changing

REFERENCE = re.compile(r"\(?([A-J])\)?|([A-J]{2,6})")
LABELLED = re.compile(r"(?:\(([A-J])\)|([A-J])[.):])\s*(\S.*)")
LEAD = re.compile(
    r"^(?:[^.]*?\b)?(?:answer|option|choice)s?\b\s*(?:is|are|should be)?\s*[:：]?\s*(?:option|choice)?\s*"
    r"|^(?:选项?|答案[是为]?|故选)\s*[:：]?\s*",
    re.IGNORECASE,
)
LETTERS = re.compile(r"\(?([A-Ja-j])\)?(?:\s*(?:,|;|and|&|\s)\s*\(?([A-Ja-j])\)?)*\.?", re.IGNORECASE)
STANDING = re.compile(r"(?<![A-Za-z\\])([A-HJ])(?![A-Za-z])")
OTHER = re.compile(r"\(([A-J])\)|(?<![A-Za-z\\])([B-HJ])(?=[.):,]|\s*$)|\b(?:or|not)\b|,\s*[a-j]\b\s*\.?$")


def reference_choice(reference: str) -> str | None:
    """The right letters in order (`ABD`), where a reference is nothing but letters A to J."""
    text = TEXT.sub(r"\1", reference).strip().strip(".")
    found = REFERENCE.fullmatch(text.replace(" ", "").replace(",", ""))
    if found is None:
        return None
    letters = found[1] or found[2]
    return letters if list(letters) == sorted(set(letters)) else None


def labelled_choice(reference: str) -> tuple[str, str] | None:
    """(letter, text) of a reference such as `C. 5` or `(C) 5`."""
    found = LABELLED.fullmatch(reference.strip())
    return (found[1] or found[2], found[3]) if found else None


def given_choice(answer: str) -> str | None:
    """The letters that an answer names, in order; None if it names none, or one and perhaps another."""
    text = re.sub(r"\\text\{([^{}]*)\}|\\boxed\s*\{([^{}]*)\}", r" \1\2 ", answer).replace("*", "").strip()
    lead = LEAD.match(text)
    if lead and changing(lead[0], NEGATIONS):
        return None  # the wrong answer is A
    rest = text[lead.end() :] if lead else text
    rest = rest.strip().rstrip(".")
    if LETTERS.fullmatch(rest) and (len(rest) == 1 or rest.upper() == rest or not rest.isalpha() or "and" in rest):
        letters = re.findall(r"(?<![A-Za-z])[A-Ja-j](?![A-Za-z])", rest)
        return "".join(sorted({letter.upper() for letter in letters})) if letters else None
    if re.fullmatch("[A-J]{2,6}", rest) and list(rest) == sorted(set(rest)):
        return rest
    if re.fullmatch(r"(?:\([A-J]\)\s*){2,}", rest):
        return "".join(sorted(set(re.findall("[A-J]", rest))))
    labelled = LABELLED.fullmatch(rest)
    if labelled is None:
        return None
    letter, tail = labelled[1] or labelled[2], re.sub(r"\\math\w+\s*\{([^{}]*)\}", r" \1 ", labelled[3])
    others = {found for found in STANDING.findall(tail) if found != letter}
    return None if others or OTHER.search(tail) or changing(tail, NEGATIONS) else letter
