"""Grading of reasoning-gym's answers: what an answer must look like before a dataset's own scorer sees it, and the
arithmetic puzzles, which are graded here. The grader "reasoning_gym" is at the end.

Which datasets may grade at all is said in config/gym_tasks.py. Left out: making entries (data/tasks.py) and the
process that grades (worker.py).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from megatron_r1.config.gym_tasks import ANSWER_GRAMMARS, ARITHMETIC, READ, refusal
from megatron_r1.rewards.grader import Grader, WorkerFunction, needed
from megatron_r1.rewards.math_grader import GRADER as MATH
from megatron_r1.syntax import parse

if TYPE_CHECKING:
    from megatron_r1.config.schema import RewardConfig
    from megatron_r1.types import Problem

EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,200}")
OPERATORS = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: lambda left, right: left / right,
}


def may_be_scored(dataset: str, answer: str) -> bool:
    """May the dataset's own scorer see this answer? If not, the answer is not right."""
    grammar = ANSWER_GRAMMARS.get(dataset)
    return dataset in READ if grammar is None else grammar.fullmatch(answer) is not None


def solves_puzzle(dataset: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Does `answer` use exactly the entry's numbers, each once, and come to its target (24 for puzzle24)?"""
    found = arithmetic(answer)
    target = 24 if dataset == "puzzle24" else entry["metadata"]["target"]
    return found is not None and found[0] == target and sorted(found[1]) == sorted(entry["metadata"]["numbers"])


def arithmetic(text: str) -> tuple[Fraction, Sequence[int]] | None:
    """The exact value of an expression of + - * / and parentheses, and the integers in it; None for other text.

    Nothing is evaluated: the text is parsed and the four operations are done on fractions.
    """
    if not EXPRESSION.fullmatch(text):
        return None
    try:
        tree = parse(text.strip(), mode="eval")
        numbers: list[int] = []
        return _value(tree.body, numbers), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, numbers)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def check(problem: Problem, _: RewardConfig) -> None:
    """DataError for a problem that does not say which entry of which dataset it is."""
    for name in ("task", "arguments", "seed", "size", "index"):
        needed(problem, name)


def quick(problem: Problem, answer: str | None) -> bool | None:
    """The reference is right and no answer is wrong. Other integers may be right too, so a worker decides the rest."""
    if not answer:
        return False
    return True if problem.answer is not None and answer == problem.answer.strip() else None


def grade(answer: str, reference: str | None, metadata: Mapping[str, Any]) -> bool:
    """In the worker: the dataset's own scorer, where it is safe. It gives partial credit (117 for 17 is 0.67) and
    sometimes more than full credit to a wrong answer; only exactly 1.0 is right."""
    if (reason := refusal(metadata["task"])) is not None:
        raise ValueError(reason)
    arguments = json.dumps(metadata["arguments"], sort_keys=True)
    dataset = _dataset(metadata["task"], arguments, metadata["seed"], metadata["size"])
    entry = dataset[metadata["index"]]
    if "question" in metadata and entry["question"] != metadata["question"]:
        raise ValueError(f"{metadata['task']} entry {metadata['index']} is not the same in this process")
    if metadata["task"] in ARITHMETIC:
        return solves_puzzle(metadata["task"], answer, entry)
    return may_be_scored(metadata["task"], answer) and float(dataset.score_answer(answer, entry)) == 1.0


@lru_cache(maxsize=256)
def _dataset(task: str, arguments: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, size=size, **json.loads(arguments))


GRADER = Grader(
    name="reasoning_gym",
    check=check,
    quick=quick,
    worker=WorkerFunction(name="reasoning_gym", function="megatron_r1.rewards.gym:grade", imports=("reasoning_gym",)),
    once=True,
    votes_as=MATH,
)
