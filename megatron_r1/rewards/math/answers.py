r"""Are two written answers the same mathematics?

The whole answer is read, or what a sentence states as its answer: nothing in it can be passed over, so "17 or 18" is
not 18. `text.py` brings both into one spelling, `words.py` finds the answer in a sentence and takes units off,
`choices.py` knows multiple choice, `reader.py` makes a tree, `equality.py` compares trees. math-verify, which did all
this before, is what docs/answers.md compares with and why: it reads over what it does not know.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from megatron_r1.rewards.math import choices, words
from megatron_r1.rewards.math.equality import same
from megatron_r1.rewards.math.reader import read
from megatron_r1.rewards.math.text import TEXT, normalise
from megatron_r1.rewards.math.tree import Apply, Items, Node, Symbol

MAX_ANSWER_CHARACTERS = 2000
"""Longer answers are wrong without reading: no reference answer is near it."""

PERCENT_WORD = re.compile(r"\bper\s?cent(?:age)?s?\b|%|百分", re.IGNORECASE)
GIVEN_PERCENT = re.compile(r"\d[\d.,]*\s*\$?\s*(?:\\?%|per\s?cent\b)|百分之[\d一二三四五六七八九十]+", re.IGNORECASE)
SENTENCE = re.compile(r"(?<=[.?!。？！])\s+|(?<=[。？！])|\n+")
PHRASES = {
    "no solution": r"\emptyset", "no solutions": r"\emptyset", "empty set": r"\emptyset", "all real numbers": r"\R",
    "all reals": r"\R",
}  # fmt: skip
CURRENCY = re.compile("[€£¥₹₩₽฿]")
DOLLARS = re.compile(r"\\\$|\bdollars?\b|\bUSD\b|^\$[\d.,]+$")
CLOCK = re.compile(r"(?<![\d:])\d{1,2}:[0-5]\d(?![\d:])")
CLOCK_WORDS = re.compile(r"\b[ap]\.?\s*m\b\.?", re.IGNORECASE)


def answers_equal(reference: str, answer: str, question: str = "") -> bool:
    """True if `answer` means the same as `reference`. Never raises for an odd answer and never runs long.

    `question` decides two things: whether a bare number may be given as a percentage, and whether `4:30` is a ratio.
    """
    if len(answer) > MAX_ANSWER_CHARACTERS or len(reference) > 4 * MAX_ANSWER_CHARACTERS:
        return False
    try:
        return _answers_equal(reference, answer, question)
    except RecursionError:  # chains of hundreds of operators
        return False


def _answers_equal(reference: str, answer: str, question: str) -> bool:
    gold, given = _cached_normal(reference), _phrase(normalise(answer))
    if not gold or not given:
        return False
    if _other_currency(reference, answer):
        return False
    if _same_text(gold, given):
        return True
    if _is_choice(gold):
        return _same_choice(gold, given)
    labelled = choices.labelled_choice(gold)
    if labelled is not None:
        if choices.given_choice(given) is not None or r"\boxed" in given:
            return _same_labelled(labelled, given)
        return answers_equal(labelled[1], answer, question)
    compare = functools.partial(
        _same_answer, gold, asks_percent=asks_percent(question), ratio=_is_about_ratio(question)
    )
    if r"\boxed" not in given:
        if compare(given):
            return True
        if _other_unit(gold, given):
            return False
    if r"\boxed" in given or words.is_prose(given):
        if any(_same_stated(gold, stated, compare) for stated in words.stated_answers(given)):
            return True
        if words.is_prose(gold):
            return any(_same_text(gold, rest) or compare(rest) for rest in words.after_answer_lead(given))
    return False


def asks_percent(question: str) -> bool:
    """Does the question ask for a percentage? Its last sentence with a question mark, or its last one, names percent
    other than behind a number, where it is given."""
    sentences = [sentence for sentence in SENTENCE.split(question.strip()) if sentence.strip()]
    asking = [sentence for sentence in sentences if sentence.rstrip().endswith(("?", "？"))][-1:] + sentences[-1:]
    return any(PERCENT_WORD.search(GIVEN_PERCENT.sub(" ", sentence)) for sentence in asking)


def _phrase(text: str) -> str:
    return PHRASES.get(text.strip(" .").lower(), text)


def _other_currency(reference: str, answer: str) -> bool:
    """£18 is not $18."""
    first, second = (set(CURRENCY.findall(text)) for text in (reference, answer))
    if first and second:
        return not first & second
    return bool(first and DOLLARS.search(answer)) or bool(second and DOLLARS.search(reference))


def _other_unit(gold: str, given: str) -> bool:
    """Do both end in a unit, and not in the same one?"""
    first, second = words.split_unit(gold)[1], words.split_unit(given)[1]
    return bool(first and second) and not words.same_unit(first, second)


@functools.lru_cache(maxsize=4096)
def _cached_normal(reference: str) -> str:
    """A reference in one spelling; of a solution with boxes what its last box holds."""
    text = normalise(reference)
    if r"\boxed" in text:
        stated = words.stated_answers(text)
        text = stated[-1].text if stated else text
    return _phrase(text)


@functools.lru_cache(maxsize=4096)
def _tree(text: str) -> Node | None:
    return read(text)


def _same_text(gold: str, given: str) -> bool:
    """Equal up to white space; words of three letters and more also up to case."""
    if _without_spaces(gold) == _without_spaces(given):
        return True
    plain = [re.sub(r"(?<!\.)\.$", "", " ".join(TEXT.sub(r" \1 ", text).split())) for text in (gold, given)]
    if plain[0] == plain[1]:
        return True
    if plain[0].casefold() != plain[1].casefold():
        return False
    letters = re.findall(r"[A-Za-z]+", plain[0])
    shortest = 3 if any(map(str.isdigit, plain[0])) else 2  # 5 MHz is not 5 mHz
    return "\\" not in plain[0] and all(len(run) > shortest or run.lower() in words.ALWAYS_FOLDED for run in letters)


def _without_spaces(text: str) -> str:
    """Spaces between two digits, letters or a digit and a letter stay: 1 2 is not 12."""
    return re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", text)


def _same_stated(gold: str, stated: words.Stated, compare: Callable[[str], bool]) -> bool:
    """A sentence may name another unit than the reference: 3 kilometers are not 3 km here, as nothing is converted."""
    if _same_text(gold, stated.text):
        return True
    unit = words.split_unit(gold)[1]
    wanted = words.words_of(unit or gold)
    following = words.words_of(stated.after)
    if (wanted or unit) and not words.split_unit(stated.text)[1] and not words.words_of(stated.text):
        if (
            following
            and wanted
            and not (
                len(following) >= len(wanted)
                and all(map(words.same_unit, map(str.lower, wanted), map(str.lower, following)))
            )
        ):
            return False
        if following and (not wanted or (re.search(r"\bper\b|/", stated.after) and not re.search(r"\bper\b|/", gold))):
            return False
    if r"\circ" in gold and following and following[0].lower().startswith("rad"):
        return False
    return compare(stated.text)


def _is_choice(gold: str) -> bool:
    return choices.reference_choice(gold) is not None


def _same_choice(gold: str, given: str) -> bool:
    boxed = r"\boxed" in given
    texts = [stated.text for stated in words.stated_answers(given)] if boxed else [given]
    return any(choices.given_choice(text) == choices.reference_choice(gold) for text in texts)


def _same_labelled(labelled: tuple[str, str], given: str) -> bool:
    """`C`, or `C. 5` with the same text; the option's text alone is looked at elsewhere."""
    texts = [stated.text for stated in words.stated_answers(given)] if r"\boxed" in given else [given]
    for text in texts:
        if choices.given_choice(text) != labelled[0]:
            continue
        other = choices.labelled_choice(text)
        if (
            other is None
            or _same_text(labelled[1], other[1])
            or _same_answer(labelled[1], other[1], asks_percent=False, ratio=False)
        ):
            return True
    return False


