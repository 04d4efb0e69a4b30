r"""Words around an answer: which of them change it, which only name its unit, and which answer a sentence states.

"The answer is 18." states 18, "not 18" states nothing, "18 million" is another number. A sentence may hold other
numbers before the words that lead to its answer ("The sum of 2 and 3 is 5."); two answers that differ are none. Left
out: what an expression means (reader.py, equality.py).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_r1.boxed import boxed_spans
from megatron_r1.rewards.math.text import TEXT
from megatron_r1.rewards.math.tokens import FUNCTIONS
from megatron_r1.rewards.math.vocabulary import AFTER, BEFORE, FUNCTION_WORDS, NEGATIONS, NOUNS, UNIT_LETTERS, UNITS

WORD = re.compile(r"(?<![\\A-Za-z0-9])[A-Za-z]{2,}(?:['’][a-z]+)?")
ENVIRONMENT = re.compile(r"\\(begin|end)\{\w+\*?\}(?:\{[lcr| ]*\})?")
HAN = re.compile(r"[\u3400-\u9fff]+")
MATH_WORDS = FUNCTIONS | {"pi", "sqrt", "infty", "infinity", "or", "and", "mod"}
HARMLESS_AFTER = re.compile(r"\bleft\s+over\b|\bleftover\b|\bmore\b(?!\s+than)|\bin\s+total\b", re.IGNORECASE)
OR_MORE = re.compile(r"\bor\s+more\b|\bor\s+so\b|\bmore\s+than\b|\bover\b", re.IGNORECASE)
CHANGING_HAN = re.compile(
    "[万亿千百十半或非不负约倍折成无没错多近毛角]|分之|左右|以上|以下|以内|至少|至多|大于|小于|根号|平方|立方|倒数|相反数|最|超过|除了|零下|减少|亏损|整除"
)
HARMLESS_HAN = re.compile("不同|完成|平方(?:厘|分|千)?米|立方(?:厘|分)?米|千米|千克|成绩|角度|三角形|多少|最后|最终")

REASON = re.compile(
    r"\b(?:because|since|where|as\s+(?:desired|required))\b|[;；](?=\s*(?:the|and|so|then|but)\b)", re.IGNORECASE
)
DENIED = re.compile(
    r"\b(?:not|n['’]t)\s+(?:true|correct|the\s+case|right)\b|\b(?:false|untrue|wrong)\s+that\b", re.IGNORECASE
)
HOPE = re.compile(r"\.?\s*I hope (?:it|this) is correct\.?$", re.IGNORECASE)
LEAD = re.compile(
    r"(?:(?<![<>=!:])=(?!=)|\b(?:is|are|equals?|equal\s+to|was|be|becomes?|gives?|get|obtain|have)\b|(?<![:\d])[:：](?!\d*=)|答案|是|为|等于|得)"
    r"\s*(?:\b(?:therefore|thus|simply|just|also|exactly|equal\s+to|hence)\b\s*)*[:：]?",
    re.IGNORECASE,
)
ANSWER_LEAD = re.compile(r"(?:\banswers?\b[^.:=]{0,60}?(?:\bis\b|\bare\b|[:=])|答案\s*(?:是|为|[:：])?)", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[^\W\d_]{2})[.!?](?=\s)|(?<=[\d)}\]])[.!?](?=\s+[A-Z])|\n")
EDGE = " \t.,;:!?\"'“”()"

POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
TEXT_UNIT = r"\\text\{[^{}]*\}" + POWER
PLAIN_UNIT = rf"(?<![A-Za-z\\])(?:{'|'.join(sorted(UNITS, key=len, reverse=True))})(?![A-Za-z])" + POWER
ONE_UNIT = rf"(?:{TEXT_UNIT}|{PLAIN_UNIT})"
UNIT = re.compile(
    rf"(?P<unit>\s*{ONE_UNIT}(?:\s*(?:/|\\cdot|\\times|\*)?\s*(?:{ONE_UNIT}|(?<=/)\s*[A-Za-z](?![A-Za-z])))*"
    r"|\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:\\text\{\s*[CF]\s*\}|[CF]))\s*$"
)
CASE_OF_PREFIX = "mMpP"
COUNTED = frozenset(
    ["points", "triples", "quarters", "doubles", "squares", "cubes", "multiples", "divisors", "roots", "logs"]
)
"""Plurals of words that would change a number, where things are counted: 204 ordered triples."""

ALWAYS_FOLDED = frozenset(["am", "pm", "no", "ok"])


def words_of(text: str) -> list[str]:
    r"""The words of a text, \text{...} included, functions and connectives not."""
    return [word for word in WORD.findall(unmarked(text)) if word.lower() not in MATH_WORDS]


def unmarked(text: str) -> str:
    r"""The text with \text{...} as plain words, and without the names of environments."""
    return ENVIRONMENT.sub(r"\\\1 ", TEXT.sub(r" \1 ", text))


def is_prose(text: str) -> bool:
    """Does the text hold words of a language, not only letters that stand for quantities?"""
    if HAN.search(text):
        return True
    return any(is_word(word) for word in words_of(text)) or r"\text{" in text


def is_word(run: str) -> bool:
    return len(run) > 3 or run in NOUNS or (run.lower() in FUNCTION_WORDS and not run.isupper())


def has_words(text: str) -> bool:
    """Does the text hold words beside anything else?"""
    found = [word for word in words_of(text) if is_word(word)]
    return bool(found) and (len(found) > 1 or text.strip("() .") != found[0])


def split_unit(text: str) -> tuple[str, str]:
    """(text without its unit, unit); the unit is empty where there is none or where it changes the number."""
    found = UNIT.search(text)
    if found is None or not re.search(r"[\d}A-Za-z)\]]", text[: found.start()]):
        return text, ""
    unit = found["unit"]
    letters = re.findall(r"\\text\{\s*([A-Za-z])\s*\}", unit)
    if not set(letters) <= UNIT_LETTERS or any(map(is_word, words_of(text[: found.start()]))):
        return text, ""
    if changing(unmarked(unit), AFTER) or re.search(r"\d", re.sub(r"\^\s*\{?\s*-?\d\s*\}?", "", unit)):
        return text, ""
    if re.search(r"[=<>+\-*/^_\\]\s*$|\\(?:cdot|times|div|pm|sqrt|frac)\s*$", text[: found.start()]):
        return text, ""
    return text[: found.start()].strip(), unit


def same_unit(first: str, second: str) -> bool:
    """The same unit in another spelling of spaces and brackets, plural, or in another case where that means the
    same."""
    one, other = _unit_key(first), _unit_key(second)
    if one == other:
        return True
    if one.casefold() != other.casefold():
        return False
    return one.casefold() in ALWAYS_FOLDED or not (one[0] != other[0] and one[0] in CASE_OF_PREFIX)


def _unit_key(unit: str) -> str:
    key = re.sub(r"[\s{}^]|\\cdot|\\circ|\*", "", unmarked(unit).replace("per", "/"))
    return key.removesuffix("s") if len(key) > 3 else key


def changing(text: str, words: frozenset[str]) -> bool:
    """Does one of `words` stand in the text?"""
    given = {word.lower().replace("'", "").replace("’", "") for word in re.findall(r"[A-Za-z]+(?:['’][a-z]+)?", text)}
    singular = {word.removesuffix("s") for word in given - COUNTED}
    return bool((given - COUNTED | singular) & words) or bool(CHANGING_HAN.search(HARMLESS_HAN.sub("", text)))


class Stated(NamedTuple):
    """An answer that a sentence states, and what follows it there (perhaps its unit)."""

    text: str
    after: str = ""


def stated_answers(text: str) -> list[Stated]:
    r"""What a sentence (or several) states as its answer: no, one or, in two ways of reading it, more texts.

    `text` is normalised. \boxed{...} goes before everything else; then what follows the last "is", "are", "=" or ":";
    then the only number among words that do not change it.
    """
    boxes = boxed_spans(text)
    if boxes:
        return _boxed_answer(text, boxes)
    text = HOPE.sub("", TEXT.sub(r" \1 ", text))
    if DENIED.search(text):
        return []
    if HAN.search(text):
        text = re.sub("或者|或", " or ", re.sub(r"以及|(?<=[\d\s}])[和与及](?=[\d\s\\-])", " and ", text))
        if not is_prose(text):
            return [Stated(text)]
    stated = _explicit(text)
    if stated is None:
        return []
    found = [answer for answer in (_after_lead(text), number_among_words(text)) if answer]
    return [answer for answer in found if answer.text in stated] if stated else found


def after_answer_lead(text: str) -> list[str]:
    """All that follows "the answer is" or the like, to the end: for references that are sentences themselves."""
    return [rest for lead in ANSWER_LEAD.finditer(text) if (rest := _trimmed(text[lead.end() :].strip(" :：*")))]


def _boxed_answer(text: str, boxes: list[tuple[int, int, str]]) -> list[Stated]:
    if len({content.replace(" ", "") for _, _, content in boxes}) == 1:
        boxes = boxes[-1:]
    start, end = boxes[0][0], boxes[-1][1]
    inside = "".join(
        content + (text[box_end : boxes[place + 1][0]] if place + 1 < len(boxes) else "")
        for place, (_, box_end, content) in enumerate(boxes)
    )
    before, after = text[:start], text[end:]
    if not words_of(before) and not HAN.search(before) and not words_of(after) and not HAN.search(after):
        whole = _trimmed(before + inside + after)
        last = inside if before.rstrip().endswith("=") and not after.strip(EDGE) else None  # 9 * 2 = \boxed{18}
        return [Stated(text) for text in (whole, last) if text]
    if words_of(TEXT.sub("", inside)) and len(boxes) > 1:
        return []  # two boxes in two sentences that differ
    last = re.findall(r"[A-Za-z]+", unmarked(before))[-1:]
    if _is_negated(before) or (last and last[0].lower() in BEFORE - {"more"}) or not _is_harmless_after(after):
        return []
    if re.search(r"\d\s*(?:,|\bor\b|\band\b)?\s*$", before):
        return []  # 17 or \boxed{18}
    return [Stated((_trimmed(inside) or inside) + _unit_at_start(after), unmarked(after))]


def _unit_at_start(after: str) -> str:
    found = re.match(rf"\s*{ONE_UNIT}(?:\s*/\s*{ONE_UNIT})*|\s*%|\s*\^\s*(?:\\circ|\{{\s*\\circ\s*\}})", after)
    return found[0] if found else ""


def _is_negated(before: str) -> bool:
    """Do the last words before an answer deny it, or make it one of several?"""
    last = re.findall(r"[A-Za-z]+(?:['’][a-z]+)?", unmarked(before))[-3:]
    given = {word.lower().replace("'", "").replace("’", "") for word in last}
    han = HAN.findall(before)
    return bool(given & (NEGATIONS | {"or", "either", "maybe", "perhaps"})) or bool(han and han[-1][-1] in "不非或负约")


def _is_harmless_after(after: str) -> bool:
    """May this stand behind an answer? No numbers, and no words that change it."""
    after = unmarked(after)
    rest = re.sub(r"\^\s*\{?\s*(?:-?\d|\\circ)\s*\}?", "", after)
    if re.search(r"\d|\\[a-z]|[=<>+*/^_]", re.sub(r"(?<=[A-Za-z])/(?=[A-Za-z])", "", rest)):
        return False
    if OR_MORE.search(HARMLESS_AFTER.sub(" ", rest)):
        return False
    return not changing(HARMLESS_AFTER.sub(" ", rest), AFTER)


def _explicit(text: str) -> list[str] | None:
    """What each "answer is ..." states; [] if none does; None where two differ."""
    found = []
    for match in ANSWER_LEAD.finditer(text):
        said = SENTENCE_END.split(text[match.end() :], maxsplit=1)[0]
        core = _core(said)
        if core:
            found.append(core.text)
        elif re.search(r"\d", said):
            return None  # two numbers: which of them is it?
    if len({core.replace(" ", "") for core in found}) > 1:
        return None
    return found


def _after_lead(text: str) -> Stated | None:
    """What follows the last word that leads to an answer."""
    leads = list(LEAD.finditer(text))
    for lead in reversed(leads):
        head, rest = text[: lead.start()], text[lead.end() :]
        if not re.search(r"[\w\\]", rest) or (lead[0].startswith("=") and not _is_total(head)):
            continue
        if re.search(r"\d", head) and not words_of(head) and not HAN.search(head):
            return None  # 17 is 18
        if _is_negated(head) or re.search(r"\d\s*\b(?:or|and)\b[^\d]*$", head):
            return None
        return _core(rest)
    return None


def _is_total(head: str) -> bool:
    """Are there words before an equals sign, as in `Total = 18` and `She makes 9 * 2 = 18`, and no other equation,
    and no variables beside it, as in `the plane x + y = 0`?"""
    last = [word for word in WORD.finditer(head) if is_word(word[0])][-1:]
    return bool(last) and "=" not in head and not re.search(r"[A-Za-z]", head[last[0].end() :])


def _core(rest: str) -> Stated | None:
    """The expression at the start of what follows a lead, with harmless words behind it."""
    rest = REASON.split(rest.strip(" \t:：*").strip(), maxsplit=1)[0].strip()
    rest = re.sub(r"^(?:the|a|an)\s+(?=number\b|\d)(?:number\s+)?", "", rest, flags=re.IGNORECASE)
    if not is_prose(rest):
        text = _trimmed(rest)
        return Stated(text) if text else None
    if not re.search(r"[\d\\]", rest) and len(words_of(rest)) <= 4:  # even, Paris, the second one
        text = _trimmed(rest)
        return Stated(text) if text else None
    return number_among_words(rest)


def number_among_words(text: str) -> Stated | None:
    """The one piece of a text that holds a digit, among words that do not change it."""
    pieces = [piece for piece in _pieces(text) if re.search(r"\d", text[piece[0] : piece[1]])]
    if len(pieces) != 1:
        return None
    start, end = pieces[0]
    before, after = text[:start], text[end:]
    if changing(re.sub(r"\bmore\b", " ", before), BEFORE) or re.search(r"\bmore\s+than\b", before, re.IGNORECASE):
        return None
    if re.search(r"[-+*/^_=<>\\]\s*$", before) or not _is_harmless_after(after):
        return None
    found = _trimmed(text[start:end])
    return Stated(found, unmarked(after)) if found else None


def _pieces(text: str) -> list[tuple[int, int]]:
    """Stretches between words, letters with an operator beside them included."""
    pieces, place = [], 0
    for word in re.finditer(
        r"(?<![\\A-Za-z0-9^_{])(?:[A-Za-z]{2,}(?:['’-][A-Za-z]+)*|\ba\b(?=\s+[A-Za-z]{2}))(?:\s*\^\s*\{?\s*[23]\s*\}?)?|[\u3400-\u9fff]+",
        text,
    ):
        if word[0].lower() in MATH_WORDS - {"or", "and"}:
            continue
        pieces.append((place, word.start()))
        place = word.end()
    pieces.append((place, len(text)))
    return [(start, end) for start, end in pieces if text[start:end].strip(EDGE)]


def _trimmed(text: str) -> str | None:
    """Without punctuation at its ends; brackets stay where they are a pair."""
    text = re.sub(r"^(?:[,;:!?\s\"“”]|\.(?!\d))+|[,;:?\s\"“”]+$|(?<![.])\.$", "", text.strip())
    if text.count("(") + text.count("[") != text.count(")") + text.count("]"):
        text = text.strip("()[] ")  # half of a pair around words
    return text.strip() or None
