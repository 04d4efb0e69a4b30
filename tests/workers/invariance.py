"""Worker: the GRPO loop on recorded rollouts, under several layouts of the same number of ranks.

usage: invariance.py STORE FOLDER NAMES; FOLDER holds a model with MTP layers, which are trained too, and recorded/. For
each layout (workers/layouts.py) FOLDER/NAME.npz gets, for each number of optimizer steps per rollout, what the steps
report, by their names in metrics.jsonl.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import numpy as np  # noqa: E402
from layouts import LAYOUTS  # noqa: E402
from trainer import groups, policy_of, row_layout  # noqa: E402

from megatron_r1.agreement import on_rank_zero  # noqa: E402
from megatron_r1.algorithms import GRPO  # noqa: E402
from megatron_r1.algorithms.correction import Correction  # noqa: E402
from megatron_r1.algorithms.kl import KL  # noqa: E402
from megatron_r1.config import OptimizerConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.rollout.recording import Recording  # noqa: E402
from megatron_r1.stages.common.divergence import SkippedSteps  # noqa: E402
from megatron_r1.stages.grpo.config import GRPOLoopConfig  # noqa: E402
from megatron_r1.stages.grpo.loop import Loop, TrainingLoop  # noqa: E402
from megatron_r1.stages.grpo.recorded import recorded  # noqa: E402

MINIBATCHES = (1, 2, 4)
REPORTED = ("loss", "grad_norm", "kl", "entropy", "mismatch", "effective_samples", "correction_weight")
ALGORITHM = GRPO(kl=KL(coef=0.05, refresh_steps=3), correction=Correction(weight="token"))


def main(store: str, folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        found = {}
        for minibatches in MINIBATCHES:
            with groups(f"{store}-{number}-{minibatches}", **LAYOUTS[name]) as parallel:
                rows = run(folder, parallel, minibatches)
            found |= {f"{minibatches}:{key}": np.array([row[key] for row in rows]) for key in REPORTED if rows[0]}
        if os.environ["RANK"] == "0":
            np.savez(folder / f"{name}.npz", **found)


def run(folder: Path, parallel: ParallelConfig, minibatches: int) -> list[dict]:
    recording = Recording(folder)
    steps = recording.num_steps()
    config = GRPOLoopConfig(steps=steps, prompts_per_step=4, group_size=2, minibatches=minibatches, mismatch_bound=1e6)
    policy = policy_of(
        folder,
        parallel,
        train=TrainConfig(dtype="fp32", logprob_chunk_tokens=32),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-3, eps=1e-3),
        steps=steps * minibatches,
        train_mtp=True,
    )
    rows: list[dict] = []
    loop = Loop(
        stream=None,
        collect=lambda *_, **__: None,  # type: ignore[arg-type] - nothing is sampled
        together=on_rank_zero,
        push=lambda version: None,
        on_step=lambda step, metrics, trained: rows.append(metrics),
        to_trainer=lambda keep: None,
        evaluate=lambda: 0.0,
        save=lambda step: None,
        checkpoint=lambda step, metrics: None,
        skips=SkippedSteps(1),
        warn=lambda text: None,
        decode=str,
        recorded=lambda step: recorded(recording, step),
    )
    TrainingLoop(policy, ALGORITHM, config, row_layout(parallel), loop, max_new_tokens=64, seed=0).run()
    return rows


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","))
