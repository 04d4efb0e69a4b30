"""Options of earlier versions, and what to say instead."""

from __future__ import annotations

from collections.abc import Collection, Sequence

CAP = "now algorithm.correction: set weight to token and high to the cap, or leave it out where the cap was 0"
REMEDIES = {
    "rollout.request_timeout_seconds": "a request has no time limit of its own any more: set rollout.stall_seconds, "
    "the time without any token on a server that has work, or leave it out",
    "grpo.kl_coef": "now algorithm.kl.coef",
    "grpo.reference_refresh_steps": "now algorithm.kl.refresh_steps",
    "grpo.clip_low": "now algorithm.clip.low",
    "grpo.clip_high": "now algorithm.clip.high",
    "grpo.clip_dual": "now algorithm.clip.dual",
    "grpo.deviation_floor": "now algorithm.deviation_floor",
    "grpo.truncated_importance_cap": CAP,
    "algorithm.truncated_importance_cap": CAP,
    "grpo.advantage": "the algorithm says it: --algorithm grpo or --algorithm dr_grpo",
    "grpo.normalisation": "the algorithm says it: --algorithm grpo (sequence mean), dapo (token mean) or dr_grpo",
    "parallel.pipeline": "now parallel.pipeline_parallel",
    "teacher.model": "now --algorithm on_policy_distill --algorithm.teacher.model",
    "teacher.tensor_parallel": "now algorithm.teacher.tensor_parallel",
    "teacher.devices": "now algorithm.teacher.devices",
}


def renamed_faults(words: Sequence[str], stages: Collection[str] = ()) -> list[str]:
    """A sentence for each word of a command line that is such an option, also within a pipeline's stage. `stages`:
    those of the pipeline that the words are for."""
    faults = []
    for word in words:
        given = word.partition("=")[0]
        if not given.startswith("--"):
            continue
        option = given.removeprefix("--").replace("-", "_")
        found = [
            remedy
            for field, remedy in REMEDIES.items()
            if (option == field or option.endswith(f".{field}")) and not option.endswith(f"algorithm.{field}")
        ]
        first, _, rest = option.partition(".")
        stage, own = (first, rest) if first in stages else ("", option)
        if not found and own.startswith("grpo."):
            found = [f"now --{'.'.join(filter(None, (stage, own.removeprefix('grpo.')))).replace('_', '-')}"]
        if not found and own.startswith("sft.") and not stage:
            found = ["the warm-up is a stage of its own (docs/pipeline.md): --warm-up." + own[4:].replace("_", "-")]
        faults += [f"{given}: {remedy}" for remedy in found]
    return faults
