"""`--help` of a recipe and of `evaluate`: the fields that most runs set. The full list, tyro's own, is `--help-all`.

Each kind of stage says which of its fields these are (Stage.common); the rest comes from the same walk over the
dataclasses that writes docs/configuration.md.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_r1.algorithms import ALGORITHMS, Algorithm, name_of
from megatron_r1.config.describe import REQUIRED, Field, leaves_of
from megatron_r1.config.pipeline import OWN_FIELDS, PipelineConfig
from megatron_r1.config.schema import StageConfig
from megatron_r1.pipeline.kinds import kind_for, kind_of
from megatron_r1.stages.stage import Stage

SHORT, FULL = ("-h", "--help"), "--help-all"
WIDEST = 110
LONGEST_DEFAULT = 40
FIELD_COLUMN = 44
"""Where the meanings begin."""

METAVARS = {"whole number": "N", "number": "X", "text": "TEXT", "path": "PATH", "yes or no": ""}


def answer_help(
    command: str, recipe: StageConfig | PipelineConfig | type, words: Sequence[str], about: str
) -> list[str]:
    """The words as tyro is to see them, which has the full help. Where the short one is asked for, it is printed, and
    the process ends as tyro's would. `recipe`: with its values, or the class of a stage without any."""
    if any(word in SHORT for word in words):
        print(help_text(command, recipe, about))
        raise SystemExit(0)
    return ["--help" if word == FULL else word for word in words]


def help_text(command: str, recipe: StageConfig | PipelineConfig | type, about: str) -> str:
    """What `megatron-r1 COMMAND --help` prints."""
    if isinstance(recipe, PipelineConfig):
        options = "[--from STAGE] [--until STAGE] [--only STAGE] [--dry-run] [--STAGE.FIELD VALUE ...]"
        rows = _pipeline(recipe)
    elif isinstance(recipe, type):
        options = "[--FIELD VALUE ...]"
        rows = _stage(kind_for(recipe), None, ())
    else:
        options = "[--dry-run] [--FIELD VALUE ...]"
        rows = _stage(kind_of(recipe), recipe, ())
    lines = [*_wrapped(f"usage: megatron-r1 {command} {options}"), "", *_wrapped(about), "", *rows]
    lines.append(f"These are the common fields; megatron-r1 {command} {FULL} and docs/configuration.md have all.")
    return "\n".join(lines)


def _pipeline(pipeline: PipelineConfig) -> Iterator[str]:
    """Its own fields, then the common ones of each kind of stage that it has."""
    own = [field for field in leaves_of(PipelineConfig) if field.path[0] != "name"]
    yield "the pipeline"
    for field in own:
        yield from _row(dataclasses.replace(field, default=str(getattr(pipeline, field.path[0]))))
    yield ""
    stages = {
        field.name: stage
        for field in dataclasses.fields(pipeline)
        if field.name not in OWN_FIELDS and (stage := getattr(pipeline, field.name)) is not None
    }
    kinds = {id(kind_of(stage)): kind_of(stage) for stage in stages.values()}
    for kind in kinds.values():
        names = [name for name, stage in stages.items() if kind_of(stage) is kind]
        if len(names) == 1:
            yield from _stage(kind, stages[names[0]], (names[0],))
        elif names:
            yield from _wrapped(f"STAGE is one of {', '.join(names)}; defaults differ (--dry-run prints them)")
            yield from _stage(kind, None, ("STAGE",), defaults=False)


def _stage(kind: Stage, config: StageConfig | None, within: tuple[str, ...], *, defaults: bool = True) -> Iterator[str]:
    """The common fields of a stage, by their parts."""
    hidden = ("name", "run_dir", "if_exists") if within else ("name",)
    group = None
    for field in common_fields(kind, config):
        if field.path[0] in hidden and len(field.path) == 1:
            continue
        part = field.path[0] if len(field.path) > 1 else ""
        if part != group:
            yield from ([""] if group is not None else [])
            yield " ".join([*within, part]).strip() or "the stage"
            group = part
        shown = field if defaults else dataclasses.replace(field, default="")
        yield from _row(dataclasses.replace(shown, path=(*within, *field.path)))
    yield ""


def common_fields(kind: Stage[Any], config: StageConfig | None = None) -> list[Field]:
    """In the order of the kind's own list."""
    given = getattr(config, "algorithm", None)
    found = [field for field in leaves_of(kind.config, config) if "[]" not in ".".join(field.path)]
    rows: list[Field] = []
    for wanted in kind.common:
        path = tuple(wanted.split("."))
        if wanted == "algorithm":
            default = name_of(given) if isinstance(given, Algorithm) else next(iter(ALGORITHMS))
            meaning = f"{', '.join(ALGORITHMS)}, or module:Class."
            rows.append(Field(path=path, type="NAME", default=default, bound="", meaning=meaning))
        rows += [field for field in found if field.path[: len(path)] == path and wanted != "algorithm"]
    return rows


def _row(field: Field) -> Iterator[str]:
    """`--option VALUE`, then the first clause of its meaning and its default."""
    left = f"  {field.option} {metavar(field.type)}".rstrip()
    clause = re.split(r"\. (?=[A-Z`])|; ", field.meaning)[0].rstrip(".")
    default = textwrap.shorten(field.default, LONGEST_DEFAULT, placeholder="...")
    shown = {REQUIRED: " (required)", "": "", "empty": ""}.get(default, f" [{default}]")
    text = _wrapped(clause + shown, FIELD_COLUMN)
    if len(left) >= FIELD_COLUMN:
        yield left
    else:
        text[0] = left.ljust(FIELD_COLUMN) + text[0].lstrip()
    yield from text


def metavar(type_text: str) -> str:
    """What stands for the value in a row: N, PATH, a|b, and `...` behind what may be given several times."""
    kind, many = type_text.removeprefix("any number of: "), type_text.startswith("any number of: ")
    alone = kind.removesuffix(" or none")
    kind = alone if alone in METAVARS else kind
    word = METAVARS.get(kind, kind.replace(" or ", "|"))
    return f"{word} ..." if many else word


def _wrapped(text: str, indent: int = 0) -> list[str]:
    width = min(WIDEST, max(80, shutil.get_terminal_size((WIDEST, 24)).columns))
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent) or [""]
