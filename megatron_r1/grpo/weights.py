"""Token weights: every way to average a GRPO loss, as one weighted sum.

The step's loss is sum_t weight_t * loss_t over all tokens of the minibatch, whatever ranks and rows they lie in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np


def token_weights(
    lengths: Sequence[int],
    kind: Literal["sequence_mean", "token_mean", "dr_grpo"],
    *,
    max_new_tokens: int = 0,
) -> np.ndarray:
    """The weight of each token of sequence i, f64[n], for n sequences with `lengths[i]` trained tokens.

    sequence_mean: 1 / (n * length_i)   - GRPO, eq. 1 of the R1 paper: mean over tokens, then over sequences.
    token_mean: 1 / sum of lengths      - DAPO (arXiv 2503.14476, eq. 8).
    dr_grpo: 1 / (n * max_new_tokens)   - Dr. GRPO (arXiv 2503.20783): a constant, so that length earns nothing.
    """
    lengths_n = np.asarray(lengths, dtype=np.float64)
    if lengths_n.size == 0:
        raise ValueError("no sequences to weigh")
    if kind == "sequence_mean":
        return 1.0 / (lengths_n.size * np.maximum(lengths_n, 1.0))
    if kind == "token_mean":
        return np.full(lengths_n.size, 1.0 / max(lengths_n.sum(), 1.0))
    if max_new_tokens <= 0:
        raise ValueError(f"dr_grpo needs max_new_tokens > 0, got {max_new_tokens}")
    return np.full(lengths_n.size, 1.0 / (lengths_n.size * max_new_tokens))
