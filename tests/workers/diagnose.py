"""Worker: what megatron-r1 diagnose finds of several trainers beside one recording, each under its layout.

usage: diagnose.py STORE FOLDER NAMES. FOLDER/NAME.words holds the command's words as JSON; the answer goes to
FOLDER/NAME.json. If FOLDER/NAME.checkpoint is a folder, the trainer's state goes there, as a run's checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import tyro  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from megatron_r1.diagnose.config import DiagnoseConfig, validate_diagnose  # noqa: E402
from megatron_r1.diagnose.report import as_json, table  # noqa: E402
from megatron_r1.diagnose.run import build_policy, compare_sides, hf_names  # noqa: E402
from megatron_r1.observe.metrics import write_json  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.checkpoint import take_snapshot  # noqa: E402


def main(store: str, folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        words = json.loads((folder / f"{name}.words").read_text())
        config = tyro.cli(DiagnoseConfig, args=[*words, "--parallel.world-size", os.environ["WORLD_SIZE"]])
        shape = validate_diagnose(config)
        topology.initialise(config.parallel, seed=1, cpu=True, store_path=f"{store}-{number}")
        assert config.recording is not None
        found = compare_sides(config, shape, torch.device("cpu"), load_file(config.recording))
        if dist.get_rank() == 0:
            write_json(folder / f"{name}.json", as_json(found, hf_names(shape)) | {"table": table(found)})
        if (checkpoint := folder / f"{name}.checkpoint").is_dir():
            take_snapshot(build_policy(config, shape, torch.device("cpu"))).write(checkpoint)
        dist.barrier()
        topology.finalise()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","))
