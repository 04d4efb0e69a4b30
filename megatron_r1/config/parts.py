"""Rules of parts that several kinds of stage have; each stage that has the part asks for them here.

Bounds of single numbers are written at the fields (bounds.py) and asked for once, for a whole configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_r1.config.gym_tasks import task_faults
from megatron_r1.config.lengths import length_faults
from megatron_r1.config.schema import DataConfig, RolloutConfig
from megatron_r1.config.server_faults import server_faults
from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import ConfigError
from megatron_r1.plugins import imported, is_import_path


def problem_faults(data: DataConfig) -> list[str]:
    """Of where problems come from."""
    faults = []
    if sum(map(bool, (data.tasks, data.files, data.source))) != 1:
        faults.append(
            "data.tasks and data.files: give one of them, reasoning-gym tasks or jsonl files, or data.source alone"
        )
    if data.source:
        faults += import_faults(data.source, "data.source")
    faults += task_faults(data.tasks)
    return faults + missing_files({"data.files": data.files, "data.holdout_files": data.holdout_files})


def import_faults(path: str, field: str) -> list[str]:
    """Of an import path that must name a function."""
    if not is_import_path(path):
        return [f"{field} is {path!r}; it must be module:function or file.py:function"]
    try:
        found = imported(path, field)
    except ConfigError as error:
        return error.faults
    return [] if callable(found) else [f"{field}: {path} is a {type(found).__name__}; it must be a function"]


def missing_files(named: Mapping[str, Sequence[Path]]) -> list[str]:
    """Files that are not there, by the field that names them."""
    return [f"{name}: {file} does not exist" for name, files in named.items() for file in files if not file.is_file()]


def rollout_faults(rollout: RolloutConfig, shape: ModelShape | None, *, fp8_block: int | None) -> list[str]:
    """Of servers that sample from a model of this shape. `fp8_block`: side of its blocks, where its weights are FP8."""
    return request_faults(rollout, shape) + device_faults(rollout) + server_faults(rollout, shape, fp8_block=fp8_block)


def request_faults(rollout: RolloutConfig, shape: ModelShape | None) -> list[str]:
    """Of what is asked for, whoever's the server is: the lengths of prompts and answers."""
    faults = []
    if rollout.sampling.max_new_tokens >= rollout.max_model_len:
        faults.append(
            f"rollout.sampling.max_new_tokens is {rollout.sampling.max_new_tokens}; it leaves no room for a prompt in "
            f"rollout.max_model_len = {rollout.max_model_len}"
        )
    return faults + length_faults("rollout.max_model_len", rollout.max_model_len, shape, served=True)


def device_faults(rollout: RolloutConfig) -> list[str]:
    """Of where the servers run."""
    if not rollout.devices or len(rollout.devices) == rollout.num_engines:
        return []
    return [
        f"rollout.devices has {len(rollout.devices)} entries; give one for each of rollout.num_engines = "
        f"{rollout.num_engines} servers, such as 4,5,6,7, or none"
    ]


def sample_faults(samples: int, rollout: RolloutConfig) -> list[str]:
    """Of several samples of a problem."""
    if rollout.sampling.temperature or samples <= 1:
        return []
    return [f"samples is {samples}; at rollout.sampling.temperature 0 they are all the same: use 1"]
