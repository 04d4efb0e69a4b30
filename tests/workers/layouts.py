"""Worker: one model under several layouts of the same number of ranks; what each computes goes to a file.

usage: layouts.py STORE FOLDER NAMES; FOLDER holds the Hugging Face model and sequences.npz. A name is a layout, or one
with -mtp behind it: MTP layers are trained too. For each
FOLDER/NAME.npz gets logits (packed and unpacked), logprobs, the GRPO loss and its gradients under Hugging Face names,
and the exported weights' largest difference from the folder's.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trainer import groups, policy_of, row_layout, rows_of  # noqa: E402

from megatron_r1.algorithms import GRPO, GSPO  # noqa: E402
from megatron_r1.algorithms.clip import Clip  # noqa: E402
from megatron_r1.algorithms.correction import Correction  # noqa: E402
from megatron_r1.algorithms.kl import KL  # noqa: E402
from megatron_r1.config import OptimizerConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.data.packing import unpack  # noqa: E402
from megatron_r1.model.attention import context_parallel_positions  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.batch import to_device  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402
from megatron_r1.stages.grpo import mismatch  # noqa: E402
from megatron_r1.stages.grpo.loss import policy_loss  # noqa: E402
from megatron_r1.types import PackedMicrobatch, TrainingSequence  # noqa: E402
from megatron_r1.weights.export import WeightStream  # noqa: E402
from megatron_r1.weights.local import LocalTensor  # noqa: E402

LAYOUTS = {
    "one": {},
    "dp2": {},
    "dp4": {},
    "tp2": {"tensor": 2, "sequence": True, "expert_tensor": 2},
    "ep2": {"expert": 2},
    "pp2": {"pipeline_parallel": 2},
    "vpp2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "tp2ep2": {"tensor": 2, "sequence": True, "expert": 2},
    "tp2pp2ep2": {"tensor": 2, "sequence": True, "pipeline_parallel": 2, "expert": 2},
    "cp2ep2": {"context": 2, "expert": 2},
    "cp2tp2": {"context": 2, "tensor": 2, "sequence": True, "expert_tensor": 2},
    "cp2pp2": {"context": 2, "pipeline_parallel": 2},
    "cp2tp2ep2": {"context": 2, "tensor": 2, "sequence": True, "expert": 2},
    "cp2pp2ep2": {"context": 2, "pipeline_parallel": 2, "expert": 2},
    "tp2nosp": {"tensor": 2},
    "tp2pp2": {"tensor": 2, "pipeline_parallel": 2, "sequence": True},
    "cp2tp2dense": {"context": 2, "tensor": 2},
    "tp4": {"tensor": 4, "sequence": True},
    "tp2ep2etp2": {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2},
    "tp4ep2etp2": {"tensor": 4, "sequence": True, "expert": 2, "expert_tensor": 2},
    "tp4nosp": {"tensor": 4},
}
ALGORITHM = GRPO(clip=Clip(low=0.2, high=0.3), kl=KL(coef=0.05))
SEQUENCE_ALGORITHM = GSPO(clip=Clip(low=0.05, high=0.05), correction=Correction(weight="sequence", high=1.5))


def main(store: str, folder: Path, names: list[str]) -> None:
    train, optimizer = TrainConfig(dtype="fp32", logprob_chunk_tokens=32), OptimizerConfig(distributed=False)
    for number, name in enumerate(names):
        layout, _, mtp = name.partition("-")
        with groups(f"{store}-{number}", **LAYOUTS[layout]) as parallel:
            policy = policy_of(folder, parallel, train=train, optimizer=optimizer, train_mtp=bool(mtp))
            found = measure(policy, parallel, folder)
            if dist.get_rank() == 0:
                np.savez(folder / f"{name}.npz", **found)


def measure(policy: Policy, parallel: ParallelConfig, folder: Path) -> dict[str, np.ndarray]:
    sequences = load_sequences(folder)
    layout = row_layout(parallel)
    rows = rows_of(sequences, layout)
    found = {f"logits_{i}": value for i, value in collect_logits(policy, rows, sequences, packed=True).items()}
    same = [sequences[0]] * topology.data_parallel()[1] * layout.rows_multiple
    single = rows_of(same, layout)
    if single[0].num_tokens == len(sequences[0]):
        found["unpacked_logits"] = collect_logits(policy, single, same, packed=False)[0]
    scored = unpack(rows, policy.logprobs(rows), [len(s) for s in sequences])
    found |= {f"logprobs_{i}": value for i, value in merge(scored).items()}
    found |= {name: np.array(value) for name, value in mismatch.measure(rows, policy.logprobs(rows)).metrics().items()}
    looked = unpack(rows, looked_at(policy, rows), [len(s) for s in sequences])
    found |= {f"inspected_{i}": value for i, value in merge(looked).items()}
    gradients = policy.gradients(rows, policy_loss(ALGORITHM, own_is_old=False))
    found |= {f"gradient:{name}": value for name, value in full(policy, gradients).items()}
    gradients = policy.gradients(rows, policy_loss(SEQUENCE_ALGORITHM, own_is_old=False))
    found |= {f"gspo:{name}": value for name, value in full(policy, gradients).items()}
    own = {
        name: value.numpy()
        for name, value in policy.weights(dtype=torch.float32, include_mtp=True, bucket_bytes=1 << 16)
    }
    if dist.get_rank() == 0:
        expected = load_file(folder / "model.safetensors")
        missing = set(expected) ^ set(own)
        assert not missing, f"names differ: {sorted(missing)[:5]}"
        worst = max(float(np.abs(own[name] - expected[name].numpy()).max()) for name in expected)
        found["export_difference"] = np.array(worst)
    return found


class StoppedError(Exception):
    """Raised before a step changes anything."""


def looked_at(policy: Policy, rows: list[PackedMicrobatch]) -> list[np.ndarray]:
    """The logprobs that a step computes its gradients with. The step is stopped then."""
    seen: list[list[np.ndarray]] = []

    def inspect(logprobs: list[np.ndarray]) -> None:
        seen.append(logprobs)
        raise StoppedError

    with contextlib.suppress(StoppedError):
        policy.step(rows, policy_loss(ALGORITHM, own_is_old=False), inspect=inspect)
    (logprobs,) = seen
    return logprobs


def load_sequences(folder: Path) -> list[TrainingSequence]:
    stored = np.load(folder / "sequences.npz")
    names = ("token_ids", "loss_mask", "token_weight", "old_logprobs", "reference_logprobs", "behaviour_logprobs")
    return [
        TrainingSequence(advantage=float(stored[f"{i}.advantage"]), **{name: stored[f"{i}.{name}"] for name in names})
        for i in range(int(stored["count"]))
    ]


def merge(own: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(own))
    return {index: value for part in gathered for index, value in part.items()}


def full(policy: Policy, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Sharded tensors under Megatron's names -> whole tensors under Hugging Face names (rank 0)."""
    local = {
        name: LocalTensor(item.entry, tensors[name], item.index, item.count)
        for name, item in policy._tensors.items()
        if name in tensors
    }
    held: list = [None] * dist.get_world_size()
    dist.all_gather_object(held, sorted(local))
    everywhere = {name for names in held for name in names}
    table = [entry for entry in policy.table if entry.name in everywhere]
    stream = WeightStream(local, table, policy.shape, dtype=torch.float32, bucket_bytes=1 << 16, include_mtp=True)
    return {name: value.numpy().copy() for name, value in stream}


