"""Every fault of a configuration, found together and before torch is imported.

`find_faults` returns sentences of the form: field, value, law, remedy. An empty list means that the run may start.
Faults of content (a malformed jsonl line, a missing tensor) are found later, where the content is read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_r1.algorithms.base import Setting
from megatron_r1.algorithms.checks import algorithm_faults
from megatron_r1.bounds import number_faults
from megatron_r1.config import deadlines
from megatron_r1.config.colocation import colocation_faults
from megatron_r1.config.custom_reward import custom_reward, reward_faults
from megatron_r1.config.model_folder import mtp_left_out
from megatron_r1.config.parts import device_faults, problem_faults, request_faults
from megatron_r1.config.run_folder import folder_faults
from megatron_r1.config.schema import RolloutConfig
from megatron_r1.config.server_faults import server_faults
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.config.trainer_faults import (
    checkpoint_faults,
    mtp_faults,
    optimizer_faults,
    parallel_faults,
    row_faults,
    train_faults,
    weight_faults,
)
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.rollout.recording import Header, Recording
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.served_beside import preference_faults, teacher_faults


def validate(config: GRPOConfig, *, folder: bool = True) -> ModelShape:
    """The model's shape, if the configuration is sound. Raises ConfigError listing every fault.

    `folder`: whether run_dir may be used is looked at too, and all of train_only (not by a rank whose folder has just
    been made)."""
    faults: list[str] = []
    shape: ModelShape | None = None
    try:
        shape = load_shape(config.model.path)
    except ConfigError as error:
        faults += error.faults
    if shape is not None:
        faults += weight_faults(config.model, shape) + mtp_faults(config.model, shape)
    faults += number_faults(config)
    faults += parallel_faults(config.parallel, shape)
    faults += train_faults(config.train, config.parallel, config.model, shape)
    faults += row_faults(config.train, config.rollout.max_model_len, "rollout.max_model_len")
    faults += optimizer_faults(config.optimizer, config.train, config.device)
    faults += _recorded_faults(config, shape, steps=folder)
    if config.train_only is None:
        faults += _rollout_faults(config, shape)
    faults += _grpo_faults(config)
    faults += checkpoint_faults(config.checkpoint_every, config.optimizer)
    if config.keep_best_checkpoint and not (config.eval_every and config.checkpoint_every):
        faults.append("keep_best_checkpoint is True; it needs eval_every and checkpoint_every above 0")
    elif config.keep_best_checkpoint and config.checkpoint_every % config.eval_every:
        faults.append(
            f"checkpoint_every is {config.checkpoint_every}; for keep_best_checkpoint it must be a multiple of "
            f"eval_every = {config.eval_every}"
        )
    faults += deadlines.phase_faults(config.deadlines, config.train)
    if config.rollout.weights_gb_per_second > 0:
        served = config.rollout.fp8_folder or config.model.path
        size = deadlines.folder_bytes(served)
        faults += deadlines.start_faults(config.rollout, config.deadlines, size)
    faults += _algorithm_faults(config)
    if config.train_only is None:
        faults += problem_faults(config.data) + preference_faults(config, shape) + teacher_faults(config, shape)
    if folder:
        faults += folder_faults(config)
    if faults or shape is None:
        raise ConfigError(faults)
    return shape


def header_of(config: GRPOConfig, shape: ModelShape) -> Header:
    """What the configuration's rollouts are of."""
    return Header.of(
        config.model.path,
        shape,
        temperature=config.rollout.sampling.temperature,
        max_model_len=config.rollout.max_model_len,
        routes=config.rollout.routes != "off",
        teacher=None if config.teacher is None else config.teacher.model,
    )


def _recorded_faults(config: GRPOConfig, shape: ModelShape | None, *, steps: bool) -> list[str]:
    """Of a run that only samples, or only trains on what was sampled. `steps`: the end of every recorded step is looked
    at, which not every rank has to do."""
    faults: list[str] = []
    if config.rollout_only and config.model.initialise == "random":
        faults.append("rollout_only is True and model.initialise random; there are no weights to sample from yet")
    if config.rollout_only and config.model.load_from is not None:
        faults.append(
            f"rollout_only is True and model.load_from {config.model.load_from}; servers start from model.path's "
            "weights and nothing sends them others: give the weights as model.path, a Hugging Face folder"
        )
    if config.train_only is not None and config.keep_rollouts:
        faults.append("keep_rollouts is True and train_only is given; nothing is sampled: leave keep_rollouts out")
    if config.train_only is None or shape is None:
        return faults
    if config.rollout_only:
        return [*faults, "rollout_only is True and train_only is given; a run does one of them"]
    recording = Recording(config.train_only)
    try:
        found = recording.header().differences(header_of(config, shape))
        if not found and steps and (fault := recording.fault()):
            found = [fault]
    except DataError as error:
        found = [str(error)]
    return faults + [f"train_only: {config.train_only} cannot be trained on: {fault}" for fault in found]


