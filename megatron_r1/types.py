"""The objects that cross a border between two folders.

Numpy and the standard library only, so that rewards, planning and the report can use them without torch.
Arrays are one-dimensional over tokens unless a shape is stated. The convention for every per-token array of a
sequence of L tokens: entry i belongs to token i, so `logprobs[i] = log p(token_ids[i] | token_ids[:i])` and
entry 0 is zero. Packing is the only place that shifts (token i is predicted at position i - 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Message = Mapping[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question with what its grader needs.

    `id` is unique and stable across restarts. `grader` names the rule that checks the answer: one of rewards/table.py,
    each of whose files says what it needs of `answer` and `metadata`, or the import path of one in rewards.graders.
    `language` (ISO 639-1) is that which the thought should be in; None: the run's.
    `metadata` is plain JSON and holds what that rule needs beyond `answer`.
    """

    id: str
    domain: str
    messages: tuple[Message, ...]
    answer: str | None = None
    grader: str = "math"
    language: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer, exactly as the engine produced it (never re-tokenised).

    token_ids i32[T]; logprobs f32[T], natural log, of the sampled tokens under the engine's weights at sampling
    temperature; finish_reason "stop" or "length"; weight_version counts weight syncs, 0 is the start checkpoint;
    text is the decoded token_ids, for graders and people; teacher_logprobs f32[T] of the same tokens under a teacher
    (on-policy distillation) or None; routes u8 or u16 [P + T - 1, layers, K], the experts that the engine chose for
    each token of prompt and completion but the last (rollout/routes.py), or None.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    weight_version: int
    text: str = ""
    teacher_logprobs: np.ndarray | None = None
    routes: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The scalar that GRPO sees and the named parts that it was made of (before weighting)."""

    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """G completions of one prompt with their rewards; prompt_ids i32[P]; rewards aligned with completions."""

    problem: Problem
    prompt_ids: np.ndarray
    completions: tuple[Completion, ...]
    rewards: tuple[Reward, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSequence:
    """One sequence to train on, L tokens.

    token_ids i32[L]; loss_mask bool[L], True where the token is trained on (False on the prompt);
    token_weight f32[L], the weight of each token's loss in the sum that is the step's loss: all normalisation
    lives here. GRPO adds `advantage` and logprob arrays f32[L] (zero where loss_mask is False):
    behaviour (the engine that sampled), old (the trainer before this rollout's updates), reference (KL anchor),
    teacher (on-policy distillation). `routes` [L - 1, sparse layers, K] are the experts of all tokens but the last.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    token_weight: np.ndarray
    advantage: float = 0.0
    behaviour_logprobs: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None
    reference_logprobs: np.ndarray | None = None
    teacher_logprobs: np.ndarray | None = None
    routes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMicrobatch:
    """Sequences laid end to end in one row of S tokens, shifted for next-token prediction.

    Position j of a sequence predicts `labels[0, j] = token_ids[0, j + 1]`; the last position of each sequence and
    all padding have loss_mask False and token_weight 0. token_ids, labels, position_ids i64[1, S] (positions restart
    at 0 in each sequence); cu_seqlens i32[n + 1], cumulative lengths over all S tokens, padding included in a last
    segment of its own; loss_mask bool[1, S]; token_weight, advantages and the logprobs f32[1, S].
    """

    token_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    loss_mask: np.ndarray
    token_weight: np.ndarray
    advantages: np.ndarray
    behaviour_logprobs: np.ndarray
    old_logprobs: np.ndarray
    reference_logprobs: np.ndarray
    teacher_logprobs: np.ndarray
    sequence_indices: tuple[int, ...]
    """Which input sequence each segment came from (a padding segment has none)."""
    routes: np.ndarray | None = None
    """i16[S, sparse layers, K]: the experts of each token, -1 where they are not known. None: of no token."""

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[1])

    @property
    def max_seqlen(self) -> int:
        return int(np.diff(self.cu_seqlens).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step reports: loss summed over the global batch, gradient norm before clipping, learning
    rate used, metrics by name (means over trained tokens), and whether the step was skipped (non-finite gradient)."""

    loss: float
    grad_norm: float
    learning_rate: float
    metrics: Mapping[str, float]
    skipped: bool = False