def collect_logits(policy: Policy, rows, sequences, *, packed: bool) -> dict[int, np.ndarray]:
    """Logits [L, V] of each sequence, through Megatron's pipeline schedule, on every rank."""

    def forward(iterator, model):
        batch = next(iterator)
        output = model(batch.token_ids, batch.position_ids, None, packed_seq_params=batch.packed if packed else None)
        return output, lambda logits: (logits.new_zeros(()), torch.zeros((), dtype=torch.int), {"logits": logits})

    for chunk in policy.chunks:
        chunk.eval()
    iterators = [iter([to_device(row, policy.device) for row in rows]) for _ in policy.chunks]
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=policy.chunks if len(policy.chunks) > 1 else policy.chunks[0],
            num_microbatches=len(rows),
            seq_length=rows[0].num_tokens,
            micro_batch_size=1,
            forward_only=True,
        )
    found: dict[int, np.ndarray] = {}
    for row, output in zip(rows, outputs, strict=False):
        whole = gather_vocabulary(output["logits"][0])[:, : policy.shape.vocab_size]
        whole = gather_context(whole, np.diff(row.cu_seqlens).tolist())
        for start, index in zip(row.cu_seqlens, row.sequence_indices, strict=False):
            found[index] = whole[start : start + len(sequences[index])].numpy()
    return merge(found)


def gather_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def gather_context(logits: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits.contiguous(), group=group)
    whole = torch.empty(sum(lengths), logits.shape[-1])
    for rank, part in enumerate(parts):
        whole[context_parallel_positions(lengths, group.size(), rank)] = part
    return whole


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","))
