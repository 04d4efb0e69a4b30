"""Who scores a student's samples in on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_r1.bounds import Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """Its server is like the rollout servers but for what is said here."""

    model: Path | None = None
    """Hugging Face folder with the student's tokenizer."""
    tensor_parallel: Count = 1
    """GPUs of its server."""
    devices: str = ""
    """CUDA_VISIBLE_DEVICES of its server; empty: what this process sees."""
