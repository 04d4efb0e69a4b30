"""Published figures of other systems, the conditions as far as they were published, and what the planner says of them.

usage: python tests/planning/published.py, prints the table of docs/planner.md.
Where a condition is not known the value taken is marked `assumed` in `note`. Not here: checkpoint-engine's sync, a way
that this project does not have; slime's and Megatron-Core's figures, and other syncs shard to shard, whose layouts are
not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config import ParallelConfig, load_shape
from megatron_r1.planning.decoding import server_memory
from megatron_r1.planning.hardware import Assumptions, find_gpu
from megatron_r1.planning.plan import ServerSetup, rollout_time
from megatron_r1.planning.stages import even_layout
from megatron_r1.planning.sync import sync_time
from megatron_r1.planning.trainer import TrainerSetup, trainer_time
from megatron_r1.planning.workload import Workload

V3 = load_shape(Path(__file__).parent / "deepseek_v3.json")
ASSUME = Assumptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    name: str
    unit: str
    value: float
    estimate: Callable[[], float]
    note: str

    @property
    def factor(self) -> float:
        """Above 1: the planner is slower (it says more seconds, or fewer tokens per second)."""
        ratio = self.estimate() / self.value
        return 1 / ratio if self.unit == "tokens/s/GPU" else ratio


def _setup(world: int, tensor: int, pipeline: int, expert: int, row: int, dtype: str = "bf16", recompute: str = "full"):
    layout = even_layout(V3, pipeline)
    parallel = ParallelConfig(
        world_size=world,
        tensor=tensor,
        sequence=tensor > 1,
        pipeline_parallel=pipeline,
        expert=expert,
        pipeline_layout=layout,
    )
    return TrainerSetup(parallel=parallel, row_tokens=row, dtype=dtype, recompute=recompute)


def step_seconds(gpu_name: str, setup: TrainerSetup, servers: ServerSetup, work: Workload, *, ahead: bool) -> float:
    """Rollout and trainer one after the other, or (one step ahead) at the same time; weight sync left out."""
    gpu = find_gpu(gpu_name)
    memory = server_memory(V3, gpu, tensor=servers.tensor, memory_fraction=servers.memory_fraction)
    rollout = rollout_time(V3, servers, memory, work, gpu, ASSUME).seconds
    trainer = trainer_time(V3, setup, work, gpu, ASSUME).total
    return max(rollout, trainer) if ahead else rollout + trainer


def tokens_per_second(gpu_name: str, setup: TrainerSetup, sequences: int) -> float:
    """Of pretraining, for each GPU, sequences of one row each."""
    row = setup.row_tokens
    work = Workload(
        samples=sequences, prompt_tokens=0, mean_response=row, max_response=row, variation=0.0, rollout=False
    )
    full = Assumptions(rows_filled=1.0)
    time = trainer_time(V3, setup, work, find_gpu(gpu_name), full)
    return sequences * row / time.train / setup.parallel.world_size


def sync_seconds() -> float:
    """Of DeepSeek-V3 in bf16 from PP16 x EP16 to eight servers of TP32, shard to shard as here."""
    served = ServerSetup(num_servers=8, tensor=32).served
    return sync_time(V3, _setup(256, 1, 16, 16, 4096).parallel, served, find_gpu("h100"), ASSUME).seconds


def part_broadcast() -> float:
    """Seconds of a broadcast of DeepSeek-V3's attention, embedding and head at the network's rate."""
    mla = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    size = 2 * (61 * mla + 2 * 129_280 * 7168)
    return size / (find_gpu("h100").network * ASSUME.network_efficiency)


SHORT = Workload(samples=512, group_size=16, prompt_tokens=150, mean_response=700, max_response=1536, scoring_passes=2)
PAPER = Workload(samples=8192, group_size=16, optimizer_steps=16, scoring_passes=2)

PUBLISHED = (
    Published(
        name="NeMo-RL 0.6, V3 bf16, 256 H100, on-policy",
        unit="s per step",
        value=134.0,
        estimate=lambda: step_seconds(
            "h100",
            _setup(256, 1, 16, 16, 4096),
            ServerSetup(num_servers=8, tensor=32, max_model_len=1686, max_running=1024),
            SHORT,
            ahead=False,
        ),
        note="assumed: rows of 4,096 tokens, 150-token prompts, two scoring passes",
    ),
    Published(
        name="NeMo-RL 0.6, V3 bf16, 512 H100, one step off",
        unit="s per step",
        value=64.1,
        estimate=lambda: step_seconds(
            "h100",
            _setup(256, 1, 16, 16, 4096),
            ServerSetup(num_servers=8, tensor=32, max_model_len=1686, max_running=1024),
            SHORT,
            ahead=True,
        ),
        note="assumed: half of the GPUs serve; otherwise as above",
    ),
    Published(
        name="NeMo-RL's refit, V3 bf16, PP16 EP16 to 8 of TP32, H100",
        unit="s a sync, at least",
        value=2.39,
        estimate=sync_seconds,
        note="2.39 to 2.83 s; theirs goes shard to shard for the MLPs only",
    ),
    Published(
        name="NeMo-RL's refit, as they do it",
        unit="s a sync, at most",
        value=2.83,
        estimate=lambda: sync_seconds() + part_broadcast(),
        note="with a broadcast of attention, embedding and head; assumed: after the rest",
    ),
    Published(
        name="verl, V3, 96 H20, TP8 PP12 EP8",
        unit="s per step",
        value=1700.0,
        estimate=lambda: step_seconds(
            "h20",
            _setup(96, 8, 12, 8, 4096),
            ServerSetup(num_servers=3, tensor=32, max_model_len=9000),
            Workload(samples=512, prompt_tokens=256, mean_response=1960, max_response=8192, scoring_passes=2),
            ahead=False,
        ),
        note="assumed: 512 samples per step (not known), rows of 4,096, servers of TP32; its full offload left out",
    ),
    Published(
        name="DeepSeek-R1-Zero, 512 H800, 198 h of 10,400 steps",
        unit="s a rollout of 8,192",
        value=198 * 3600 / (10_400 / 16),
        estimate=lambda: step_seconds(
            "h800", _setup(512, 1, 16, 32, 33_792), ServerSetup(num_servers=16, tensor=32), PAPER, ahead=False
        ),
        note="assumed: this recipe's trainer, servers of TP32, mean answer 8,192; theirs was EP, FP8 and MTP drafts",
    ),
    Published(
        name="DeepSeek-V3 pretraining, H800, PP16 EP64, FP8",
        unit="tokens/s/GPU",
        value=1e12 / (180e3 * 3600),
        estimate=lambda: tokens_per_second("h800", _setup(2048, 1, 16, 64, 4096, "fp8", "none"), 15_360),
        note="theirs overlaps all-to-all with matmuls (DualPipe)",
    ),
    Published(
        name="Megatron-Bridge 25.09, V3, 1,024 H100, TP2 PP8 EP64",
        unit="tokens/s/GPU",
        value=1297.0,
        estimate=lambda: tokens_per_second("h100", _setup(1024, 2, 8, 64, 4096, "bf16", "none"), 8192),
        note="assumed: bf16, batches of 8,192 sequences of 4,096, no recomputation",
    ),
)


def table() -> str:
    rows = ["| published | value | planner | factor | conditions |", "| --- | --- | --- | --- | --- |"]
    for each in PUBLISHED:
        value, estimate = f"{each.value:,.4g} {each.unit}", f"{each.estimate():,.4g}"
        rows.append(f"| {each.name} | {value} | {estimate} | {each.factor:.2f} | {each.note} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
