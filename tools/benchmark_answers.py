#!/usr/bin/env python3
r"""How often does the math reward err on real reference answers? False negatives: each reference in other spellings and
in the sentences that models put around an answer. False positives: each reference as the answer to every other one.

    python tools/benchmark_answers.py FILE.jsonl ... [--pairs 200000] [--math-verify] [--show 5]

Each line of a file is a problem as data.files takes it. Of two references that differ as texts some are equal as
mathematics (1/2 and 0.5): an accepted pair counts as equal where a simplification by sympy, or equal text without
LaTeX's spacing and delimiters, agrees; all others are printed and counted as false positives. `--math-verify` adds
plain math-verify, on at most 400 references and 4,000 pairs of a file, with its own limits of 5 s.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from megatron_r1.data.jsonl import read_problems
from megatron_r1.rewards.math import answers_equal
from megatron_r1.rewards.math.text import normalise
from megatron_r1.types import Problem

SENTENCES: tuple[str, ...] = (
    "{a}", "${a}$", r"\({a}\)", r"\boxed{{{a}}}", r"$\boxed{{{a}}}$", "The answer is ${a}$.",
    "The final answer is {a}.",
    r"Therefore, the final answer is $\boxed{{{a}}}$.", r"Thus the answer is \[\boxed{{{a}}}\]", "**Answer:** ${a}$",
    "Answer: {a}", r"So we get the result: \boxed{{{a}}}.", "答案是${a}$。", "Hence, the answer is: **{a}**.",
    r"After simplifying the expression in step 2, the value we are looking for is \(\boxed{{{a}}}\).",
)  # fmt: skip
NAMED = re.compile(r"^[A-Za-z](?:_\w|\([A-Za-z]\s*\))?\s*=(?=[^=]*$)")
"""`x = 5` and `f(x) = 5` answer what 5 answers."""
MATH_VERIFY_REFERENCES, MATH_VERIFY_PAIRS = 400, 4000


def _spaced(text: str) -> str:
    return re.sub(r"(?<=[0-9a-zA-Z)}])([+=<>])(?=[0-9a-zA-Z(\\])", r" \1 ", text)


def _thousands(text: str) -> str:
    return f"{int(text):,}" if re.fullmatch(r"[1-9]\d{3,}", text) else text


FORMS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("dfrac", lambda text: text.replace(r"\frac", r"\dfrac")),
    ("spaces", _spaced),
    (
        "sized brackets",
        lambda text: text.replace("(", r"\left(").replace(")", r"\right)") if r"\left" not in text else text,
    ),
    ("thin space", lambda text: text.replace(",", r",\,") if not re.search(r"\d,\d{3}", text) else text),
    ("unicode minus", lambda text: text.replace("-", "\u2212")),
    ("unicode", lambda text: re.sub(r"\\pi(?![A-Za-z])", "π", re.sub(r"\\infty(?![A-Za-z])", "∞", text))),
    ("full width", lambda text: "".join(chr(ord(c) + 0xFEE0) for c in text) if re.fullmatch(r"\d+", text) else text),
    ("thousands", _thousands),
    ("decimal point", lambda text: text + ".0" if re.fullmatch(r"-?\d+", text) else text),
    ("named", lambda text: f"x = {text}" if re.fullmatch(r"-?\d+(\.\d+)?", text) else text),
    ("unit", lambda text: text + r"\text{ cm}" if re.fullmatch(r"-?\d+(\.\d+)?", text) else text),
)


def ours(reference: str, answer: str, question: str) -> bool:
    return answers_equal(reference, answer, question)


def plain_math_verify(reference: str, answer: str, question: str) -> bool:
    """math-verify as its README shows it; a reference gets delimiters where it has none."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    gold = reference if "$" in reference or r"\boxed" in reference else f"${reference}$"
    return bool(verify(parse(gold), parse(answer)))


def variants(reference: str) -> list[tuple[str, str]]:
    """(name, answer) of every way in which the reference is written, without repetitions."""
    bare = re.sub(r"^\$([^$]*)\$$", r"\1", reference.strip().rstrip("."))
    found = {sentence.format(a=bare): f"sentence {sentence}" for sentence in SENTENCES}
    for name, change in FORMS:
        if (changed := change(bare)) != bare:
            found.setdefault(changed, name)
    return [(name, answer) for answer, name in found.items()]


