"""How a judge's answer is read: what is a verdict or a pair of scores, and what is none."""

import time

import pytest

from megatron_r1.rewards.verdicts import parse_scores, parse_verdict

VERDICTS = [
    ("Verdict: correct", True),
    ("**Verdict:** Incorrect.", False),
    ("Verdict: correct, no: verdict: incorrect", False),
    ("<think>Verdict: correct</think> I cannot tell", None),
    ("It is correct.", None),
    ("", None),
    ("It says 18. Verdict: correct", True),
    ("The verdict is incorrect.", False),
    ("The verdict is correct.", True),
    ('The response claims "Verdict: correct". It is wrong.', None),
    ("claims “Verdict: correct”. It is wrong.", None),
    ("Verdict: correct? No.", None),
    ("<think>hm, Verdict: correct", None),
    ("a</think>b <think>Verdict: correct", None),
    ("Verdict: correct? No. Verdict: incorrect", False),
    ("Verdict: correct\nWait. Verdict: correct?", None),
    ("## Verdict\n\nCorrect", True),
    ("Verdict: **incorrect**", False),
    ("VERDICT: CORRECT", True),
    ("Verdict：correct", True),
    ("Verdict = correct", True),
    ("Verdict - incorrect", False),
    ("Verdict: not correct", False),
    ("The verdict is not correct.", False),
    ("The verdict isn't correct.", False),
    ("Verdict: partially correct", None),
    ("Verdict: correct or incorrect", None),
    ("Verdict: correct/incorrect", None),
    ('"Verdict: correct"', True),
    ("`Verdict: incorrect`", False),
    ("> Verdict: correct", None),
    ("Verdict: correct, because it equals 18.", True),
    ("Verdict: correct (same value)", True),
    ("Verdict: correct. The answer is 18.", True),
    ("Verdict: correct, but the unit is wrong", None),
    ("Verdict: correctly done", None),
    ('{"verdict": "correct"}', True),
    ("Verdict: \\boxed{correct}", True),
    ("Final verdict: incorrect", False),
    ("Is the verdict correct?", None),
    ("The verdict would be correct if it were 18.", None),
    ('Verdict: incorrect. The response says "Verdict: correct".', False),
    ('I will end with "Verdict: correct" or "Verdict: incorrect".', None),
    ("Verdict correct", True),
    ("Verdict: the answer is correct.", True),
    ("Verdict: it is not correct", False),
    ("verdict: INCORRECT!", False),
    ("Verdict: correct\n\nThe response 'Verdict: incorrect' is quoted.", True),
    ("Verdict: not incorrect", None),
    ("It is not true that the verdict is correct.", None),
    ("I doubt that the verdict is correct.", None),
    ("The response says that the verdict is correct.", None),
    ("If the sign is left out, verdict: correct", None),
    ("It doesn't state a unit. Verdict: correct", True),
    ("My verdict: the answer is incorrect, since 17 is not 18.", False),
    ("Verdict: mostly correct", None),
    ("Verdict: correct except for the sign", None),
    ("Verdict: neither correct nor incorrect", None),
    ("Verdict: CORRECT \u2705", True),
    ("Verdict: [correct]", True),
    ("Verdict: <incorrect>", False),
    ("Verdict \u2014 **Incorrect**: it says 17", False),
    ("Verdict: `correct`", True),
]
SCORES = [
    ("Scores: A=7 B=4", (7, 4)),
    ("Score: A: 7.5, B: 10", (7.5, 10)),
    ("Scores: A=1 B=1 ... Scores: A=2 B=3", (2, 3)),
    ("Scores: A=0 B=4", None),
    ("Scores: A=7 B=11", None),
    ("A is better", None),
    ("Scores: A=8/10 B=7/10", (8, 7)),
    ("A=8 and B=7", (8, 7)),
    ("A: 8, B: 7", (8, 7)),
    ("**Scores:** **A**=8 **B**=7", (8, 7)),
    ("Scores: **A=8** **B=7**", (8, 7)),
    ("Scores: B=7 A=8", (8, 7)),
    ("Score A: 8\nScore B: 7", (8, 7)),
    ("Response A: 8/10\nResponse B: 7/10", (8, 7)),
    ("Scores: A = 8, B = 7.", (8, 7)),
    ("Scores: A=8/5 B=7/5", None),
    ("Scores: A=7-8 B=6", None),
    ("Scores: A=-3 B=4", None),
    ("Scores: A=80 B=70", None),
    ("<think>Scores: A=8 B=7", None),
    ("<think>Scores: A=8 B=7</think>no", None),
    ('It says "Scores: A=10 B=1". That is no score.', None),
    ('"Scores: A=8 B=7"', (8, 7)),
    ("Scores：A＝8 B＝7", (8, 7)),
    ("Scores: A=8; B=7", (8, 7)),
    ("Scores: A=8 and B=7", (8, 7)),
    ("Scores: A=8 out of 10, B=7 out of 10", (8, 7)),
    ("with A=3 and B=4 the sum is 7", None),
    ("Scores: A=8 B=7?", None),
    ("Scores: A=8 A=7", None),
    ("| A | 8 |", None),
    ("Scores: A=8.5/10, B=6.25/10", (8.5, 6.25)),
    ("A's score: 8, B's score: 7", (8, 7)),
    ("Scores: A=10 B=10", (10, 10)),
    ("Scores: A=8% B=7%", None),
    ("> Scores: A=8 B=7", None),
    ("Scores:\nA=8\nB=7", (8, 7)),
    ("Scores: A=8,B=7", (8, 7)),
    ("- A: 8\n- B: 7", (8, 7)),
    ("Scores: A=1e3 B=7", None),
]


@pytest.mark.parametrize(("text", "verdict"), VERDICTS, ids=[case[0][:60] for case in VERDICTS])
def test_verdicts_are_read_or_refused(text, verdict):
    assert parse_verdict(text) is verdict


@pytest.mark.parametrize(("text", "scores"), SCORES, ids=[case[0][:60] for case in SCORES])
def test_scores_are_read_or_refused(text, scores):
    assert parse_scores(text) == scores


LONG = ("verdict: ", "A=8 ", "scores: A", "'a ", "verdict is not ", "verdict: correct not ", "A: 8\n", '"')


@pytest.mark.parametrize("piece", LONG)
def test_long_answers_are_read_in_time(piece):
    text = (piece * 100_000)[:100_000]
    begun = time.process_time()
    assert parse_verdict(text) is None and parse_scores(text) is None
    assert time.process_time() - begun < 4.0
