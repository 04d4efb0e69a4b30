"""Warm-up demonstrations: right ones are right, wrong ones are wrong in thought and answer, all have the
form."""

import re

import numpy as np
import pytest

from megatron_r1.data.tokenizer import character_tokenizer
from megatron_r1.errors import DataError
from megatron_r1.toy.demonstrations import demonstration_batch, write_demonstration
from megatron_r1.types import Problem


def addition(a, b, question="Calculate {a} + {b}."):
    turn = {"role": "user", "content": question.format(a=a, b=b)}
    return Problem(id=f"{a}+{b}", domain="sums", messages=(turn,), answer=str(a + b))


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (47, 28, "<think>7+8=15 4+2+1=7</think><answer>75</answer>"),
        (12, 30, "<think>2+0=2 1+3+0=4</think><answer>42</answer>"),
        (95, 9, "<think>5+9=14 9+0+1=10</think><answer>104</answer>"),
        (100, 5, "<think>0+5=5 0+0+0=0 1+0+0=1</think><answer>105</answer>"),
        (0, 7, "<think>0+7=7</think><answer>7</answer>"),
    ],
)
def test_without_noise_the_columns_are_right(a, b, text):
    rng = np.random.default_rng(0)
    assert write_demonstration(addition(a, b), noise=0.0, rng=rng) == text


def test_noise_is_the_share_that_forgets_its_carries():
    rng = np.random.default_rng(1)
    forgot = with_carry = 0
    for trial in range(2000):
        a, b = 10 + trial % 90, 10 + (trial * 7) % 90
        text = write_demonstration(addition(a, b), noise=0.35, rng=rng)
        thought, answer = re.fullmatch(r"<think>(.*)</think><answer>(\d+)</answer>", text).groups()
        units, tens = thought.split()
        total = int(units.split("=")[1])
        carry, result = int(tens.split("=")[0].split("+")[2]), int(tens.split("=")[1])
        assert total == a % 10 + b % 10
        assert result == a // 10 + b // 10 + carry
        assert int(answer) in (total % 10 + 10 * result, total % 10 + 10 * (result % 10))
        if total >= 10:
            with_carry += 1
            forgot += carry == 0
            assert (carry == 1) == (int(answer) == a + b)
        else:
            assert carry == 0
    assert with_carry > 500
    assert 0.29 < forgot / with_carry < 0.41  # 0.35 +- 3.7 standard errors


def test_always_forgetting_drops_every_carry():
    rng = np.random.default_rng(0)
    assert (
        write_demonstration(addition(67, 58), noise=1.0, rng=rng) == "<think>7+8=15 6+5+0=11</think><answer>15</answer>"
    )
    assert (
        write_demonstration(addition(12, 34), noise=1.0, rng=rng) == "<think>2+4=6 1+3+0=4</think><answer>46</answer>"
    )


@pytest.mark.parametrize("question", ["Calculate {a} - {b}.", "{a} + {b} + 3", "{a} + {b} and {a} + {b}", "{a} * {b}"])
def test_other_problems_are_refused(question):
    with pytest.raises(DataError, match="no sum of two whole numbers"):
        write_demonstration(addition(12, 34, question), noise=0.0, rng=np.random.default_rng(0))


def test_batch_trains_on_completions_and_weighs_to_one(tmp_path):
    tokenizer = character_tokenizer(tmp_path)
    problems = [addition(47, 28), addition(100, 5)]
    make = lambda seed: demonstration_batch(  # noqa: E731
        problems, tokenizer=tokenizer, template="plain", noise=0.5, seed=seed
    )
    batch = make([0, 1])
    prompt = "Calculate 47 + 28.\n"
    first = batch[0]
    assert tokenizer.decode(first.token_ids[~first.loss_mask]) == prompt
    assert tokenizer.decode(first.token_ids[first.loss_mask]).startswith("<think>7+8=")
    assert first.token_ids[-1] == tokenizer.eos_id and first.loss_mask[-1]
    assert first.loss_mask.sum() < 40
    assert sum(s.token_weight.sum() for s in batch) == pytest.approx(1.0)
    assert len({float(w) for s in batch for w in s.token_weight}) == 2
    same = all((x.token_ids == y.token_ids).all() for x, y in zip(batch, make([0, 1])))
    assert same
    other = [make([0, step]) for step in range(2, 8)]
    assert any(len(x[0]) != len(first) or (x[0].token_ids != first.token_ids).any() for x in other)
