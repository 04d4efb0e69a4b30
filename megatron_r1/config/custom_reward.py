"""A reward of the user's own, as rewards.custom names it, and the rules of rewards that every stage has."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

from megatron_r1.algorithms import ALGORITHMS
from megatron_r1.algorithms.base import RESERVED
from megatron_r1.config.custom_grader import grader_faults
from megatron_r1.config.languages import language_fault
from megatron_r1.config.schema import RewardConfig
from megatron_r1.errors import ConfigError
from megatron_r1.plugins import imported

TAKEN = (
    frozenset(("accuracy", "format", "language", "length"))
    | RESERVED
    | {name for kind in ALGORITHMS.values() for name in kind.METRICS}
)
"""Names that parts of the reward and other metrics have already."""

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
    takes = _parameters(function)
    if takes is None:
        raise ConfigError(
            f"rewards.custom: {path} must be a function of (problem, completion) or (problem, completion, group); the "
            "third is given if it has no default, or is called group: all completions of the problem"
        )
    return CustomReward(
        path=path, name=path.rpartition(":")[2].rpartition(".")[2], weight=weight, sees_group=takes == 3
    )


def _parameters(function: object) -> int | None:
    """How many arguments it is called with, 2 or 3; None if with neither."""
    if not callable(function):
        return None
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    named = [
        one for one in signature.parameters.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    if named and named[0].name == "self":
        return None  # a method, without its object
    third = named[2] if len(named) > 2 else None
    takes = 3 if third is not None and (third.default is third.empty or third.name == "group") else 2
    try:
        signature.bind(*range(takes))
    except TypeError:
        return None
    return takes


def reward_faults(rewards: RewardConfig) -> list[str]:
    """Faults of rewards besides their bounds, as sentences."""
    fault = language_fault(rewards.language)
    faults = [f"rewards.language is {fault}"] if fault else []
    faults += grader_faults(rewards.graders)
    used = {*TAKEN, *(preference.name for preference in rewards.preferences)}
    for entry in rewards.custom:
        try:
            custom = custom_reward(entry)
        except ConfigError as error:
            faults += error.faults
            continue
        if custom.name in used:
            faults.append(f"rewards.custom: {entry}: a reward or a metric is called {custom.name} already; rename it")
        used.add(custom.name)
    return faults
