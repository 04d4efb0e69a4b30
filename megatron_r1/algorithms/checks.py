"""Whether an algorithm can be used. Its functions are tried too: a user's own then fails before the servers start."""

from __future__ import annotations

import numpy as np

from megatron_r1.algorithms.base import RESERVED, Algorithm, Setting
from megatron_r1.plugins import told


def algorithm_faults(algorithm: Algorithm, setting: Setting) -> list[str]:
    """Faults of its settings besides their bounds, and of what its functions give for a group of two."""
    kind = type(algorithm).__name__
    try:
        needs = algorithm.needs
        faults = [*algorithm.faults(setting)]
        faults += needs.kl.faults("algorithm.kl") if needs.kl is not None else []
        if needs.correction is not None:
            faults += needs.correction.faults("algorithm.correction", stale=setting.stale)
        if needs.teacher is not None and needs.teacher.model is None:
            faults.append("algorithm.teacher.model is missing; name the teacher's Hugging Face folder")
        taken = sorted(RESERVED & set(algorithm.METRICS))
        if taken:
            faults.append(f"algorithm: {kind}.METRICS has {', '.join(taken)}, which metrics.jsonl has already: rename")
        tried = {
            "advantages": algorithm.advantages(np.array([0.0, 1.0])),
            "token_weights": algorithm.token_weights([1, 2], max(1, setting.max_new_tokens)),
        }
        faults += [fault for name, found in tried.items() if (fault := array_fault(f"{kind}.{name}", found, 2))]
        return faults
    except Exception as error:
        return [f"algorithm: {kind} fails{told(error)}"]


def array_fault(what: str, found: object, size: int) -> str | None:
    """Why `found` is not `size` finite numbers; None if it is."""
    try:
        array = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.array([])
    if array.shape == (size,) and np.isfinite(array).all():
        return None
    return f"algorithm: {what} gave {found!r}; it must be {size} finite numbers"