def _is_about_ratio(question: str) -> bool:
    return re.search(r"\bratios?\b|比例|比值|之比|的比", question, re.IGNORECASE) is not None


def _same_answer(gold: str, given: str, *, asks_percent: bool, ratio: bool) -> bool:
    """Of two normalised texts without a sentence around them."""
    gold_core, gold_unit = words.split_unit(gold)
    given_core, given_unit = words.split_unit(given)
    if gold_unit and given_unit and not words.same_unit(gold_unit, given_unit):
        return False
    if "%" in given_core and "%" not in gold_core:
        if not asks_percent or given_core.count("%") != 1:
            return False
        given_core = given_core.replace("%", "")
    elif "%" in gold_core and "%" not in given_core and asks_percent:
        gold_core = gold_core.replace("%", "")
    if not ratio and CLOCK.search(gold_core) and CLOCK.search(given_core):
        return _same_clock(gold, given)
    if _is_one_word(gold_core) or _is_one_word(given_core):
        return _same_text(gold_core, given_core)
    if words.has_words(gold_core):
        return _same_words_and_parts(gold_core, given_core) or (
            not words.words_of(given_core) and _is_number_with_words(gold_core, given_core)
        )
    if words.has_words(given_core):
        return False  # a sentence: answers_equal looks at what it states
    tree, other = _tree(gold_core), read(given_core)
    if tree is not None and other is not None:
        if same(tree, other):
            return True
    elif words.words_of(gold_core):
        return _same_words_and_parts(gold_core, given_core)
    if bool(gold_unit) != bool(given_unit):  # a unit in letters may have been read as variables: 42 m and 42\text{ m}
        tree, other = _tree(" ".join(words.unmarked(gold).split())), read(" ".join(words.unmarked(given).split()))
        return _is_product_with_letters(tree) and _is_product_with_letters(other) and same(tree, other)  # type: ignore
    return False


