"""Measure pushes of weights, each way beside the others, an export and loads, of one model in one run.

usage: python tools/benchmark_sync.py [--megabytes 500 | --model FOLDER] [--layout tensor=2,pipeline_parallel=2]
           [--ranks 4] [--tensor 2] [--dtype bf16] [--repeats 5] [--json OUT]

Servers of the same random DeepSeek-V3, or of FOLDER's model (--tensor workers each), stand side by side, one for each
way: over sockets (rollout.sync gloo), the same with nothing compared afterwards, and through the host's memory (ipc).
Pushes take turns. With a dense model, one rank and one worker so does what no push can do without: one copy of each
tensor, and vLLM's packing of each matrix for its CPU kernels, in a process that does nothing else. After each export
rank 0 alone writes as many bytes: the disk's own speed. All ranks then load what was saved, once when the page cache
has forgotten it and once again. Medians of seconds, processor seconds of all ranks together, and by how much rank 0's
memory grew at most.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig, TrainConfig
from megatron_r1.config.shape import load_shape, shape_from_config
from megatron_r1.policy.platform import configure_process
from megatron_r1.weights.table import build_table

if TYPE_CHECKING:
    import torch

    from megatron_r1.policy.policy import Policy

TINY = Path(__file__).resolve().parent.parent / "megatron_r1" / "recipes" / "tiny_v3"
WAYS = {"gloo": ("gloo", 8), "gloo, nothing compared": ("gloo", 0), "ipc": ("ipc", 8)}
"""Name -> rollout.sync and rollout.check_tensors."""
EXPORT, PLAIN = "export", "as many bytes written by rank 0"
LOAD, AGAIN = "load by all ranks", "load again"
BARE = "bare parts: a copy, and vLLM's packing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="of the weights on the wire")
    parser.add_argument("--layout", default="tensor=2,pipeline_parallel=2", help="fields of `parallel` of the trainer")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=2, help="workers of each server")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    parser.add_argument("--model", type=Path, help="this folder's model, with its weights if it has any")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        serve_bare_parts(arguments.bare)
        return
    if arguments.folder:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_folder(folder, arguments)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
        words = [*launch, __file__, *sys.argv[1:], "--folder", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(words, check=True, env=environment)
        result = json.loads((folder.parent / "result.json").read_text())
    print(as_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def make_folder(folder: Path, arguments: argparse.Namespace) -> None:
    """A copy of --model, or a config.json of about --megabytes of weights: layers of 8.6 million numbers are added
    until it has them."""
    if arguments.model:
        shutil.copytree(arguments.model, folder)
        return
    num_bytes, itemsize = arguments.megabytes << 20, 2 if arguments.dtype == "bf16" else 4
    fields = json.loads((TINY / "config.json").read_text())
    fields |= {
        "hidden_size": 512, "moe_intermediate_size": 256, "intermediate_size": 1024, "n_routed_experts": 16,
        "num_hidden_layers": 2, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    while size(fields) * itemsize < num_bytes:
        fields["num_hidden_layers"] += 2
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())


def size(fields: dict[str, Any]) -> int:
    return sum(entry.size for entry in build_table(shape_from_config(fields)))


def measure(arguments: argparse.Namespace) -> None:
    """On each rank."""
    configure_process(threads=1, cpu=True)
    import torch
    import torch.distributed as dist

    from megatron_r1.engines.vllm.server import start_engines
    from megatron_r1.engines.vllm.sync import WeightSync
    from megatron_r1.policy import topology
    from megatron_r1.weights.load import load_weights
    from megatron_r1.weights.save import save_hf_folder

    parallel = parallel_of(arguments)
    topology.initialise(parallel, seed=1, cpu=True)
    policy, dtype = make_policy(arguments, parallel)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*WAYS, EXPORT, PLAIN, LOAD, AGAIN)}
    base = arguments.folder.parent / "base"
    num_bytes = sum(math.prod(size) * kind.itemsize for _, kind, size in policy.weights(dtype=dtype).metadata())
    plain = b"1" * (num_bytes if dist.get_rank() == 0 else 0)
    for repeat in range(arguments.repeats):
        target = base if repeat == 0 else arguments.folder.parent / f"export-{repeat}"
        rows[EXPORT].append(timed(lambda: save_hf_folder(policy.weights(dtype=dtype), arguments.folder, target)))  # noqa: B023
        rows[PLAIN].append(timed(lambda: (base.parent / f"plain-{repeat}").write_bytes(plain)))  # noqa: B023
    plain = b""
    disk = {name: 0 for name in (LOAD, AGAIN)}
    for _ in range(arguments.repeats):
        if dist.get_rank() == 0:
            forget(base)
        for name in (LOAD, AGAIN):
            begun = disk_bytes()
            rows[name].append(timed(lambda: load_weights(policy._tensors, base)))
            read = torch.tensor(disk_bytes() - begun)
            dist.all_reduce(read)
            disk[name] = max(disk[name], int(read))
    rollout = rollout_of(arguments)
    syncs = {}
    for number, (name, (sync, compared)) in enumerate(WAYS.items()):
        own = dataclasses.replace(rollout, sync=sync, check_tensors=compared)
        run_dir = base.parent / f"servers-{number}"
        engines = start_engines(own, model_path=base, run_dir=run_dir) if dist.get_rank() == 0 else ()
        dist.barrier()
        source = policy.weights(dtype=dtype, bucket_bytes=rollout.sync_bucket_mib << 20)
        syncs[name] = WeightSync(own, source=source, engines=engines, model_path=base, rank=dist.get_rank())
        syncs[name].push(1)  # meets, and plans
    works = {name: opened.push for name, opened in syncs.items()}
    bare = None
    if not policy.shape.moe and arguments.tensor == arguments.ranks == 1:
        bare = BareParts(base)
        works[BARE], rows[BARE] = bare.work, []
    for repeat in range(arguments.repeats):
        for name, work in rotated(list(works.items()), repeat):
            rows[name].append(timed(lambda: work(repeat + 2)))  # noqa: B023
    if bare is not None:
        bare.close()
    if dist.get_rank() == 0:
        found = {"megabytes": num_bytes >> 20, "ranks": arguments.ranks, "layout": arguments.layout, "rows": rows}
        found |= {"disk_megabytes": {name: size >> 20 for name, size in disk.items()}}
        (arguments.folder.parent / "result.json").write_text(json.dumps(found))
    for opened in syncs.values():
        opened.close()
        for engine in opened.engines:
            engine.stop()
    topology.finalise()


def parallel_of(arguments: argparse.Namespace) -> ParallelConfig:
    layout: dict[str, Any] = {
        name: int(value) for name, value in (word.split("=") for word in arguments.layout.split(",") if word)
    }
    return ParallelConfig(world_size=arguments.ranks, sequence=layout.get("tensor", 1) > 1, **layout)


def make_policy(arguments: argparse.Namespace, parallel: ParallelConfig) -> tuple[Policy, torch.dtype]:
    """Of the folder's model, with random weights if it has none; and the dtype of its weights on the wire."""
    import torch

    from megatron_r1.policy.policy import Policy

    has_weights = any(arguments.folder.glob("*.safetensors"))
    policy = Policy(
        load_shape(arguments.folder),
        parallel=parallel,
        train=TrainConfig(dtype=arguments.dtype),
        model=ModelConfig(path=arguments.folder, initialise="weights" if has_weights else "random"),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-3),
        total_steps=1,
        device=torch.device("cpu"),
    )
    return policy, torch.bfloat16 if arguments.dtype == "bf16" else torch.float32


