"""The names in summary.json of an evaluation; results.json has more (docs/evaluation.md)."""

from __future__ import annotations

from megatron_r1.observe.names import NUMBER, Names, Number
from megatron_r1.stages.grpo.names import JUDGED, said_of

SUMMARY_NAMES: Names = {
    "accuracy": Number("share", "pass@1."),
    f"pass@{NUMBER}": Number("share", "Chance that one of K samples of a problem is right, mean over the problems."),
    f"cons@{NUMBER}": Number("share", "Problems whose majority answer of K samples is right."),
    **said_of("all samples", JUDGED, "held_out_after/"),
}
