"""Go through the rounds of a weight sync's plan: how long it takes beside what its busiest link needs alone.

usage: python tools/simulate_sync.py [--bucket-mib 512] [--rate 40] [--step-us 300]
       ... --model DeepSeek-V3-Base --trainer pipeline_parallel=16,expert=16,world_size=256 --tensor 32 --servers 8
           [--expert-parallel]

Prints a row for each of CASES, or for the layout that is given, with the processor seconds that the plan takes. Every
link has --rate GB/s each way, which its messages share; a rank or worker has messages of at most two rounds on the way
(engines/vllm/messages.py), and time goes in steps of --step-us. Packing and placing are left out: they run beside the
transfer.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.planning.holdings import sent_entries, server_wants, trainer_shards, wire_tensors
from megatron_r1.planning.stages import even_layout
from megatron_r1.recipes import PACKAGED_SHAPES
from megatron_r1.resharding.plan import Plan, make_plan
from megatron_r1.resharding.takes import numbers_of

IN_FLIGHT = 2
Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """`trainer`: fields of `parallel`. `experts`: whole ones on each worker."""

    model: str
    trainer: str
    tensor: int
    servers: int
    experts: bool = False


V3, MOONLIGHT = "DeepSeek-V3-Base", "Moonlight-16B-A3B"
CASES = (
    Case(V3, "pipeline_parallel=16,expert=16,world_size=256", 32, 8),
    Case(V3, "pipeline_parallel=16,expert=16,world_size=256", 32, 8, experts=True),
    Case(V3, "pipeline_parallel=16,expert=32,world_size=512", 32, 8),
    Case(V3, "pipeline_parallel=16,expert=32,world_size=512", 32, 8, experts=True),
    Case(V3, "tensor=8,pipeline_parallel=16,expert=8,world_size=256", 32, 16, experts=True),
    Case(MOONLIGHT, "expert=8,world_size=8", 4, 2, experts=True),
    Case(MOONLIGHT, "expert=4,pipeline_parallel=3,world_size=24", 2, 8),
    Case("Qwen2.5-7B", "tensor=2,pipeline_parallel=4,world_size=16", 4, 4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=V3, choices=sorted(PACKAGED_SHAPES))
    parser.add_argument("--trainer", help="fields of `parallel`")
    parser.add_argument("--tensor", type=int, default=32, help="workers of each server")
    parser.add_argument("--servers", type=int, default=8)
    parser.add_argument("--expert-parallel", action="store_true", help="whole experts on each worker")
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--rate", type=float, default=40.0, help="GB/s of a link, one way")
    parser.add_argument("--step-us", type=float, default=300.0)
    given = parser.parse_args()
    own = Case(given.model, given.trainer or "", given.tensor, given.servers, given.expert_parallel)
    print("| model | trainer | servers | wants | messages | plan, s | sync, s | busiest link alone, s | its share |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in [own] if given.trainer else CASES:
        plan, wants, seconds = timed_plan(case, given.bucket_mib << 20)
        sizes = plan.sizes
        alone = max(np.bincount(row, sizes[3]).max() for row in sizes[1:3]) / (given.rate * 1e9)
        took = simulate(sizes, given.rate * 1e9, given.step_us * 1e-6)
        print(
            f"| {case.model} | {case.trainer.replace(',', ', ')} | {case.servers} of TP{case.tensor}"
            f"{' EP' if case.experts else ''} | {wants:,} | {sizes.shape[1]:,} | {seconds:.1f} | {took:.2f} | "
            f"{alone:.2f} | {alone / took:.2f} |",
            flush=True,
        )


def layout_of(words: str, shape: ModelShape) -> ParallelConfig:
    given = {name: int(value) for name, value in (word.split("=") for word in words.split(","))}
    stages = given.get("pipeline_parallel", 1) * given.get("virtual_pipeline", 1)
    layout = even_layout(shape, stages) if stages > 1 else ""
    if layout == "" and shape.num_layers % stages:
        raise SystemExit(f"--trainer: {stages} stages do not divide {shape.num_layers} layers")
    return ParallelConfig(**given, sequence=given.get("tensor", 1) > 1, pipeline_layout=layout)


def timed_plan(case: Case, bucket_bytes: int) -> tuple[Plan, int, float]:
    """The plan, its wants, and the processor seconds that making it took."""
    shape = dataclasses.replace(load_shape(PACKAGED_SHAPES[case.model]), num_mtp_layers=0)
    tensors = wire_tensors(sent_entries(shape))
    shards = trainer_shards(shape, layout_of(case.trainer, shape))
    wants = [numbers_of(own) for own in server_wants(shape, tensor=case.tensor, expert_parallel=case.experts)]
    started = time.process_time()
    plan = make_plan(tensors, shards, [wants] * case.servers, bucket_bytes)
    return plan, case.servers * sum(map(len, wants)), time.process_time() - started


def simulate(sizes: Numbers, rate: float, step: float) -> float:
    """Seconds until all messages (int64[4, n]: round, sender, worker, bytes) are there. A message is on its way when
    its round is among the next IN_FLIGHT of both its ends; links are shared by what is on its way over them."""
    _, senders, workers, num_bytes = sizes
    ends = int(senders.max()) + 1 + int(workers.max()) + 1
    sides = np.stack([senders, workers + senders.max() + 1])
    # Of each end, its rounds in their order: which messages, and how many of them are not there yet.
    places = np.stack([_places(sizes[0], side) for side in sides])
    rounds: dict[tuple[int, int], list[int]] = {}
    for message in range(len(num_bytes)):
        for side in range(2):
            rounds.setdefault((int(sides[side, message]), int(places[side, message])), []).append(message)
    missing = {key: len(own) for key, own in rounds.items()}
    entered = np.zeros(len(num_bytes), int)
    for end in range(ends):
        for place in range(IN_FLIGHT):
            entered[rounds.get((end, place), [])] += 1
    first = [0] * ends
    left, seconds, done = num_bytes.astype(float), 0.0, np.zeros(len(num_bytes), bool)
    while not done.all():
        moving = np.flatnonzero((entered == 2) & ~done)
        speed = shared(sides[:, moving], ends) * rate
        passed = max(step, float((left[moving] / speed).min()))
        left[moving] -= speed * passed
        seconds += passed
        arrived = moving[left[moving] <= 0]
        done[arrived] = True
        for message in arrived.tolist():
            for side in range(2):
                end = int(sides[side, message])
                missing[end, int(places[side, message])] -= 1
                while missing.get((end, first[end])) == 0:
                    entered[rounds.get((end, first[end] + IN_FLIGHT), [])] += 1
                    first[end] += 1
    return seconds


def _places(rounds: Numbers, side: Numbers) -> Numbers:
    """Of each message, which of its end's own rounds it is in."""
    order = np.lexsort((rounds, side))
    new_end = np.diff(side[order], prepend=-1) != 0
    new = new_end | (np.diff(rounds[order], prepend=-1) != 0)
    counted = np.cumsum(new)
    found = np.empty_like(rounds)
    found[order] = counted - np.maximum.accumulate(np.where(new_end, counted, 0))
    return found


def shared(sides: Numbers, ends: int) -> Floats:
    """Each message's share of a link: what its busier end leaves it, and then in turns what is still free at both."""
    crowd = np.stack([np.bincount(side, minlength=ends)[side] for side in sides])
    speed = 1 / crowd.max(axis=0)
    for _ in range(4):
        used = np.stack([np.bincount(side, speed, minlength=ends)[side] for side in sides])
        speed = speed + ((1 - used).clip(0) / crowd).min(axis=0)
    return speed


if __name__ == "__main__":
    main()
