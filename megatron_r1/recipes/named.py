"""A recipe by its name, or the user's own by its import path."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.schema import StageConfig
from megatron_r1.errors import ConfigError
from megatron_r1.plugins import imported, is_import_path, told
from megatron_r1.recipes import RECIPES


def about_recipe(word: str) -> str:
    """The recipe's docstring in one line; empty where it has none."""
    recipe = RECIPES[word] if word in RECIPES else imported(word, "recipe")
    return " ".join((recipe.__doc__ or "").split("\n\n")[0].split())


def recipe_named(word: str) -> StageConfig | PipelineConfig:
    """The configuration of that recipe, or of the user's: module:function or file.py:function. ConfigError if it is
    none."""
    if word in RECIPES:
        return RECIPES[word]()
    if not is_import_path(word):
        raise ConfigError(
            f"no recipe is called {word!r}; there are {', '.join(RECIPES)}, or your own, file.py:function"
        )
    recipe = imported(word, "recipe")
    if not callable(recipe):
        raise ConfigError(f"recipe: {word} is a {type(recipe).__name__}; it must be a function that returns one")
    try:
        found: Any = recipe()
    except Exception as error:
        raise ConfigError(f"recipe: {word}{told(error)}") from error
    if isinstance(found, type) or not dataclasses.is_dataclass(found) or not hasattr(found, "run_dir"):
        raise ConfigError(
            f"recipe: {word} returned a {type(found).__name__}; expected a stage's configuration or a pipeline's, as "
            "those of megatron_r1/recipes"
        )
    return found  # pyright: ignore[reportReturnType]
