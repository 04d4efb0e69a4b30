"""Process that writes a model folder's logits: python -m megatron_r1.policy.logits FOLDER IDS.npy LOGITS.npy

IDS: i64[tokens]; LOGITS: f32[tokens, vocabulary]. One rank, fp32, on the CPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from megatron_r1.policy.platform import configure_process


def main(folder: Path, given: Path, target: Path) -> None:
    configure_process(threads=os.cpu_count() or 1, cpu=True)
    import torch

    from megatron_r1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
    from megatron_r1.config.shape import hf_files, load_shape
    from megatron_r1.policy import topology
    from megatron_r1.policy.policy import Policy

    parallel, shape = ParallelConfig(), load_shape(folder)
    with tempfile.TemporaryDirectory() as store:
        topology.initialise(parallel, seed=0, cpu=True, store_path=f"{store}/store")
        policy = Policy(
            shape,
            parallel=parallel,
            train=TrainConfig(dtype="fp32"),
            model=ModelConfig(path=hf_files(folder), load_from=folder),
            optimizer=OptimizerConfig(distributed=False),
            total_steps=1,
            device=torch.device("cpu"),
        )
        ids = torch.from_numpy(np.load(given))[None]
        chunk = policy.chunks[0].eval()
        with torch.no_grad():
            logits = chunk(ids, torch.arange(ids.shape[1])[None], None)
        np.save(target, logits[0, :, : shape.vocab_size].float().numpy())
        topology.finalise()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
