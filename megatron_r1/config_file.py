"""`--config FILE`: where a configuration starts, in place of a recipe or over one. The command line's own fields win.

A TOML or JSON file names `recipe`, or the `kind` of one stage, beside the fields that it sets. A run's own run.json is
such a file (kind and every field), and so is a pipeline's pipeline.json (recipe and every field).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from megatron_r1.config.overlay import overlaid
from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.schema import StageConfig
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.kinds import KINDS, kind_named, kind_of, name_of_kind
from megatron_r1.pipeline.options import CONFIG, split_config
from megatron_r1.recipes.named import recipe_named

Stage = TypeVar("Stage")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """`recipe` or `kind` is empty where the file does not say it."""

    path: Path
    recipe: str
    kind: str
    values: Mapping[str, Any]

    def over(self, word: str) -> StageConfig | PipelineConfig:
        """The configuration of recipe `word` (empty: what the file names) with the file's fields over it.
        ConfigError, naming the file, for what does not fit."""
        if word and self.recipe and word != self.recipe:
            raise self._fault(f"it is for recipe {self.recipe}, the command says {word}; leave one out")
        named = word or self.recipe
        given = recipe_named(named) if named else None
        if given is not None and self.kind and kind_name(given) != self.kind:
            raise self._fault(f"it is of kind {self.kind}, recipe {named} is {kind_name(given)}")
        return self._overlaid(self._class() if given is None else type(given), given)

    def for_kind(self, kind: type[Stage]) -> Stage:
        """That kind of stage, with the file's fields over its defaults."""
        if self.recipe or (self.kind and self._class() is not kind):
            raise self._fault(f"it is of {self.recipe or self.kind}; expected one of another kind of stage")
        return self._overlaid(kind, None)

    def _overlaid(self, kind: type[Any], given: Any) -> Any:
        try:
            return overlaid(kind, given, self.values, missing=tyro.MISSING)
        except ConfigError as error:
            raise ConfigError([f"{self.path}: {fault}" for fault in error.faults]) from error

    def _class(self) -> type:
        if not self.kind:
            raise self._fault(
                'it names neither recipe nor kind; put recipe = "grpo_671b" (or another) at its top, or say the recipe '
                f"before {CONFIG}"
            )
        try:
            return kind_named(self.kind).config
        except ConfigError as error:
            raise ConfigError([f"{self.path}: {fault}" for fault in error.faults]) from error

    def _fault(self, words: str) -> ConfigError:
        return ConfigError([f"{self.path}: {words}"])


def read_config_file(path: Path) -> ConfigFile:
    """ConfigError, naming the file and where in it, for what is neither TOML nor JSON with a table at its top."""
    if path.is_dir():
        inside = next((path / name for name in ("run.json", "pipeline.json") if (path / name).is_file()), None)
        raise ConfigError(f"{CONFIG} {path} is a folder; name a file" + (f", such as {inside}" if inside else ""))
    if path.suffix not in (".json", ".toml"):
        raise ConfigError(f"{CONFIG} {path}: the name must end in .toml or .json")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, object_pairs_hook=_once)
    except OSError as error:
        raise ConfigError(f"{CONFIG} {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise ConfigError(f"{CONFIG} {path} is not {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{CONFIG} {path}: expected a table of fields at the top")
    names = {}
    for name in ("recipe", "kind"):
        names[name] = content.pop(name, "")
        if not isinstance(names[name], str):
            raise ConfigError(f"{CONFIG} {path}: {name} is {names[name]!r}; it must be a name in quotes")
    if isinstance(content.get("config"), dict):  # run.json and pipeline.json
        if not any(names.values()):
            raise ConfigError(
                f"{CONFIG} {path} was written by an earlier version, which did not say what it is of; say the recipe "
                f"before {CONFIG}, or add its kind beside its config: one of {', '.join(k.name for k in KINDS)}"
            )
        if others := sorted(content.keys() - {"name", "inputs", "config"}):
            raise ConfigError(f"{CONFIG} {path}: {', '.join(others)} stands beside config; fields belong inside it")
        content = content["config"]
    return ConfigFile(path, **names, values=content)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's last word of several would win silently. ValueError for a key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one table")
    return found


def kind_name(config: StageConfig | PipelineConfig) -> str:
    return "a pipeline" if isinstance(config, PipelineConfig) else name_of_kind(kind_of(config))


def recipe_word(words: Sequence[str]) -> str:
    """The recipe that a command or its file names; empty where neither does."""
    words, file = split_config(words)
    if words and not words[0].startswith("-"):
        return words[0]
    return "" if file is None else read_config_file(file).recipe
