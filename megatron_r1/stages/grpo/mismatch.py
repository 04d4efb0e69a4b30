"""Do rollout engine and trainer agree on what the policy is? Measured at each step; the gate before the first update.

Both have scored the same tokens: the engine as it sampled them, the trainer before it learned from them. With the
difference d = log p_trainer - log p_engine at each trained token, w = exp(d), and n tokens that the engine sampled:

    KL(engine || trainer) = E[w - 1 - d]                  KL(trainer || engine) = E[w d - w + 1]
    effective samples     = (sum w)^2 / (n sum w^2)       of the importance weights w, in (0, 1]

Both estimators are never negative (k3 and its counterpart, http://joschu.net/blog/kl-approx.html). A wrong weight name,
a stale cache or a different rotary convention shows here. RL on such data learns noise and looks like bad luck, so a
run stops before its first update, with the tokens that differ most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.algorithms.kl import LOG_RATIO_BOUND
from megatron_r1.errors import MismatchError
from megatron_r1.policy.topology import gather_over_data
from megatron_r1.types import PackedMicrobatch

WORST_TOKENS = 8
CONTEXT_TOKENS = 12
SMALLEST, GROWTH, BINS = 1e-8, 1.01, 2560
"""|d| is counted in bins, the n-th up to SMALLEST * GROWTH ** n: a quantile is within 1%, whatever ranks hold the
tokens. What is below SMALLEST counts as 0, what is beyond the last bin (1,155 nats) or NaN is in the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Of |d| per token in nats: `mean`, `p99` (within 1%), `largest`; of the importance weights as above. NaN without
    tokens, and but for `p99` where a logprob is NaN, which counts as infinitely wrong there."""

    mean: float = math.nan
    p99: float = math.nan
    largest: float = math.nan
    kl_rollout: float = math.nan
    kl_trainer: float = math.nan
    effective_samples: float = math.nan

    def metrics(self) -> dict[str, float]:
        """By their names in metrics.jsonl."""
        return {
            "mismatch": self.mean,
            "mismatch_p99": self.p99,
            "mismatch_max": self.largest,
            "mismatch_kl_rollout": self.kl_rollout,
            "mismatch_kl_trainer": self.kl_trainer,
            "effective_samples": self.effective_samples,
        }


class Gate:
    """The mismatch of each step of a run. At its first it raises MismatchError above `bound`, at later ones it warns
    once. A run that goes on (`restarted`) would have gone on, so it only warns."""

    def __init__(
        self,
        bound: float,
        decode: Callable[[Sequence[int]], str],
        warn: Callable[[str], None],
        *,
        restarted: bool,
        recorded: bool = False,
        routes_differ: Callable[[], Mapping[int, float]] = dict,
    ) -> None:
        """`recorded`: the rollouts are, and nothing is sampled. `routes_differ`: by sparse layer the share of tokens
        that the trainer sends to other experts than the engine (Policy.routes_differ)."""
        self._bound, self._decode, self._warn, self._restarted = bound, decode, warn, restarted
        self._recorded, self._routes_differ = recorded, routes_differ
        self._passed = self._warned = self._first = False
        self.found, self.looked = Mismatch(), False
        self.routes: Mapping[int, float] = {}

    def metrics(self) -> dict[str, Any]:
        """The step's, by their names in metrics.jsonl."""
        found: dict[str, Any] = self.found.metrics()
        if self.routes:
            by_layer = {f"layer@{layer}": share for layer, share in self.routes.items()}
            found["routes_differ"] = {"mean": sum(by_layer.values()) / len(by_layer), **by_layer}
        return found

    def next_step(self) -> None:
        """Nothing is known of the next step's rollout."""
        self.found, self.looked, self._first, self.routes = Mismatch(), False, False, {}

    def look(self, rows: Sequence[PackedMicrobatch], logprobs: Sequence[np.ndarray]) -> None:
        """`measure` these, of the trainer as it is before it learns from them. A collective."""
        self.found, self.looked = measure(rows, logprobs), True
        self.routes = self._routes_differ()
        if self._passed:
            return
        self._passed = self._first = True
        try:
            refuse(rows, logprobs, self.found, bound=self._bound, decode=self._decode, recorded=self._recorded)
        except MismatchError as error:
            if not self._restarted:
                raise
            self._warn(f"going on in spite of this, as the run before its restart would have: {error}")

    def warn_if_grown(self, step: int) -> None:
        """Once: servers and trainer differ by more than the bound (NaN too) though the gate has passed."""
        if self._warned or self._first or not self.looked or self.found.mean <= self._bound:
            return
        self._warned = True
        why = (
            "they agreed: look whether weight sync misses a part (megatron-r1 diagnose)"
            if not self._recorded
            else "they agreed: since then this run has trained otherwise than the one that sampled, so that samples "
            "are of another policy; algorithm.correction.weight token weighs them for it"
        )
        self._warn(
            f"step {step + 1}: rollout and trainer differ by {self.found.mean:.4f} in the mean logprob of a token, and "
            f"grpo.mismatch_bound is {self._bound}. At the first step {why}"
        )


