"""Words of `megatron-r1 run` that are no fields of the configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.errors import ConfigError

CONFIG = "--config"
"""A file of fields, in place of a recipe or over one (config_file.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`first`: run again from this stage on, whatever is current. `last`: stop after it. `only`: just this one."""

    dry_run: bool = False
    first: str | None = None
    last: str | None = None
    only: str | None = None

    def only_for_pipelines(self) -> None:
        """Raises ConfigError if a stage was chosen of a recipe that has none."""
        if self.first or self.last or self.only:
            raise ConfigError("--from, --until and --only choose stages of a pipeline; this recipe is one stage")


def split_options(words: Sequence[str]) -> tuple[list[str], Options]:
    """(the words that are left, the options among them). Raises ConfigError for an option without its stage."""
    names = {"--from": "first", "--until": "last", "--only": "only"}
    left: list[str] = []
    found: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        option, _, value = word.partition("=")
        if option not in names:
            left.append(word)
            continue
        value = value or next(rest, "")
        if not value or value.startswith("--"):
            raise ConfigError(f"{option} needs the name of a stage")
        if names[option] in found:
            raise ConfigError(f"{option} is given twice; it names one stage")
        found[names[option]] = value
    if "only" in found and len(found) > 1:
        raise ConfigError("--only names one stage; it goes with neither --from nor --until")
    dry_run = "--dry-run" in left
    return [word for word in left if word != "--dry-run"], Options(dry_run=dry_run, **found)


def split_config(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """(the words that are left, the file of fields that they name). ConfigError for more than one, or none."""
    left, values = take_option(words, CONFIG)
    for number, value in enumerate(values):
        if not value or value.startswith("--"):
            raise ConfigError(f"{CONFIG} needs a file: a run's run.json, or a TOML file")
        if number:
            raise ConfigError(f"{CONFIG} is given twice; it names one file")
    return left, Path(values[0]) if values else None


def take_option(words: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """(the words without `option`, its values)."""
    left: list[str] = []
    values: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != option:
            left.append(word)
            continue
        values.append(value if equals else next(rest, ""))
    return left, values


def words_after_move(words: Sequence[str], folder: Path, moved: Path) -> list[str]:
    """The same command once `folder` is called `moved`: the file that it names may have gone with it."""
    left, file = split_config(words)
    if file is None or not _lies_in(file, folder):
        return list(words)
    return [*left, CONFIG, str(moved / os.path.relpath(os.path.realpath(file), os.path.realpath(folder)))]


def moving_faults(words: Sequence[str], run_dir: Path) -> list[str]:
    """What forbids the command's file where several nodes read it: it lies in the run's folder, which the first one
    may rename before the others have read it."""
    _, file = split_config(words)
    if file is None or not _lies_in(file, run_dir):
        return []
    return [f"{CONFIG}: {file} lies in run_dir {run_dir}, which may be moved aside; copy the file elsewhere first"]


def _lies_in(file: Path, folder: Path) -> bool:
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))
