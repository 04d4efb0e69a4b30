"""Options of earlier versions, and what to say instead."""

from __future__ import annotations

from collections.abc import Sequence

REMEDIES = {
    "rollout.request_timeout_seconds": "a request has no time limit of its own any more: set rollout.stall_seconds, "
    "the time without any token on a server that has work, or leave it out",
    "grpo.kl_coef": "now algorithm.kl.coef",
    "grpo.reference_refresh_steps": "now algorithm.kl.refresh_steps",
    "grpo.clip_low": "now algorithm.clip.low",
    "grpo.clip_high": "now algorithm.clip.high",
    "grpo.clip_dual": "now algorithm.clip.dual",
    "grpo.deviation_floor": "now algorithm.deviation_floor",
    "grpo.truncated_importance_cap": "now algorithm.truncated_importance_cap",
    "grpo.advantage": "the algorithm says it: --algorithm grpo or --algorithm dr_grpo",
    "grpo.normalisation": "the algorithm says it: --algorithm grpo (sequence mean), dapo (token mean) or dr_grpo",
    "teacher.model": "now --algorithm on_policy_distill --algorithm.teacher.model",
    "teacher.tensor_parallel": "now algorithm.teacher.tensor_parallel",
    "teacher.devices": "now algorithm.teacher.devices",
}


def renamed_faults(words: Sequence[str]) -> list[str]:
    """A sentence for each word of a command line that is such an option, also within a pipeline's stage."""
    faults = []
    for word in words:
        option = word.partition("=")[0].removeprefix("--").replace("-", "_")
        faults += [
            f"{word.partition('=')[0]}: {remedy}"
            for field, remedy in REMEDIES.items()
            if word.startswith("--")
            and (option == field or option.endswith(f".{field}"))
            and not option.endswith(f"algorithm.{field}")
        ]
    return faults
