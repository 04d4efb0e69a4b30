"""Language consistency: the share of a thought's words that are in the language that was asked for (paper, section
2.3.2: "the proportion of target language words in the CoT").

A word is a run of letters; two Chinese characters count as one word. What has no language does not count: code, LaTeX,
numbers, single letters, identifiers, names (capitalised within a sentence), acronyms, quoted text and addresses.
Scripts that one language owns decide by themselves; for the rest a detector (py3langid, 97 languages) looks at each
word with its neighbours, so that a foreign clause is found inside a sentence and a short exclamation is not taken for
Malagasy.
"""

from __future__ import annotations

import regex
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from megatron_r1.rewards.format import TAGS

WINDOW = 3
"""Words to each side of a word that the detector sees with it."""

STRIDE = 2
"""Words that share one look of the detector."""

DOUBT = 0.5
"""A word is the target language's where that has at least this share of the probability of the likeliest one."""

MAX_CHARACTERS = 200_000
"""What follows is not looked at: a thought of 32,768 tokens is shorter."""

LONGEST_QUOTE = 30
"""Words. What is longer and in quotation marks is text, not a quotation."""

CHARACTERS_PER_WORD = 2
"""Chinese characters (and kana) that count as one word."""

# Loaded with the module: it writes a temporary file, which a grading worker may not do later.
DETECTOR = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
LANGUAGES = frozenset(DETECTOR.labels)
"""ISO 639-1 codes of the languages that the detector knows."""

THOUGHT = regex.compile(r"<think>(.*?)(?:</think>|\Z)", regex.DOTALL)
WITHOUT_LANGUAGE = regex.compile(
    r"""
    ```.*?(?:```|\Z) | ~~~.*?(?:~~~|\Z) | `[^`\n]*`                     # code
    | \$\$.*?(?:\$\$|\Z) | \\\[.*?(?:\\\]|\Z) | \\\(.*?(?:\\\)|\Z)      # LaTeX
    | \\begin\{(\w+\*?)\}.*?(?:\\end\{\1\}|\Z) | \$[^$\n]{1,500}\$
    | \\[A-Za-z]+(?:\s*[\[{][^{}\[\]]*[\]}])*
    | https?://\S++ | www\.\S++ | (?<![\w.])[\w.]{1,64}+@[\w.]{1,64}+ | (?<!\w)[~.]?/(?:[\w.-]++/)++[\w.-]*+ # addresses
    | \b(?=\p{L}*[_\d])\w++ | \b[\w.]{1,100}+\([^()\n]{0,200}\) | \b[a-z]++(?:[A-Z][a-z0-9]++)++\b  # identifiers, calls
    | \b\p{Lu}{2,}s?\b                                                  # acronyms
    | \b(?:sin|cos|tan|cot|sec|log|ln|exp|max|min|mod|gcd|lcm|lim|sqrt|det|dim|arg|sup|inf|cm|mm|km|kg|mph|kmh)\b
    """,
    regex.DOTALL | regex.VERBOSE,
)
QUOTATION = regex.compile(
    r"\"[^\"\n]{1,2000}+\"|“[^”\n]{1,2000}+”|„[^“”\n]{1,2000}+[“”]|«[^»\n]{1,2000}+»|「[^」\n]{1,2000}+」"
    r"|『[^』\n]{1,2000}+』|《[^》\n]{1,2000}+》|(?<![\w'’])['‘][^'’\n]{1,2000}+['’](?!\w)|^[ \t]*+>[^\n]*+",
    regex.MULTILINE,
)
WORD = regex.compile(r"[\p{Han}々〆〇]+|[\p{Hiragana}\p{Katakana}ー]+|[\p{L}\p{M}]+(?:['’-][\p{L}\p{M}]+)*")
IDEOGRAPHIC = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")
NAME = regex.compile(r"(?<=[\p{Ll}\p{Han}\p{Hiragana}\p{Katakana},;:]\s?)\p{Lu}[\p{Ll}\p{M}]+(?:['’-]\p{L}+)*")
KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
OWNED = (
    ("ko", regex.compile(r"\p{Hangul}")),
    ("th", regex.compile(r"\p{Thai}")),
    ("el", regex.compile(r"\p{Greek}")),
    ("he", regex.compile(r"\p{Hebrew}")),
    ("hy", regex.compile(r"\p{Armenian}")),
    ("ka", regex.compile(r"\p{Georgian}")),
    ("ta", regex.compile(r"\p{Tamil}")),
    ("te", regex.compile(r"\p{Telugu}")),
)
"""Scripts that one language owns among those that the detector knows."""


