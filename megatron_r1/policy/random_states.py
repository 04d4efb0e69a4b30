"""The states of every random number generator that a rank's training may draw from, as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

TRACKED = "megatron/"
"""Before the names of Megatron's own generators, one a kind of parallel region."""


def random_states() -> dict[str, torch.Tensor]:
    """Copies in host memory: torch's (u8), CUDA's and Megatron's if there is a GPU, numpy's (i64[626]: key, place, and
    whether it holds a normal deviate, which is in f64[1]), Python's (i64[625])."""
    _, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, keys), int(place), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().cpu()
        states |= {f"{TRACKED}{name}": state.cpu() for name, state in get_cuda_rng_tracker().get_states().items()}
    return {name: state.clone() for name, state in states.items()}


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what random_states() gave."""
    torch.set_rng_state(states["torch"])
    *keys, place, has_gauss = states["numpy"].tolist()
    gauss = float(states["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    random.setstate((3, tuple(states["python"].tolist()), None))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
        tracker = get_cuda_rng_tracker()
        found = {name.removeprefix(TRACKED): state for name, state in states.items() if name.startswith(TRACKED)}
        tracker.set_states({name: found.get(name, state) for name, state in tracker.get_states().items()})
