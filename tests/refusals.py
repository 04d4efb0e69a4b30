"""What a configuration is refused with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_r1.errors import ConfigError


def faults_of(check: Callable[[Any], object], config: object) -> list[str]:
    """The faults that `check` raises; none if the configuration passes."""
    try:
        check(config)
    except ConfigError as error:
        return error.faults
    return []
