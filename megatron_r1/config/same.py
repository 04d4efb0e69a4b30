"""Whether two runs compute the same: their configurations, apart from where they run and what they show on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_r1.algorithms import Algorithm, name_of

PLACE = frozenset(
    {
        "name",
        "run_dir",
        "if_exists",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_best_checkpoint",
        "keep_rollouts",
        "deadlines",
        "max_skipped_steps",
        "mismatch_bound",
        "save_every",
        "validate_every",
        "rollouts_logged_per_step",
        "rewards.num_workers",
        "rollout.start_timeout_seconds",
        "rollout.stall_seconds",
        "rollout.request_timeout_seconds",  # of older runs
        "rollout.weights_gb_per_second",
        "rollout.max_restarts",
        "train.collective_timeout_seconds",
        "train.deterministic",
        "train.gpu",
        "train.logprob_chunk_tokens",
        "train.offload",
        "train.recompute",
        "train.threads_per_rank",
        "track",
        "parallel",
        "rollout.check_tensors",
        "rollout.devices",
        "rollout.enforce_eager",
        "rollout.expert_parallel",
        "rollout.kv_cache_gib",
        "rollout.max_num_seqs",
        "rollout.memory_fraction",
        "rollout.num_engines",
        "rollout.sleep_level",
        "rollout.sync",
        "rollout.sync_bucket_mib",
        "rollout.tensor_parallel",
        "rollout.threads",
    }
)
"""Fields, by their paths, that change no result, or only by rounding: a run may go on with others. So are those that
only end a run which something is wrong with: its error names them as the remedy."""


WITHOUT_EFFECT = {"algorithm.truncated_importance_cap": 0.0}
"""Fields of older runs that are no more, with the value at which they changed nothing."""


def same_computation(recorded: Mapping[str, Any], config: object, *, within: str = "") -> bool:
    """Whether `recorded`, a configuration as plain JSON, computes what `config` does. A field that the record does not
    have, because it is newer than the record, must have its default."""
    assert dataclasses.is_dataclass(config)
    if isinstance(config, Algorithm):
        if recorded.get("name") != name_of(config):
            return False
        recorded = {name: value for name, value in recorded.items() if name != "name"}
    fields = {field.name: field for field in dataclasses.fields(config)}
    gone = {f"{within}{name}": value for name, value in recorded.items() if name not in fields}
    if any(path not in PLACE and (path, value) not in WITHOUT_EFFECT.items() for path, value in gone.items()):
        return False
    for name, field in fields.items():
        if f"{within}{name}" in PLACE:
            continue
        value = getattr(config, name)
        if name not in recorded:
            if value != _default(field):
                return False
        elif dataclasses.is_dataclass(value) and isinstance(recorded[name], Mapping):
            if not same_computation(recorded[name], value, within=f"{within}{name}."):
                return False
        elif as_json(value) != recorded[name]:
            return False
    return True


def as_json(value: Any) -> Any:
    """A field's value as JSON would hold it; an algorithm with its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = {"name": name_of(value)} if isinstance(value, Algorithm) else {}
        return name | {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
