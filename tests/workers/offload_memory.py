"""Worker: what was moved to the host does not fit on the device any more, and later does.

usage: offload_memory.py STORE FOLDER. The device is a CPU whose process may grow no further (RLIMIT_AS). Asserts that
the error says so each time, and that after it the next step is that of a policy that never moved, bit for bit.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import psutil  # noqa: E402
import torch  # noqa: E402
from offload import OPTIMIZER, STEPS, rows, weights_of  # noqa: E402
from oracles import save_model  # noqa: E402
from trainer import policy_of  # noqa: E402

from megatron_r1.config import ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.errors import DeviceMemoryError  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.offload import Offload  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402
from megatron_r1.stages.sft.loss import sft_loss  # noqa: E402

PARTS = ("weights", "gradients", "optimizer")


def build(folder: Path) -> Policy:
    torch.manual_seed(5)
    return policy_of(folder, ParallelConfig(), train=TrainConfig(dtype="bf16"), optimizer=OPTIMIZER, steps=STEPS)


def without_room(offload: Offload, part: str) -> None:
    """Ask for `part` while the process can map nothing more."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms, limit[1]))
    try:
        offload.to_device((part,))
    except DeviceMemoryError as error:
        message = str(error)
    else:
        message = ""
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    for word in (f"train.offload: the {part} of rank 0", "rollout.memory_fraction", "rollout.sleep_level 2"):
        assert word in message, message
    assert part in offload.away


def main(store: str, folder: Path) -> None:
    topology.initialise(ParallelConfig(), seed=1, cpu=True, store_path=store)
    save_model("deepseek_v3", folder / "model", mtp_layers=1)
    stayed, moved = build(folder / "model"), build(folder / "model")
    for step in range(2):
        assert stayed.step(rows(step, 0), sft_loss).loss == moved.step(rows(step, 0), sft_loss).loss
    offload = Offload(moved, PARTS)
    for part in PARTS:
        offload.to_host()
        without_room(offload, part)
        offload.to_device()
        assert not offload.away
    assert stayed.step(rows(2, 0), sft_loss).loss == moved.step(rows(2, 0), sft_loss).loss
    for one, other in zip(weights_of(stayed), weights_of(moved), strict=True):
        assert torch.equal(one, other)
    topology.finalise()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
