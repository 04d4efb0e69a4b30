# ruff: noqa: E501 - a labelled case stands on one line
"""What is text and what hides none: marks that never close, fences, formulas, quotations, capitals."""

import time

import pytest

from megatron_r1.rewards.language import language_consistency
from megatron_r1.rewards.prose import is_prose, num_words, prose_of

ENGLISH = "First we add the two numbers, then we check the sum."
CHINESE = "首先我们把两个数字加起来，然后检查结果是不是偶数，最后写下答案。"
MANY = CHINESE * 20
FENCE = "`" * 3

HIDING = {
    "a stray bracket": rf"{ENGLISH} \( {MANY}",
    "a stray square bracket": rf"{ENGLISH} \[ {MANY}",
    "two stray dollars": f"{ENGLISH} $$ {MANY}",
    "an environment that never ends": rf"{ENGLISH} \begin{{align}} {MANY}",
    "a fence that never ends": f"{ENGLISH}\n{FENCE}\n{MANY}",
    "the same, line by line": f"{ENGLISH}\n{FENCE}text\n" + f"{CHINESE}\n" * 20,
    "tildes that never end": f"{ENGLISH}\n~~~\n{MANY}",
    "a closed bracket": rf"{ENGLISH} \( {MANY} \)",
    "dollars round paragraphs": f"{ENGLISH} $$ {CHINESE}\n\n{MANY} $$",
    "a closed environment": rf"{ENGLISH} \begin{{align}} {MANY} \end{{align}}",
    "a closed fence": f"{ENGLISH}\n{FENCE}\n{MANY}\n{FENCE}",
    "comments alone": f"{ENGLISH}\n{FENCE}python\n" + f"# {CHINESE}\n" * 20 + FENCE,
    "a command's argument": rf"{ENGLISH} \text{{{MANY}}}",
    "many commands": ENGLISH + rf" \text{{{CHINESE}}}" * 20,
    "inline code": f"{ENGLISH} `{MANY}`",
    "many pieces of inline code": ENGLISH + f" `{CHINESE}`" * 20,
    "many quotations": ENGLISH + f' "{CHINESE}"' * 20,
    "block quotes": ENGLISH + f"\n> {CHINESE}" * 20,
    "calls": ENGLISH + f" f({CHINESE})" * 20,
    "many formulas": ENGLISH + f" ${CHINESE}$" * 20,
    "a formula, then a stray bracket": rf"{ENGLISH} \( x \) {MANY} \(",
    "between invisible characters": ENGLISH + " " + "\u200b".join(MANY),
}


@pytest.mark.parametrize("thought", HIDING.values(), ids=HIDING)
def test_nothing_hides_twenty_sentences_behind_one(thought):
    """11 of about 300 words are English."""
    assert language_consistency(f"<think>{thought}</think><answer>1</answer>", "en") < 0.05


@pytest.mark.parametrize(
    "thought",
    [
        rf"{ENGLISH} So \( x = {{}} y \) and $$ x + y = 3 $$ and \[ x = \frac{{1}}{{2}} \] hold.",
        rf"{ENGLISH} \begin{{align}} \text{{若}} x &= 3 \\ y &= 4 \end{{align}}",
        f"{ENGLISH} It says “{CHINESE[:12]}”, so we add.",
        f"{ENGLISH}\n{FENCE}python\ndef f(x):\n    # 返回两个数字的和\n    return x + 1\n{FENCE}\nSo it is right.",
        f"{ENGLISH}\n{FENCE}\ntotal = sum(values)\nfor value in values:\n    print(value)",
        f"{ENGLISH} This costs $5 and that costs $6, so it is $11 for them.",
        rf"{ENGLISH} The set \( is open.",
    ],
)
def test_what_has_no_language_still_does_not_count(thought):
    assert language_consistency(f"<think>{thought}</think><answer>1</answer>", "en") == 1.0


def test_a_quoted_problem_before_a_short_thought_does_not_count():
    problem = "Let x be a real number such that x squared plus one equals five, and find all possible values of x."
    assert language_consistency(f"<think>题目是：“{problem}”{CHINESE}</think>", "zh") == 1.0
    formulas = r"\[ \text{Area} = \text{length} \times \text{width} \]" * 9
    assert language_consistency(f"<think>{CHINESE}{formulas}</think>", "zh") == 1.0
    assert language_consistency(f"<think>{CHINESE}{formulas * 2}</think>", "zh") < 0.5


