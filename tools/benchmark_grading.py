#!/usr/bin/env python3
"""How many responses a second are scored: 8,000 characters each, of a file's questions, with its own reference answers.

    python tools/benchmark_grading.py FILE.jsonl [--responses 1000] [--workers 2] [--repeats 3]

Three cases: accuracy and format; the same with 5% of the answers such that computing them would never end; the
language reward too. Every answer is different, so that none is graded once for several. Medians of the repeats, which
take turns; processor time is that of the workers and of this process.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatron_r1.config.schema import RewardConfig
from megatron_r1.data.jsonl import read_problems
from megatron_r1.rewards.compose import Scorer
from megatron_r1.rewards.wiring import scorer_for
from megatron_r1.types import Problem

CHARACTERS = 8000
ENDLESS = (
    "18!!!!",
    "10^{{10^{{10}}}}+{n}",
    "9^{{9^{{9^{{9}}}}}}-{n}",
    r"\binom{{10^9}}{{10^8}}+{n}",
    "(x+{n})^{{10^9}}",
)
"""Answers that nobody can compute; {n} makes each different."""


def responses(problems: Sequence[Problem], count: int, endless_share: float) -> list[tuple[Problem, str]]:
    """Right answers in other spellings, wrong ones (another problem's) and endless ones, in turn."""
    draw = random.Random(0)
    text = itertools.cycle(problem.messages[-1]["content"] for problem in problems)
    made = []
    for number in range(count):
        problem = dataclasses.replace(draw.choice(list(problems)), id=str(number))
        thought = ""
        while len(thought) < CHARACTERS - 60:
            thought += next(text) + " "
        answer = str(problem.answer if number % 2 else draw.choice(list(problems)).answer).strip("$")
        answer = f"The answer is ${answer}$."
        if draw.random() < endless_share:
            answer = draw.choice(ENDLESS).format(n=number)
        made.append((problem, f"<think>{thought[: CHARACTERS - 60]}</think><answer>{answer}</answer>"))
    return made


def measure(scorer: Scorer, given: Sequence[tuple[Problem, str]]) -> tuple[float, float]:
    """(seconds, seconds of processor time) to score all."""
    processes = [psutil.Process(), *psutil.Process().children()]
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    begun = time.perf_counter()
    for future in [scorer.submit(problem, response) for problem, response in given]:
        future.result()
    seconds = time.perf_counter() - begun
    return seconds, sum(sum(process.cpu_times()[:2]) for process in processes) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--responses", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    problems = [problem for problem in read_problems([arguments.file]) if problem.grader == "math"]
    plain = RewardConfig(num_workers=arguments.workers)
    cases = {
        "accuracy and format": (plain, 0.0),
        "5% endless answers": (plain, 0.05),
        "with language": (dataclasses.replace(plain, language_weight=1.0), 0.0),
    }
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in cases}
    for _ in range(arguments.repeats):
        for name, (config, share) in cases.items():
            given = responses(problems, arguments.responses, share)
            with scorer_for(config, problems) as scorer:
                scorer.check_started()
                seconds, processor = measure(scorer, given)
                found[name].append((seconds, processor, scorer.counts().timeouts))
    print("| case | responses/s | processor ms a response | time-outs |\n| --- | --- | --- | --- |")
    for name, runs in found.items():
        seconds = statistics.median(run[0] for run in runs)
        processor = statistics.median(run[1] for run in runs)
        rate, cost = arguments.responses / seconds, 1e3 * processor / arguments.responses
        print(f"| {name} | {rate:,.0f} | {cost:.2f} | {max(run[2] for run in runs)} |")


if __name__ == "__main__":
    main()
