"""The errors that users see. Each says what was wrong, what was expected and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something that the user can mend. The command line prints it without a traceback; anything else is a bug."""


class ConfigError(UserError, ValueError):
    """One or more faults of a configuration, reported together before any expensive work."""

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        count = len(self.faults)
        head = "1 fault" if count == 1 else f"{count} faults"
        super().__init__(f"the configuration has {head}:\n" + "\n".join(f"  - {fault}" for fault in self.faults))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        """Rebuilt from the faults, not from the message, when one rank sends it to the others."""
        return type(self), (self.faults,)


class DataError(UserError, ValueError):
    """A malformed input file: names file, line and reason."""


class CheckpointError(UserError, ValueError):
    """A model folder that cannot be read or written as it is: names the file and the tensor, and the remedy."""


class AlgorithmError(UserError, ValueError):
    """An algorithm of the user's own gave what cannot be trained on: names it and what it gave."""


class RewardError(UserError, RuntimeError):
    """A reward of the user's own raised, or gave no number: names it, the problem, the file and the line."""


class EngineError(UserError, RuntimeError):
    """A vLLM process that cannot be started, died, or answered nonsense; carries the tail of its log."""


class DeviceMemoryError(UserError, RuntimeError):
    """Memory of a device that was lent to others and does not come back."""


class MismatchError(UserError, RuntimeError):
    """Rollout and trainer disagree on logprobs by more than the configured bound."""


class RoutesError(UserError, RuntimeError):
    """The experts that an engine says it chose cannot be those of its tokens in the trainer's model."""


class DivergedError(UserError, RuntimeError):
    """Too many optimizer steps in a row had no finite gradient: the policy cannot be trained further."""


class JudgeError(UserError, RuntimeError):
    """The server that judges cannot be used: names its URL, and shows an answer that made no sense."""


class EmptyStageError(UserError, ValueError):
    """A stage has nothing to hand on; carries the report that says where everything went."""


class PreemptedError(UserError):
    """The run was asked to end early, and did, after a checkpoint. The exit status is PREEMPTED."""


PREEMPTED = 75
"""Exit status of a run that should be started again as it was (EX_TEMPFAIL in sysexits.h)."""
