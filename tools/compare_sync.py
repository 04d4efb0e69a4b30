"""Measure pushes of weights at several commits by turns, in one run: is a sync slower than it was?

usage: python tools/compare_sync.py CHECKOUT... [--megabytes 500 | --model FOLDER]
           [--layout tensor=2,pipeline_parallel=2] [--ranks 4] [--tensor 2] [--dtype bf16] [--sync gloo]
           [--uncompared] [--repeats 9] [--json OUT]

CHECKOUT is a clone of this repository at another commit, after `python setup.py egg_info` there. That one, and this
checkout as it is, start a trainer and a server of the same model, and push by turns, another one first each time; with
--uncompared this checkout does so once more with nothing compared afterwards (rollout.check_tensors 0). All are there
at once: mind the memory. Prints for each: medians of the seconds of a push and of its parts, of the processor seconds
of all ranks together, and of the MB by which rank 0 grew at most.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmark_sync import make_folder, make_policy, parallel_of, rollout_of, rotated, timed  # beside this file

HERE = Path(__file__).resolve().parent.parent
ANSWER = "pushed "
"""How a trainer's rank 0 begins the line that answers an order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="*")
    parser.add_argument("--megabytes", type=int, default=500, help="of the weights on the wire")
    parser.add_argument("--model", type=Path, help="this folder's model, with its weights if it has any")
    parser.add_argument("--layout", default="tensor=2,pipeline_parallel=2", help="fields of `parallel` of the trainer")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=2, help="workers of each server")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--sync", default="gloo", choices=["gloo", "ipc"])
    parser.add_argument("--uncompared", action="store_true", help="also push with nothing compared afterwards")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write what was measured as JSON too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check-tensors", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.save:
        save(arguments)
        return
    if arguments.folder:
        serve(arguments)
        return
    for checkout in arguments.checkouts:
        if not (checkout / "megatron_r1").is_dir():
            parser.error(f"{checkout} has no folder megatron_r1: give a clone of this repository")
        if not (checkout / "megatron_r1.egg-info").is_dir():  # vLLM's server finds the plugin by it
            parser.error(f"{checkout} has no megatron_r1.egg-info: run `python setup.py egg_info` there")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_folder(folder, arguments)
        if not any(folder.glob("*.safetensors")):
            words = [f"--folder={folder}", f"--save={scratch}/weights", f"--dtype={arguments.dtype}"]
            subprocess.run([sys.executable, __file__, *words], check=True)
            folder = Path(scratch) / "weights"
        trainers = {
            f"{number}: {checkout}": Trainer(checkout, arguments, folder)
            for number, checkout in enumerate((*arguments.checkouts, HERE))
        }
        if arguments.uncompared:
            trainers[f"{HERE}, nothing compared"] = Trainer(HERE, arguments, folder, ("--check-tensors", "0"))
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
        for trainer in trainers.values():
            trainer.push(1)  # meets, and plans
        for repeat in range(arguments.repeats):
            for name, trainer in rotated(list(trainers.items()), repeat):
                rows[name].append(trainer.push(repeat + 2))
        for trainer in trainers.values():
            trainer.close()
    print(as_table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


class Trainer:
    """The ranks of one checkout, which push when they are told to."""

    def __init__(self, checkout: Path, arguments: argparse.Namespace, folder: Path, more: tuple[str, ...] = ()) -> None:
        """The trainer has `folder` for itself, in a copy."""
        own = Path(tempfile.mkdtemp(dir=folder.parent)) / "model"
        shutil.copytree(folder, own)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
        words = [f"--layout={arguments.layout}", f"--ranks={arguments.ranks}", f"--tensor={arguments.tensor}"]
        words += [f"--dtype={arguments.dtype}", f"--sync={arguments.sync}", f"--folder={own}", *more]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(checkout.resolve()),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [*launch, __file__, *words], cwd=checkout, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def push(self, version: int) -> dict[str, float]:
        """Seconds and processor seconds of one push, by name."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(version, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"{self.process.args}: ended with status {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        if status := self.process.wait():
            raise RuntimeError(f"{self.process.args}: ended with status {status} after its last push")


def save(arguments: argparse.Namespace) -> None:
    """Give the folder's model random weights, in a folder of its own."""
    from megatron_r1.policy.platform import configure_process

    configure_process(threads=2, cpu=True)
    from megatron_r1.config import ParallelConfig
    from megatron_r1.policy import topology
    from megatron_r1.weights.save import save_hf_folder

    topology.initialise(ParallelConfig(), seed=1, cpu=True)
    policy, dtype = make_policy(arguments, ParallelConfig())
    save_hf_folder(policy.weights(dtype=dtype), arguments.folder, arguments.save)
    topology.finalise()


def serve(arguments: argparse.Namespace) -> None:
    """On each rank: push the version that each line of rank 0's input has. What is imported is any commit's."""
    from megatron_r1.policy.platform import configure_process

    configure_process(threads=1, cpu=True)
    import torch.distributed as dist

    from megatron_r1.engines.vllm.server import start_engines
    from megatron_r1.engines.vllm.sync import WeightSync
    from megatron_r1.policy import topology

    parallel = parallel_of(arguments)
    topology.initialise(parallel, seed=1, cpu=True)
    policy, dtype = make_policy(arguments, parallel)
    base, rank = arguments.folder, dist.get_rank()
    rollout = dataclasses.replace(rollout_of(arguments), sync=arguments.sync)
    if arguments.check_tensors is not None:
        rollout = dataclasses.replace(rollout, check_tensors=arguments.check_tensors)
    engines = start_engines(rollout, model_path=base, run_dir=base.parent / "servers") if rank == 0 else ()
    source = policy.weights(dtype=dtype, bucket_bytes=rollout.sync_bucket_mib << 20)
    sync = WeightSync(rollout, source=source, engines=engines, model_path=base, rank=rank)
    while version := ordered(sys.stdin.readline() if rank == 0 else ""):
        parts: dict[str, float] = {}
        row = timed(lambda: parts.update(sync.push(version).parts))  # noqa: B023
        if rank == 0:
            print(
                ANSWER + json.dumps({"seconds": row["seconds"], "cpu": row["cpu"], "grew": row["grew"], **parts}),
                flush=True,
            )
    sync.close()
    for engine in engines:
        engine.stop()
    topology.finalise()


def ordered(line: str) -> int:
    """Rank 0's line as a number, on all ranks; 0 for the end."""
    import torch
    import torch.distributed as dist

    version = torch.tensor(int(line or 0))
    dist.broadcast(version, 0)
    return int(version)


def as_table(rows: dict[str, list[dict[str, float]]]) -> str:
    columns = ["seconds, median", "least", "most", "pause", "transfer", "resume", "verify", "CPU seconds", "grew, MB"]
    lines = [f"| | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for name, own in rows.items():
        seconds = [row["seconds"] for row in own]
        fields = ("pause", "transfer", "resume", "verify", "cpu", "grew")
        middle = [statistics.median(row.get(field, 0.0) for row in own) for field in fields]
        numbers = [statistics.median(seconds), min(seconds), max(seconds), *middle]
        lines.append(f"| {name} | {' | '.join(f'{number:.3f}' for number in numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
