"""An endless, shuffled, resumable stream of training problems.

Its whole state is (epoch, position): the order of an epoch is a function of seed and epoch number, so a
restart neither loses nor repeats a problem. Held-out questions are skipped. Left out: prefetching and
sharding over ranks; one rank draws and hands the problems on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from megatron_r1.data.problems import ProblemSplit
from megatron_r1.errors import DataError
from megatron_r1.types import Problem


class ProblemStream:
    """Draws problems of a split in a seeded order, epoch after epoch."""

    def __init__(self, split: ProblemSplit, *, seed: int) -> None:
        self.split = split
        self.seed = seed
        self.epoch = 0
        self._position = 0
        self._order = self._epoch_order()

    def take(self, count: int, wanted: Callable[[Problem], bool] = lambda problem: True) -> list[Problem]:
        """The next `count` problems that are `wanted`; others are passed over until the next epoch.

        DataError if a whole epoch has none."""
        problems: list[Problem] = []
        started = self.epoch
        while len(problems) < count:
            if self._position == len(self._order):
                if self.epoch > started and not problems:
                    raise DataError("none of the training problems may be drawn at this step; see preference_from_step")
                self.epoch += 1
                self._position = 0
                self._order = self._epoch_order()
            problem = self.split.problem(int(self._order[self._position]))
            self._position += 1
            if self.split.is_trainable(problem) and wanted(problem):
                problems.append(problem)
        return problems

    def state_dict(self) -> dict[str, int]:
        """Plain JSON; includes what must be equal for the position to mean the same thing."""
        return {"seed": self.seed, "size": len(self.split), "epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken. DataError if it belongs to other data or another seed."""
        for key, own in (("seed", self.seed), ("size", len(self.split))):
            if state[key] != own:
                raise DataError(
                    f"checkpointed problem stream: {key} is {state[key]}, this run has {own}; they must be "
                    "equal to resume; restore the data configuration of the checkpoint or start a new run "
                    "folder"
                )
        self.epoch = state["epoch"]
        self._position = state["position"]
        self._order = self._epoch_order()

    def _epoch_order(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.split))
