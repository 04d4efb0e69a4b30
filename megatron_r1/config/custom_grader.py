"""A grader of the user's own, as rewards.graders names it (docs/extending.md)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from megatron_r1.errors import ConfigError
from megatron_r1.plugins import imported, is_import_path

EXPECTED = "must be a function of (answer, problem), or of (response, problem) to see all that follows the thought"


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomGrader:
    """`sees_response`: its first parameter is called response, so it gets all that follows the thought."""

    path: str
    sees_response: bool


def custom_grader(path: str) -> CustomGrader:
    """`module:function` or `file.py:function`, imported and looked at. ConfigError if it cannot be used."""
    if not is_import_path(path):
        raise ConfigError(f"rewards.graders: {path} is no import path; write module:function or file.py:function")
    function = imported(path, "rewards.graders")
    if inspect.isclass(function):
        raise ConfigError(f"rewards.graders: {path} is a class; it {EXPECTED}")
    try:
        signature = inspect.signature(function)
        signature.bind("", None)
    except (TypeError, ValueError):
        raise ConfigError(f"rewards.graders: {path} {EXPECTED}") from None
    first = next(iter(signature.parameters))
    if first == "self":  # a method, without its object
        raise ConfigError(f"rewards.graders: {path} {EXPECTED}")
    return CustomGrader(path=path, sees_response=first == "response")


def grader_faults(paths: tuple[str, ...]) -> list[str]:
    """Faults of rewards.graders, as sentences."""
    faults = []
    for path in paths:
        try:
            custom_grader(path)
        except ConfigError as error:
            faults += error.faults
    return faults
