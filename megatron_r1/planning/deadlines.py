"""Whether a plan's phases, and its servers' start, fit in the run's deadlines. Asked of a plan before the run."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.config.deadlines import folder_bytes, start_faults, start_seconds
from megatron_r1.config.schema import RolloutConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.needs import Needs
from megatron_r1.planning.parameters import count_parameters
from megatron_r1.planning.plan import Plan

BYTES = {"fp32": 4, "bf16": 2}


def served_bytes(rollout: RolloutConfig, folder: Path, shape: ModelShape) -> float:
    """What a server reads: the weights of its `folder`, or as many as the model has where they are not here yet."""
    count = count_parameters(shape)
    each = 1 if rollout.fp8_folder else BYTES[rollout.dtype]
    return folder_bytes(rollout.fp8_folder or folder) or each * (count.total + count.mtp)


def deadline_faults(needs: Needs, shape: ModelShape, plan: Plan) -> list[str]:
    """Deadlines that the plan passes, one sentence each; none for a stage that has none to compare."""
    limits, rollout, model = needs.deadlines, needs.rollout, needs.model
    if limits is None or rollout is None or model is None:
        return []
    faults = start_faults(rollout, limits, served_bytes(rollout, model.path, shape))
    for phase, seconds in plan.phases().items():
        limit = getattr(limits, phase)
        if limit and seconds > limit:
            faults.append(
                f"deadlines.{phase} is {limit:.0f}; this layout is planned to take {seconds:,.0f} s: raise it to "
                f"{2 * seconds:.0f} (the plan may be off by as much), or use a faster layout (megatron-r1 plan)"
            )
    return faults


def deadline_line(needs: Needs, shape: ModelShape, plan: Plan) -> str:
    """How much of each deadline is planned; "" for a stage that has none to compare."""
    limits, rollout, model = needs.deadlines, needs.rollout, needs.model
    if limits is None or rollout is None or model is None:
        return ""
    start = start_seconds(rollout, served_bytes(rollout, model.path, shape))
    shares = [f"a server's start {start:,.0f} of deadlines.start {limits.start:,.0f}"]
    shares += [
        f"{phase} {seconds:,.0f} of {getattr(limits, phase):,.0f}"
        for phase, seconds in plan.phases().items()
        if getattr(limits, phase)
    ]
    return f"deadlines: {', '.join(shares)} s"
