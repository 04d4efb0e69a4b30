"""A run that is asked to end early: it finishes its step, writes a checkpoint and ends with status 75.

Asked by SIGUSR1 to a rank or to the launcher, or by a file `stop` in the run folder, which any host can make.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1.config.run_folder import STOP
from megatron_r1.errors import PreemptedError

if TYPE_CHECKING:
    import torch


_heard = threading.Event()
"""SIGUSR1 has come."""


def listen() -> None:
    """From now on SIGUSR1 is heard, and does not end this process. In the main thread, as early as may be."""
    signal.signal(signal.SIGUSR1, lambda *_: _heard.set())


def end_alone(run_dir: Path, step: int) -> None:
    """Of a run of one process that has kept what its steps up to `step` made: PreemptedError if it has been asked."""
    if not (_heard.is_set() or (run_dir / STOP).exists()):
        return
    with contextlib.suppress(OSError):
        (run_dir / STOP).unlink(missing_ok=True)
    raise PreemptedError(f"asked to end: stopped after step {step}; start it again to go on")


class Preemption:
    """Whether this run has been asked. Make it on every rank, in the main thread."""

    def __init__(self, run_dir: Path, device: torch.device) -> None:
        self._file, self._device = run_dir / STOP, device
        listen()

    def checkpoint_now(self, step: int, every: int) -> tuple[bool, bool]:
        """(whether a checkpoint is due after step `step`, whether the run is to end after it). A collective."""
        asked = self.asked()
        return asked or bool(every and step % every == 0), asked

    def asked(self) -> bool:
        """Whether any rank has been; the same on all. A collective."""
        import torch
        import torch.distributed as dist

        own = _heard.is_set() or (dist.get_rank() == 0 and self._file.exists())
        flag = torch.tensor([float(own)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def end(self, step: int) -> None:
        """Raises PreemptedError, the checkpoint of step `step` being written. A collective."""
        import torch.distributed as dist

        dist.barrier()
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
        raise PreemptedError(f"asked to end: stopped after step {step} with a checkpoint; start it again to go on")
