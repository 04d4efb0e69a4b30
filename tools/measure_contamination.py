"""How many questions of evaluation sets are found behind a prefix, and how many unrelated texts are taken for one.

    python tools/measure_contamination.py --evaluation gsm8k.jsonl math.jsonl --unrelated mbpp.jsonl solutions.jsonl

All are jsonl files. An evaluation file's question is its `question` (or `problem`, `prompt`); of an unrelated file all
texts of a line are looked at. Each rule is measured alone: n-grams and equality ("n-grams"), and with short questions
looked for as a whole ("and short"). Nothing is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_r1.data.decontaminate import EvaluationIndex, index_turns
from megatron_r1.data.words import words_of

PREFIX, SUFFIX = "Solve the following problem. ", " Put your final answer within \\boxed{}."
QUESTION = ("question", "problem", "prompt", "Question")


def rows(path: Path) -> Iterator[dict]:
    """The objects of a jsonl file."""
    with open(path, encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def questions(path: Path) -> list[str]:
    """Of each line the question; lines without one are left out."""
    found = (next((row[key] for key in QUESTION if isinstance(row.get(key), str)), None) for row in rows(path))
    return [text for text in found if text]


def texts(value: object) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What decontamination finds, and what it takes for a find.")
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--unrelated", type=Path, nargs="*", default=[])
    parser.add_argument("--ngram", type=int, default=13)
    parser.add_argument("--show", action="store_true", help="print every unrelated text that is taken for a question")
    given = parser.parse_args(arguments)
    others = {path: [text for row in rows(path) for text in texts(row)] for path in given.unrelated}
    print("found: behind a prefix; taken: unrelated texts; each by n-grams alone, then with short questions")
    print(f"{'set':22s} {'questions':>9s} {'short':>6s} {'found':>14s} {'taken':>14s}")
    for path in given.evaluation:
        asked = questions(path)
        index = index_turns(((str(number), str(path), text) for number, text in enumerate(asked)), given.ngram)
        plain = dataclasses.replace(index, short={})
        hidden = [PREFIX + text + SUFFIX for text in asked]
        short = sum(len(words_of(text)) < given.ngram for text in asked)
        found = [sum(one.overlap(text) is not None for text in hidden) for one in (plain, index)]
        unrelated = [text for group in others.values() for text in group]
        taken = [sum(taken_for(one, text, given.show) for text in unrelated) for one in (plain, index)]
        print(
            f"{path.stem[-22:]:22s} {len(asked):9,d} {short:6,d} {found[0]:7,d} {found[1]:6,d} "
            f"{taken[0]:7,d} {taken[1]:6,d}",
            flush=True,
        )
    for path, group in others.items():
        print(f"unrelated: {path.name}, {len(group):,} texts, {sum(map(len, group)) / 1e6:.1f} million characters")
    return 0


def taken_for(index: EvaluationIndex, text: str, show: bool) -> bool:
    name = index.overlap(text)
    if name is not None and show:
        print(f"  question {name}: {text[:200]!r}")
    return name is not None


if __name__ == "__main__":
    sys.exit(main())
