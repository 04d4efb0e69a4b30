# ruff: noqa: E501 - a labelled case stands on one line
"""The language-consistency reward on labelled thoughts: the share of words in the language that was asked for.

Each case states the share that a reader would give; `exact` cases must come out so, the others within 0.15 (where a
foreign clause begins is a word or two of judgement).
"""

import pytest

from megatron_r1.config.languages import LANGUAGES
from megatron_r1.rewards.detector import DETECTOR, LOOKS
from megatron_r1.rewards.language import count_words, language_consistency

ENGLISH = "First we add the two numbers, then we check whether the result is even, and finally we write it down."
CHINESE = "首先我们把两个数字加起来，然后检查结果是不是偶数，最后写下答案。"
GERMAN = "Zunächst addieren wir die beiden Zahlen, dann prüfen wir, ob das Ergebnis gerade ist, und schreiben es auf."
FRENCH = "D'abord on additionne les deux nombres, puis on vérifie si le résultat est pair, et on écrit la réponse."
SPANISH = "Primero sumamos los dos números, luego comprobamos si el resultado es par, y al final lo escribimos."
RUSSIAN = "Сначала мы складываем два числа, потом проверяем, чётный ли результат, и записываем ответ."
JAPANESE = "まず二つの数を足して、次に結果が偶数かどうかを確かめて、最後に答えを書きます。"
KOREAN = "먼저 두 수를 더하고, 그 다음 결과가 짝수인지 확인하고, 마지막으로 답을 적습니다."
PINYIN = "wo men xian ba liang ge shu zi jia qi lai, ran hou kan yi kan jie guo shi bu shi ou shu"
ROMAJI = "mazu futatsu no kazu wo tashite, tsugi ni kekka ga guusuu ka dou ka wo tashikamemasu"
TRANSLIT = "snachala my skladyvaem dva chisla, potom proveryaem, chyotnyj li rezultat, i zapisyvaem otvet"
CODE = "```python\ndef add(first, second):\n    return first + second  # the sum of both\n```"

