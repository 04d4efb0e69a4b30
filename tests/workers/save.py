"""Worker: save a model folder again from each layout, in several files.

usage: save.py STORE ROOT NAMES; ROOT/model is the folder, ROOT/NAME what layout NAME saves. With the first layout also
what cannot be saved (ROOT/refused), and what each rank raises where one cannot read its weights (ROOT/failed.json of
rank 0: {"save 2": [of rank 0, of rank 1, ...], ...}).
"""

from __future__ import annotations

import itertools
import json
import sys
from functools import partial
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from trainer import groups, policy_of  # noqa: E402

from megatron_r1.errors import CheckpointError  # noqa: E402
from megatron_r1.resharding.boxes import Box  # noqa: E402
from megatron_r1.weights.export import WeightStream  # noqa: E402
from megatron_r1.weights.save import save_hf_folder  # noqa: E402

LAYOUTS = {
    "tp2pp2": {"tensor": 2, "pipeline_parallel": 2, "sequence": True},
    "ep2tp2etp2": {"tensor": 2, "expert": 2, "expert_tensor": 2, "sequence": True},
    "ep4": {"expert": 4},
    "cp2tp2": {"tensor": 2, "context": 2, "sequence": True},
}


def main(store: str, root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        with groups(f"{store}-{number}", **LAYOUTS[name]) as parallel:
            policy = policy_of(root / "model", parallel)
            stream = policy.weights(dtype=torch.float32, include_mtp=True, bucket_bytes=1 << 14)
            save_hf_folder(stream, root / "model", root / name, file_bytes=1 << 17)
            if number == 0:
                refused(stream, root)
                failed = {
                    f"{work} {bad}": raised(stream, root, work, bad) for work in ("save", "gather") for bad in range(4)
                }
                if dist.get_rank() == 0:
                    (root / "failed.json").write_text(json.dumps(failed))


def refused(stream: WeightStream, root: Path) -> None:
    """A folder whose index cannot be written: ROOT/refused-RANK is what the rank raised."""
    target, read = root / "refused", stream.read

    def read_and_obstruct(tensor: int, box: Box) -> torch.Tensor:
        (root / "refused.partial" / "model.safetensors.index.json").mkdir(exist_ok=True)
        return read(tensor, box)

    stream.read = read_and_obstruct  # type: ignore[method-assign]
    try:
        save_hf_folder(stream, root / "model", target, file_bytes=1 << 17)
    except CheckpointError as error:
        (root / f"refused-{dist.get_rank()}").write_text(str(error))


def raised(stream: WeightStream, root: Path, work: str, bad: int) -> list[str]:
    """What each rank raises where the third tensor that rank `bad` reads is not to be had."""
    read, count, said = WeightStream.read, itertools.count(), ""

    def failing(tensor: int, box: Box) -> torch.Tensor:
        if dist.get_rank() == bad and next(count) == 2:
            raise ValueError(f"planted on rank {bad}")
        return read(stream, tensor, box)

    stream.read = failing  # type: ignore[method-assign]
    try:
        if work == "save":
            save_hf_folder(stream, root / "model", root / "not_saved", file_bytes=1 << 17)
        else:
            for _ in stream:
                pass
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    stream.read = partial(read, stream)  # type: ignore[method-assign]
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    return everyone


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","))
