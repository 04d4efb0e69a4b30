"""Write the pages that are read from the code: docs/configuration.md and docs/metrics.md.

    python tools/make_docs.py            writes them
    python tools/make_docs.py --check    status 1 if one is not what the code says

Fields, defaults and bounds come from the dataclasses (config/describe.py), metrics from the tables of the stages
(stages/*/names.py) and of the algorithms.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_r1.algorithms import ALGORITHMS
from megatron_r1.config.describe import REQUIRED, Field, fields_of, leaves_of, meaning_of
from megatron_r1.config.pipeline import OWN_FIELDS, PipelineConfig
from megatron_r1.observe.names import NUMBER, PART, Names
from megatron_r1.pipeline.kinds import KINDS
from megatron_r1.recipes import RECIPES
from megatron_r1.stages.grpo.config import GRPOConfig

DOCS = Path(__file__).parent.parent / "docs"
WRITTEN_BY = "<!-- Written by tools/make_docs.py; change the code instead and run `make docs`. -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is out of date")
    check = parser.parse_args().check
    status = 0
    for name, text in pages().items():
        file = DOCS / name
        if file.exists() and file.read_text(encoding="utf-8") == text:
            continue
        if check:
            print(f"docs/{name} is not what the code says; write it anew: python tools/make_docs.py", file=sys.stderr)
            status = 1
        else:
            file.write_text(text, encoding="utf-8")
            print(f"docs/{name} written")
    return status


def pages() -> dict[str, str]:
    """The text of each page by its file's name."""
    return {"configuration.md": configuration(), "metrics.md": metrics()}


def configuration() -> str:
    lines = [
        WRITTEN_BY,
        "",
        "# Configuration",
        "",
        "Every field of every kind of stage, as the command line spells it. A recipe sets many of them; "
        "`megatron-r1 run RECIPE --dry-run` prints what results. The columns show the kind's own defaults.",
        "",
        "    megatron-r1 run tiny --steps 20 --rollout.sampling.temperature 0.8",
        "    megatron-r1 run quickstart --grpo.steps 20          # a pipeline: --STAGE.FIELD",
        "",
        "- `yes or no`: `--parallel.sequence` sets it, `--parallel.no-sequence` unsets it.",
        "- any number of values: `--data.files a.jsonl b.jsonl`; none after the option empties it.",
        "- a path with `[]` is a field of each entry of a list; lists of this kind are set in a recipe.",
        "- a number out of its bound is refused before anything starts; a number without one must be finite.",
        "",
    ]
    lines += _pipelines()
    lines += ["## Stages", ""]
    for kind in KINDS:
        lines += _stage(kind.config)
    lines += ["## Parts that several stages have", ""]
    for name, part in shared_parts().items():
        lines += [f"### {name}", "", meaning_of(part), "", *table(leaves_of(part, None, (name,))), ""]
    lines += ["## Algorithms", "", *_algorithms()]
    return "\n".join(lines).rstrip() + "\n"


def shared_parts() -> dict[str, type]:
    """Dataclasses that more than one kind of stage has, by their field's name."""
    parts = [(field.path[0], field.part) for kind in KINDS for field in fields_of(kind.config) if field.part]
    return {name: part for (name, part), count in Counter(parts).items() if count > 1}


def _pipelines() -> list[str]:
    lines = [
        "## Pipelines",
        "",
        meaning_of(PipelineConfig) + " See [pipeline](pipeline.md).",
        "",
        *table(fields_of(PipelineConfig)),
        "",
        "`--from STAGE`, `--until STAGE` and `--only STAGE` choose stages; `--dry-run` prints and runs nothing.",
        "",
        "| pipeline | its stages and their kinds |",
        "| --- | --- |",
    ]
    for name, recipe in RECIPES.items():
        made = recipe()
        if isinstance(made, PipelineConfig):
            stages = [
                f"{field.name} ([{kind_name(type(stage))}](#{kind_name(type(stage))}))"
                for field in dataclasses.fields(made)
                if field.name not in OWN_FIELDS and (stage := getattr(made, field.name)) is not None
            ]
            lines.append(f"| `{name}` | {', '.join(stages)} |")
    return [*lines, ""]


def kind_name(config: type) -> str:
    """A kind's name: that of its folder."""
    return config.__module__.split(".")[-2]


