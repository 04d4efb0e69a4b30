r"""The contents of \boxed{...}, which both reference solutions and models' answers use to mark a final answer.

On the lowest floor because reading problems (data) and reading answers (rewards) both need it and may not import each
other. Left out: what a content means (rewards/math.py).
"""

from __future__ import annotations

import re

OPENING = re.compile(r"\\(?:boxed|fbox)\s*(\{|(?=[^\s{]))")
ESCAPED = re.compile(r"\\.|[{}]", re.DOTALL)


def boxed_spans(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each complete, outermost \boxed{...} or \fbox{...} of `text`, in order.

    `text[start:end]` is the whole command. Braces nest, escaped ones (\{) do not count. \boxed 2 and \boxed\pi, without
    braces, hold one token as in TeX. A box that is never closed is none.
    """
    spans: list[tuple[int, int, str]] = []
    place = 0
    while (found := OPENING.search(text, place)) is not None:
        start = found.end()
        if not found[1]:
            token = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL).match(text, start)
            assert token is not None  # OPENING looked ahead
            end = token.end()
            spans.append((found.start(), end, token[0]))
        elif (end := _closing_brace(text, start)) is None:
            place = start
            continue
        else:
            spans.append((found.start(), end, text[start : end - 1]))
        place = end
    return spans


def boxed_contents(text: str) -> list[str]:
    r"""The content of each complete, outermost \boxed{...}, in order (boxed_spans without the places)."""
    return [content for _, _, content in boxed_spans(text)]


def _closing_brace(text: str, start: int) -> int | None:
    """The place after the brace that closes the one before `start`; None if there is none."""
    depth = 1
    for found in ESCAPED.finditer(text, start):
        if found[0] == "{":
            depth += 1
        elif found[0] == "}":
            depth -= 1
            if not depth:
                return found.end()
    return None
