"""The names in metrics.jsonl and summary.json of a supervised stage."""

from __future__ import annotations

from megatron_r1.observe.names import OPTIMIZER, SECONDS_TOTAL, STEP, Names, Number

STEP_NAMES: Names = {
    **STEP,
    "epoch": Number("epochs", "Epochs done, with their fraction."),
    "loss": Number("nats per token", "Mean loss of the step's batch, as data.loss weighs it."),
    "entropy": Number("nats per token", "Mean entropy of the model at the trained tokens."),
    **OPTIMIZER,
    "trained_tokens": Number("tokens", "Tokens that the loss is over: the answers'."),
    "skipped": Number("yes or no", "Whether the step was skipped, for want of a finite gradient."),
    "seconds": Number("seconds", "The step's time."),
    "tokens_per_second": Number("tokens per second", "`trained_tokens` by `seconds`."),
    "validation_loss": Number("nats per token", "Loss on the validation examples, at the steps of validate_every."),
}

SUMMARY_NAMES: Names = {
    "steps": Number("count", "Optimizer steps."),
    "examples": Number("count", "Examples that were read, those kept apart included."),
    "tokens": Number("tokens", "Tokens that were trained on."),
    "loss_first": Number("nats per token", "Loss of the first step."),
    "loss_last": Number("nats per token", "Loss of the last step."),
    "validation_loss_before": Number("nats per token", "Loss on the validation examples before the first step."),
    "validation_loss_after": Number("nats per token", "The same after the last step."),
    **SECONDS_TOTAL,
}
