"""Grading of reasoning-gym's answers: what an answer must look like before a dataset's own scorer sees it, and the
arithmetic puzzles, which are graded here.

Which datasets may grade at all is said in config/gym_tasks.py. Left out: making entries (data/tasks.py) and the
process that grades (worker.py).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from megatron_r1.config.gym_tasks import ANSWER_GRAMMARS, READ
from megatron_r1.syntax import parse

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
