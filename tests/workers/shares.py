"""Worker: what each rank gets of a rollout that is whole on rank 0, under every layout of four ranks.

usage: shares.py STORE FOLDER; FOLDER/RANK.json gets, by layout, the rank's data-parallel rank, the numbers of its
sequences, the bytes of its share and of the whole, and the errors that it saw.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import numpy as np  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_r1.algorithms import GRPO  # noqa: E402
from megatron_r1.config import ParallelConfig  # noqa: E402
from megatron_r1.data.packing import RowLayout, pack_rank  # noqa: E402
from megatron_r1.errors import DataError  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.stages.grpo.sequences import to_sequences  # noqa: E402
from megatron_r1.stages.grpo.shares import Trained, shares_of  # noqa: E402
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup  # noqa: E402

LAYOUTS = {
    "dp4": {},
    "tp2": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline_parallel": 2},
    "cp2": {"context": 2},
    "ep2": {"expert": 2},
    "tp2pp2": {"tensor": 2, "sequence": True, "pipeline_parallel": 2},
    "tp2cp2": {"tensor": 2, "sequence": True, "context": 2},
    "cp2pp2": {"context": 2, "pipeline_parallel": 2},
}
LAYOUT = RowLayout(tokens_per_microbatch=256)
MINIBATCHES = 2


def rollout() -> list[RolloutGroup]:
    rng = np.random.default_rng(5)

    def completion() -> Completion:
        length = int(rng.integers(20, 120))
        return Completion(
            token_ids=rng.integers(0, 100, length).astype(np.int32),
            logprobs=rng.normal(-2, 0.1, length).astype(np.float32),
            finish_reason="stop",
            weight_version=0,
            text="t" * length,
        )

    return [
        RolloutGroup(
            problem=Problem(id=str(place), domain="math", messages=()),
            prompt_ids=rng.integers(0, 100, 9).astype(np.int32),
            completions=tuple(completion() for _ in range(4)),
            rewards=tuple(Reward(total=float(total), parts={}) for total in rng.integers(0, 2, 4)),
        )
        for place in range(12)
    ]


def look() -> dict[str, object]:
    """What this rank gets, compared with what it would pack for itself from the whole."""
    groups = rollout()
    parts = Trained.of(groups, GRPO(), 128).parts(MINIBATCHES)
    own, ranks = topology.data_parallel()
    shares = topology.scatter_over_data(lambda: shares_of(parts, GRPO(), LAYOUT, 128, ranks))
    equal = True
    for part, share in zip(parts, shares, strict=True):
        expected = pack_rank(to_sequences(part, GRPO(), 128), LAYOUT, rank=own, num_ranks=ranks)
        for row, known in zip(share.lay_out(LAYOUT), expected, strict=True):
            equal &= all(
                np.array_equal(getattr(row, name), getattr(known, name))
                for name in ("token_ids", "labels", "advantages", "token_weight", "behaviour_logprobs", "cu_seqlens")
            )
            equal &= row.sequence_indices == known.sequence_indices

    def fail() -> list[int]:
        raise DataError("rank 0 alone met this")

    errors = []
    for ask in (lambda: topology.scatter_over_data(fail), lambda: topology.answered(0, lambda found: fail())):
        try:
            ask()
        except DataError as error:
            errors.append(str(error))
    answer = topology.answered(dist.get_rank(), lambda asked: [(rank, len(asked)) for rank in asked])
    return {
        "data_rank": own,
        "data_ranks": ranks,
        "held": [sorted(share.sequences) for share in shares],
        "share_bytes": len(pickle.dumps(shares)),
        "groups_bytes": len(pickle.dumps(groups)),
        "equal": bool(equal),
        "errors": errors,
        "answer": answer,
    }


def main(store: str, folder: Path) -> None:
    found, rank = {}, None
    for number, (name, sizes) in enumerate(LAYOUTS.items()):
        topology.initialise(ParallelConfig(world_size=4, **sizes), seed=1, cpu=True, store_path=f"{store}-{number}")
        found[name], rank = look(), dist.get_rank()
        dist.barrier()
        topology.finalise()
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
