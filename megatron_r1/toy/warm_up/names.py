"""The names in summary.json of the warm-up."""

from __future__ import annotations

from megatron_r1.observe.names import SECONDS_TOTAL, Names, Number

SUMMARY_NAMES: Names = {
    "steps": Number("count", "Optimizer steps."),
    "loss_first": Number("nats per token", "Loss of the first step."),
    "loss_last": Number("nats per token", "Loss of the last step."),
    **SECONDS_TOTAL,
}
