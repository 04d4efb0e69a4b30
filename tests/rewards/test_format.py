"""The format reward accepts the paper's structure and nothing else."""

import pytest

from megatron_r1.rewards.format import after_thought, extract_answer, format_score

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


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>maybe <answer>18</answer>? let me", None),  # cut off
        ("<think>maybe <answer>18</answer></think> I give up", None),  # a draft
        ("<think>maybe <answer>17</answer></think><answer>18</answer>", "18"),
        ("maybe <answer>17</answer>?</think><answer>18</answer>", "18"),  # the prompt opened the thought
        ("<think>a</think><answer>18</answer><think>or <answer>17</answer>", "18"),
        ("<answer>18</answer>\nUser: and 2 + 2?\nAssistant: <answer>4</answer>", "18"),
        ("<answer>18</answer> User: and 2 + 2? Assistant: <answer>4</answer>", "18"),
        ("<answer>18</answer>\n\nQuestion 2: what is 2 + 2?\n<answer>4</answer>", "18"),
        ("<answer>18</answer><|im_start|>user\n2 + 2?<answer>4</answer>", "18"),
        ("<answer>18</answer><｜User｜>2 + 2?<answer>4</answer>", "18"),
        ("User: that was the question. <answer>18</answer>", "18"),
        (r"<think>a</think>So \boxed{18}.", None),
    ],
)
def test_neither_a_draft_nor_a_new_turn_is_the_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"<think>\boxed{17}?</think>So it is $\boxed{18}$.", "18"),
        (r"First \boxed{17}. No: \boxed{18}", "18"),
        (r"<think>maybe \boxed{18}", None),
        (r"thinking \boxed{17}</think>\n\n\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"The roots are $\boxed{3}$, $\boxed{5}$ and $\boxed{7}$.", "3, 5, 7"),
        (r"\boxed{17} or \boxed{18}", "17 or 18"),
        (r"\boxed{17}\boxed{18}", "18"),
        ("\\boxed{18}\nUser: 2 + 2?\nAssistant: \\boxed{4}", "18"),
        (r"\boxed{18", None),
        ("<think>a</think><answer>18</answer>", None),
    ],
)
def test_answer_in_the_last_box(response, answer):
    assert extract_answer(response, "boxed") == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"<think>\boxed{1}</think><answer>18</answer> \boxed{17}", "18"),
        (r"<think>a</think>\boxed{17}", "17"),
        ("<think>a</think> 17", None),
    ],
)
def test_answer_in_either_place(response, answer):
    assert extract_answer(response, "either") == answer


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("a", "a"),
        ("<think>a</think>b", "b"),
        ("<think>a", ""),
        ("a</think>b", "b"),
        ("<think>a</think>b<think>c", "b"),
        ("", ""),
    ],
)
def test_what_the_user_sees_is_not_the_thought(response, shown):
    assert after_thought(response).strip() == shown
