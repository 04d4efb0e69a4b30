"""The part of a text that is in some language: without code, formulas, quotations, names, numbers and addresses.

What has no language must not hide what has one. An opening mark that is never closed hides nothing (but for a fence,
which ends with the text, as in Markdown), nor does a formula that runs over a blank line, which TeX does not allow. Of
code, a formula or a quotation that is closed, more than `LONGEST_QUOTE` words of prose are text all the same; and if
all that is hidden has more than twice the words of what is not, all of it is text. Left out: which
language it is (language.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import regex

LONGEST_QUOTE = 30
"""Words. What is longer and in quotation marks, a formula or code is text, not a quotation."""

MOST_HIDDEN = 2.0
"""Words in short quotations, formulas and code, for each word outside of them: more of them are text all the same. A
problem that is quoted before a short thought is less."""

CHARACTERS_PER_WORD = 2
"""Chinese characters (and kana) that count as one word."""

CODE_MARKS = 0.3
"""A fenced block with fewer marks of code than this a word is prose (is_prose)."""

SHORTEST_QUOTE = 6
"""Characters, marks included, from which on a quoted part is looked at for words."""

LEAST_PHRASE = 4
"""Words that follow each other with nothing but spaces and punctuation between them, as they do not in code."""

WORD = regex.compile(r"[\p{Han}々〆〇]+|[\p{Hiragana}\p{Katakana}ー]+|[\p{L}\p{M}]+(?:['’-][\p{L}\p{M}]+)*")
IDEOGRAPHIC = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")

OPENING = regex.compile(r"```|~~~|\$\$|\\\[|\\\(|\\begin\{(\w{1,30}\*?)\}")
ENVIRONMENT_END = regex.compile(r"\\end\{(\w{1,30}\*?)\}")
CLOSING = {"```": "```", "~~~": "~~~", "$$": "$$", "\\[": "\\]", "\\(": "\\)"}
FENCES = ("```", "~~~")
BLANK_LINE = regex.compile(r"\n[ \t\r]*\n")

QUOTING = regex.compile(
    r"""
    `[^`\n]+`                                                           # code
    | \$[^$\n]{1,500}\$                                                 # LaTeX
    | \\[A-Za-z]+(?:\s*[\[{][^{}\[\]]*[\]}])*
    | \b[\w.]{1,100}+\([^()\n]{0,200}\)                                 # calls
    """,
    regex.VERBOSE,
)
ADDRESS = regex.compile(
    r"https?://\S++|www\.\S++|(?<![\w.])[\w.]{1,64}+@[\w.]{1,64}+|(?<!\w)[~.]?/(?:[\w.-]++/)++[\w.-]*+"
)
IDENTIFIER = regex.compile(r"(?<!\w)\p{L}*+[_\d]\w*+")
CAMEL_CASE = regex.compile(r"\b[a-z]++(?:[A-Z][a-z0-9]++)++\b")
SYMBOLS = frozenset(
    (
        "sin", "cos", "tan", "cot", "sec", "log", "ln", "exp", "max", "min", "mod", "gcd", "lcm", "lim", "sqrt", "det",
        "dim", "arg", "sup", "inf", "cm", "mm", "km", "kg", "mph", "kmh",
    )
)  # fmt: skip
"""Functions and units: the same in every language."""

QUOTATION = regex.compile(
    r"\"[^\"\n]{1,2000}+\"|“[^”\n]{1,2000}+”|„[^“”\n]{1,2000}+[“”]|«[^»\n]{1,2000}+»|「[^」\n]{1,2000}+」"
    r"|『[^』\n]{1,2000}+』|《[^》\n]{1,2000}+》|(?<![\w'’])['‘][^'’\n]{1,2000}+['’](?!\w)|^[ \t]*+>[^\n]*+",
    regex.MULTILINE,
)
CAPITALS = regex.compile(r"\b\p{Lu}+(?:['’]\p{Lu}+)?(?:[\s,;:.!?'’\"()-]{1,3}\p{Lu}+(?:['’]\p{Lu}+)?)*+\b")
ACRONYM = regex.compile(r"\b\p{Lu}{2,}s?\b")
NAME = regex.compile(r"(?<=[\p{Ll}\p{Han}\p{Hiragana}\p{Katakana},;:]\s?)\p{Lu}[\p{Ll}\p{M}]+(?:['’-]\p{L}+)*")
SAID = regex.compile(r"\p{L}{2}|[\p{Han}\p{Hiragana}\p{Katakana}]")
COMMAND = regex.compile(r"\\[A-Za-z]+\*?")
SPELLED = r"\p{L}[\p{L}\p{M}'’-]*+"
PHRASE = regex.compile(
    rf"{SPELLED}(?:[\s,.;:!?，。；：！？、]{{1,4}}+{SPELLED}){{{LEAST_PHRASE - 1},}}"
    r"|[\p{Han}\p{Hiragana}\p{Katakana}ー]{4,}+"
)
FORMULA = regex.compile(r"\\\(.{0,300}?\\\)|\\\[.{0,1000}?\\\]|\$[^$\n]{1,500}\$|\\[A-Za-z]+", regex.DOTALL)
CODE_MARK = regex.compile(
    r"[=(){}\[\];_<>|&\"]|\w\.\w|:[ \t]*\n|^[ \t]*(?:def|for|if|import|from|return|print|class|while)\b",
    regex.MULTILINE,
)
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))
SHOUTED = 4
"""Letters of the longest word of at least three in capitals that are text and not acronyms or names of points."""


def prose_of(text: str) -> str:
    """The text without what has no language; marks and white space stay. In time linear in the text's length."""
    hidden: list[str] = []

    def keep(part: str) -> str:
        """What stands in the place of a quoted part: the part itself if it is too long for a quotation."""
        if len(part) < SHORTEST_QUOTE and part.isascii():
            return " "
        said = COMMAND.sub(" ", part)
        words = num_words(said)
        if words > LONGEST_QUOTE and words_in_phrases(said) > LONGEST_QUOTE:
            return f" {said} "
        if words:
            hidden.append(said)
        return " "

    text = "".join(_without_blocks(text.translate(INVISIBLE), keep))
    text = QUOTING.sub(lambda found: keep(found[0]), text)
    text = _without_identifiers(text)
    text = QUOTATION.sub(lambda found: keep(found[0]), text)
    if hidden and 0 < MOST_HIDDEN * num_words(text) < sum(map(num_words, hidden)):
        text = "\n\n".join((text, *map(_without_identifiers, hidden)))
    return _without_names(text)


def num_words(text: str) -> float:
    """Words of two letters or more; of ideographic characters two count as one."""
    return sum(
        len(word) / CHARACTERS_PER_WORD if IDEOGRAPHIC.match(word) else len(word) > 1 for word in WORD.findall(text)
    )


def words_in_phrases(text: str) -> float:
    """Those of the words that follow each other as in prose, not as in formulas and code."""
    return sum(num_words(phrase) for phrase in PHRASE.findall(text))


def is_prose(block: str) -> bool:
    """Whether a fenced block holds text and not code, by how many marks of code there are for each word, formulas
    aside."""
    plain = FORMULA.sub(" ", block)
    return len(CODE_MARK.findall(plain)) < CODE_MARKS * num_words(plain)


def _without_blocks(text: str, keep: Callable[[str], str]) -> Iterator[str]:
    """The text's parts with fences and displayed or bracketed formulas replaced."""
    ahead: dict[str, int] = {}
    """The next place of each closing mark; looked for once, so that many opening ones cost no more than one."""

    def next_place(mark: str, start: int) -> int:
        if ahead.get(mark, -1) < start:
            found = text.find(mark, start)
            ahead[mark] = found if found >= 0 else len(text)
        return ahead[mark]

    environments = set(ENVIRONMENT_END.findall(text))
    blank, place = -1, 0
    while (found := OPENING.search(text, place)) is not None:
        start = found.end()
        closing = CLOSING.get(found[0]) or f"\\end{{{found[1]}}}"
        end = next_place(closing, start) if found[1] is None or found[1] in environments else len(text)
        yield text[place : found.start()]
        if found[0] in FENCES:
            block = text[start:end]
            yield keep(block) if is_prose(block) else " "
        else:
            if blank < start:
                blank_line = BLANK_LINE.search(text, start)
                blank = blank_line.start() if blank_line else len(text) + 1
            if end == len(text) or blank < end:
                place = start  # it closes nothing: an opening mark alone
                yield " "
                continue
            yield keep(text[start:end])
        place = min(end + len(closing), len(text))
    yield text[place:]


def _without_identifiers(text: str) -> str:
    for pattern in (ADDRESS, IDENTIFIER, CAMEL_CASE):
        text = pattern.sub(" ", text)
    return text


def _without_names(text: str) -> str:
    """Without acronyms and with sentences in capitals in small letters; without names within sentences. The text as it
    is if nothing else is in it."""
    plain = CAPITALS.sub(lambda found: found[0].lower() if _is_shouted(found[0]) else found[0], text)
    without = NAME.sub(" ", ACRONYM.sub(" ", plain))
    return without if SAID.search(without) else plain.lower()


def _is_shouted(run: str) -> bool:
    words = WORD.findall(run)
    return len(words) >= 3 and max(map(len, words)) >= SHOUTED
