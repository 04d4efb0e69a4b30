"""What one step of a run has to do, in tokens."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step: `samples` sequences, `optimizer_steps` of equal size, `scoring_passes` forward passes over all of them
    (old and reference logprobs). Lengths are lognormal with this mean and coefficient of variation (standard deviation
    / mean), cut off at `max_response`; `rollout` is False where sequences come from files. The servers get
    the weights once in `sync_every` steps."""

    samples: int
    group_size: int = 1
    prompt_tokens: int = 256
    mean_response: int = 8192
    max_response: int = 32_768
    variation: float = 0.8
    optimizer_steps: int = 1
    sync_every: int = 1
    scoring_passes: int = 0
    rollout: bool = True

    @property
    def mean_tokens(self) -> float:
        """Of a whole sequence."""
        return self.prompt_tokens + self.mean_response

    @property
    def tokens(self) -> float:
        """Of a step."""
        return self.samples * self.mean_tokens

    @property
    def context_per_token(self) -> float:
        """The mean over tokens of their sequence's length, E[L^2] / E[L]: what causal attention costs by."""
        return min(self.prompt_tokens + self.max_response, self.mean_tokens * (1 + self.variation**2))

    def lengths(self, seed: int = 0) -> list[int]:
        """A response length for every sample, at least 1, in the order of sampling."""
        rng = random.Random(seed)
        spread = math.sqrt(math.log1p(self.variation**2))
        centre = math.log(self.mean_response) - spread**2 / 2
        drawn = (rng.lognormvariate(centre, spread) if spread else self.mean_response for _ in range(self.samples))
        return [max(1, min(self.max_response, round(length))) for length in drawn]

    def with_mean(self, mean_response: int | None) -> Workload:
        """The same with another mean response; None: as it is."""
        return self if mean_response is None else dataclasses.replace(self, mean_response=mean_response)


def sampled(samples: int, longest: int) -> Workload:
    """Of a stage that only samples, `samples` of each problem: 512 problems at once. The mean response is in no
    configuration: a quarter of the longest."""
    return Workload(samples=512 * samples, group_size=samples, mean_response=max(1, longest // 4), max_response=longest)
