"""Faults of the models that are served beside the policy: reward models and a teacher."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_r1.config.custom_reward import TAKEN
from megatron_r1.config.lengths import length_faults
from megatron_r1.config.schema import RolloutConfig
from megatron_r1.config.server_faults import served_otherwise, splits
from megatron_r1.config.shape import ModelShape, hf_files, load_shape
from megatron_r1.config.trainer_faults import reward_model_faults
from megatron_r1.errors import ConfigError
from megatron_r1.stages.grpo.config import GRPOConfig

PART_NAME = re.compile(r"[A-Za-z0-9_-]+")


def preference_faults(config: GRPOConfig, policy: ModelShape | None) -> list[str]:
    """Of rewards.preferences; `policy` is the shape of model.path, where it could be read."""
    faults: list[str] = []
    used = set(TAKEN)
    own = _tokenizer(config.model.path)
    for number, preference in enumerate(config.rewards.preferences):
        field = f"rewards.preferences[{number}]"
        if not PART_NAME.fullmatch(preference.name) or preference.name in used:
            faults.append(
                f"{field}.name is {preference.name!r}; it must be a name (letters, digits, - and _) that no other part "
                "of the reward and no metric has"
            )
        used.add(preference.name)
        if not preference.domains:
            faults.append(f"{field}.domains is empty; name the domains of the problems that it scores")
        found = _tokenizer(preference.model)
        if found is None:
            faults.append(f"{field}.model: {preference.model} has no tokenizer.json; it must be a reward model stage's")
        elif found != own:
            faults.append(
                f"{field}.model: {preference.model} has another tokenizer than model.path "
                f"{config.model.path}; train the reward model from a model of the policy's family"
            )
        else:
            faults += _model_faults(config, preference.model, field, preference.tensor_parallel, policy, judge=True)
    return faults


def teacher_faults(config: GRPOConfig, policy: ModelShape | None) -> list[str]:
    """Of the teacher, whose server scores the policy's samples; `policy` as above."""
    teacher, field, faults = config.teacher, "algorithm.teacher", list[str]()
    if teacher is None or teacher.model is None:
        return faults
    tokenizer = _tokenizer(teacher.model)
    if tokenizer is None:
        faults.append(f"{field}.model: {teacher.model}/tokenizer.json does not exist; it must be a Hugging Face folder")
    elif tokenizer != _tokenizer(config.model.path):
        faults.append(
            f"{field}.model: {teacher.model} has another tokenizer than model.path {config.model.path}; a student with "
            "a tokenizer of its own learns from samples (stage distill_set, then SFT)"
        )
    else:
        faults += _model_faults(config, teacher.model, field, teacher.tensor_parallel, policy, judge=False)
    return faults


def _model_faults(
    config: GRPOConfig, folder: Path, field: str, tensor: int, policy: ModelShape | None, *, judge: bool
) -> list[str]:
    """Of the model itself, served for texts as long as the rollouts'; `judge`: it is a reward model."""
    try:
        shape = load_shape(folder)
    except ConfigError as error:
        return [fault.replace("model.path", f"{field}.model", 1) for fault in error.faults]
    if judge and not shape.reward_head:
        return [f"{field}.model: {folder} has no reward head; it must be the model of a reward model stage"]
    if not judge and (faults := reward_model_faults(shape, folder, f"{field}.model")):
        return faults
    if shape.fp8_block is not None and config.rollout.device == "cpu":
        return [f"{field}.model: {folder} is FP8, of which vLLM has no products on CPUs: take it in bf16"]
    longest = config.rollout.max_model_len
    faults = length_faults("its server's longest text", longest, shape, served=True) + served_otherwise(shape)
    asked = f"{field}.model: {folder}, whose server takes texts of rollout.max_model_len = {longest}"
    faults = [f"{asked}: {fault.removeprefix('model.path: ')}" for fault in faults]
    return faults + _row_faults(folder, field, shape, policy) + _split_faults(config.rollout, field, tensor, shape)


def _row_faults(folder: Path, field: str, shape: ModelShape, policy: ModelShape | None) -> list[str]:
    """Its embedding needs a row for every token that the policy may write: of the policy's rows, those that the common
    tokenizer has a token for."""
    if policy is None or shape.vocab_size >= policy.vocab_size:
        return []
    needed = min(policy.vocab_size, _tokens(folder))
    if shape.vocab_size >= needed:
        return []
    return [
        f"{field}.model: {folder} has an embedding of {shape.vocab_size} rows (config.json, vocab_size), and the "
        f"policy may write tokens up to {needed - 1}: enlarge it with transformers' resize_token_embeddings, or take "
        "another model"
    ]


def _split_faults(rollout: RolloutConfig, field: str, tensor: int, shape: ModelShape) -> list[str]:
    experts = rollout.expert_parallel and tensor > 1 and shape.moe is not None
    if tensor < 1 or splits(shape, tensor, expert_parallel=experts):
        return []
    return [
        f"{field}.tensor_parallel is {tensor}; it must divide attention heads, feed-forward and expert sizes of "
        f"{field}.model"
    ]


def _tokenizer(folder: Path) -> bytes | None:
    file = hf_files(folder) / "tokenizer.json"
    return file.read_bytes() if file.is_file() else None


def _tokens(folder: Path) -> int:
    """One more than the largest id in tokenizer.json; 0 where it cannot be read (whoever loads it says why)."""
    try:
        read = json.loads(_tokenizer(folder) or b"")
        vocabulary = read["model"]["vocab"]
        known = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        ids = [*known, *(token["id"] for token in read.get("added_tokens") or ())]
        return 1 + max(ids, default=-1)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return 0