def rollout_of(arguments: argparse.Namespace) -> RolloutConfig:
    return RolloutConfig(
        device="cpu", dtype=arguments.dtype, tensor_parallel=arguments.tensor, max_model_len=64, max_num_seqs=4,
        memory_fraction=0.2, kv_cache_gib=0.25, enforce_eager=True, sync_bucket_mib=64, start_timeout_seconds=400,
    )  # fmt: skip


class BareParts:
    """The process that does a worker's bare parts when it is told to."""

    def __init__(self, folder: Path) -> None:
        words = [sys.executable, __file__, "--bare", str(folder)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.work(0)  # what is done once

    def work(self, number: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(number, file=self.process.stdin, flush=True)
        while (said := self.process.stdout.readline()) != "done\n":  # vLLM logs there too
            if not said:
                raise RuntimeError("the process of the bare parts has ended")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve_bare_parts(folder: Path) -> None:
    """For each line of the input copy every tensor of the folder, pack every matrix, and say so."""
    configure_process(threads=1, cpu=True)
    import torch
    from safetensors.torch import load_file
    from vllm import _custom_ops

    tensors = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
    places, packed = [torch.empty_like(tensor) for tensor in tensors], list[Any]()
    for _ in sys.stdin:
        kept = list[Any]()
        for tensor, place in zip(tensors, places, strict=True):
            place.copy_(tensor)
            if place.ndim == 2:
                kept.append(_custom_ops.create_onednn_mm(place.t(), 32))  # as vLLM's linear layers do
        packed = kept
        print("done", flush=True)
    del packed


def timed(work: Any) -> dict[str, float]:
    """Seconds of the slowest rank, processor seconds of all, and by how many MB rank 0 grew at most meanwhile."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    begun, processor = time.perf_counter(), cpu_seconds()
    work()
    found = torch.tensor([time.perf_counter() - begun, cpu_seconds() - processor], dtype=torch.float64)
    slowest, total = found.clone(), found.clone()
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return {"seconds": float(slowest[0]), "cpu": float(total[1]), "grew": (status("VmHWM") - before) / 1024}


def rotated(items: list[Any], by: int) -> list[Any]:
    """Another one first each time: what comes after something else may find other caches."""
    return items[by % len(items) :] + items[: by % len(items)]


def forget(folder: Path) -> None:
    """Have the page cache forget the folder's weights."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def disk_bytes() -> int:
    """What this process has read from the disk, not from the page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def status(field: str) -> int:
    """kB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def as_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['megabytes']} MB, {result['ranks']} ranks ({result['layout']})",
        "| | seconds, median | least | most | CPU seconds of the ranks | rank 0 grew, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in result["rows"].items():
        seconds = [row["seconds"] for row in rows]
        middle = [statistics.median(row[field] for row in rows) for field in ("cpu", "grew")]
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} | "
            f"{middle[0]:.2f} | {middle[1]:.0f} |"
        )
    read = ", ".join(f"{name}: {size} MB" for name, size in result["disk_megabytes"].items())
    return "\n".join([*lines, f"read from the disk, by all ranks together: {read}"])


if __name__ == "__main__":
    main()