def language_consistency(response: str, language: str) -> float:
    """Share of the thought's words that are in `language` (ISO 639-1, such as "en" or "zh"); in [0, 1].

    The thought is what stands in `<think>` (to the end of the response if that is not closed), the whole response where
    there is none. 0.0 for a thought without words: nothing was said in the language. Raises ValueError for a language
    that the detector does not know.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r} is not known; known are {', '.join(sorted(LANGUAGES))}")
    thought = THOUGHT.search(response)
    text = (thought[1] if thought else response)[:MAX_CHARACTERS]
    for tag in TAGS:
        text = text.replace(tag, " ")
    counts = count_words(text, language)
    return counts[0] / sum(counts) if sum(counts) else 0.0


def count_words(text: str, language: str) -> tuple[float, float]:
    """(words in `language`, other words) of a text without tags."""
    text = WITHOUT_LANGUAGE.sub(" ", text)
    text = QUOTATION.sub(lambda found: " " if _num_words(found[0]) <= LONGEST_QUOTE else found[0], text)
    text = NAME.sub(" ", text)
    own = other = 0.0
    for sentences in _lines(text):
        japanese = KANA.search(sentences) is not None
        words = [word for word in WORD.findall(sentences) if len(word) > 1 or IDEOGRAPHIC.match(word)]
        spelled = [word for word in words if _language_of_script(word, japanese) is None]
        detected = iter(_in_language(spelled, language))
        for word in words:
            script = _language_of_script(word, japanese)
            matches = next(detected) if script is None else script == language
            weight = len(word) / CHARACTERS_PER_WORD if IDEOGRAPHIC.match(word) else 1.0
            own, other = (own + weight, other) if matches else (own, other + weight)
    return own, other


def _lines(text: str) -> list[str]:
    """The text in stretches within which neighbouring words say something about each other."""
    return [text] if len(text) < 200 else [part for part in regex.split(r"\n\s*\n", text) if part.strip()]


def _num_words(text: str) -> float:
    return sum(len(word) / CHARACTERS_PER_WORD if IDEOGRAPHIC.match(word) else 1 for word in WORD.findall(text))


def _language_of_script(word: str, japanese: bool) -> str | None:
    """The language that a word's script tells, None where the script has several."""
    if IDEOGRAPHIC.match(word):
        return "ja" if japanese else "zh"
    for language, script in OWNED:
        if script.match(word):
            return language
    return None


def _in_language(words: list[str], language: str) -> list[bool]:
    """Whether each of consecutive words is in `language`, by the words around it."""
    found: dict[str, bool] = {}
    verdicts: list[bool] = []
    for place in range(0, len(words), STRIDE):
        start = max(0, min(place - WINDOW, len(words) - 2 * WINDOW - 1))
        window = " ".join(words[start : max(place, WINDOW) + WINDOW + 1]).lower()
        if window not in found:
            found[window] = _is_in(window, language)
        verdicts += [found[window]] * min(STRIDE, len(words) - place)
    return verdicts


def _is_in(window: str, language: str) -> bool:
    likeliest, probability = DETECTOR.classify(window)
    return likeliest == language or dict(DETECTOR.rank(window))[language] >= DOUBT * probability