def refused(job: tuple[Callable[[str, str, str], bool], Sequence[Problem]]) -> list[tuple[str, str, str]]:
    """(form, reference, answer) of what is right and refused."""
    grade, problems = job
    return [
        (name, str(problem.answer), answer)
        for problem in problems
        for name, answer in variants(str(problem.answer))
        if not grade(str(problem.answer), answer, problem.messages[-1]["content"])
    ]


def accepted(job: tuple[Callable[[str, str, str], bool], Sequence[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Pairs of different references of which one is taken for the other."""
    grade, pairs = job
    return [pair for pair in pairs if grade(pair[0], pair[1], "")]


def really_equal(pair: tuple[str, str]) -> bool:
    """By another judge than the one that is measured: texts without spacing, else sympy."""
    from math_verify import parse
    from sympy import simplify

    logging.disable(logging.CRITICAL)
    plain = [re.sub(r"\s", "", NAMED.sub("", normalise(text))) for text in pair]
    if plain[0] == plain[1]:
        return True
    try:
        first, second = (parse(f"${text.strip('$')}$")[0] for text in pair)
        return first == second or simplify(first - second) == 0
    except Exception:  # a judge that cannot read the pair does not agree
        return False


def chosen_pairs(references: Sequence[str], most: int, seed: int = 0) -> list[tuple[str, str]]:
    """All ordered pairs of different texts, or `most` of them drawn without replacement."""
    distinct = sorted(set(references))
    total = len(distinct) * (len(distinct) - 1)
    if total <= most:
        return list(itertools.permutations(distinct, 2))
    numbers = random.Random(seed).sample(range(total), most)
    rows = [divmod(number, len(distinct) - 1) for number in numbers]
    return [(distinct[row], distinct[column + (column >= row)]) for row, column in rows]


def spread(pool: ProcessPoolExecutor, work: Callable, grade: Callable, items: Sequence) -> list:
    size = max(1, len(items) // 16)
    jobs = [(grade, items[start : start + size]) for start in range(0, len(items), size)]
    return [found for part in pool.map(work, jobs) for found in part]


def measure(path: Path, arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, str]:
    problems = [problem for problem in read_problems([path]) if problem.grader == "math"]
    references = [str(problem.answer) for problem in problems]
    tries = sum(len(variants(reference)) for reference in references)
    begun = time.perf_counter()
    missed = spread(pool, refused, ours, problems)
    pairs = chosen_pairs(references, arguments.pairs)
    taken = spread(pool, accepted, ours, pairs)
    wrong = [pair for pair in taken if not really_equal(pair)]
    seconds = time.perf_counter() - begun
    for form, reference, answer in missed[: arguments.show]:
        print(f"  refused ({form}): {reference!r} | {answer!r}")
    for reference, answer in wrong[: arguments.show]:
        print(f"  accepted: {reference!r} | {answer!r}")
    row = {
        "file": path.stem,
        "references": str(len(references)),
        "right answers refused": f"{len(missed)} of {tries} ({len(missed) / max(1, tries):.2%})",
        "wrong pairs accepted": f"{len(wrong)} of {len(pairs)}",
        "verdicts/s": f"{(tries + len(pairs)) / seconds:,.0f}",
    }
    if arguments.math_verify:
        row |= beside(problems, pairs, pool)
    return row


def beside(problems: Sequence[Problem], pairs: Sequence[tuple[str, str]], pool: ProcessPoolExecutor) -> dict[str, str]:
    """The same figures of plain math-verify, on a part."""
    draw = random.Random(1)
    some = draw.sample(list(problems), min(len(problems), MATH_VERIFY_REFERENCES))
    tries = sum(len(variants(str(problem.answer))) for problem in some)
    missed = spread(pool, refused, plain_math_verify, some)
    few = draw.sample(list(pairs), min(len(pairs), MATH_VERIFY_PAIRS))
    taken = [pair for pair in spread(pool, accepted, plain_math_verify, few) if not answers_equal(*pair)]
    return {
        "math-verify: refused": f"{len(missed)} of {tries} ({len(missed) / max(1, tries):.2%})",
        "math-verify alone accepts": f"{len(taken)} of {len(few)}",
    }


def table(rows: Iterable[dict[str, str]]) -> str:
    rows = list(rows)
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--pairs", type=int, default=200_000, help="pairs of different references of a file, at most")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--math-verify", action="store_true", help="plain math-verify too (minutes)")
    parser.add_argument("--show", type=int, default=0, help="errors of each kind to print")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.workers) as pool:
        rows = []
        for path in arguments.files:
            rows.append(measure(path, arguments, pool))
            print(f"{path.stem}: done", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
