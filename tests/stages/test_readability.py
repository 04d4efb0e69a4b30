"""Each filter on a response that breaks it alone, and on one that just does not."""

import pytest

from megatron_r1.rewards.language import language_consistency
from megatron_r1.stages.rejection.config import FilterConfig
from megatron_r1.stages.rejection.readability import prose_reason, repeated_share, structural_reason

SOUND = "<think>We add three and four, which makes seven in all.</think><answer>7</answer>"
CONFIG = FilterConfig(min_language=0.9, max_paragraph_characters=400)


def reason(thought, config=CONFIG, *, language="en", is_code=False):
    text = f"<think>{thought}</think><answer>7</answer>"
    score = language_consistency(text, language)
    return prose_reason(text, config, language_score=score, is_code=is_code)


@pytest.mark.parametrize(
    ("text", "finish_reason", "expected"),
    [
        (SOUND, "stop", None),
        (f"\n{SOUND}\n", "stop", None),
        (SOUND, "length", "truncated"),
        ("<think>We add", "length", "truncated"),
        ("It is 7.", "stop", "missing_tags"),
        ("<think>We add</think>7", "stop", "missing_tags"),
        (SOUND + SOUND, "stop", "missing_tags"),
        (f"Well. {SOUND}", "stop", "missing_tags"),
    ],
)
def test_a_whole_response_has_one_thought_and_one_answer(text, finish_reason, expected):
    assert structural_reason(text, finish_reason=finish_reason) == expected


def test_a_sound_thought_has_no_reason():
    assert reason("We add three and four, which makes seven in all.") is None


def test_mixed_languages():
    mixed = "We first look at the numbers. 然后我们把三和四加起来得到七。所以答案就是七没有别的可能。"
    assert reason(mixed) == "mixed_language"
    assert reason(mixed, FilterConfig(min_language=0.0)) is None
    assert reason("三和四加起来得到七，所以答案就是七。", language="zh") is None


def test_a_thought_without_words_is_in_no_other_language():
    assert language_consistency("<think>7+8=15 4+2+1=7</think><answer>75</answer>", "en") == 0.0
    assert reason("7+8=15 4+2+1=7") is None
    assert reason("Wir zählen die beiden Zahlen zusammen und erhalten dann sieben.") == "mixed_language"


def test_long_paragraphs():
    assert reason("We add the next number to the sum that we have. " * 10) == "long_paragraph"
    short = "\n\n".join(f"We add the number {number} to the sum." for number in range(20))
    assert reason(short) is None, "many short paragraphs"
    assert reason("We add them.\n \t\n" * 3) is None


def test_code_is_not_a_long_paragraph_but_a_code_block():
    code = "We compute it.\n```python\n" + "\n".join(f"x{i} = {i}" for i in range(100)) + "\n```\nSo it is seven."
    assert reason(code) == "code_block"
    assert reason(code, is_code=True) is None
    assert reason(code, FilterConfig(code_blocks=True, max_paragraph_characters=400)) is None
    assert reason("We compute it.\n```\nnever closed") == "code_block"
    assert reason("We use `sum` for it.") is None


def test_repeated_lines():
    config = FilterConfig(max_repeated_ngrams=1.0)
    lines = [f"The sum of the numbers up to {i} is {i * (i + 1) // 2}." for i in range(14)]
    shares = {repeats: "\n" + "\n".join(lines[:8] + lines[:repeats]) + "\n" for repeats in (0, 4, 5)}
    assert reason(shares[0], config) is None
    assert reason(shares[4], config) is None, "4 of 14 lines, those of the tags too"
    assert reason(shares[5], config) == "repetition", "5 of 15 lines"


def test_repeated_phrases_within_a_line():
    config = FilterConfig(min_language=0.0, max_paragraph_characters=0)
    loop = "wait, let us check that again from the very start of it all, "
    assert reason(loop * 20, config) == "repetition"
    assert reason(loop * 3, config) is None, "too short to tell"
    assert reason(" ".join(f"the number {i} is odd" for i in range(60)), config) is None


def test_share_of_repeats():
    assert repeated_share(["a", "b", "c"]) == 0
    assert repeated_share(["a", "a", "a", "b"]) == 0.5


def test_the_first_reason_counts():
    bad = "然后我们把三和四加起来得到七。" * 40 + "```x```"
    assert reason(bad) == "mixed_language"
    assert reason(bad, language="zh") == "long_paragraph"