EXACT = [
    ("english", ENGLISH, "en", 1.0),
    ("english asked chinese", ENGLISH, "zh", 0.0),
    ("chinese", CHINESE, "zh", 1.0),
    ("chinese asked english", CHINESE, "en", 0.0),
    ("german", GERMAN, "de", 1.0),
    ("german asked english", GERMAN, "en", 0.0),
    ("french", FRENCH, "fr", 1.0),
    ("french asked english", FRENCH, "en", 0.0),
    ("spanish", SPANISH, "es", 1.0),
    ("spanish asked english", SPANISH, "en", 0.0),
    ("russian", RUSSIAN, "ru", 1.0),
    ("russian asked english", RUSSIAN, "en", 0.0),
    ("japanese", JAPANESE, "ja", 1.0),
    ("japanese is not chinese", JAPANESE, "zh", 0.0),
    ("chinese is not japanese", CHINESE, "ja", 0.0),
    ("korean", KOREAN, "ko", 1.0),
    ("korean asked english", KOREAN, "en", 0.0),
    ("korean asked chinese", KOREAN, "zh", 0.0),
    ("pinyin is not english", PINYIN, "en", 0.0),
    ("pinyin is not chinese script", PINYIN, "zh", 0.0),
    ("romaji is not english", ROMAJI, "en", 0.0),
    ("romanised russian is not english", TRANSLIT, "en", 0.0),
    ("english around code", f"{ENGLISH}\n{CODE}\nSo the program is right.", "en", 1.0),
    ("chinese around english code", f"{CHINESE}\n{CODE}\n所以程序是对的。", "zh", 1.0),
    ("chinese around inline code", "我们调用 `sort the list` 函数，然后返回结果。", "zh", 1.0),
    ("chinese with identifiers", "变量 total_sum 和 nextIndex 的初始值都是零，循环到 len(values) 为止。", "zh", 1.0),
    ("chinese with latex", r"设 $x = \text{the first number}$，那么 \(2x + 1 = 7\)，所以 \[ x = 3 \] 成立。", "zh", 1.0),
    ("chinese with a latex environment", "于是 \\begin{align} \\text{sum of all} &= 3 \\end{align} 得到结果。", "zh", 1.0),
    ("english with latex", r"Let $n$ be even, so that \frac{n}{2} is a whole number and we are done here.", "en", 1.0),
    ("chinese with numbers and units", "小明买了 3 kg 苹果和 2.5 km 的绳子，一共花了 12 元。", "zh", 1.0),
    ("chinese with a foreign name", "小红和 Alice 一起去了 Berlin，然后他们买了三本书。", "zh", 1.0),
    ("english with foreign names", "Then Xiaoming gives Johann two apples, and so he keeps three of them.", "en", 1.0),
    ("names in a row", "After that, Ivan Petrovich Sidorov and Kenji Watanabe share the rest with them.", "en", 1.0),
    ("chinese with an acronym", "用 GCD 和 LCM 的关系，可以很快求出结果。", "zh", 1.0),
    ("chinese with functions", "因为 sin 和 cos 的平方和是一，所以 max 是一。", "zh", 1.0),
    ("english with one chinese quote", "The word “苹果” means apple, so the answer must be about fruit.", "en", 1.0),
    ("chinese with one english quote", "题目说 \"the sum of two numbers\"，也就是两个数的和。", "zh", 1.0),
    ("english with a german quote", "The proverb 'Aller Anfang ist schwer' says that every start is hard.", "en", 1.0),
    ("chinese with corner quotes", "这里的「number of ways」指的是方法的数量。", "zh", 1.0),
    ("a block quote", "We read the statement again:\n> Berechne die Summe der Zahlen\nand so we add them up.", "en", 1.0),
    ("an apostrophe is no quote", "It's clear that we don't need the other numbers, and that's what they're asking.", "en", 1.0),
    ("web addresses", "见 https://example.com/the/long/english/path 的说明，结果相同。", "zh", 1.0),
    ("file paths", "文件在 /usr/share/common/words 里面，我们读取它。", "zh", 1.0),
    ("a short exclamation", "Wait. Hmm, let me think. OK, so x is even. Yes.", "en", 1.0),
    ("one word", "Therefore", "en", 1.0),
    ("single letters are variables", "设 a、b、c 为三个整数，那么 a 加 b 大于 c。", "zh", 1.0),
    ("only numbers", "12 + 34 = 46", "en", 0.0),
    ("nothing", "", "en", 0.0),
    ("only code", CODE, "en", 0.0),
    ("everything hidden in a fence", f"```\n{ENGLISH}\n```", "en", 0.0),
    ("everything hidden in an open fence", f"```\n{ENGLISH}", "en", 0.0),
    ("list of steps", "1. Add the numbers.\n2. Check the sum.\n3. Write down the answer.", "en", 1.0),
    ("english with greek letters", "The angle α is twice the angle β, so that the third one must be right.", "en", 1.0),
    ("traditional chinese", "首先我們把兩個數字加起來，然後檢查結果是不是偶數。", "zh", 1.0),
    ("full-width punctuation", "答案是：三十二（整数）；因此，选择第二个。", "zh", 1.0),
]  # fmt: skip

NEAR = [
    ("half and half", f"{ENGLISH}\n\n{CHINESE}", "en", 0.57),
    ("half and half, the other", f"{ENGLISH}\n\n{CHINESE}", "zh", 0.43),
    ("english then german", f"{ENGLISH} {GERMAN}", "en", 0.53),
    ("german then english", f"{GERMAN} {ENGLISH}", "de", 0.47),
    ("an english clause in chinese", "我们先算总数，then we subtract the remaining part，最后得到答案是七。", "zh", 0.6),
    ("a chinese clause in english", "So we first compute the total，然后减去剩下的部分，and get seven.", "en", 0.6),
    ("a french clause in english", "The answer is then found by la méthode des moindres carrés ordinaires de tous les points.", "en", 0.37),
    ("single english words in chinese", "这个 function 会 return 一个 value，然后 continue 下一步。", "zh", 0.6),
    ("a long quotation counts", '"' + CHINESE * 5 + '" ' + ENGLISH, "en", 0.2),
    ("pinyin within english", f"{ENGLISH} {PINYIN}", "en", 0.47),
    ("english with one german sentence", f"{ENGLISH} {ENGLISH} Das Ergebnis ist also gerade und wir sind fertig.", "en", 0.81),
    ("romaji within japanese", f"{JAPANESE} {ROMAJI}", "ja", 0.55),
]  # fmt: skip


