"""The names in metrics.jsonl and summary.json of GRPO. Those of an algorithm's own metrics are in its METRICS."""

from __future__ import annotations

from megatron_r1.observe.names import NUMBER, OPTIMIZER, PART, SECONDS_TOTAL, STEP, Names, Number

PARTS: Names = {
    "accuracy": Number("share", "Mean accuracy reward: answers that are right."),
    "format": Number("share", "Mean format reward: responses with the tags of thought and answer."),
    "language": Number("share", "Mean language reward: the thought's words in the problem's language."),
    PART: Number("reward", "Mean of any other part of the reward, by its name: of a reward model or of your function."),
}
"""Each is over the completions that have the part as a finite number."""

PHASES: Names = {
    "seconds/rollout": Number("seconds", "Sampling, and the grading that runs beside it."),
    "seconds/reward": Number("seconds", "Grading that went on after sampling had ended."),
    "seconds/teacher": Number("seconds", "Scoring by the teacher, with an algorithm that has one."),
    "seconds/packing": Number("seconds", "Packing sequences into rows."),
    "seconds/logprob": Number("seconds", "Scoring by the old and the reference policy."),
    "seconds/train": Number("seconds", "All optimizer steps of the rollout."),
    "seconds/sync": Number("seconds", "Pushing the weights to the servers."),
    "seconds/evaluate": Number("seconds", "Greedy answers to the validation problems."),
    "seconds/save": Number("seconds", "Exporting a Hugging Face folder."),
    "seconds/checkpoint": Number("seconds", "What saving for a restart held the step up; of the step before."),
    "seconds/other": Number("seconds", "What is in none of the phases."),
}

STEP_NAMES: Names = {
    **STEP,
    "loss": Number("nats", "The loss, mean over the step's minibatches."),
    "reward_mean": Number("reward", "Mean total reward of the completions with a usable one."),
    **PARTS,
    "entropy": Number("nats per token", "Mean entropy of the policy at the trained tokens."),
    "mismatch": Number("nats per token", "Mean |logprob(servers) - logprob(trainer)| of the trained tokens."),
    "mismatch_p99": Number("nats", "Its 99th percentile over tokens, within 1%."),
    "mismatch_max": Number("nats", "Its largest value."),
    "mismatch_kl_rollout": Number("nats per token", "KL(servers || trainer), estimated from the samples."),
    "mismatch_kl_trainer": Number("nats per token", "KL(trainer || servers), estimated from the samples."),
    "effective_samples": Number("share", "Effective sample size of the tokens' importance weights, by their number."),
    "routes_differ/mean": Number("share", "Mean of the layers' shares, with rollout.routes."),
    f"routes_differ/layer@{NUMBER}": Number(
        "share", "Tokens that the trainer's router sends to other experts than the servers' did, in layer K (from 0)."
    ),
    **OPTIMIZER,
    "skipped_steps": Number("count", "Optimizer steps of the rollout that were skipped: no finite gradient, no data."),
    "length_mean": Number("tokens", "Mean length of the completions."),
    "truncated": Number("share", "Completions that were cut off at max_new_tokens."),
    "zero_advantage_groups": Number("count", "Groups whose rewards are all equal: they give no gradient."),
    "completions_left_out": Number("count", "Completions without a usable reward, which are not trained on."),
    "groups_left_out": Number("count", "Groups of which no completion is trained on."),
    "broken_parts": Number("count", "Parts of rewards that are no finite number."),
    "groups_sampled": Number("count", "Groups sampled, where the algorithm samples more than once."),
    "sampling_rounds": Number("count", "Rounds of sampling, where the algorithm samples more than once."),
    "weight_version": Number("count", "Steps that the weights had been trained which sampled the newest completion."),
    "staleness": Number("steps", "Steps that were trained since the weights which sampled a completion, mean."),
    "completion_tokens": Number("tokens", "In all completions."),
    "tokens": Number("tokens", "In all prompts and completions, each prompt counted once per completion."),
    "tokens_per_second": Number("tokens per second", "`tokens` by the step's time, without evaluation and export."),
    "grading_timeouts": Number("count", "Answers whose grading took too long; they score 0."),
    "grading_errors": Number("count", "Answers whose grader failed; they score 0."),
    "eval_accuracy": Number("share", "Greedy accuracy on the validation problems, at the steps of eval_every."),
    **PHASES,
}  # fmt: skip


JUDGED: Names = {**PARTS, "length": Number("tokens", "Mean length of the completions.")}
"""What greedy answers to problems say (stages/common/greedy.py)."""


def said_of(what: str, names: Names, within: str = "") -> Names:
    """The names inside another one, with `what` before their meanings."""
    return {
        f"{within}{name}": Number(number.unit, f"{what}: {number.meaning[0].lower()}{number.meaning[1:]}")
        for name, number in names.items()
    }


SUMMARY_NAMES: Names = {
    "accuracy_before": Number("share", "Greedy accuracy on the held-out problems before the first step."),
    "accuracy_after": Number("share", "The same after the last step."),
    **said_of("held-out problems, before", JUDGED, "held_out_before/"),
    **said_of("held-out problems, after", JUDGED, "held_out_after/"),
    "steps": Number("count", "Steps done; fewer than configured where target_accuracy was reached."),
    "seconds/start": Number("seconds", "Starting the servers and loading the model."),
    **said_of("all steps", PHASES),
    "tokens_per_second": Number("tokens per second", "All steps' tokens by their time, without evaluation and export."),
    "sync_milliseconds_median": Number("milliseconds", "Median time of pushing the weights."),
    "held_out": Number("count", "Held-out problems."),
    "reward_mean": Number("reward", "Mean over the steps, with rollout_only."),
    "tokens": Number("tokens", "In all prompts and completions, with rollout_only."),
    **SECONDS_TOTAL,
}
