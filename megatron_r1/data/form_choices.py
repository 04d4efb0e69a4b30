"""Questions with choices: the options under letters, and the letter as the answer.

Publishers give options as a list, an object or a text, and the right one as a letter, a number or a text. GPQA has the
right one first: its options are shuffled by the record, so the same in every run. Left out: which letters an answer may
be written with (rewards/math).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from typing import Any

from megatron_r1.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REQUEST = "Answer with the letter of the right option."
SEVERAL = "Several options may be right. Answer with the letters of all of them."
MARK = re.compile(r"\s*\(?([A-Z])\s*[).:、．]\s*")
"""The letter before an option, as in "A)5" or "(B) 6"."""
SHUFFLED = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def choices(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Question and answer of a row with options. DataError where the right one is none of them."""
    if "Correct Answer" in row:
        return _shuffled(row, where)
    options = _options(row.get("options", row.get("choices")), where)
    key = next(key for key in ("label", "correct", "Answer", "answer_index", "answer") if row.get(key) is not None)
    letters = _letters(row[key], options, where, key)
    question = f"{row['passage']}\n\n{row['question']}" if row.get("passage") else str(row["question"])
    return {"question": _asked(question, options, SEVERAL if len(letters) > 1 else REQUEST), "answer": letters}


def _options(given: Any, where: str) -> list[str]:
    """The options' texts in the order of their letters."""
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        given = given["text"]
    if isinstance(given, dict):
        if list(given) != list(LETTERS[: len(given)]):
            raise DataError(f"{where}: options has the keys {list(given)}; expected A, B, C and so on")
        return [str(option).strip() for option in given.values()]
    if isinstance(given, str):
        parts = re.split(r"(?:^|\s)\(?([A-Z])(?:\)|\.(?!\d))\s*", given.strip())
        if parts[1::2] != list(LETTERS[: len(parts) // 2]) or not parts[1::2]:
            raise DataError(f"{where}: options {given!r:.80} is not of the form A) ... B) ...")
        return [option.strip() for option in parts[2::2]]
    if not isinstance(given, list) or not 2 <= len(given) <= len(LETTERS):
        raise DataError(f"{where}: options is {given!r:.80}; expected a list of 2 to {len(LETTERS)}")
    texts = [str(option) for option in given]
    marks = [MARK.match(text) for text in texts]
    if all(mark is not None and mark[1] == letter for mark, letter in zip(marks, LETTERS, strict=False)):
        texts = [text[mark.end() :] for text, mark in zip(texts, marks, strict=True) if mark is not None]
    return [text.strip() for text in texts]


def _letters(right: Any, options: list[str], where: str, key: str) -> str:
    known = LETTERS[: len(options)]
    if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(options):
        return known[right]
    if isinstance(right, list):
        right = "".join(str(letter) for letter in right)
    text = str(right).strip()
    letters = re.sub(r"[\s,、;()]+", "", text.upper())
    if letters and set(letters) <= set(known) and len(set(letters)) == len(letters):
        return "".join(sorted(letters))
    if options.count(text) == 1:
        return known[options.index(text)]
    raise DataError(f"{where}: {key} is {right!r:.80}; expected one of the {len(options)} options {known}")


def _shuffled(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    question, options = row["Question"], [row[key] for key in SHUFFLED]
    if not all(isinstance(text, str) and text.strip() for text in (question, *options)):
        raise DataError(f"{where}: Question and the four answers must be texts")
    seed = str(row.get("Record ID") or question)
    order = list(range(len(options)))
    random.Random(hashlib.sha256(seed.encode()).digest()).shuffle(order)
    shown = [options[index].strip() for index in order]
    return {"question": _asked(question.strip(), shown, REQUEST), "answer": LETTERS[order.index(0)]}


def _asked(question: str, options: list[str], request: str) -> str:
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.strip(), "", *lines, "", request])
