"""Language consistency: the share of a thought's words that are in the language that was asked for (paper, section
2.3.2: "the proportion of target language words in the CoT").

A word is a run of letters; two Chinese characters count as one word. What has no language does not count (prose.py):
code, LaTeX, numbers, single letters, identifiers, names, acronyms, quoted text and addresses. Scripts that one language
owns decide by themselves; for the rest a detector looks at each word with its neighbours (detector.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import regex

from megatron_r1.config.languages import LANGUAGES, language_code
from megatron_r1.rewards.detector import WINDOW, words_in_language
from megatron_r1.rewards.format import TAGS
from megatron_r1.rewards.prose import BLANK_LINE, CHARACTERS_PER_WORD, IDEOGRAPHIC, SYMBOLS, WORD, prose_of

MAX_CHARACTERS = 200_000
"""What follows is not looked at: a thought of 32,768 tokens is shorter."""

KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
LEAST_KANA = 0.1
"""Of a paragraph's Chinese characters and kana, from which on it is Japanese: a single の is not."""

OWNED = {
    "ko": r"\p{Hangul}",
    "th": r"\p{Thai}",
    "el": r"\p{Greek}",
    "he": r"\p{Hebrew}",
    "hy": r"\p{Armenian}",
    "ka": r"\p{Georgian}",
    "ta": r"\p{Tamil}",
    "te": r"\p{Telugu}",
}
"""Scripts that one language owns among those that the detector knows."""

SCRIPT = regex.compile("|".join(f"(?P<{language}>{script})" for language, script in OWNED.items()))
BY_SCRIPT = frozenset((*OWNED, "zh", "ja"))
TAG = regex.compile("|".join(map(regex.escape, TAGS)))
THINK = regex.compile(r"</?think>")


def language_consistency(response: str, language: str) -> float:
    """Share of the thoughts' words that are in `language` ("en", "zh", or what config/languages.py takes); in [0, 1].

    0.0 for thoughts without words: nothing was said in the language. Raises ValueError for a language that is not
    known. Of texts of more than about 500 words the share is an estimate, whose error detector.py states.
    """
    code = language_code(language)
    if code is None:
        raise ValueError(f"language {language!r} is not known; known are {', '.join(sorted(LANGUAGES))}")
    own, other = count_words(TAG.sub(" ", thought_of(response))[:MAX_CHARACTERS], code)
    return own / (own + other) if own + other else 0.0


def thought_of(response: str) -> str:
    """All that stands in `<think>`, of every thought (to the end of the response if the last is not closed). Without an
    opening tag it is what stands before `</think>`, since a template may have opened the thought, else all of it."""
    tags = list(THINK.finditer(response))
    if not any(tag[0] == "<think>" for tag in tags):
        return response[: tags[-1].start()] if tags else response
    parts, depth, begun = [], 0, 0
    for tag in tags:
        if tag[0] == "<think>":
            begun = tag.end() if not depth else begun
            depth += 1
        elif depth:
            depth -= 1
            if not depth:
                parts.append(response[begun : tag.start()])
    if depth:
        parts.append(response[begun:])
    return "\n\n".join(parts)


def count_words(text: str, language: str) -> tuple[float, float]:
    """(words in `language`, other words) of a text without tags; `language` is a code of LANGUAGES."""
    own = other = 0.0
    runs: list[list[str]] = [[]]
    """Words whose script several languages have. Paragraphs stay apart where each is long enough to be judged."""
    for paragraph in BLANK_LINE.split(prose_of(text)):
        words = [
            word
            for word in WORD.findall(paragraph)
            if (len(word) > 1 and word not in SYMBOLS) or IDEOGRAPHIC.match(word)
        ]
        japanese = _is_japanese(paragraph)
        if len(runs[-1]) > 2 * WINDOW:
            runs.append([])
        for word in words:
            script = _language_of_script(word, japanese)
            if script is None:
                runs[-1].append(word)
                continue
            weight = len(word) / CHARACTERS_PER_WORD if IDEOGRAPHIC.match(word) else 1.0
            own, other = (own + weight, other) if script == language else (own, other + weight)
    if len(runs) > 1 and len(runs[-1]) <= 2 * WINDOW:
        last = runs.pop()
        runs[-1] += last
    spelled = sum(map(len, runs))
    detected = 0.0 if language in BY_SCRIPT else words_in_language(runs, language)
    return own + detected, other + spelled - detected


def _is_japanese(paragraph: str) -> bool:
    kana = len(KANA.findall(paragraph))
    return kana > 0 and kana >= LEAST_KANA * len(IDEOGRAPHIC.findall(paragraph))


def _language_of_script(word: str, japanese: bool) -> str | None:
    """The language that a word's script tells, None where the script has several."""
    if word.isascii():
        return None
    if IDEOGRAPHIC.match(word):
        return "ja" if japanese else "zh"
    script = SCRIPT.match(word)
    return script.lastgroup if script else None


def grade(response: str, language: str | None, _: Mapping[str, Any]) -> float:
    """In the worker: the language reward of a response."""
    return language_consistency(response, language or "en")