def _is_number_with_words(gold: str, given: str) -> bool:
    """`5 dollars` for 5, where the words leave the number as it is."""
    tree, stated = read(given), words.number_among_words(gold)
    number = read(stated.text) if stated is not None else None
    return tree is not None and number is not None and same(number, tree)


def _is_product_with_letters(tree: Node | None) -> bool:
    return isinstance(tree, Apply) and tree.name in ("mul", "div")


def _is_one_word(text: str) -> bool:
    """A run of letters that is a word or a name, no product of variables."""
    run = text.strip("() .")
    if not run.isascii() or not run.isalpha() or len(run) < 2:
        return False
    if run.lower() in words.MATH_WORDS:
        return False
    return (
        len(run) > 3
        or run.lower() in words.FUNCTION_WORDS
        or (len(run) == 3 and any(v in "aeiou" for v in run.lower()))
    )


def _same_clock(gold: str, given: str) -> bool:
    """Times are not ratios: 4:30 is not 2:15, and before 4:30 is another time."""
    first, second = (_clock(words.unmarked(text)) for text in (gold, given))
    return first[0] == second[0] and first[2] == second[2] and (first[1] == second[1] or not first[1] or not second[1])


def _clock(text: str) -> tuple[list[str], list[str], str]:
    """(times, halves of the day, all the rest) of a text."""
    times = [time.lstrip("0") for time in CLOCK.findall(text)]
    halves = [re.sub(r"[^a-z]", "", found.lower()) for found in CLOCK_WORDS.findall(text)]
    return times, halves, re.sub(r"[\s.]", "", CLOCK_WORDS.sub("", CLOCK.sub("", text)))


def _same_words_and_parts(gold: str, given: str) -> bool:
    """The same words in the same order, and equal mathematics between them: `3 km` and `3.0 km`, not `3 m`."""
    gold, given = words.unmarked(gold), words.unmarked(given)
    plural = any(character.isdigit() for character in gold)
    runs, given_runs = (
        [word.casefold().removesuffix("s" if plural and len(word) > 3 else "") for word in words.WORD.findall(text)]
        for text in (gold, given)
    )
    if runs != given_runs:
        return False
    parts, given_parts = words.WORD.split(gold), words.WORD.split(given)
    for part, other in zip(parts, given_parts, strict=True):
        part, other = part.strip(), other.strip()
        if _same_text(part, other) if part and other else part == other:
            continue
        if not part or not other or "," in part:
            return False
        tree, given_tree = _tree(part), read(other)
        if tree is None or given_tree is None or isinstance(tree, Symbol | Items) or not same(tree, given_tree):
            return False
    return True
