"""What a command line chooses by name before it sets fields: `--algorithm dapo`, or `--STAGE.algorithm dapo`.

An algorithm's settings are its own, so the choice comes first and brings that algorithm's defaults; then the command
line offers its fields (`--algorithm.sampling-rounds 5`) and no others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from megatron_r1.algorithms import algorithm_named
from megatron_r1.errors import ConfigError

T = TypeVar("T")

FIELD = "algorithm"


def with_choices(recipe: T, words: Sequence[str]) -> tuple[T, list[str]]:
    """The recipe with the algorithms that `words` name, and the words that are left. ConfigError for a name that is
    none, and for a stage without an algorithm."""
    left: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        path = option.removeprefix("--").replace("-", "_").split(".")
        if not option.startswith("--") or path[-1] != FIELD:
            left.append(word)
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("--"):
            raise ConfigError([f"{option} needs the name of an algorithm, such as dapo, or module:Class"])
        recipe = _replaced(recipe, path, value, option, recipe)
    return recipe, left


def _replaced(config: Any, path: Sequence[str], value: str, option: str, recipe: Any) -> Any:
    names = [field.name for field in dataclasses.fields(config)] if _is_part(config) else []
    if path[0] not in names:
        raise ConfigError([f"{option}: there is no {'.'.join(path)} here; {_remedy(recipe)}"])
    if len(path) == 1:
        return dataclasses.replace(config, **{path[0]: algorithm_named(value, option.removeprefix("--"))})
    return dataclasses.replace(
        config, **{path[0]: _replaced(getattr(config, path[0]), path[1:], value, option, recipe)}
    )


def _is_part(config: object) -> bool:
    return dataclasses.is_dataclass(config) and not isinstance(config, type)


def _remedy(recipe: Any) -> str:
    """The options of this recipe that name an algorithm."""
    stages = [field.name for field in dataclasses.fields(recipe) if hasattr(getattr(recipe, field.name), FIELD)]
    options = [f"--{name}.{FIELD}" for name in stages]
    return f"use {' or '.join(options)}" if options else "only stages of GRPO have an algorithm"
