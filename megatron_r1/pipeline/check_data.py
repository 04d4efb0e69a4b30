"""megatron-r1 check-data: files of problems read as a run would read them, and all of their faults told at once.

Beside what reading finds there is what a run looks at before it starts (rewards/wiring.py), and graders that can be
attacked are, with answers that solve nothing (of programs: rewards/code_idle.py). Left out: whether a reference is
right, and whether prompts leave room for an answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.check_data import CheckDataConfig, validate_check_data
from megatron_r1.data.jsonl import placed_problems
from megatron_r1.data.problems import normalised_text
from megatron_r1.data.survey import survey
from megatron_r1.errors import DataError
from megatron_r1.observe.progress import duration
from megatron_r1.rewards.grader import Attacker
from megatron_r1.rewards.table import check_known, grader_of
from megatron_r1.rewards.wiring import check_problems
from megatron_r1.types import Problem

SHOWN_NOTES = 20
LONG_ANSWER = 200
"""Characters of a reference answer beyond which it is more likely a solution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """`counts`: problems by grader. Faults make a run stop or reward noise; notes are worth a look. Both name file and
    line."""

    forms: dict[str, Counter[str]]
    counts: Counter[str]
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float


def check_data(config: CheckDataConfig) -> DataReport:
    """Reads and checks all files. ConfigError for no files, and where programs are to be run and no sandbox is to be
    had."""
    validate_check_data(config)
    begun = time.monotonic()
    faults: list[str] = []
    notes: list[str] = []
    placed = _all_files(config.data.files, lambda error: faults.append(str(error)))
    attacked: dict[Attacker, list[tuple[str, Problem]]] = {}
    for where, problem in placed:
        try:
            check_known(problem, config.rewards)
            grader = grader_of(problem)
            if grader.has_accuracy or config.rewards.preferences:
                check_problems([problem], config.rewards, reward_models=True)
        except DataError as error:
            faults.append(f"{where}: {error}")
            continue
        if grader.attack is not None:
            attacked.setdefault(grader.attack, []).append((where, problem))
    forms = {str(path): _survey(path, notes) for path in dict.fromkeys(config.data.files)}
    notes += _repeated(placed) + _long_answers(placed)
    for attack, entries in attacked.items() if config.programs else ():
        found = attack([problem for _, problem in entries], config.rewards, config.constants)
        for (where, problem), passes in zip(entries, found, strict=True):
            for one in passes:
                (faults if one.fault else notes).append(f"{where}: problem {problem.id}: {one.words}")
    return DataReport(
        forms=forms,
        counts=Counter(problem.grader for _, problem in placed),
        faults=tuple(faults),
        notes=tuple(notes),
        seconds=time.monotonic() - begun,
    )


def describe(report: DataReport) -> str:
    """The report as text: all faults, the first notes, and a last line that says how it went."""
    lines = [
        f"{path}: " + (", ".join(f"{count} as {name}" for name, count in forms.most_common()) or "nothing was read")
        for path, forms in report.forms.items()
    ]
    lines += [f"fault  {fault}" for fault in report.faults]
    lines += [f"note   {note}" for note in report.notes[:SHOWN_NOTES]]
    if len(report.notes) > SHOWN_NOTES:
        lines.append(f"       and {len(report.notes) - SHOWN_NOTES} more notes")
    counts = ", ".join(f"{count} {grader}" for grader, count in sorted(report.counts.items())) or "no"
    word = "1 fault" if len(report.faults) == 1 else f"{len(report.faults) or 'no'} faults"
    return "\n".join([*lines, f"{counts} problems, {word}, {duration(report.seconds)}"])


def _all_files(files: Sequence[Path], told: Callable[[DataError], None]) -> list[tuple[str, Problem]]:
    """All problems; a file that cannot be read at all is a fault, and the next one is read."""
    bad: set[Path] = set()
    while True:
        readable = [path for path in dict.fromkeys(files) if path not in bad]
        seen: list[DataError] = []
        found: list[tuple[str, Problem]] = []
        try:
            for placed in placed_problems(readable, seen.append):
                found.append(placed)
        except DataError as error:
            bad.add(next(path for path in readable if str(error).startswith((f"{path}:", f"{path},"))))
            told(error)
            continue
        for error in seen:
            told(error)
        return found


def _survey(path: Path, notes: list[str]) -> Counter[str]:
    try:
        found = survey(path)
    except DataError:  # told already
        return Counter()
    notes += [
        f"{path}: the key {key!r} of {count} rows is not read; did you mean {ours!r}?"
        for (key, ours), count in found.misspelt.items()
    ]
    return found.forms


def _repeated(placed: Sequence[tuple[str, Problem]]) -> list[str]:
    first: dict[str, str] = {}
    notes = []
    for where, problem in placed:
        text = normalised_text(problem)
        if text in first:
            notes.append(f"{where}: asks the same as {first[text]}")
        first.setdefault(text, where)
    return notes


def _long_answers(placed: Sequence[tuple[str, Problem]]) -> list[str]:
    return [
        f"{where}: the answer has {len(problem.answer)} characters, so it may be a solution that nothing will match: "
        f"...{' '.join(problem.answer.split())[-60:]}"
        for where, problem in placed
        if problem.answer is not None and len(problem.answer) > LONG_ANSWER
    ]
