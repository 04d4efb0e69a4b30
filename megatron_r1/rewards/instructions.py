"""Whether a response follows instructions that a program can check: the 25 kinds of IFEval (arXiv 2311.07911).

A check is a function of the response and the instruction's arguments, under the names of IFEval's jsonl files.
Sentences are counted by their end marks, where IFEval uses a trained splitter, so number_sentences may differ on texts
with many abbreviations. The grader "instructions" is at the end. Left out: the loose variants, which change the
response before they check it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_r1.config.languages import language_code, language_fault
from megatron_r1.errors import DataError
from megatron_r1.rewards.detector import likeliest_language
from megatron_r1.rewards.exact import GRADER as EXACT
from megatron_r1.rewards.format import after_thought, extract_answer
from megatron_r1.rewards.grader import Grader, WorkerFunction, needed

if TYPE_CHECKING:
    from megatron_r1.config.schema import AnswerPlace, RewardConfig
    from megatron_r1.types import Problem

Arguments = Mapping[str, Any]

WORD = re.compile(r"\w+")
SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"')\]”’]*\s+")
BULLETS = (r"^\s*\*[^\*].*$", r"^\s*-.*$")
SAMPLES = ("one", "one\n\ntwo\n\nthree", "one *** two ****** three")
"""Texts that bring each check to all of its arguments."""
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def follows(response: str, instruction: str, arguments: Arguments) -> bool:
    """Whether `response` follows one instruction. DataError for a kind that is not known or lacks an argument."""
    check = CHECKS.get(instruction)
    if check is None:
        raise DataError(f"instruction {instruction!r}: not one of {', '.join(CHECKS)}")
    try:
        return bool(response.strip()) and check(response, arguments)
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise DataError(
            f"instruction {instruction!r}: its arguments {dict(arguments)} are incomplete ({error})"
        ) from error


def check_instruction(instruction: str, arguments: Arguments) -> None:
    """DataError for a kind that is not known, lacks an argument or has one of no use: what `follows` would find in the
    middle of a run, found before it."""
    for sample in (*SAMPLES, *map(str, arguments.get("keywords") or ())):
        follows(sample, instruction, arguments)
    language = arguments.get("language")
    if instruction == "language:response_language" and language_code(str(language)) is None:
        raise DataError(f"instruction {instruction!r}: language is {language_fault(str(language))}")


def _compare(count: int, bound: int, relation: str | None) -> bool:
    """IFEval's two relations: "less than", and "at least" (also where none is given)."""
    if relation not in (None, "at least", "less than"):
        raise ValueError(f"relation {relation!r}")
    return count < bound if relation == "less than" else count >= bound


def _sentences(text: str) -> list[str]:
    return [part for part in SENTENCE_END.split(text.strip()) if WORD.search(part)]


def _paragraphs(text: str, given: Arguments) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    whole = [part for number, part in enumerate(parts) if part.strip() or number not in (0, len(parts) - 1)]
    return len(whole) == int(given["num_paragraphs"]) and all(part.strip() for part in whole)


def _contains(word: str, text: str) -> bool:
    return re.search(word, text, re.IGNORECASE) is not None


def _word_count(word: str, text: str) -> int:
    return len(re.findall(word, text, re.IGNORECASE))


def _is_whole_word(word: str, text: str) -> bool:
    return re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None


def _first_word_of_paragraph(response: str, given: Arguments) -> bool:
    # Empty paragraphs are not counted, but they have a place.
    paragraphs = response.split("\n\n")
    count, place = sum(bool(part.strip()) for part in paragraphs), int(given["nth_paragraph"])
    if count != int(given["num_paragraphs"]) or place > count:
        return False
    words = paragraphs[place - 1].split()
    first = words[0].lstrip("'").lstrip('"') if words else ""
    return re.split(r"[.,?!'\"]", first)[0].lower() == str(given["first_word"]).lower() != ""


def _sections(response: str, given: Arguments) -> bool:
    marks = re.findall(rf"\s?{given['section_spliter'].strip()}\s?\d+\s?", response)
    return len(marks) >= int(given["num_sections"])


def _is_json(response: str, _: Arguments) -> bool:
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _highlights(response: str, given: Arguments) -> bool:
    # Bold text also matches the first pattern, with empty content between its double stars.
    single = [part for part in re.findall(r"\*([^\n\*]*)\*", response) if part.strip()]
    bold = [part for part in re.findall(r"\*\*([^\n\*]*)\*\*", response) if part.strip()]
    return len(single) + len(bold) >= int(given["num_highlights"])


