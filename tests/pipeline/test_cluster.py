"""Slurm's variables become a rank's, only where launch.sh says so; what ranks and job leave for each other."""

import json

import pytest

from megatron_r1.cluster.task import (
    become_rank,
    own_address,
    read_roles,
    store_path,
    tasks_on_nodes,
    this_task,
)
from megatron_r1.errors import ConfigError


@pytest.fixture
def environment(tmp_path):
    """Rank 9 of 16 on the second of two nodes, in the second attempt of job 41."""
    for name in ("nodes", "exit", "stores"):
        (tmp_path / name).mkdir()
    (tmp_path / "nodes" / "0.json").write_text(json.dumps({"address": "10.1.2.3"}))
    (tmp_path / "roles").write_text("world_size=16\nserver_nodes=2\nmaster_port=20041\n")
    return {
        "MEGATRON_R1_JOB": str(tmp_path),
        "MEGATRON_R1_SLOTS_PER_NODE": "8",
        "SLURM_JOB_ID": "41",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_STEP_ID": "2",
        "SLURM_NODEID": "1",
        "SLURM_PROCID": "9",
        "SLURM_NTASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    }


def test_a_rank_gets_what_torchrun_would_set(environment):
    task = become_rank(environment)
    assert task is not None and task.attempt == "41.1" and task.has_servers
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
    }
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.1.2.3", "20041")


def test_slurm_alone_makes_no_rank(environment):
    del environment["MEGATRON_R1_JOB"]
    before = dict(environment)
    assert become_rank(environment) is None and store_path(environment) is None
    assert environment == before


def test_every_step_of_every_attempt_has_a_meeting_place_of_its_own(environment, tmp_path):
    assert store_path(environment) == str(tmp_path / "stores" / "2")


def test_a_variable_that_srun_did_not_set_is_named(environment):
    del environment["SLURM_PROCID"]
    with pytest.raises(ConfigError, match=r"SLURM_PROCID.*through slurm/launch\.sh"):
        this_task(environment)


@pytest.mark.parametrize(("text", "tasks"), [("8(x2),4", [8, 8, 4]), ("1", [1]), ("2,1(x3)", [2, 1, 1, 1])])
def test_tasks_of_each_node(text, tasks):
    assert tasks_on_nodes(text) == tasks


def test_the_address_is_that_of_the_interface_or_a_clear_fault():
    assert own_address({"MEGATRON_R1_INTERFACE": "lo"}) == "127.0.0.1"
    with pytest.raises(ConfigError, match="NETWORK_INTERFACE is ib7"):
        own_address({"MEGATRON_R1_INTERFACE": "ib7"})


def test_roles_are_read_as_written(tmp_path):
    (tmp_path / "roles").write_text("a=2\nb=x=y\n")
    assert read_roles(tmp_path) == {"a": "2", "b": "x=y"}
