"""A supervised stage: conversations to a Hugging Face folder. Cold start, mixed SFT and distillation alike.

Runs on every trainer rank. Rank 0 tokenises the files once; all ranks read the same batches and train on their rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.agreement import on_rank_zero
from megatron_r1.config.shape import ModelShape
from megatron_r1.data.answers import answer_encoder
from megatron_r1.data.example_cache import build_cache
from megatron_r1.data.examples import open_cache
from megatron_r1.data.packing import RowLayout
from megatron_r1.data.reader import ExampleReader
from megatron_r1.data.tokenizer import Tokenizer, load_tokenizer
from megatron_r1.observe.metrics import write_json
from megatron_r1.observe.progress import SFT_COLUMNS, duration
from megatron_r1.observe.watch import Watch
from megatron_r1.policy.policy import Policy
from megatron_r1.stages.common.checkpoints import Checkpoints
from megatron_r1.stages.common.divergence import SkippedSteps
from megatron_r1.stages.common.preempt import Preemption
from megatron_r1.stages.common.trainer import StepLog, build_policy, export, printer, row_layout
from megatron_r1.stages.sft.config import SFTConfig
from megatron_r1.stages.sft.loss import mean_loss, train_sft
from megatron_r1.types import StepResult

CACHE = "examples"
"""Folder of the tokenised files, in the run's folder."""


def run_sft(config: SFTConfig, shape: ModelShape, device: torch.device) -> dict[str, Any]:
    """The whole stage on this rank; the folder is prepared. Returns the summary (also in summary.json, on rank 0)."""
    with Watch(config.run_dir, rank=dist.get_rank(), deadlines=config.deadlines.by_phase(dist.get_rank())) as watch:
        return _run(config, shape, device, watch)


def _run(config: SFTConfig, shape: ModelShape, device: torch.device, watch: Watch) -> dict[str, Any]:
    begun = time.perf_counter()
    say = printer()
    tokenizer = load_tokenizer(config.model.path, thinking=config.data.thinking)
    store = open_cache(on_rank_zero(lambda: _tokenise(config, tokenizer)))
    for file, count in zip(config.data.files, store.counts, strict=True):
        left_out = f"; left out: {count.too_long} too long" if count.too_long else ""
        left_out += f"; left out: {count.control_text} with special tokens in the text" if count.control_text else ""
        if count.untrained:
            left_out += f"; {count.untrained:,} earlier answers that the template changes are not trained on"
        fields = ", ".join(f"{name} ({number:,})" for name, number in sorted(count.not_read.items()))
        say(f"{file}: {count.kept:,} examples{left_out}{f'; fields that are not read: {fields}' if fields else ''}")
    reader = ExampleReader(store, config.data)
    layout = row_layout(config, tokenizer.pad_id, vocab_size=shape.vocab_size)
    policy = build_policy(
        config,
        shape,
        device,
        model=config.model,
        total_steps=reader.order.num_steps,
    )
    validation = reader.validation_sequences()
    say(
        f"{reader.order.num_steps:,} steps of {config.data.batch_sequences} examples, {config.data.epochs} epoch(s); "
        f"{len(validation)} validation examples"
    )

    def validate() -> float | None:
        with watch.phase("evaluate"):
            return mean_loss(policy, validation, layout) if validation else None

    checkpoints = Checkpoints(config.run_dir, keep=config.keep_checkpoints, say=say)
    run = _Run(config, policy, reader, validate, checkpoints, watch)
    with watch.phase("start"):
        state = checkpoints.load_latest(policy)
    if state is None:
        run.validation_loss_before = validate()
    else:
        run.load_state_dict(state)
    run.train(layout)
    before, after = run.validation_loss_before, validate()
    with watch.phase("checkpoint"):
        checkpoints.close()
    with watch.phase("save"):
        save(config, policy, config.run_dir / "model", step=reader.order.num_steps)
    summary = {
        "steps": reader.order.num_steps,
        "examples": len(store),
        "tokens": run.tokens,
        "loss_first": run.first_loss,
        "loss_last": run.last_loss,
        "validation_loss_before": before,
        "validation_loss_after": after,
        "seconds_total": time.perf_counter() - begun,
    }
    if dist.get_rank() == 0:
        write_json(config.run_dir / "summary.json", summary)
    shown = "" if before is None else f"validation loss {before:.4f} -> {after:.4f}; "
    say(f"{shown}{config.run_dir / 'model'} written, {duration(summary['seconds_total'])} in all")
    return summary


