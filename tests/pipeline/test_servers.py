"""Which GPUs each server is given, by the names that this process's CUDA_VISIBLE_DEVICES has for them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_r1.cluster.task import JOB_VARIABLE, ROLES, SLOTS_VARIABLE
from megatron_r1.errors import ConfigError
from megatron_r1.recipes import RECIPES
from megatron_r1.stages.common.servers import own_devices
from megatron_r1.stages.grpo.servers import server_devices

MIG = "MIG-8f1c-7"
UUIDS = "GPU-aa,GPU-bb, GPU-cc,GPU-dd"


def config(**rollout: object):
    made = RECIPES["tiny"]()
    return dataclasses.replace(
        made, rollout=dataclasses.replace(made.rollout, **({"device": "cuda", "sync": "nccl"} | rollout))
    )


@pytest.fixture
def see(monkeypatch):
    """A process that sees `count` GPUs under CUDA_VISIBLE_DEVICES `names` (None: not set), with `ranks` on its host."""

    def seen(names: str | None, count: int, ranks: int = 2) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        if names is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)

    return seen


def test_all_of_the_machines_gpus(see):
    see(None, 8)
    assert server_devices(config(num_engines=3, tensor_parallel=2)) == ["2,3", "4,5", "6,7"]


@pytest.mark.parametrize(
    ("names", "count", "expected"),
    [
        ("4,5,6,7", 4, ["6", "7"]),
        ("7,6,5,4", 4, ["5", "4"]),
        (UUIDS, 4, ["GPU-cc", "GPU-dd"]),
        (f"0,1,{MIG},3", 4, [MIG, "3"]),
    ],
)
def test_a_part_of_the_machines_gpus(see, names, count, expected):
    see(names, count)
    assert server_devices(config(num_engines=2)) == expected


def test_servers_on_the_trainers_gpus_begin_at_its_first(see):
    see("4,5,6,7", 4, ranks=4)
    assert server_devices(config(num_engines=2, tensor_parallel=2, sync="ipc")) == ["4,5", "6,7"]


def test_servers_alone_have_the_gpus_that_there_are(see):
    see("6,7", 2)
    assert own_devices(config(num_engines=2).rollout) == ["6", "7"]


@pytest.mark.parametrize(("names", "count"), [("4,5", 2), ("4,5,-1,6", 2), ("", 0), (None, 2)])
def test_too_few_are_refused_in_one_line(see, names, count):
    see(names, count)
    with pytest.raises(ConfigError) as refused:
        server_devices(config(num_engines=1))
    [fault] = refused.value.faults
    assert "2 of the trainer and 1 of the servers make 3 GPUs" in fault and f"sees {count}" in fault
    assert "rollout.devices" in fault and "\n" not in fault


def test_what_is_configured_stays_as_it_is(see):
    see("4,5", 2)
    assert server_devices(config(num_engines=2, devices=("0,1", MIG))) == ("0,1", MIG)


def test_cpus_have_nothing_to_choose(see):
    see("0", 1)
    assert server_devices(config(device="cpu", num_engines=2)) == (None, None)


def test_servers_on_other_nodes_need_no_gpu_here(see, monkeypatch, tmp_path):
    see("0,1", 2)
    (tmp_path / ROLES).write_text("server_nodes=1\n")
    task = {"SLURM_NODEID": "0", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    task |= {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2", JOB_VARIABLE: str(tmp_path), SLOTS_VARIABLE: "2"}
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    assert server_devices(config(num_engines=2)) == (None, None)


def test_a_server_nodes_gpus_keep_their_names(monkeypatch):
    from megatron_r1.pipeline.serve import gpu_names

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    assert gpu_names([2, 3]) == ["GPU-c", "GPU-d"]
    with pytest.raises(ConfigError, match=r"number 5 of this node, and its supervisor sees 4 \(GPU-a"):
        gpu_names([4, 5])
