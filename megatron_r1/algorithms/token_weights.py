"""Token weights: every way to average a loss over tokens, as one weighted sum.

The step's loss is sum_t weight_t * loss_t over all tokens of the minibatch, whatever ranks and rows they lie in. Each
function gives the weight of each token of sequence i, f64[n], for n sequences with `lengths[i]` trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sequence_mean(lengths: Sequence[int]) -> np.ndarray:
    """1 / (n * length_i): mean over tokens, then over sequences (R1 paper, eq. 1)."""
    lengths_n = _lengths(lengths)
    return 1.0 / (lengths_n.size * np.maximum(lengths_n, 1.0))


def token_mean(lengths: Sequence[int]) -> np.ndarray:
    """1 / sum of lengths (DAPO, arXiv 2503.14476, eq. 8)."""
    lengths_n = _lengths(lengths)
    return np.full(lengths_n.size, 1.0 / max(lengths_n.sum(), 1.0))


def constant(lengths: Sequence[int], max_new_tokens: int) -> np.ndarray:
    """1 / (n * max_new_tokens), so that length earns nothing (Dr. GRPO, arXiv 2503.20783)."""
    lengths_n = _lengths(lengths)
    if max_new_tokens <= 0:
        raise ValueError(f"a constant weight needs max_new_tokens > 0, got {max_new_tokens}")
    return np.full(lengths_n.size, 1.0 / (lengths_n.size * max_new_tokens))


def _lengths(lengths: Sequence[int]) -> np.ndarray:
    lengths_n = np.asarray(lengths, dtype=np.float64)
    if lengths_n.size == 0:
        raise ValueError("no sequences to weigh")
    return lengths_n
