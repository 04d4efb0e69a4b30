"""A run that is asked to end early: it finishes its step, writes a checkpoint and ends with status 75.

Asked by SIGUSR1 to a rank or to the launcher, or by a file `stop` in the run folder, which any host can make.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.errors import PreemptedError
from megatron_r1.pipeline.folder import STOP


class Preemption:
    """Whether this run has been asked. Make it on every rank, in the main thread."""

    def __init__(self, run_dir: Path, device: torch.device) -> None:
        self._file, self._device = run_dir / STOP, device
        self._asked = False
        signal.signal(signal.SIGUSR1, self._ask)

    def asked(self) -> bool:
        """Whether any rank has been; the same on all. A collective."""
        own = self._asked or (dist.get_rank() == 0 and self._file.exists())
        flag = torch.tensor([float(own)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def end(self, step: int) -> None:
        """Raises PreemptedError, the checkpoint of step `step` being written. A collective."""
        dist.barrier()
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
        raise PreemptedError(f"asked to end: stopped after step {step} with a checkpoint; start it again to go on")

    def _ask(self, *_: object) -> None:
        self._asked = True
