"""What samples of answers say about a model: pass@1, pass@k, cons@k, and how sure that is. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from megatron_r1.types import Reward


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021,
    arXiv 2107.03374, equation 1). With k = 1 it is the share that is right. ValueError unless 1 <= k <= n."""
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples, {num_correct} of them right, is not defined")
    wrong = num_samples - num_correct
    if wrong < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(wrong + 1, num_samples + 1)))


def consensus(classes: Sequence[int | None], correct: Sequence[bool]) -> float:
    """Majority vote over equivalent answers: 1.0 if the largest class is right, 0.0 if it is wrong.

    `classes[i]` says which class sample i's answer is in, None for a sample without an answer, which has no vote.
    Tie rule: classes of equal size share the verdict, so the result is the chance that a fair draw among them is right.
    A class is right if most of its samples are (equivalent answers are graded alike but for a grader's faults).
    """
    members: dict[int, list[bool]] = {}
    for name, right in zip(classes, correct, strict=True):
        if name is not None:
            members.setdefault(name, []).append(right)
    if not members:
        return 0.0
    largest = max(map(len, members.values()))
    verdicts = [2 * sum(group) > len(group) for group in members.values() if len(group) == largest]
    return sum(verdicts) / len(verdicts)


def answer_classes(
    answers: Sequence[str | None], equal: Callable[[Sequence[tuple[str, str]]], Sequence[bool]]
) -> list[int | None]:
    """Classes of equivalent answers, numbered by first appearance; None where there is no answer.

    `equal` says of pairs (representative, answer) which are equivalent; it is asked once for each round of different
    spellings that no class has taken yet, never for equal strings.
    """
    spelled = {answer: None for answer in answers if answer}
    waiting, classes, number = list(spelled), dict[str, int](), 0
    while waiting:
        representative, *others = waiting
        classes[representative] = number
        verdicts = equal([(representative, other) for other in others])
        classes |= {other: number for other, same in zip(others, verdicts, strict=True) if same}
        waiting = [other for other, same in zip(others, verdicts, strict=True) if not same]
        number += 1
    return [classes[answer] if answer else None for answer in answers]


def bootstrap_interval(
    values: Sequence[float], *, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> list[float]:
    """[low, high] of the mean over problems: percentiles of the means of `draws` resamples with replacement.

    It says how much another draw of problems would change the mean; with few problems it is wide, as it should be.
    """
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.concatenate([rng.choice(array, (min(500, draws), len(array))).mean(1) for _ in range(-(-draws // 500))])
    return [float(edge) for edge in np.quantile(means[:draws], [(1 - level) / 2, (1 + level) / 2])]


def mean_parts(rewards: Sequence[Reward]) -> dict[str, float]:
    """The mean of each part over the rewards that have it as a finite number; NaN of none. A part of weight 0 may be
    broken (a reward model that gives NaN) in a reward whose total is sound."""
    names = dict.fromkeys(name for reward in rewards for name in reward.parts)
    found = {name: [r.parts[name] for r in rewards if math.isfinite(r.parts.get(name, math.nan))] for name in names}
    return {name: float(np.mean(values)) if values else math.nan for name, values in found.items()}
