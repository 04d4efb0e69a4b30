"""The names in metrics.jsonl and summary.json of reward model training."""

from __future__ import annotations

from megatron_r1.observe.names import OPTIMIZER, SECONDS_TOTAL, STEP, Names, Number

STEP_NAMES: Names = {
    **STEP,
    "pair_loss": Number("nats per pair", "Mean of -log sigmoid(value(chosen) - value(rejected))."),
    "pair_accuracy": Number("share", "Pairs whose chosen response has the higher value; a tie counts as half."),
    "margin": Number("value", "Mean of value(chosen) - value(rejected)."),
    **OPTIMIZER,
    "skipped": Number("yes or no", "Whether the step was skipped, for want of a finite gradient."),
    "tokens": Number("tokens", "In the step's pairs."),
    "seconds": Number("seconds", "The step's time."),
}

SUMMARY_NAMES: Names = {
    "steps": Number("count", "Optimizer steps."),
    "pairs": Number("count", "Pairs to train on."),
    "too_long": Number("count", "Pairs that were left out, for being longer than data.max_tokens."),
    "same": Number("count", "Pairs that were left out, for not differing in what is judged."),
    "pair_accuracy_before": Number("share", "Validation pairs that are ranked right, before the first step."),
    "pair_accuracy_after": Number("share", "The same after the last step."),
    "value_mean": Number("value", "Mean of the values of the validation pairs' responses; scores are less this."),
    "value_std": Number("value", "Their standard deviation; scores are divided by it."),
    **SECONDS_TOTAL,
}
