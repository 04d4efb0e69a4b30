"""Words of `megatron-r1 run` that are no fields of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.errors import ConfigError


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