@pytest.mark.parametrize(
    ("block", "prose"),
    [
        (MANY, True),
        (ENGLISH * 5, True),
        ("1. Add the numbers.\n2. Check whether the sum is even.\n3. Write it down.", True),
        (r"Since \(x = 3\) and \(y = f(x)\), we have \[ y = \frac{x}{2} \] and so the answer is the smaller one.", True),
        ("def add(first, second):\n    return first + second  # the sum of both", False),
        ("for (int i = 0; i < n; i++) {\n  total += values[i];\n}", False),
        ('{"name": "Anna", "age": 3}', False),
        ("x = 3\ny = 4\nprint(x + y)", False),
        ("", False),
    ],
)  # fmt: skip
def test_prose_is_told_from_code(block, prose):
    assert is_prose(block) is prose


@pytest.mark.parametrize(
    ("thought", "language", "share"),
    [
        ("Yes", "en", 1.0),
        ("Yes.", "en", 1.0),
        ("OK.", "en", 1.0),
        ("Okay", "en", 1.0),
        ("No.", "en", 1.0),
        ("YES!", "en", 1.0),
        ("I see.", "en", 1.0),
        ("Done.", "en", 1.0),
        ("Nein.", "de", 1.0),
        ("Oui.", "fr", 1.0),
        ("是的。", "zh", 1.0),
        ("好", "zh", 1.0),
        ("Да.", "ru", 1.0),
        ("OK.", "zh", 0.0),
        ("是的。", "en", 0.0),
        ("Да.", "en", 0.0),
        ("THE SUM OF THE TWO NUMBERS IS EVEN, SO WE ARE DONE.", "en", 1.0),
        ("DIE SUMME DER BEIDEN ZAHLEN IST GERADE, ALSO SIND WIR FERTIG.", "en", 0.0),
        ("DIE SUMME DER BEIDEN ZAHLEN IST GERADE, ALSO SIND WIR FERTIG.", "de", 1.0),
        ("СУММА ДВУХ ЧИСЕЛ ЧЁТНАЯ, ЗНАЧИТ МЫ ЗАКОНЧИЛИ.", "ru", 1.0),
        ("In the triangles ABC, DEF and GHI the sides AB, DE, GH are equal.", "en", 1.0),
    ],
)
def test_short_texts_and_texts_in_capitals(thought, language, share):
    assert language_consistency(f"<think>{thought}</think><answer>1</answer>", language) == share


def test_a_stray_mark_is_a_mark():
    assert "stays" in prose_of(r"This \( stays") and "stays" in prose_of("This $$ stays")
    assert "goes" not in prose_of(r"This \( goes \) away") and "goes" not in prose_of("So $$ goes $$ away")
    assert "stays" in prose_of("This $$ stays\n\nas TeX has it $$ here")


def test_words_are_counted_as_the_reward_counts_them():
    assert num_words("a three-word it's 苹果树") == 2 + 1.5


HOSTILE = {
    "brackets": r"\(", "brackets with a far end": "\\( \n\n", "backticks": "`x", "dollars": "$$ ", "fences": FENCE,
    "quotes": '"a', "braces": r"\a{", "capitals": "AB ", "sentences in capitals": "HELLO THERE FRIEND ", "calls": "a(",
    "calls with an argument": "f(x) ", "thoughts": "<think>", "ends of thoughts": "</think>", "han": "中", "clauses": "中，",
    "dots": "a.", "addresses": "a@", "paths": "/a", "hyphens": "a-", "arguments": r"\text{中中}", "formulas": r"\(x\) ",
    "words": "hello there ", "code": f"{FENCE}\nx = f(y)\n{FENCE}\n", "open formulas": "$x ", "numbers": "12 ",
    "underscores": "a_", "camels": "aB", "quotations": '"hello there" ',
}  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
def test_200k_characters_take_a_part_of_the_time_limit(piece):
    """A tenth of rewards.timeout_seconds = 5 is what an undisturbed machine needs at most; here is room for others."""
    thought = f"<think>{(piece * 200_000)[:200_000]}</think>"
    begun = time.process_time()
    assert 0.0 <= language_consistency(thought, "en") <= 1.0
    assert time.process_time() - begun < 1.5


def test_many_environments_take_no_long():
    thought = "".join(rf"\begin{{a{number}}}" for number in range(15_000))
    begun = time.process_time()
    assert language_consistency(f"<think>{thought}</think>", "en") == 0.0
    assert time.process_time() - begun < 1.5