def save(config: SFTConfig, policy: Policy, target: Path, *, step: int) -> None:
    """Export the policy after step n. A collective."""
    extra = {"stage": config.name, "step": step}
    export(policy, config.model.path, target, dtype=config.save_dtype, extra=extra)


def _tokenise(config: SFTConfig, tokenizer: Tokenizer) -> Path:
    begun = time.monotonic()

    def tell(done: int, total: int) -> None:
        left = (time.monotonic() - begun) / done * (total - done)
        if left > 1:
            print(f"  tokenised {done:,}/{total:,}  left {duration(left)}", flush=True)

    return build_cache(
        config.data.files,
        encoder=answer_encoder(config.data.template, tokenizer),
        max_tokens=config.data.max_tokens,
        cache_dir=config.run_dir / CACHE,
        on_progress=tell,
    )


class _Run:
    """What the loop calls after each step, and the files that it fills."""

    def __init__(
        self,
        config: SFTConfig,
        policy: Policy,
        reader: ExampleReader,
        validate: Callable[[], float | None],
        checkpoints: Checkpoints,
        watch: Watch,
    ) -> None:
        self.config, self.policy, self.reader, self.validate = config, policy, reader, validate
        self.checkpoints, self.watch = checkpoints, watch
        self.steps_done = 0
        self.validation_loss_before: float | None = None
        self.num_steps = reader.order.num_steps
        self.skips = SkippedSteps(config.max_skipped_steps)
        self.preemption = Preemption(config.run_dir, policy.device)
        self.tokens = 0
        self.first_loss = self.last_loss = float("nan")
        self._marked = time.perf_counter()

    def train(self, layout: RowLayout) -> None:
        """The steps that are left."""
        first = self.steps_done
        self._log = StepLog(self.config, stage="sft", num_steps=self.num_steps, columns=SFT_COLUMNS, first_step=first)
        with self._log, self.watch.phase("train"):
            train_sft(self.policy, self.reader, layout, self.on_step, first_step=first)

    def on_step(self, step: int, result: StepResult) -> None:
        """Every rank calls it: validation and saving are collectives."""
        self.skips.check(result, step)
        done, config = step + 1, self.config
        trained = int(result.metrics["tokens"])
        seconds = time.perf_counter() - self._marked
        row: dict[str, Any] = {
            "step": step,
            "epoch": self.reader.epochs_done,
            "loss": result.loss,
            "entropy": result.metrics["entropy"],
            "grad_norm": result.grad_norm,
            "lr": result.learning_rate,
            "trained_tokens": trained,
            "skipped": result.skipped,
            "seconds": seconds,
            "tokens_per_second": trained / max(seconds, 1e-9),
        }
        self.watch.step(done, of=self.num_steps)
        if config.validate_every and done % config.validate_every == 0 and done < self.num_steps:
            row["validation_loss"] = self.validate()
        if config.save_every and done % config.save_every == 0 and done < self.num_steps:
            with self.watch.phase("save"):
                save(config, self.policy, config.run_dir / f"model_step_{done:06d}", step=done)
        self.tokens += trained
        self.first_loss = result.loss if step == 0 else self.first_loss
        self.last_loss = result.loss
        self.steps_done = done
        self._log.write(step, row)
        if done < self.num_steps:
            with self.watch.phase("checkpoint"):
                self._checkpoint(done)
        self._marked = time.perf_counter()

    def _checkpoint(self, done: int) -> None:
        self.checkpoints.commit()
        due, asked = self.preemption.checkpoint_now(done, self.config.checkpoint_every)
        if due:
            self.checkpoints.save(done, self.policy, self.state_dict())
        if asked:
            self.checkpoints.commit(wait=True)
            self.preemption.end(done)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: what a restart needs besides the policy."""
        return {
            "steps_done": self.steps_done,
            "skipped_in_a_row": self.skips.count,
            "tokens": self.tokens,
            "losses": [self.first_loss, self.last_loss],
            "validation_loss_before": self.validation_loss_before,
            "reader": self.reader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. DataError if it belongs to other data."""
        self.reader.load_state_dict(state["reader"])
        self.steps_done, self.tokens = state["steps_done"], state["tokens"]
        self.skips.count = state.get("skipped_in_a_row", 0)  # not in the first version's
        self.first_loss, self.last_loss = state["losses"]
        self.validation_loss_before = state["validation_loss_before"]
