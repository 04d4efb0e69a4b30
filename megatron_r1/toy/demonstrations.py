"""Demonstrations for the embedded default's warm-up: addition, written out column by column, partly wrong.

`7+8=15 4+2+1=7` are the column sums from the units upwards, each with the carry it receives, and the answer
repeats their last digits. A share of demonstrations forgets every carry, the commonest mistake, down to the
answer: the model learns the form and, mostly, the bad habit, and GRPO has to bring out the good one. Left out:
any other task; a real base model needs no warm-up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from megatron_r1.data.template import Template, render_prompt
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.types import Problem, TrainingSequence

EXPRESSION = re.compile(r"\d+(?:\.\d+)?(?:\s*[-+*/]\s*\d+(?:\.\d+)?)+")
SUM_OF_TWO = re.compile(r"(\d+) \+ (\d+)")


def write_demonstration(problem: Problem, *, noise: float, rng: np.random.Generator) -> str:
    """Completion text for a problem that adds two whole numbers; with probability `noise` it
    forgets every carry, in thought and answer alike. DataError for any other problem."""
    expressions = EXPRESSION.findall(problem.messages[-1]["content"])
    found = SUM_OF_TWO.fullmatch(expressions[0]) if len(expressions) == 1 else None
    if found is None:
        raise DataError(
            f"problem {problem.id}: {problem.messages[-1]['content']!r} is no sum of two whole numbers; "
            "demonstrations exist only for e.g. basic_arithmetic:min_terms=2,max_terms=2,operators=+,"
            "allow_parentheses=False"
        )
    left, right = found.groups()
    steps, answer = _add_by_columns(left, right, forgets_carries=rng.random() < noise)
    return f"<think>{' '.join(steps)}</think><answer>{answer}</answer>"


def demonstration_batch(
    problems: Sequence[Problem],
    *,
    tokenizer: Tokenizer,
    template: Template,
    noise: float,
    seed: Sequence[int],
) -> list[TrainingSequence]:
    """One sequence per problem, trained on the completion and its end token only.

    token_weight is 1 / (trained tokens in the batch), so the summed loss is the batch's token mean. `seed`
    (e.g. [run seed, step]) decides which demonstrations forget carries; the same call gives the same batch.
    """
    rng = np.random.default_rng(list(seed))
    pairs = []
    for problem in problems:
        text = write_demonstration(problem, noise=noise, rng=rng)
        prompt_ids = tokenizer.encode(render_prompt(problem, template, tokenizer), start=template != "chat")
        pairs.append((prompt_ids, np.append(tokenizer.encode(text), np.int32(tokenizer.eos_id))))
    num_trained = sum(len(completion) for _, completion in pairs)
    return [_to_sequence(prompt, completion, 1.0 / num_trained) for prompt, completion in pairs]


def _add_by_columns(left: str, right: str, *, forgets_carries: bool) -> tuple[list[str], str]:
    """Column sums from the units upwards, and the answer that follows from them."""
    width = max(len(left), len(right))
    columns = list(zip(reversed(left.zfill(width)), reversed(right.zfill(width))))
    steps: list[str] = []
    digits = ""
    carry = 0
    for place, (a, b) in enumerate(columns):
        total = int(a) + int(b) + carry
        steps.append(f"{a}+{b}={total}" if place == 0 else f"{a}+{b}+{carry}={total}")
        digits = str(total % 10) + digits
        carry = 0 if forgets_carries else total // 10
    return steps, str(int(str(carry) + digits))


def _to_sequence(prompt: np.ndarray, completion: np.ndarray, weight: float) -> TrainingSequence:
    token_ids = np.concatenate([prompt, completion]).astype(np.int32)
    trained = np.arange(len(token_ids)) >= len(prompt)
    return TrainingSequence(
        token_ids=token_ids,
        loss_mask=trained,
        token_weight=np.where(trained, weight, 0.0).astype(np.float32),
    )
