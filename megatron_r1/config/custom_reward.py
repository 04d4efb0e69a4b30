"""A reward of the user's own, as rewards.custom names it, and the rules of rewards that every stage has."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

from megatron_r1.config.languages import language_fault
from megatron_r1.config.schema import RewardConfig
from megatron_r1.errors import ConfigError
from megatron_r1.plugins import imported

PARTS: tuple[str, ...] = ("accuracy", "format", "language", "length")
"""Names that parts of the reward have already."""

PREFIX = "custom "
"""Before the import path, in the name of the worker's grader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomReward:
    """One entry of rewards.custom."""

    path: str
    name: str
    weight: float
    sees_group: bool

    @property
    def grader(self) -> str:
        return PREFIX + self.path


def custom_reward(entry: str) -> CustomReward:
    """`module:function` or `module:function=WEIGHT`, imported and looked at. ConfigError if it cannot be used."""
    path, _, text = entry.partition("=")
    try:
        weight = float(text) if text else 1.0
        if not math.isfinite(weight):
            raise ValueError
    except ValueError:
        raise ConfigError([f"rewards.custom: {entry}: {text!r} is no weight; write module:function=0.5"]) from None
    if ":" not in path:
        raise ConfigError([f"rewards.custom: {entry} is no import path; write module:function or file.py:function"])
    function = imported(path, "rewards.custom")
    try:
        parameters = len(inspect.signature(function).parameters) if callable(function) else 0
    except ValueError:
        parameters = 0
    if parameters not in (2, 3):
        raise ConfigError(
            [
                f"rewards.custom: {path} must be a function of (problem, completion) or (problem, completion, group); "
                + (f"it has {parameters} parameters" if callable(function) else f"it is a {type(function).__name__}")
            ]
        )
    return CustomReward(path=path, name=path.rpartition(":")[2], weight=weight, sees_group=parameters == 3)


def reward_faults(rewards: RewardConfig) -> list[str]:
    """Faults of rewards besides their bounds, as sentences."""
    fault = language_fault(rewards.language)
    faults = [f"rewards.language is {fault}"] if fault else []
    used = {*PARTS, *(preference.name for preference in rewards.preferences)}
    for entry in rewards.custom:
        try:
            custom = custom_reward(entry)
        except ConfigError as error:
            faults += error.faults
            continue
        if custom.name in used:
            faults.append(f"rewards.custom: {entry}: a part of the reward is called {custom.name} already; rename it")
        used.add(custom.name)
    return faults
