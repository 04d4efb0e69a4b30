"""The format reward accepts the paper's structure and nothing else."""

import pytest

from megatron_r1.rewards.format import extract_answer, format_score

GOOD = [
    "<think>a</think><answer>b</answer>",
    " <think> reasoning process here </think> <answer> answer here </answer>",
    "<think>two\nlines</think>\n\n<answer>\n5\n</answer>\n",
    "<think></think><answer></answer>",
]
BAD = [
    "",
    "5",
    "<answer>5</answer>",
    "<think>a</think>",
    "<answer>5</answer><think>a</think>",
    "Sure! <think>a</think><answer>5</answer>",
    "<think>a</think> so <answer>5</answer>",
    "<think>a</think><answer>5</answer> done",
    "<think>a</think><answer>5</answer><answer>6</answer>",
    "<think>a</think><think>b</think><answer>5</answer>",
    "<think>a <answer>4</answer></think><answer>5</answer>",
    "<think>a<answer>5</think></answer>",
    "<think>a</think><answer>5",
    "a</think><answer>5</answer>",
    "<think>a</think><answer>5</answer><pad>",
]


@pytest.mark.parametrize("response", GOOD)
def test_structure_scores_one(response):
    assert format_score(response) == 1.0


@pytest.mark.parametrize("response", BAD)
def test_any_deviation_scores_zero(response):
    assert format_score(response) == 0.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a</think><answer> 5 </answer>", "5"),
        ("<answer>4</answer> no, <answer>5</answer>", "5"),
        ("<answer>4</answer><answer>5", "4"),
        ("<answer>4</answer></answer>", "4"),
        ("<answer>4 <answer>5</answer>", "5"),
        ("<answer></answer>", ""),
        ("5", None),
        ("</answer>5<answer>", None),
    ],
)
def test_answer_is_the_last_complete_element(response, answer):
    assert extract_answer(response) == answer