def _two_responses(response: str, _: Arguments) -> bool:
    parts = response.split("******")
    whole = [part.strip() for number, part in enumerate(parts) if part.strip() or number not in (0, len(parts) - 1)]
    return len(whole) == 2 and all(whole) and whole[0] != whole[1]


def _language(response: str, given: Arguments) -> bool:
    return language_code(likeliest_language(response)) == language_code(str(given["language"]))


def _case(response: str, *, upper: bool) -> bool:
    cased = response.isupper() if upper else response.islower()
    return cased and likeliest_language(response.lower()) == "en"


def _postscript(response: str, given: Arguments) -> bool:
    marker = str(given["postscript_marker"])
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker.lower()))
    return re.search(pattern, response.lower()) is not None


def _letters(response: str, given: Arguments) -> bool:
    count = response.lower().count(str(given["letter"]).lower())
    return _compare(count, int(given["let_frequency"]), given.get("let_relation"))


def _capital_words(response: str, given: Arguments) -> bool:
    count = sum(word.isupper() for word in re.findall(r"[\w'-]+", response))
    return _compare(count, int(given["capital_frequency"]), given.get("capital_relation"))


def _ends_with(response: str, given: Arguments) -> bool:
    return response.strip().strip('"').lower().endswith(str(given["end_phrase"]).strip().lower())


CHECKS: Mapping[str, Callable[[str, Arguments], bool]] = {
    "keywords:existence": lambda text, given: all(_contains(word, text) for word in given["keywords"]),
    "keywords:frequency": lambda text, given: _compare(
        _word_count(given["keyword"], text), int(given["frequency"]), given.get("relation")
    ),
    "keywords:forbidden_words": lambda text, given: not any(_is_whole_word(w, text) for w in given["forbidden_words"]),
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": lambda text, given: _compare(
        len(_sentences(text)), int(given["num_sentences"]), given.get("relation")
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda text, given: _compare(
        len(WORD.findall(text)), int(given["num_words"]), given.get("relation")
    ),
    "length_constraints:nth_paragraph_first_word": _first_word_of_paragraph,
    "detectable_content:number_placeholders": lambda text, given: (
        len(re.findall(r"\[.*?\]", text)) >= int(given["num_placeholders"])
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, given: (
        sum(len(re.findall(pattern, text, re.MULTILINE)) for pattern in BULLETS) == int(given["num_bullets"])
    ),
    "detectable_format:constrained_response": lambda text, _: any(one in text for one in CONSTRAINED),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text, _: any(
        title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text)
    ),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, given: (
        text.strip().lower().startswith(str(given["prompt_to_repeat"]).strip().lower())
    ),
    "startend:end_checker": _ends_with,
    "startend:quotation": lambda text, _: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, _: _case(text, upper=True),
    "change_case:english_lowercase": lambda text, _: _case(text, upper=False),
    "punctuation:no_comma": lambda text, _: "," not in text,
}
"""Every kind of instruction by IFEval's name for it."""


def check(problem: Problem, _: RewardConfig) -> None:
    """DataError for a problem without instructions, and for one that is not known or lacks an argument."""
    given = needed(problem, "instructions")
    try:
        for name, arguments in given:
            check_instruction(name, arguments)
    except (TypeError, ValueError) as error:  # not pairs, or a DataError
        raise DataError(f"problem {problem.id}: {error}") from None


def reads(response: str, _: AnswerPlace) -> str:
    """What the user sees: the answer's tags, else what follows the thought. Empty where the thought was cut off."""
    answer = extract_answer(response, "answer")
    return answer if answer is not None else after_thought(response)


def quick(problem: Problem, answer: str | None) -> bool | None:
    """Nothing follows no instruction."""
    return None if (answer or "").strip() else False


def grade(response: str, reference: str | None, metadata: Mapping[str, Any]) -> bool:
    """In the worker: whether the response follows all of its instructions."""
    return all(follows(response, name, arguments) for name, arguments in metadata["instructions"])


GRADER = Grader(
    name="instructions",
    check=check,
    reads=reads,
    quick=quick,
    worker=WorkerFunction(name="instructions", function="megatron_r1.rewards.instructions:grade"),
    votes_as=EXACT,
)
