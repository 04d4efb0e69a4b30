"""Parts, weights and graders of the one reward."""

import dataclasses

import pytest

from megatron_r1.config.sandbox import SandboxConfig
from megatron_r1.config.schema import RewardConfig
from megatron_r1.errors import DataError
from megatron_r1.rewards.compose import Scorer
from megatron_r1.types import Problem

CONFIG = RewardConfig(accuracy_weight=1.0, format_weight=0.5, num_workers=1, timeout_seconds=20.0)


@pytest.fixture(scope="module")
def scorer():
    with Scorer(CONFIG, [problem(), problem(grader="reasoning_gym")]) as made:
        yield made


def problem(answer="18", grader="math", metadata=None):
    return Problem(id="p", domain="d", messages=(), answer=answer, grader=grader, metadata=metadata or {})


def tagged(answer):
    return f"<think>t</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("response", "total", "parts"),
    [
        (tagged("18"), 1.5, {"accuracy": 1.0, "format": 1.0}),
        (tagged("17"), 0.5, {"accuracy": 0.0, "format": 1.0}),
        ("so <answer>18</answer>", 1.0, {"accuracy": 1.0, "format": 0.0}),
        (tagged("36/2"), 1.5, {"accuracy": 1.0, "format": 1.0}),
        (tagged(""), 0.5, {"accuracy": 0.0, "format": 1.0}),
        ("18", 0.0, {"accuracy": 0.0, "format": 0.0}),
    ],
)
def test_total_is_the_weighted_sum_of_parts(scorer, response, total, parts):
    reward = scorer.submit(problem(), response).result(60)
    assert reward.total == total
    assert reward.parts == parts


def test_obvious_answers_need_no_worker(scorer):
    before = scorer.counts().graded
    assert scorer.submit(problem(), tagged("18")).result(0).parts["accuracy"] == 1
    assert scorer.submit(problem(), tagged("1234")).result(0).parts["accuracy"] == 0
    assert scorer.submit(problem(), "no tags").result(0).parts["accuracy"] == 0
    assert scorer.counts().graded == before
    # 018 is not the canonical spelling of an integer: a worker decides.
    assert scorer.submit(problem(), tagged("018")).result(60).parts["accuracy"] == 1
    assert scorer.counts().graded == before + 1


def test_equal_answers_are_graded_once(scorer):
    before = scorer.counts().graded
    asked = dataclasses.replace(problem(), id="once")
    futures = [scorer.submit(asked, tagged(answer)) for answer in ("36/2", "36/2", " 36/2 ", "72/4")]
    assert [future.result(60).parts["accuracy"] for future in futures] == [1.0] * 4
    assert scorer.counts().graded == before + 2
    other = dataclasses.replace(problem("19"), id="q")
    assert scorer.submit(other, tagged("36/2")).result(60).parts["accuracy"] == 0.0
    assert scorer.counts().graded == before + 3


def test_answer_is_looked_for_where_the_configuration_says():
    boxed = "<think>so</think> The answer is $\\boxed{36/2}$."
    for place, response, accuracy in [
        ("answer", boxed, 0.0), ("boxed", boxed, 1.0), ("either", boxed, 1.0),
        ("answer", tagged("36/2"), 1.0), ("boxed", tagged("36/2"), 0.0), ("either", tagged("36/2"), 1.0),
    ]:  # fmt: skip
        with Scorer(dataclasses.replace(CONFIG, answer_from=place), [problem()]) as scorer:
            assert scorer.submit(problem(), response).result(60).parts["accuracy"] == accuracy, place


def test_the_question_decides_about_percent(scorer):
    asked = dataclasses.replace(problem(), messages=({"role": "user", "content": "What percent are red?"},), id="red")
    assert scorer.submit(asked, tagged("18%")).result(60).parts["accuracy"] == 1.0
    assert scorer.submit(problem(), tagged("18%")).result(60).parts["accuracy"] == 0.0


def test_instructions_are_not_followed_in_a_thought_that_was_cut_off():
    follows = {"instructions": [("punctuation:no_comma", {})]}
    config = dataclasses.replace(CONFIG, format_weight=0.0)
    asked = problem(None, "instructions", follows)
    with Scorer(config, [asked]) as scorer:
        assert scorer.submit(asked, "<think>a</think>No comma here").result(60).parts["accuracy"] == 1.0
        assert scorer.submit(asked, "<think>No comma <answer>here</answer>").result(60).parts["accuracy"] == 0.0
        assert scorer.submit(asked, "<think>No comma here").result(60).parts["accuracy"] == 0.0


def test_exact_is_string_equality(scorer):
    assert scorer.submit(problem(grader="exact"), tagged("18.0")).result(0).parts["accuracy"] == 0
    assert scorer.submit(problem(grader="exact"), tagged(" 18 ")).result(0).parts["accuracy"] == 1


