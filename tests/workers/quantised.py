"""Worker: each rank quantises its parts of weights that all could make, and compares with the whole weight's.

usage: quantised.py STORE FOLDER. FOLDER/RANK.json: by tensor, whether codes and scales are those of the whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.engines.quantised import QuantisedSource
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Shard
from megatron_r1.weights.fp8 import quantise

SHAPES = {"rows": (200, 300), "columns": (130, 500), "even": (384, 260), "plain": (7, 9)}
CUTS = {
    "rows": [Box(0, 65, 0, 300), Box(65, 130, 0, 300), Box(130, 200, 0, 300)],
    "columns": [Box(0, 130, 0, 100), Box(0, 130, 100, 256), Box(0, 130, 256, 500)],
    "even": [Box(0, 128, 0, 260), Box(128, 256, 0, 260), Box(256, 384, 0, 260)],
    "plain": [Box(0, 2, 0, 9), Box(2, 3, 0, 9), Box(3, 7, 0, 9)],
}
SERVED = {name + ".weight" for name in SHAPES} | {name + ".weight_scale_inv" for name in ("rows", "columns", "even")}


class Source:
    """Rank r holds the r-th box of each tensor, in fp32; on the wire it is bf16."""

    device = torch.device("cpu")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]

    def metadata(self):
        return [(name + ".weight", torch.bfloat16, shape) for name, shape in SHAPES.items()]

    def __iter__(self):
        raise NotImplementedError

    @property
    def shards(self):
        return [Shard(n, box, (rank,)) for n, cut in enumerate(CUTS.values()) for rank, box in enumerate(cut)]

    def reading(self):
        return contextlib.nullcontext()

    def read(self, tensor, box):
        own = list(CUTS.values())[tensor][self.rank]
        assert own.meet(box) == box
        return self.weights[tensor][box.top : box.bottom, box.left : box.right]


def main(store: str, folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    equal = {}
    for power_of_two in (False, True):
        source = Source(rank)
        quantised = QuantisedSource(source, SERVED, block=128, power_of_two=power_of_two)
        whole = {name + ".weight": weight for name, weight in zip(SHAPES, source.weights, strict=True)}
        for name in ("rows", "columns", "even"):
            codes, scales = quantise(whole[f"{name}.weight"].bfloat16(), block=128, power_of_two=power_of_two)
            whole |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}
        with quantised.reading():
            for tensor, box, ranks in quantised.shards:
                if rank in ranks:
                    name = quantised.metadata()[tensor][0]
                    part = whole[name][box.top : box.bottom, box.left : box.right]
                    same = torch.equal(quantised.read(tensor, box).float(), part.float())
                    equal[f"{name}, {power_of_two}"] = equal.get(f"{name}, {power_of_two}", True) and same
    (folder / f"{rank}.json").write_text(json.dumps(equal))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
