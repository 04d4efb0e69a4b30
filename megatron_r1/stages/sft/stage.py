"""Supervised fine-tuning as a kind of stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.needs import Needs, supervised_needs
from megatron_r1.planning.summary import describe_trainer
from megatron_r1.stages.sft.config import SFTConfig, validate_sft
from megatron_r1.stages.sft.names import STEP_NAMES, SUMMARY_NAMES
from megatron_r1.stages.stage import Stage


def needs(config: SFTConfig) -> Needs:
    data = config.data
    return supervised_needs(config, samples=data.batch_sequences, longest=data.max_tokens, files=data.files)


def describe(config: SFTConfig, asked: Needs, shape: ModelShape) -> list[str]:
    data = config.data
    return [
        *describe_trainer(asked, shape),
        f"data: {len(data.files)} file(s), {data.epochs} epoch(s), batches of {data.batch_sequences} examples, at "
        f"most {data.max_tokens:,} tokens each, {data.loss.replace('_', ' ')}, reader {data.reader}",
    ]


def load() -> Callable[..., dict[str, Any]]:
    from megatron_r1.stages.sft.run import run_sft

    return run_sft


STAGE = Stage(
    name="SFT",
    config=SFTConfig,
    validate=validate_sft,
    describe=describe,
    needs=needs,
    load=load,
    outputs=("model",),
    metrics=STEP_NAMES,
    summary=SUMMARY_NAMES,
    common=tuple(
        """
        run_dir if_exists seed device validate_every save_every checkpoint_every
        model.path model.load_from model.initialise
        data.files data.weights data.template data.max_tokens data.batch_sequences data.epochs data.validation
        parallel
        train.dtype train.tokens_per_microbatch train.recompute
        optimizer.lr optimizer.min_lr optimizer.schedule optimizer.warmup_steps
        track.names
        """.split()
    ),
)