def measure(rows: Sequence[PackedMicrobatch], logprobs: Sequence[np.ndarray]) -> Mismatch:
    """Over all ranks' trained tokens; `logprobs`: the trainer's f32[S] of each of this rank's `rows`. A collective over
    data-parallel ranks; the same on all of them."""
    differences = [_differences(row, own)[row.loss_mask[0]] for row, own in zip(rows, logprobs, strict=True)]
    own = np.concatenate(differences) if differences else np.zeros(0)
    parts = gather_over_data((_sums(own), float(np.abs(own).max(initial=0.0)), _counts(np.abs(own))))
    count, absolute, kl_rollout, kl_trainer, weights, squares = np.sum([sums for sums, _, _ in parts], axis=0)
    if not count:
        return Mismatch()
    largest = float(np.max([most for _, most, _ in parts]))
    return Mismatch(
        mean=float(absolute / count),
        p99=min(_quantile(np.sum([counts for _, _, counts in parts], axis=0), 0.99), largest),
        largest=largest,
        kl_rollout=float(kl_rollout / count),
        kl_trainer=float(kl_trainer / count),
        effective_samples=float(weights**2 / (count * squares)),
    )


def refuse(
    rows: Sequence[PackedMicrobatch],
    logprobs: Sequence[np.ndarray],
    mismatch: Mismatch,
    *,
    bound: float,
    decode: Callable[[Sequence[int]], str],
    recorded: bool = False,
) -> None:
    """Raises MismatchError on every rank if the mean of `measure` exceeds `bound` or is no number, naming the worst
    tokens of all ranks. A collective then."""
    if mismatch.mean <= bound:  # not if it is NaN
        return
    own = [worst for row, values in zip(rows, logprobs, strict=True) for worst in _worst(row, values, decode)]
    found = sorted((worst for part in gather_over_data(own) for worst in part), reverse=True)[:WORST_TOKENS]
    lines = [
        f"  {token!r} after {context!r}: rollout {pair[0]:.4f}, trainer {pair[1]:.4f}"
        for _, token, pair, context in found
    ]
    check = (
        "whether model.path and model.load_from are what the recorded run started from, and its precision"
        if recorded
        else "weight sync and precision"
    )
    raise MismatchError(
        f"rollout and trainer disagree: mean |logprob difference| is {mismatch.mean:.4f}, grpo.mismatch_bound is "
        f"{bound}. Training on this would learn noise. Check {check} (rollout.dtype, train.dtype), or raise the bound "
        "if the difference is explained. Worst tokens:\n" + "\n".join(lines)
    )


def _differences(row: PackedMicrobatch, logprobs: np.ndarray) -> np.ndarray:
    """f64[S]: trainer less engine; 0 where both say that the token is impossible."""
    engine = row.behaviour_logprobs[0].astype(np.float64)
    impossible = np.isneginf(engine) & np.isneginf(logprobs)
    with np.errstate(invalid="ignore"):
        return np.where(impossible, 0.0, logprobs.astype(np.float64) - engine)


def _sums(differences: np.ndarray) -> np.ndarray:
    """f64[6]: tokens, |d|, the two KLs, w, w^2, summed. Weights are bounded as those of a loss are."""
    bounded = np.clip(differences, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    weights, excess = np.exp(bounded), np.expm1(bounded)
    columns = (
        np.ones_like(bounded), np.abs(differences), excess - bounded, weights * bounded - excess, weights, weights**2,
    )  # fmt: skip
    return np.array([column.sum() for column in columns])


def _counts(sizes: np.ndarray) -> np.ndarray:
    """i64[BINS]: how many of |d| are in each bin."""
    places = np.full(len(sizes), BINS - 1)
    known = sizes < SMALLEST * GROWTH ** (BINS - 2)  # not NaN
    places[known] = np.ceil(np.log(np.maximum(sizes[known], SMALLEST) / SMALLEST) / math.log(GROWTH))
    return np.bincount(places, minlength=BINS)


def _quantile(counts: np.ndarray, share: float) -> float:
    """The upper edge of the bin in which the smallest |d| lies that `share` of the tokens do not exceed."""
    place = int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
    return 0.0 if place == 0 else math.inf if place == BINS - 1 else SMALLEST * GROWTH**place


def _worst(
    row: PackedMicrobatch, logprobs: np.ndarray, decode: Callable[[Sequence[int]], str]
) -> list[tuple[float, str, tuple[float, float], str]]:
    """(|d|, token, logprobs of engine and trainer, text before it) of the tokens of a row that differ most; NaN ranks
    first."""
    sizes = np.where(row.loss_mask[0], np.abs(_differences(row, logprobs)), -1.0)
    ranks = np.where(np.isnan(sizes), np.inf, sizes)
    found = []
    for position in np.argsort(-ranks, kind="stable")[:WORST_TOKENS]:
        if not row.loss_mask[0, position]:
            continue
        context = decode(row.token_ids[0, max(0, position - CONTEXT_TOKENS) : position + 1].tolist())
        pair = (float(row.behaviour_logprobs[0, position]), float(logprobs[position]))
        found.append((float(ranks[position]), decode([int(row.labels[0, position])]), pair, context))
    return found
