"""GPUs, as their data sheets have them, and what is assumed of a cluster built from them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """`memory_gib` is what the driver reports; FLOP/s are dense (without sparsity); bandwidths are bytes/s, one way.

    `network` is the link of one GPU to other nodes, `per_node` how many GPUs NVLink joins in the usual server."""

    name: str
    memory_gib: float
    memory_bandwidth: float
    bf16_flops: float
    fp8_flops: float
    nvlink: float
    network: float
    per_node: int = 8
    source: str = ""


_TABLE = (
    GPU(
        name="a100",
        memory_gib=80,
        memory_bandwidth=2039e9,
        bf16_flops=312e12,
        fp8_flops=312e12,  # has no FP8 units
        nvlink=300e9,
        network=25e9,
        source="NVIDIA A100 80GB SXM data sheet; DGX A100: one 200 Gb/s HDR link a GPU",
    ),
    GPU(
        name="h100",
        memory_gib=79.6,
        memory_bandwidth=3350e9,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        nvlink=450e9,
        network=50e9,
        source="NVIDIA H100 SXM data sheet; DGX H100: one 400 Gb/s NDR link a GPU",
    ),
    GPU(
        name="h800",
        memory_gib=79.6,
        memory_bandwidth=3350e9,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        nvlink=200e9,
        network=50e9,
        source="as h100; DeepSeek-V3, arXiv 2412.19437, section 3.2.2: NVLink 160 GB/s and IB 50 GB/s in use",
    ),
    GPU(
        name="h20",
        memory_gib=95.6,
        memory_bandwidth=4000e9,
        bf16_flops=148e12,
        fp8_flops=296e12,
        nvlink=450e9,
        network=50e9,
        source="NVIDIA H20 data sheet",
    ),
    GPU(
        name="h200",
        memory_gib=140.4,
        memory_bandwidth=4800e9,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        nvlink=450e9,
        network=50e9,
        source="NVIDIA H200 SXM data sheet; DGX H200",
    ),
    GPU(
        name="b200",
        memory_gib=179,
        memory_bandwidth=8000e9,
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        nvlink=900e9,
        network=50e9,
        source="NVIDIA DGX B200 data sheet",
    ),
)
GPUS: dict[str, GPU] = {gpu.name: gpu for gpu in _TABLE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What no data sheet says. Each is a guess to be replaced by a measurement; docs/planner.md says how well they do.

    The values are one set for all GPUs and models: nothing is fitted to a single published number."""

    matmul_efficiency: float = 0.45
    """Share of the dense peak that a training step's matmuls reach, without communication and bubbles."""
    network_efficiency: float = 0.8
    """Share of a link's rate that collectives and a weight sync's messages reach. NVIDIA expects 46 to 48 of 50 GB/s of
    an H100's network link in large rings (github.com/NVIDIA/nccl-tests/issues/290); less is counted, since here each
    GPU has many peers."""
    sync_overlap: float = 0.84
    """Share of a weight sync in which its busiest link is at work; in between its messages wait for their turn in the
    plan's rounds. The least of the layouts that tools/simulate_sync.py goes through, the greatest is 0.97."""
    memory_efficiency: float = 0.7
    """Share of the memory bandwidth that decoding reaches."""
    expert_imbalance: float = 1.25
    """Tokens on the busiest expert-parallel rank over the mean."""
    collective_seconds: float = 20e-6
    """Latency of one all-reduce in decoding, inside a node; three times that across nodes."""
    reserved_gib: float = 4.0
    """CUDA context, NCCL buffers, workspaces, fragmentation of a trainer's GPU."""
    host_link: float = 50e9
    """Bytes/s between a GPU and its host's memory (PCIe 5 x16)."""
    rows_filled: float = 0.95
    """Share of a packed row that is tokens."""


def find_gpu(name: str, field: str = "--gpu") -> GPU:
    """The GPU called `name`. Raises ConfigError, naming `field`, for any other."""
    found = GPUS.get(name.lower())
    if found is None:
        raise ConfigError(f"{field} is {name!r}; known are {', '.join(GPUS)}")
    return found
