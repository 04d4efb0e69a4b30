"""The kinds of stage, a line each, and the questions that are asked of a configuration whatever its kind.

A kind of the user's own needs no line: its `Stage` object stands in the module that defines its configuration."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from megatron_r1.config.packages import installed_versions, plugin_faults, version_faults
from megatron_r1.config.schema import StageConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.config.track import tracker_faults
from megatron_r1.errors import ConfigError
from megatron_r1.planning.fit import check_fit
from megatron_r1.planning.needs import Needs
from megatron_r1.plugins import import_path_of, imported, is_import_path
from megatron_r1.stages.evaluate.stage import STAGE as EVALUATE
from megatron_r1.stages.grpo.stage import STAGE as GRPO
from megatron_r1.stages.rejection.stage import STAGE as REJECTION
from megatron_r1.stages.reward_model.stage import STAGE as REWARD_MODEL
from megatron_r1.stages.sft.stage import STAGE as SFT
from megatron_r1.stages.stage import Stage
from megatron_r1.toy.tiny_world.stage import STAGE as TINY_WORLD
from megatron_r1.toy.warm_up.stage import STAGE as WARM_UP

KINDS: tuple[Stage[Any], ...] = (
    GRPO,
    SFT,
    REWARD_MODEL,
    REJECTION,
    EVALUATE,
    WARM_UP,
    TINY_WORLD,
)


def kind_of(config: StageConfig) -> Stage[Any]:
    """The kind whose configuration this is."""
    return kind_for(type(config))


def kind_for(made: type) -> Stage[Any]:
    """The kind of a configuration's class: the `Stage` beside it in its module, or one of ours. ConfigError if it has
    none."""
    beside = [one for one in vars(sys.modules[made.__module__]).values() if isinstance(one, Stage)]
    for kind in (*(kind for kind in beside if kind.config is made), *KINDS):
        if issubclass(made, kind.config):
            return kind
    raise ConfigError(
        f"{import_path_of(made)} is of no kind of stage: put a Stage(config={made.__name__}, ...) beside it "
        "(docs/extending.md)"
    )


def kind_named(word: str) -> Stage[Any]:
    """By the name that `name_of_kind` gives. ConfigError if there is none."""
    if is_import_path(word):
        return kind_for(imported(word, "kind"))
    names = {kind.name: kind for kind in KINDS}
    if word not in names:
        raise ConfigError(
            f"kind is {word!r}; it must be one of {', '.join(names)}, or file.py:Config of a kind of your own"
        )
    return names[word]


def name_of_kind(kind: Stage[Any]) -> str:
    """What run.json calls it: its name, or where the configuration's class of a user's kind is imported from."""
    return kind.name if kind in KINDS else import_path_of(kind.config)


def needs_of(config: StageConfig) -> Needs:
    return kind_of(config).needs(config)


def check(config: StageConfig, *, folder: bool = True) -> ModelShape | None:
    """The shape of the stage's model, if it has one. Raises ConfigError listing every fault. `folder`: whether run_dir
    may be used is looked at too. A stage for GPUs must fit them."""
    shape = kind_of(config).validate(config, folder=folder)
    needs = needs_of(config)
    faults = version_faults(needs.packages, installed_versions()) + plugin_faults(needs.packages)
    faults += tracker_faults(config)
    if faults:
        raise ConfigError(faults)
    if shape is not None:
        check_fit(needs, shape)
    return shape


def summary_of(config: StageConfig, shape: ModelShape | None) -> str:
    """What is about to run, in a few lines."""
    folder = f"run folder: {config.run_dir}"
    if shape is None:
        return folder
    needs = needs_of(config)
    return "\n".join([*kind_of(config).describe(config, needs, shape), folder, check_fit(needs, shape)]).rstrip()


def loop_of(config: StageConfig) -> Callable[..., dict[str, Any]]:
    """The stage's function: (config, shape, device) on a trainer rank, (config) in the only process. Imports torch:
    the command line has to answer without it."""
    return kind_of(config).load()