def _stage(config: type) -> list[str]:
    shared = shared_parts()
    rows: list[str] = []
    for field in fields_of(config):
        name = field.path[0]
        if name == "algorithm":
            rows.append(row(dataclasses.replace(field, type="[an algorithm](#algorithms)")))
        elif field.part is not None and shared.get(name) is field.part:
            rows.append(f"| `--{name}.*` | [{name}](#{name}) | {_differences(config, field)} | | {_meaning(field)} |")
        elif field.part is not None:
            rows += [row(leaf) for leaf in leaves_of(config) if leaf.path[0] == name]
        else:
            rows += [row(leaf) for leaf in leaves_of(config) if leaf.path[0].removesuffix("[]") == name]
    return [f"### {kind_name(config)}", "", meaning_of(config), "", *HEAD, *rows, ""]


def _meaning(field: Field) -> str:
    """A part's: what stands below the field, else the first sentence about the part."""
    assert field.part is not None
    return in_table(field.meaning or meaning_of(field.part).split(". ")[0].rstrip(".") + ".")


def _differences(config: type, field: Field) -> str:
    """The defaults of a shared part that this kind has otherwise."""
    assert field.part is not None
    usual = {leaf.path: leaf.default for leaf in leaves_of(field.part, None, field.path)}
    own = (leaf for leaf in leaves_of(config) if leaf.path[0] == field.path[0])
    found = [f"`{leaf.option} {leaf.default}`" for leaf in own if leaf.default != usual[leaf.path]]
    return "; ".join(found) or (REQUIRED if field.default == REQUIRED else "")


def _algorithms() -> list[str]:
    lines = [
        "`--algorithm NAME` chooses one; then its own fields are `--algorithm.FIELD`. What each computes: "
        "[algorithms](algorithms.md).",
        "",
    ]
    for name, algorithm in ALGORITHMS.items():
        lines += [f"### {name.replace('_', '-')} algorithm", "", meaning_of(algorithm), ""]
        lines += [*table(leaves_of(algorithm, None, ("algorithm",))), ""]
    return lines


def metrics() -> str:
    lines = [
        WRITTEN_BY,
        "",
        "# Metrics",
        "",
        "What the numbers in a run's folder are. metrics.jsonl has one row per step; summary.json is written once, at "
        "the end. A number that could not be computed is null.",
        "",
        'A name with a slash lies inside another one: `seconds/train` is `row["seconds"]["train"]`. Trackers get the '
        "names as they stand here ([watching runs](watching.md)).",
        "",
        f"`{PART}` stands for the name of a part of the reward: that of a reward model in `rewards.preferences`, or of "
        f"your function in `rewards.custom`. `{NUMBER}` stands for a number. A share is between 0 and 1.",
        "",
    ]
    for kind in KINDS:
        lines += [f"## {kind_name(kind.config)}", ""]
        if kind.metrics:
            lines += ["metrics.jsonl:", "", *_names(kind.metrics)]
        if kind.config is GRPOConfig:
            lines += ["and what the [algorithm](algorithms.md) reports:", "", "| name | algorithm | meaning |"]
            lines += ["| --- | --- | --- |", *_algorithm_metrics(), ""]
        lines += ["summary.json:", "", *_names(kind.summary)]
    return "\n".join(lines).rstrip() + "\n"


def _names(names: Names) -> list[str]:
    rows = [f"| `{name}` | {number.unit} | {in_table(number.meaning)} |" for name, number in names.items()]
    return ["| name | unit | meaning |", "| --- | --- | --- |", *rows, ""]


def _algorithm_metrics() -> Iterator[str]:
    """A row for each name and meaning, with the algorithms that share it."""
    having: dict[tuple[str, str], list[str]] = {}
    for algorithm, kind in ALGORITHMS.items():
        for item in kind.METRICS.items():
            having.setdefault(item, []).append(algorithm)
    for (name, meaning), algorithms in having.items():
        yield f"| `{name}` | {', '.join(algorithms)} | {in_table(meaning)} |"


HEAD = ("| field | type | default | bound | meaning |", "| --- | --- | --- | --- | --- |")


def table(fields: Iterable[Field]) -> list[str]:
    return [*HEAD, *map(row, fields)]


def row(field: Field) -> str:
    default = f"`{field.default}`" if field.default and field.default != REQUIRED else field.default
    return f"| {' | '.join([f'`{field.option}`', field.type, default, field.bound, in_table(field.meaning)])} |"


def in_table(text: str) -> str:
    """Text as a cell of Markdown: outside of `code`, what would be read as a tag or a column is escaped."""
    parts: Sequence[str] = re.split(r"(`[^`]*`)", text)
    return "".join(
        part.replace("|", "\\|") if part.startswith("`") else re.sub(r"([|<*])", r"\\\1", part) for part in parts
    )


if __name__ == "__main__":
    raise SystemExit(main())
