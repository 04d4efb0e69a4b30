r"""The contents of \boxed{...}, which both reference solutions and models' answers use to mark a final answer.

On the lowest floor because reading problems (data) and reading answers (rewards) both need it and may not import each
other. Left out: what a content means (rewards/math).
"""

from __future__ import annotations

import re

OPENING = re.compile(r"\\(?:boxed|fbox)\s*(\{|(?=[^\s{]))")
TOKEN = re.compile(r"\\(?:frac|sqrt|binom)(?:\{[^{}]*\}|\d){1,2}|\\[A-Za-z]+|\\.|.", re.DOTALL)
BETWEEN = re.compile(r"(?:[\s,;$.、，]|\\[()\[\]]|\\(?:quad|qquad|text\s*\{\s*(?:and|or)\s*\})|\b(?:and|or)\b|和|或)*")
ESCAPED = re.compile(r"\\.|[{}]", re.DOTALL)


def boxed_spans(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each complete, outermost \boxed{...} or \fbox{...} of `text`, in order.

    `text[start:end]` is the whole command. Braces nest, escaped ones (\{) do not count. \boxed 2 and \boxed\pi, without
    braces, hold one token as in TeX. A box that is never closed is none.
    """
    spans: list[tuple[int, int, str]] = []
    ends = _closing_braces(text)
    place = 0
    while (found := OPENING.search(text, place)) is not None:
        start = found.end()
        if not found[1]:
            token = TOKEN.match(text, start)
            assert token is not None  # OPENING looked ahead
            end = token.end()
            spans.append((found.start(), end, token[0]))
        elif (end := ends.get(start)) is None:
            place = start
            continue
        else:
            spans.append((found.start(), end, text[start : end - 1]))
        place = end
    return spans


def boxed_contents(text: str) -> list[str]:
    r"""The content of each complete, outermost \boxed{...}, in order (boxed_spans without the places)."""
    return [content for _, _, content in boxed_spans(text)]


def final_boxes(text: str) -> str | None:
    r"""What the last \boxed{...} holds, or the last few, with commas or "or" between them, where nothing else stands
    there: `1, 2` of `$\boxed{1}$ and $\boxed{2}$`. None where there is none; empty boxes do not count."""
    spans = [span for span in boxed_spans(text) if span[2].strip()]
    if not spans:
        return None
    said = spans[-1][2]
    for (_, end, content), (start, _, _) in zip(reversed(spans[:-1]), reversed(spans[1:]), strict=True):
        between = text[end:start]
        if not between.strip() or BETWEEN.fullmatch(between) is None:
            break
        said = content + (" or " if re.search(r"\bor\b|或", between) else ", ") + said
    return said.strip()


def _closing_braces(text: str) -> dict[int, int]:
    """The place behind each opening brace: the place behind the brace that closes it. In time linear in the text."""
    opened: list[int] = []
    ends: dict[int, int] = {}
    for found in ESCAPED.finditer(text):
        if found[0] == "{":
            opened.append(found.end())
        elif found[0] == "}" and opened:
            ends[opened.pop()] = found.end()
    return ends