@pytest.mark.parametrize(("text", "language", "share"), [case[1:] for case in EXACT], ids=[case[0] for case in EXACT])
def test_the_share_is_exact(text, language, share):
    assert language_consistency(f"<think>{text}</think><answer>46</answer>", language) == share, count_words(
        text, language
    )


@pytest.mark.parametrize(("text", "language", "share"), [case[1:] for case in NEAR], ids=[case[0] for case in NEAR])
def test_the_share_is_near_what_a_reader_says(text, language, share):
    found = language_consistency(f"<think>{text}</think><answer>46</answer>", language)
    assert found == pytest.approx(share, abs=0.15), count_words(text, language)


def test_only_the_thought_counts():
    assert language_consistency(f"<think>{CHINESE}</think><answer>{ENGLISH}</answer>", "zh") == 1.0
    assert language_consistency(f"{ENGLISH}<think>{CHINESE}", "zh") == 1.0  # never closed: to the end
    assert language_consistency(ENGLISH, "en") == 1.0  # no thought: the whole response


@pytest.mark.parametrize(
    ("response", "share"),
    [
        (f"<think>{ENGLISH}</think> <think>{CHINESE * 20}</think><answer>1</answer>", 0.06),
        (f"<think>{ENGLISH}</think><answer>1</answer><think>{CHINESE * 20}", 0.06),
        (f"<think>{ENGLISH}<think>{ENGLISH}</think>{CHINESE * 20}</think><answer>1</answer>", 0.11),
        (f"{CHINESE}</think>{ENGLISH}", 0.0),  # a template has opened the thought
        (f"{ENGLISH}</think>{CHINESE}", 1.0),
        (f"<think></think>{ENGLISH}", 0.0),
    ],
)
def test_every_thought_counts(response, share):
    assert language_consistency(response, "en") == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(
    ("name", "text"), [("zh-CN", CHINESE), ("EN", ENGLISH), ("German", GERMAN), ("chinese", CHINESE)]
)
def test_a_language_may_be_written_as_people_do(name, text):
    assert language_consistency(text, name) == 1.0


def test_every_language_has_a_place_in_the_table():
    kept = set(DETECTOR.labels) - {"grc", "hbo", "wuu", "yue", "zxx"}  # of one script with another, or no language
    assert kept == LANGUAGES


def test_short_paragraphs_are_judged_with_their_neighbours():
    steps = ["Wait.", "Hmm, let me see.", "So x is even.", "OK.", "Yes.", "Then we are done."]
    assert language_consistency("<think>" + "\n\n".join(steps * 5) + "</think>", "en") == 1.0


def test_one_kana_does_not_make_a_paragraph_japanese():
    assert language_consistency(f"<think>{CHINESE}这家店叫“鮮の每日”也好，我们先不管它。</think>", "zh") == 1.0


def test_a_long_text_is_looked_at_in_places_and_the_same_ones_every_time():
    clauses = [(ENGLISH, GERMAN)[number % 4 == 0] for number in range(400)]
    text = "<think>" + " ".join(clauses) + "</think>"
    full = count_words(" ".join(clauses[:16]), "en")
    share = language_consistency(text, "en")
    assert language_consistency(text, "en") == share
    assert share == pytest.approx(full[0] / sum(full), abs=3 * 0.5 / LOOKS**0.5)


def test_two_characters_are_one_word():
    assert count_words("三个苹果", "zh") == (2.0, 0.0)
    assert count_words("三个 apples 苹果", "zh") == (2.0, 1.0)


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="language 'tlh' is not known; known are"):
        language_consistency(ENGLISH, "tlh")
    assert {"en", "zh", "de", "fr", "es", "ru", "ja", "ko"} <= LANGUAGES


def test_long_and_hostile_texts_take_no_long():
    import time

    texts = ["a" * 100_000, "`" * 50_000, "$" * 50_001, '"' * 50_001, "\\begin{a}" * 5_000, "<think>" * 10_000]
    texts += [
        "中" * 100_000,
        "a b " * 25_000,
        "(" * 50_000,
        "\\a{" * 20_000,
        "Aa" * 30_000,
        "a_" * 40_000,
        ". A" * 30_000,
    ]
    for text in texts:
        begun = time.monotonic()
        assert 0.0 <= language_consistency(text, "en") <= 1.0
        assert time.monotonic() - begun < 5.0, text[:12]