def _rollout_faults(config: GRPOConfig, shape: ModelShape | None) -> list[str]:
    rollout, sampling, faults = config.rollout, config.rollout.sampling, []
    if rollout.device == "cpu" and rollout.sync == "nccl":
        faults.append("rollout.sync is nccl; on rollout.device cpu use gloo or ipc")
    if rollout.device == "cuda" and rollout.sync == "gloo":
        faults.append("rollout.sync is gloo; on rollout.device cuda use nccl (separate GPUs) or ipc (shared GPUs)")
    if rollout.sync == "ipc" and rollout.device == "cuda":
        faults += _beside_faults(config)
    faults += request_faults(rollout, shape) + device_faults(rollout)
    faults += colocation_faults(rollout, config.train)
    if rollout.fp8_folder is not None:
        faults += _fp8_rollout_faults(rollout, rollout.fp8_folder, shape)
    else:
        faults += server_faults(rollout, shape)
    if rollout.draft_tokens and shape is not None and not shape.num_mtp_layers:
        why = mtp_left_out(config.model.path) or "config.json has no num_nextn_predict_layers"
        faults.append(f"rollout.draft_tokens is {rollout.draft_tokens}, but {why}: use 0")
    if rollout.draft_tokens and rollout.device == "cpu":
        faults.append(f"rollout.draft_tokens is {rollout.draft_tokens}; drafting is offered on GPUs only: use 0")
    if rollout.routes != "off" and shape is not None and shape.moe is None:
        faults.append(f"rollout.routes is {rollout.routes}; the model of model.path has no experts: use off")
    if sampling.temperature == 0:
        faults.append(f"rollout.sampling.temperature is {sampling.temperature}; training needs samples: use 1.0")
    if sampling.top_p != 1.0 or sampling.top_k not in (0, -1):
        faults.append(
            "rollout.sampling.top_p and top_k must be 1.0 and 0 in training: the trainer computes probabilities over "
            "the whole vocabulary"
        )
    return faults


def _beside_faults(config: GRPOConfig) -> list[str]:
    """Servers beside those that share the trainer's GPUs: they never sleep, so they need GPUs of their own."""
    beside = {f"rewards.preferences[{i}].devices": each.devices for i, each in enumerate(config.rewards.preferences)}
    if config.teacher is not None:
        beside["algorithm.teacher.devices"] = config.teacher.devices
    return [
        f"{field} is empty; with rollout.sync ipc that server would share the trainer's GPUs and never sleep: give it "
        "GPUs of its own, such as 7"
        for field, devices in beside.items()
        if not devices
    ]


def _fp8_rollout_faults(rollout: RolloutConfig, folder: Path, shape: ModelShape | None) -> list[str]:
    if rollout.device == "cpu":
        return [f"rollout.fp8_folder is {folder}; vLLM has no FP8 products on CPUs: leave it out"]
    try:
        found = load_shape(folder)
    except ConfigError as error:
        return [fault.replace("model.path", "rollout.fp8_folder", 1) for fault in error.faults]
    if found.fp8_block is None:
        return [
            f"rollout.fp8_folder: {folder} is not FP8; make it: tools/convert_checkpoint.py hf-to-hf SRC DST "
            "--precision fp8"
        ]
    if shape is None:
        return server_faults(rollout, found, fp8_block=found.fp8_block)
    # MTP layers that the trainer lacks may lie there: nothing is drafted then (draft_tokens are refused).
    mtp_layers = min(found.num_mtp_layers, shape.num_mtp_layers)
    if dataclasses.replace(found, fp8_block=None, num_mtp_layers=mtp_layers) != dataclasses.replace(
        shape, fp8_block=None
    ):
        return [f"rollout.fp8_folder: {folder} holds another model than model.path; their config.json must agree"]
    return server_faults(rollout, found, fp8_block=found.fp8_block)


def _grpo_faults(config: GRPOConfig) -> list[str]:
    grpo, faults = config, list[str]()
    if grpo.minibatches > grpo.prompts_per_step:
        faults.append(f"minibatches is {grpo.minibatches}; it must be 1 to prompts_per_step = {grpo.prompts_per_step}")
    faults += _sync_faults(grpo.sync_every, eval_every=grpo.eval_every, checkpoint_every=grpo.checkpoint_every)
    if grpo.target_accuracy > 0 and not grpo.eval_every:
        faults.append(f"target_accuracy is {grpo.target_accuracy}; it needs eval_every > 0")
    if grpo.eval_every and not config.data.validation:
        faults.append(f"eval_every is {grpo.eval_every}; it needs data.validation > 0 problems to evaluate on")
    rewards = config.rewards
    of_rewards = reward_faults(rewards)
    weights = [rewards.accuracy_weight, rewards.format_weight, rewards.language_weight]
    weights += [preference.weight for preference in rewards.preferences]
    weights += [1.0] if of_rewards else [custom_reward(entry).weight for entry in rewards.custom]
    if not any(weights):
        faults.append(
            "rewards.accuracy_weight, format_weight and language_weight are all 0, and no reward model has a weight; "
            "every reward would be 0"
        )
    if config.data.thinking == "off" and rewards.format_weight:
        faults.append(
            f"data.thinking is off and rewards.format_weight {rewards.format_weight}; the format asks for a thought: "
            "use thinking on, or format_weight 0"
        )
    return faults + of_rewards


def _sync_faults(sync_every: int, *, eval_every: int, checkpoint_every: int) -> list[str]:
    """What happens after a sync only, where the servers have the trainer's weights."""
    if sync_every < 1:  # its bounds are looked at elsewhere
        return []
    return [
        f"{field} is {every}; {why}, so it must be a multiple of sync_every = {sync_every}: use "
        f"{-(-every // sync_every) * sync_every}"
        for field, every, why in (
            ("eval_every", eval_every, "between two syncs the servers answer with older weights"),
            ("checkpoint_every", checkpoint_every, "a restart gives the servers the checkpoint's weights"),
        )
        if every % sync_every
    ]


def _algorithm_faults(config: GRPOConfig) -> list[str]:
    sampling = config.rollout.sampling
    return algorithm_faults(
        config.algorithm,
        Setting(
            minibatches=config.minibatches,
            sync_every=config.sync_every,
            recorded_stale=_recorded_stale(config),
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
        ),
    )


def _recorded_stale(config: GRPOConfig) -> bool:
    return config.train_only is not None and config.steps > 1 and Recording(config.train_only).is_stale()
