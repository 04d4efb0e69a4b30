"""Problems as their publishers write them, as a table of field names.

Every public set names its fields differently. A form says which keys a row has and where its question, its answer and
the rest stand; the first form whose keys are all there is taken, and the row becomes one of ours (jsonl.py), which is
then checked as strictly as any. Keys of ours that the row has too (grader, domain, language, id) win. Left out: what
takes more than names (form_programs.py, form_choices.py), and files that are not public.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.boxed import final_boxes
from megatron_r1.data.form_choices import choices
from megatron_r1.data.form_programs import humaneval, livecodebench, mbpp, standard_streams
from megatron_r1.errors import DataError

IDS = ("id", "unique_id", "task_id", "question_id", "Record ID", "ID", "key")
"""Where an id may stand."""
KEPT = ("grader", "domain", "language", "tests", "instruction_id_list", "kwargs", "metadata")
"""Keys of ours that a row of another form may have too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """`name` is the set's. `keys` must all be in a row, and hold something. `question` and `answer` name the fields of
    those; `solution` one whose last box is the answer; `more` gives fields of ours from the row (DataError with `where`
    for a row that is broken)."""

    name: str
    keys: tuple[str, ...]
    question: tuple[str, ...] = ()
    answer: str = ""
    solution: str = ""
    more: Callable[[Mapping[str, Any], str], dict[str, Any]] | None = None
    domain: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def _verl(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    model = row["reward_model"]
    if not isinstance(model, dict) or not isinstance(row["prompt"], list):
        raise DataError(f"{where}: reward_model must be an object and prompt a list of turns, as verl writes them")
    return {"messages": row["prompt"], "answer": model.get("ground_truth")}


def _olympiad(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Its final_answer is a list; several answers stand in one text. `error` (a tolerance) is not used."""
    answers = row["final_answer"]
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        raise DataError(f"{where}: final_answer is {answers!r:.80}; expected a list of texts")
    if re.search(r"<img_\d+>|<image", str(row["question"])):
        raise DataError(f"{where}: the question shows a picture, which no prompt can; leave the row out")
    context = [row["context"]] if row.get("context") else []
    return {"question": "\n\n".join([*context, str(row["question"])]), "answer": ", ".join(answers)}


def _asdiv(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The unit stands in brackets behind the number."""
    return {"answer": re.sub(r"\s*\([^()]*\)", "", str(row["answer"])).strip()}


OURS_TOO = Form(name="GSM8K and ours", keys=("question", "answer"))
FORMS = (
    # programs
    Form(name="HumanEval", keys=("prompt", "test", "entry_point"), more=humaneval, domain="code"),
    Form(name="MBPP", keys=("test_list", "text"), more=mbpp, domain="code"),
    Form(name="MBPP, sanitized", keys=("test_list", "prompt"), more=mbpp, domain="code"),
    Form(name="LiveCodeBench", keys=("question_content", "public_test_cases"), more=livecodebench, domain="code"),
    Form(name="APPS, TACO", keys=("question", "input_output"), more=standard_streams, domain="code"),
    # choices, of which the letter is the answer
    Form(
        name="GPQA",
        keys=("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        more=choices,
    ),
    Form(name="gaokao, AGIEval", keys=("question", "options", "label"), more=choices),
    Form(name="AQuA", keys=("question", "options", "correct"), more=choices),
    Form(name="SAT", keys=("question", "options", "Answer"), more=choices),
    Form(name="MMLU", keys=("question", "choices", "answer"), more=choices),
    Form(name="MMLU-Pro", keys=("question", "options", "answer_index"), more=choices),
    Form(name="gaokao 2024", keys=("question", "choice_answer"), question=("question",), answer="choice_answer"),
    # instructions
    Form(
        name="IFEval",
        keys=("prompt", "instruction_id_list"),
        question=("prompt",),
        extra={"grader": "instructions"},
    ),
    # mathematics
    Form(name="verl", keys=("prompt", "reward_model"), more=_verl),
    Form(name="OlympiadBench", keys=("question", "final_answer"), more=_olympiad),
    Form(name="SVAMP", keys=("Body", "Question", "Answer"), question=("Body", "Question"), answer="Answer"),
    Form(name="ASDiv", keys=("body", "question", "answer"), question=("body", "question"), more=_asdiv),
    Form(name="AIME 2024", keys=("Problem", "Answer"), question=("Problem",), answer="Answer"),
    Form(name="AIME 1983 to 2024", keys=("Question", "Answer"), question=("Question",), answer="Answer"),
    Form(name="AMC 2023, AIME, MATH-500", keys=("problem", "answer"), question=("problem",), answer="answer"),
    Form(name="DeepScaleR", keys=("problem", "expected_answer"), question=("problem",), answer="expected_answer"),
    Form(name="MATH, Minerva", keys=("problem", "solution"), question=("problem",), solution="solution"),
    Form(name="MAWPS", keys=("input", "target"), question=("input",), answer="target"),
    Form(name="CARP", keys=("content", "answer"), question=("content",), answer="answer"),
    OURS_TOO,
    Form(name="PRM800K", keys=("question", "gt"), question=("question",), answer="gt"),
    Form(name="a prompt with its answer", keys=("prompt", "answer"), question=("prompt",), answer="answer"),
    Form(
        name="a question with its solution", keys=("question", "solution"), question=("question",), solution="solution"
    ),
)


def form_of(row: Mapping[str, Any]) -> Form | None:
    """The publisher's form that a row has, or None: it is one of ours, or none."""
    if _holds(row, "grader") and (_holds(row, "question") or _holds(row, "messages")):
        return None
    if _holds(row, "messages") and not (_holds(row, "problem") or _holds(row, "prompt")):
        return None
    form = next((form for form in FORMS if all(_holds(row, key) for key in form.keys)), None)
    return None if form is OURS_TOO else form


def our_fields(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row with the names of ours, its own where it has no publisher's form. DataError for a row that is broken."""
    given = {key: value for key, value in row.items() if value is not None}
    form = form_of(row)
    if form is None:
        return given
    fields: dict[str, Any] = {key: given[key] for key in KEPT if key in given} | dict(form.extra)
    if form.domain is not None:
        fields.setdefault("domain", form.domain)
    if form.question:
        parts = [given[key] for key in form.question]
        fields["question"] = parts[0] if len(parts) == 1 else "\n".join(str(part).strip() for part in parts)
    if form.answer:
        fields["answer"] = given[form.answer]
    if form.solution:
        fields["answer"] = _boxed_end(given[form.solution], form.solution, where)
    if form.more is not None:
        fields |= form.more(given, where)
    number = next((given[key] for key in IDS if _holds(given, key)), None)
    return fields if number is None else fields | {"id": number}


def _holds(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) is not None and row.get(key) != "" and row.get(key) != []


def _boxed_end(solution: Any, key: str, where: str) -> str:
    if not isinstance(solution, str) or not (found := final_boxes(solution)):
        raise DataError(
            f"{where}: there is no answer, and {key} holds no \\boxed{{...}} to take it from; add an answer, or leave "
            "the row out"
        )
    return found
