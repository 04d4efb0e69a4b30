"""Worker: a converted checkpoint under several layouts, against the Hugging Face folder that it came from.

usage: torch_dist.py STORE FOLDER CONVERTED OUT NAMES. For each named layout, OUT/NAME.json says what differed:
weights read by our loader and by Megatron's dist_checkpointing.load, both compared with what the HF folder gives this
layout; and bytes read by each rank. OUT/NAME is a checkpoint that Megatron saved from this layout.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from layouts import LAYOUTS  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from trainer import groups, policy_of  # noqa: E402

from megatron_r1.config import OptimizerConfig  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402
from megatron_r1.weights.local import LocalTensor  # noqa: E402
from megatron_r1.weights.torch_dist import CONTENT  # noqa: E402


def main(store: str, folder: Path, converted: Path, out: Path, names: list[str]) -> None:
    # The queue of Megatron's writers lies in a process that it spawns: all imports once more for each rank.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    optimizer = OptimizerConfig(distributed=False)
    for number, name in enumerate(names):
        with groups(f"{store}-{number}", **LAYOUTS[name]) as parallel:
            expected = policy_of(folder, parallel, optimizer=optimizer)
            ours = policy_of(folder, parallel, optimizer=optimizer, load_from=converted)
            found = {"ours": differing(expected, ours), "bytes_read": expected.bytes_read}
            found |= shares(expected)
            for local in ours._tensors.values():
                local.tensor.data.zero_()
            load_with_megatron(ours, converted)
            found["megatron"] = differing(expected, ours)
            save_with_megatron(expected, folder, out / name)
            everyone: list = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, found)
            if dist.get_rank() == 0:
                (out / f"{name}.json").write_text(json.dumps(everyone))


def differing(expected: Policy, found: Policy) -> list[str]:
    """Names of parameters that are not bit for bit the same. Padding of the vocabulary does not count."""
    names = []
    for name, local in expected._tensors.items():
        rows = real_rows(local)
        if not torch.equal(local.tensor[:rows], found._tensors[name].tensor[:rows]):
            names.append(name)
    return names


def real_rows(local: LocalTensor) -> int:
    size = local.tensor.shape[0]
    if local.entry.kind != "vocabulary":
        return size
    return max(min(local.entry.hf_shapes[0][0] - local.index * size, size), 0)


def shares(policy: Policy) -> dict[str, int]:
    """Bytes of this rank's own parameters, split and replicated (a tied head's copy counts once more)."""
    split = replicated = 0
    for local in policy._tensors.values():
        size = local.tensor[: real_rows(local)].numel() * 4
        split, replicated = (split + size, replicated) if local.count > 1 else (split, replicated + size)
    return {"split": split, "replicated": replicated}


def sharded(policy: Policy) -> dict:
    """The chunks' sharded state dicts without extra states, which hold nothing here."""
    state = {}
    for number, chunk in enumerate(policy.chunks):
        part = chunk.module.sharded_state_dict(metadata=dict(CONTENT))
        state[f"model{number}"] = {key: value for key, value in part.items() if not isinstance(value, ShardedObject)}
    return state


def load_with_megatron(policy: Policy, folder: Path) -> None:
    loaded = dist_checkpointing.load(sharded(policy), str(folder))
    for number, chunk in enumerate(policy.chunks):
        missing, unexpected = chunk.module.load_state_dict(loaded[f"model{number}"], strict=False)
        assert not unexpected and all("_extra_state" in name for name in missing), (missing, unexpected)


def save_with_megatron(policy: Policy, folder: Path, target: Path) -> None:
    if dist.get_rank() == 0:
        target.mkdir()
    dist.barrier()
    dist_checkpointing.save(sharded(policy), str(target), content_metadata=dict(CONTENT))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(folder, target / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
    assert parallel_state.is_initialized()


if __name__ == "__main__":
    main(sys.argv[1], *(Path(argument) for argument in sys.argv[2:5]), sys.argv[5].split(","))