def test_reasoning_gym_gives_no_partial_credit_and_takes_other_right_answers(scorer):
    import reasoning_gym

    metadata = {"task": "countdown", "arguments": {}, "seed": 3, "size": 10, "index": 0}
    entry = reasoning_gym.create_dataset("countdown", seed=3, size=10)[0]
    gym = problem(answer=entry["answer"], grader="reasoning_gym", metadata=metadata)
    other = "+".join(f"({part})" for part in [entry["metadata"]["expression"]])
    assert other != entry["answer"]
    assert scorer.submit(gym, tagged(other)).result(60).parts["accuracy"] == 1
    assert scorer.submit(gym, tagged("1+1")).result(60).parts["accuracy"] == 0
    metadata = {"task": "chain_sum", "arguments": {}, "seed": 3, "size": 10, "index": 0}
    total = reasoning_gym.create_dataset("chain_sum", seed=3, size=10)[0]["answer"]
    gym = problem(answer=total, grader="reasoning_gym", metadata=metadata)
    assert scorer.submit(gym, tagged("1" + total.lstrip("-"))).result(60).parts["accuracy"] == 0
    assert scorer.submit(gym, tagged(total + ".0")).result(60).parts["accuracy"] == 1


def test_entry_that_is_not_the_one_asked_is_an_error(scorer):
    metadata = {"task": "chain_sum", "arguments": {}, "seed": 3, "size": 10, "index": 0, "question": "other?"}
    before = scorer.counts().errors
    reward = scorer.submit(problem("7", "reasoning_gym", metadata), tagged("7.0")).result(60)
    assert reward.parts["accuracy"] == 0
    assert scorer.counts().errors == before + 1


def test_unknown_grader_is_refused(scorer):
    with pytest.raises(DataError, match="grader 'judge'"):
        scorer.submit(problem(grader="judge"), tagged("1"))
    with pytest.raises(DataError, match="needs an answer"):
        scorer.submit(problem(answer=None), tagged("1"))


def test_language_is_a_part_where_it_has_a_weight():
    english, chinese = "First we add the two numbers and write down the sum.", "首先我们把两个数字加起来。"
    respond = lambda thought: f"<think>{thought}</think><answer>36/2</answer>"  # noqa: E731
    config = RewardConfig(format_weight=0.5, language_weight=2.0, language="zh", num_workers=1, timeout_seconds=20.0)
    with Scorer(config, [problem()]) as scorer:
        own = scorer.submit(problem(), respond(chinese)).result(60)
        other = scorer.submit(problem(), respond(english)).result(60)
        named = scorer.submit(dataclasses.replace(problem(), language="en"), respond(english)).result(60)
        quick = scorer.submit(problem(), f"<think>{chinese}</think><answer>18</answer>").result(60)
    assert own.parts == {"accuracy": 1.0, "format": 1.0, "language": 1.0} and own.total == 3.5
    assert other.parts["language"] == 0.0 and other.total == 1.5
    assert named.parts["language"] == 1.0  # the problem's own language goes before the run's
    assert quick.total == 3.5  # no worker was needed for the answer


def test_a_language_that_is_not_known_is_counted_as_an_error_not_as_a_reward():
    config = RewardConfig(language_weight=1.0, language="tlh", num_workers=1, timeout_seconds=20.0)
    with Scorer(config, [problem()]) as scorer:
        reward = scorer.submit(problem(), tagged("18")).result(60)
        assert reward.parts["language"] == 0.0 and scorer.counts().errors == 1


SQUARE = {"tests": {"asserts": ["assert square(3) == 9", "assert square(-2) == 4"], "entry_point": "square"}}


@pytest.fixture(scope="module")
def code_scorer():
    config = RewardConfig(num_workers=2, sandbox=SandboxConfig(allow_unisolated=True, cpu_seconds=1, wall_seconds=20.0))
    with Scorer(config, [problem(None, "code", SQUARE)]) as made:
        yield made


@pytest.mark.parametrize(
    ("program", "accuracy"),
    [
        ("def square(x):\n    return x * x", 1.0),
        ("def square(x):\n    return x * 3", 0.0),  # passes one of two tests
        ("def square(x):\n    while True:\n        pass", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("", 0.0),
    ],
)
def test_a_program_is_right_if_it_passes_every_test(code_scorer, program, accuracy):
    reward = code_scorer.submit(problem(None, "code", SQUARE), tagged(f"\n```python\n{program}\n```\n")).result(120)
    assert reward.parts == {"accuracy": accuracy, "format": 1.0}


def test_programs_are_counted_and_no_answer_is_wrong(code_scorer):
    before = code_scorer.counts()
    assert code_scorer.submit(problem(None, "code", SQUARE), "no tags").result(60).total == 0
    endless = tagged("```python\ndef square(x):\n    while True: pass\n```")
    assert code_scorer.submit(problem(None, "code", SQUARE), endless).result(120).parts["accuracy"] == 0
    after = code_scorer.counts()
    assert (after.graded - before.graded, after.timeouts - before.timeouts) == (1, 1)


def test_tests_are_looked_at_before_the_run():
    broken = problem(None, "code", {"tests": {"asserts": ["assert 1 == 1"], "entry_point": "f"}})
    with pytest.raises(DataError, match="problem p: code tests"):
        Scorer(CONFIG, [broken])
    with Scorer(CONFIG, []) as without, pytest.raises(DataError, match="made for problems without it"):
        without.submit(problem(None, "code", SQUARE), tagged("x"))
