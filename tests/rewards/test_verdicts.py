"""How a judge's answer is read: what is a verdict, and what is none."""

import time

import pytest

from megatron_r1.rewards.verdicts import parse_verdict

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


@pytest.mark.parametrize(("text", "verdict"), VERDICTS, ids=[case[0][:60] for case in VERDICTS])
def test_verdicts_are_read_or_refused(text, verdict):
    assert parse_verdict(text) is verdict


LONG = ("verdict: ", "'a ", "verdict is not ", "verdict: correct not ", '"')


@pytest.mark.parametrize("piece", LONG)
def test_long_answers_are_read_in_time(piece):
    text = (piece * 100_000)[:100_000]
    begun = time.process_time()
    assert parse_verdict(text) is None
    assert time.process_time() - begun < 4.0
