"""Whether a plan's phases, and its servers' start, fit in the run's deadlines. Asked of a plan before the run."""

from __future__ import annotations

from megatron_r1.config.deadlines import folder_bytes, start_faults, start_seconds
from megatron_r1.config.schema import RunConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.parameters import count_parameters
from megatron_r1.planning.plan import Plan, Planned

BYTES = {"fp32": 4, "bf16": 2}


def served_bytes(config: RunConfig, shape: ModelShape) -> float:
    """What a server reads: its folder's weights, or as many as the model has where they are not here yet."""
    count = count_parameters(shape)
    folder = config.rollout.fp8_folder or config.model.path
    each = 1 if config.rollout.fp8_folder else BYTES[config.rollout.dtype]
    return folder_bytes(folder) or each * (count.total + count.mtp)


def deadline_faults(config: Planned, shape: ModelShape, plan: Plan) -> list[str]:
    """Deadlines that the plan passes, one sentence each. Only RL has servers and phases with deadlines to compare."""
    if not isinstance(config, RunConfig):
        return []
    faults = start_faults(config.rollout, config.deadlines, served_bytes(config, shape))
    for phase, seconds in plan.phases().items():
        limit = getattr(config.deadlines, phase)
        if limit and seconds > limit:
            faults.append(
                f"deadlines.{phase} is {limit:.0f}; this layout is planned to take {seconds:,.0f} s: raise it to "
                f"{2 * seconds:.0f} (the plan may be off by as much), or use a faster layout (megatron-r1 plan)"
            )
    return faults


def deadline_line(config: RunConfig, shape: ModelShape, plan: Plan) -> str:
    """How much of each deadline is planned."""
    start = start_seconds(config.rollout, served_bytes(config, shape))
    shares = [f"a server's start {start:,.0f} of deadlines.start {config.deadlines.start:,.0f}"]
    shares += [
        f"{phase} {seconds:,.0f} of {getattr(config.deadlines, phase):,.0f}"
        for phase, seconds in plan.phases().items()
        if getattr(config.deadlines, phase)
    ]
    return f"deadlines: {', '.join(shares)} s"
