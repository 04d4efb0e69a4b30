"""Weights from trainers of many layouts into servers of several: vLLM's checksums of every parameter on every worker
are those of a server that was started from the same weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from oracles import save_model, write_tokenizer
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.planning.traffic import Served, traffic

pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Group:
    """Layouts that are pushed one after the other into the same servers."""

    model: str
    dtype: str
    tensor: int
    servers: int
    ranks: int
    layouts: tuple[str, ...]
    slow: bool = True


GROUPS = {
    "v3 into TP2": Group("deepseek_v3", "fp32", 2, 1, 4, ("tp2pp2", "ep4", "dp2ep2"), slow=False),
    "v3 into two servers": Group("deepseek_v3", "bf16", 1, 2, 4, ("tp2pp2", "ep4", "tp2etp2", "cp2")),
    "v3, eight ranks": Group("deepseek_v3", "fp32", 1, 1, 8, ("tp2ep2pp2",)),
    "qwen3_moe into TP2": Group("qwen3_moe", "bf16", 2, 1, 4, ("tp2pp2", "ep4", "dp2ep2")),
    "qwen2 into TP4, two a key-value head": Group("qwen2", "fp32", 4, 1, 4, ("tp2pp2", "tp4", "dp2pp2")),
    "tied llama into two servers": Group("llama", "bf16", 1, 2, 4, ("tp2pp2", "cp2")),
}
CASES = [
    pytest.param(name, layout, id=f"{name}, {layout}", marks=[pytest.mark.slow] if group.slow else [])
    for name, group in GROUPS.items()
    for layout in group.layouts
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a group found; made when first asked for."""

    @cache
    def of(name: str) -> dict:
        group, root = GROUPS[name], tmp_path_factory.mktemp("reshard")
        save_model(group.model, root / "a")
        write_tokenizer(root / "a")
        shutil.copytree(root / "a", root / "b")
        torch.manual_seed(1)
        moved = {
            name: weights + 0.1 * torch.randn_like(weights)
            for name, weights in load_file(root / "a" / "model.safetensors").items()
        }
        save_file(moved, root / "b" / "model.safetensors", metadata={"format": "pt"})
        words = [str(root), group.dtype, str(group.tensor), str(group.servers), ",".join(group.layouts)]
        run_ranks("reshard.py", *words, ranks=group.ranks, timeout_seconds=1000)
        found = json.loads((root / f"found_{'_'.join(group.layouts)}.json").read_text())
        return found | {"shape": load_shape(root / "a")}

    return of


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_pushed_server_is_a_fresh_one_to_the_bit(results, name, layout):
    found = results(name)
    folder, servers = found[layout]["folder"], found[layout]["servers"]
    assert len(servers) == GROUPS[name].servers
    for sums in servers:
        assert len(sums) > 10 and sums == found["fresh"][folder]
    assert found["fresh"]["a"] != found["fresh"]["b"]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_the_planner_knows_the_bytes_without_asking(results, name, layout):
    """Into each worker, of what vLLM's loaders were recorded to want."""
    found, group = results(name), GROUPS[name]
    served = Served(count=group.servers, tensor=group.tensor, weight_bytes=4 if group.dtype == "fp32" else 2)
    parallel = ParallelConfig(world_size=group.ranks, **found[layout]["parallel"])
    assert found[layout]["received"] == traffic(found["shape"], parallel, served).received.tolist() * group.servers
