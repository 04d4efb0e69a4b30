"""The kind of engine that a configuration names."""

from __future__ import annotations

from megatron_r1.config.engines import engine_entry
from megatron_r1.config.schema import RolloutConfig
from megatron_r1.engines.base import EngineKind
from megatron_r1.errors import ConfigError
from megatron_r1.plugins import imported


def engine_kind(rollout: RolloutConfig) -> EngineKind:
    """That of rollout.engine. ConfigError if its import path leads to none."""
    kind = imported(engine_entry(rollout.engine).kind, "rollout.engine")
    if not (isinstance(kind, type) and issubclass(kind, EngineKind)):
        raise ConfigError(
            f"rollout.engine: {rollout.engine} is {kind!r}; it must be a class that derives from "
            "megatron_r1.engines.base.EngineKind"
        )
    return kind()
