"""The format reward: is the response exactly the structure that the paper's template asks for?

Rule-based on purpose (paper, section 2.2.2): a learned judge can be fooled. The prompt ends where the
assistant's turn begins, so the response has to open `<think>` itself. Left out: whether the thought or the
answer is any good.
"""

from __future__ import annotations

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
STRUCTURE = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def format_score(response: str) -> float:
    """1.0 if each tag occurs exactly once, in order, with only white space outside the two elements; else
    0.0."""
    once = all(response.count(tag) == 1 for tag in TAGS)
    return float(once and STRUCTURE.fullmatch(response) is not None)


def extract_answer(response: str) -> str | None:
    """The stripped content of the last complete `<answer>...</answer>`, or None where there is none.

    Independent of the format score: accuracy and format are separate parts. A tag inside the content is never
    part of it: of nested or repeated tags the innermost pair counts.
    """
    found = ANSWER.findall(response)
    return found[-1].strip() if found else None
