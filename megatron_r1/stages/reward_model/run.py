"""Reward model training as a stage: preference pairs to a Hugging Face folder with a head of one value.

Runs on every trainer rank. The folder is one of transformers' sequence classifiers with one label, which vLLM serves;
megatron_r1.json in it says what part of a response it judges and the scale of its values.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_r1.config.architectures import ARCHITECTURES
from megatron_r1.config.shape import ModelShape
from megatron_r1.data.packing import RowLayout
from megatron_r1.data.preferences import JudgedEncoder, Pair, read_pairs
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.observe.metrics import write_json
from megatron_r1.observe.progress import PAIR_COLUMNS, duration
from megatron_r1.policy.policy import Policy
from megatron_r1.stages.common.divergence import SkippedSteps
from megatron_r1.stages.common.trainer import EXPORT_DTYPE, StepLog, build_policy, printer, row_layout
from megatron_r1.stages.reward_model.config import RewardModelConfig
from megatron_r1.stages.reward_model.loss import ranked_right, train_pairs, values_of
from megatron_r1.types import TrainingSequence
from megatron_r1.weights.save import save_hf_folder

EncodedPair = tuple[TrainingSequence, TrainingSequence]


def run_reward_model(config: RewardModelConfig, shape: ModelShape, device: torch.device) -> dict[str, Any]:
    """The whole stage on this rank; the folder is prepared. Returns the summary (also in summary.json, on rank 0)."""
    begun = time.perf_counter()
    say = printer()
    tokenizer = load_tokenizer(config.model.path)
    encoder = JudgedEncoder(template=config.data.template, tokenizer=tokenizer, part=config.data.part)
    split = split_pairs(config, encoder, read_pairs(config.data.files))
    num_steps = -(-len(split.training) * config.data.epochs // config.data.batch_pairs)
    say("\n".join(_told(config, split, num_steps)))
    layout = row_layout(config, tokenizer.pad_id, vocab_size=shape.vocab_size)
    policy = build_policy(
        config,
        dataclasses.replace(shape, reward_head=True, num_mtp_layers=0),
        device,
        model=config.model,
        total_steps=num_steps,
    )
    held_out = [sequence for pair in split.validation for sequence in pair]
    before = values_of(policy, held_out, layout)
    _train(config, policy, split.training, layout, num_steps)
    after = values_of(policy, held_out, layout)
    scale = {"value_mean": float(after.mean()), "value_std": float(after.std())}
    _export(config, policy, shape, {"step": num_steps, **scale})
    summary = {
        "steps": num_steps,
        "pairs": len(split.training),
        "too_long": split.too_long,
        "same": split.same,
        "pair_accuracy_before": ranked_right(before),
        "pair_accuracy_after": ranked_right(after),
        **scale,
        "seconds_total": time.perf_counter() - begun,
    }
    if dist.get_rank() == 0:
        write_json(config.run_dir / "summary.json", summary)
    say(
        f"validation pairs ranked right {summary['pair_accuracy_before']:.1%} -> {summary['pair_accuracy_after']:.1%}; "
        f"{config.run_dir / 'model'} written, {duration(summary['seconds_total'])} in all"
    )
    return summary


def _told(config: RewardModelConfig, split: PairSplit, num_steps: int) -> Iterator[str]:
    data = config.data
    yield f"{len(split.training):,} pairs to train on, {len(split.validation):,} to validate; {num_steps:,} steps"
    if split.too_long:
        yield f"left out: {split.too_long:,} pairs of more than data.max_tokens = {data.max_tokens:,}"
    if split.same:
        yield f"left out: {split.same:,} pairs whose responses do not differ in what is judged, the {data.part}"


def _train(
    config: RewardModelConfig, policy: Policy, training: Sequence[EncodedPair], layout: RowLayout, num_steps: int
) -> None:
    skips = SkippedSteps(config.max_skipped_steps)
    with StepLog(config, stage="reward_model", num_steps=num_steps, columns=PAIR_COLUMNS) as log:
        for step in range(num_steps):
            marked = time.perf_counter()
            batch = batch_at(training, step, config)
            result = train_pairs(policy, batch, layout)
            skips.check(result.step, step)
            tokens, seconds = sum(map(len, batch)), time.perf_counter() - marked
            row = {
                "step": step,
                "pair_loss": result.loss,
                "pair_accuracy": result.accuracy,
                "margin": result.margin,
                "grad_norm": result.step.grad_norm,
                "lr": result.step.learning_rate,
                "skipped": result.step.skipped,
                "tokens": tokens,
                "seconds": seconds,
            }
            log.write(step, row, tokens_per_second=tokens / max(seconds, 1e-9))


def _export(config: RewardModelConfig, policy: Policy, shape: ModelShape, told: Mapping[str, float]) -> None:
    """Write run_dir/model, with `told` in its megatron_r1.json. A collective."""
    save_hf_folder(
        policy.weights(dtype=EXPORT_DTYPE[config.save_dtype]),
        config.model.path,
        config.run_dir / "model",
        extra={"stage": config.name, "part": config.data.part, "template": config.data.template, **told},
        config_changes={
            "architectures": [ARCHITECTURES[shape.architecture].classifier],
            "num_labels": 1,
            "num_nextn_predict_layers": 0,
        },
    )
    dist.barrier()


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSplit:
    """Pairs as token ids, and how many were left out: those longer than data.max_tokens (`too_long`), and those whose
    responses are the `same` where they are judged (they differ in the thought, say)."""

    training: list[EncodedPair]
    validation: list[EncodedPair]
    too_long: int
    same: int


def split_pairs(config: RewardModelConfig, encoder: JudgedEncoder, pairs: Sequence[Pair]) -> PairSplit:
    """The pairs in a seeded order. A prompt is on one side only.

    ConfigError if nothing is left to train on or to validate."""
    prompts: dict[str, list[EncodedPair]] = {}
    too_long = same = 0
    for pair in pairs:
        encoded = encoder.pair(pair)
        if max(map(len, encoded)) > config.data.max_tokens + 1:
            too_long += 1
        elif np.array_equal(encoded[0].token_ids, encoded[1].token_ids):
            same += 1
        else:
            prompts.setdefault(repr(pair.messages), []).append(encoded)
    groups = [prompts[key] for key in sorted(prompts)]
    order = np.random.default_rng(config.data.seed).permutation(len(groups))
    validation: list[EncodedPair] = []
    training: list[EncodedPair] = []
    for place in order:
        side = validation if len(validation) < config.data.validation else training
        side += groups[place]
    if not groups:
        raise ConfigError(
            f"data.files: of {len(pairs)} pairs {too_long} are longer than data.max_tokens = {config.data.max_tokens}, "
            f"and {same} do not differ in data.part = {config.data.part}; none is left"
        )
    if not training:
        raise ConfigError(
            f"data.validation: {config.data.validation} of {len(validation)} pairs with {len(groups)} different "
            "prompts leaves none to train on; lower it or give more data"
        )
    return PairSplit(training=training, validation=validation, too_long=too_long, same=same)


def batch_at(training: Sequence[EncodedPair], step: int, config: RewardModelConfig) -> list[TrainingSequence]:
    """The pairs of a step, chosen and rejected in turn: epochs end to end, each in its own seeded order."""
    first, size = step * config.data.batch_pairs, len(training)
    last = min(first + config.data.batch_pairs, size * config.data.epochs)
    orders = {
        epoch: np.random.default_rng([config.data.seed, epoch]).permutation(size)
        for epoch in range(first // size, (last - 1) // size + 1)
    }
    places = (orders[number // size][number % size] for number in range(first, last))
    return [sequence for place in places for sequence in training[place]]
