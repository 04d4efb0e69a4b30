"""The names in summary.json of rejection sampling; yield.json has more (docs/rejection.md)."""

from __future__ import annotations

from megatron_r1.observe.names import Names, Number

SUMMARY_NAMES: Names = {
    "problems": Number("count", "Problems that were sampled for."),
    "samples": Number("count", "Samples of all problems."),
    "kept": Number("count", "Samples that passed every filter."),
}
