"""The program in a model's answer: which of its fenced blocks, and how that reads as Python.

Models write fences as Markdown allows and as it does not: with titles, with tildes, inside lists, without an end. The
rule: of the blocks that say Python the last complete one, else the last; else of those without a language; else of all;
else, without any fence, the whole answer. Nothing is parsed or run here. Left out: what a program may use (sandbox.py).
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

OPENING = re.compile(
    r"^(?P<indent>[ \t]*(?:(?:>|[-*+]|\d{1,3}[.)])[ \t]*)*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`\r\n]*?)[ \t]*\r?$",
    re.MULTILINE,
)
"""A fence, also behind the marks of lists and quotations. Its info may hold no backtick, as in CommonMark."""
CLOSING = re.compile(r"^[ \t>]*(?P<fence>`{3,}|~{3,})[ \t]*\r?$", re.MULTILINE)
PYTHON = re.compile(r"\{?[ \t]*\.?(?:i?python|py)[\d.]*(?![\w+#-])", re.I)
"""python, py, Python3, py3, python3.11, ipython, {.python}, and these with more behind them: title=x, :name.py."""
STRINGS = re.compile(
    r"#[^\n]*|(?P<triple>\"{3}|'{3})(?:\\.|(?!(?P=triple))[^\\])*(?P=triple)"
    r"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'",
    re.DOTALL,
)
MOST_FENCES = 100
"""In an answer with more, a fence inside a string ends the block: looking for strings takes time for each block."""
ONE_LINE = re.compile(r"\s*(`{3,})(?:[ \t]*(?:python3?|py)\b)?(?P<program>[^`]+)\1\s*", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`label` is what stands behind the fence; `complete` says that the block was closed."""

    label: str
    text: str
    complete: bool


def extract_program(answer: str) -> str:
    """The program in `answer`, dedented; the whole answer where it has no fence."""
    answer = answer.removeprefix("\ufeff")
    blocks = fenced_blocks(answer)
    if not blocks:
        inline = ONE_LINE.fullmatch(answer)
        return inline["program"].strip() if inline else answer
    named = [block for block in blocks if PYTHON.match(block.label)]
    unnamed = [block for block in blocks if not block.label]
    chosen = named or unnamed or blocks
    return ([block for block in chosen if block.complete] or chosen)[-1].text


def fenced_blocks(answer: str) -> list[Block]:
    """All fenced blocks in order, each with the text inside, without the indentation of its fence."""
    blocks: list[Block] = []
    has_strings = ('"""' in answer or "'''" in answer) and len(CLOSING.findall(answer)) <= MOST_FENCES
    place = 0
    while (opening := OPENING.search(answer, place)) is not None:
        start = min(opening.end() + 1, len(answer))
        closing = _closing(answer, start, opening["fence"], has_strings)
        text = answer[start : closing.start()] if closing else _until_fence(answer[start:], opening["fence"])
        place = closing.end() if closing else start + max(len(text), 1)
        blocks.append(
            Block(label=opening["info"].strip(), text=_dedented(text, opening["indent"]), complete=closing is not None)
        )
    return blocks


def _closing(answer: str, start: int, fence: str, has_strings: bool) -> re.Match[str] | None:
    """The line that closes a block: as many of the same marks, and not inside a string of three quotes."""
    closings = (found for found in CLOSING.finditer(answer, start) if found["fence"].startswith(fence))
    first = next(closings, None)
    if first is None or not has_strings:
        return first
    strings = [found.span() for found in STRINGS.finditer(answer, start) if found["triple"]]
    outside = (found for found in (first, *closings) if not any(begin < found.start() < end for begin, end in strings))
    return next(outside, first)


def _until_fence(text: str, fence: str) -> str:
    """Up to a fence that ends a line of the program itself (`return x```), else all."""
    found = re.search(rf"{re.escape(fence)}[ \t]*\r?$", text, re.MULTILINE)
    return text[: found.start()] if found else text


def _dedented(text: str, indent: str) -> str:
    lines = text.splitlines(keepends=True)
    if ">" in indent:
        lines = [re.sub(r"^[ \t]*>[ \t]?", "", line) for line in lines]
    width = len(indent) if ">" not in indent else 0
    lines = [line[min(width, len(line) - len(line.lstrip(" \t"))) :] for line in lines]
    return textwrap.dedent("".join(lines))
