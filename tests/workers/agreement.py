"""Worker: what ranks 0 and 1 raise when one of them, or both, had an error.

usage: agreement.py STORE FOLDER. FOLDER/RANK.json: by case, the type and the words of what the rank raised.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.agreement import on_rank_zero, together
from megatron_r1.engines.quantised import QuantisedSource
from megatron_r1.errors import EngineError
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Shard


class Source:
    """A matrix that is cut inside a block of 128 x 128; rank 1 cannot read its half of it."""

    device = torch.device("cpu")

    def metadata(self):
        return [("a.weight", torch.bfloat16, (128, 128))]

    def __iter__(self):
        return iter(())

    @property
    def shards(self):
        return [Shard(0, Box(0, 64, 0, 128), (0,)), Shard(0, Box(64, 128, 0, 128), (1,))]

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        yield

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        return raised(OSError("no such weights")) if dist.get_rank() else torch.ones(box.rows, box.columns)


def raised(error: Exception):
    raise error


def main(store: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    class LocalError(Exception):
        """Of a function's own: it cannot be pickled."""

    def quantise() -> None:
        source = QuantisedSource(Source(), {"a.weight", "a.weight_scale_inv"}, block=128)
        with source.reading():
            pass

    cases: dict[str, Callable[[], object]] = {
        "rank 1": lambda: together(lambda: raised(ValueError("of rank 1")) if rank else None),
        "both": lambda: together(lambda: raised(EngineError(f"of rank {rank}"))),
        "a server's and another": lambda: together(
            lambda: raised(KeyError("of rank 1") if rank else EngineError("rank 1 left"))
        ),
        "local": lambda: on_rank_zero(lambda: raised(LocalError("of rank 0"))),
        "quantising": lambda: together(quantise),
    }
    found = {}
    for name, case in cases.items():
        try:
            case()
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
