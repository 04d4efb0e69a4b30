"""When to give up: optimizer steps that had to be skipped one after the other."""

from __future__ import annotations

from megatron_r1.errors import DivergedError
from megatron_r1.types import StepResult


class SkippedSteps:
    """Counts optimizer steps in a row whose gradient was not finite; `count` is part of a checkpoint."""

    def __init__(self, limit: int) -> None:
        """`limit`: the stage's max_skipped_steps."""
        self._limit, self.count = limit, 0

    def check(self, result: StepResult, step: int) -> None:
        """Count the result of step `step` (from 0). Raises DivergedError past the limit."""
        self.count = self.count + 1 if result.skipped else 0
        if self.count > self._limit:
            cause = f"had no finite gradient (norm {result.grad_norm})"
            remedy = "lower optimizer.lr or start from an earlier export"
            if not result.metrics:
                cause = "had nothing to train on, the last because no group's rewards could be used"
                remedy = "look at metrics.jsonl: are parts of the rewards broken (broken_parts), or all alike?"
            raise DivergedError(
                f"step {step + 1}: {self.count} optimizer steps in a row {cause}, max_skipped_steps is {self._limit}; "
                f"{remedy}"
            )
