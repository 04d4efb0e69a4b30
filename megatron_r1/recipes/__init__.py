"""Recipes: typed functions that return a RunConfig. The command line overrides any field."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_r1.config.schema import RunConfig
from megatron_r1.recipes.r1_zero import grpo_671b, grpo_smollm2
from megatron_r1.recipes.tiny import quickstart, tiny

RECIPES: Mapping[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for recipe in (quickstart, tiny, grpo_smollm2, grpo_671b)
}
"""Every recipe by the name that the command line uses."""
