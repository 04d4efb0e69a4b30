"""Which node does what: counted by hand for the recipes, refused where nodes and layout do not go together."""

import dataclasses
from pathlib import Path

import pytest

from megatron_r1.algorithms import OnPolicyDistill
from megatron_r1.algorithms.teacher import Teacher
from megatron_r1.cluster.roles import roles_of, server_config
from megatron_r1.config.pipeline import stages_of
from megatron_r1.config.schema import PreferenceConfig, RunningServerConfig
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.kinds import needs_of
from megatron_r1.recipes import RECIPES
from megatron_r1.stages.evaluate.config import EvaluateConfig


def with_rollout(config, **fields):
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **fields))


def test_grpo_671b_is_64_nodes_of_trainers_and_32_of_servers():
    roles = roles_of(needs_of(RECIPES["grpo_671b"]()), slots_per_node=8)
    assert (roles.world_size, roles.trainer_nodes, roles.tasks_per_node) == (512, 64, 8)
    assert (roles.first_server_node, roles.server_nodes, roles.nodes) == (64, 32, 96)
    # Eight servers of 32 GPUs: four nodes each.
    assert [server.nodes for server in roles.servers[:2]] == [(64, 65, 66, 67), (68, 69, 70, 71)]
    assert roles.servers[7].nodes == (92, 93, 94, 95)
    assert roles.servers[0].slots == tuple(range(8))


def test_reward_models_have_nodes_after_the_rollouts():
    roles = roles_of(needs_of(stages_of(RECIPES["r1_671b"]())["final_rl"]), slots_per_node=8)
    assert roles.nodes == 64 + 32 + 2 * 4
    assert [(s.name, s.role, s.nodes) for s in roles.servers[-2:]] == [
        ("reward-helpful", "reward", (96, 97, 98, 99)),
        ("reward-harmless", "reward", (100, 101, 102, 103)),
    ]


def test_small_servers_share_a_node():
    config = with_rollout(RECIPES["grpo_671b"](), num_engines=3, tensor_parallel=4)
    config = dataclasses.replace(
        config, algorithm=OnPolicyDistill(teacher=Teacher(model=Path("models/teacher"), tensor_parallel=4))
    )
    places = roles_of(needs_of(config), slots_per_node=8).servers
    assert [(p.name, p.nodes, p.slots) for p in places] == [
        ("vllm-0", (64,), (0, 1, 2, 3)),
        ("vllm-1", (64,), (4, 5, 6, 7)),
        ("vllm-2", (65,), (0, 1, 2, 3)),
        ("teacher", (65,), (4, 5, 6, 7)),
    ]
    assert server_config(config.rollout, places[3]).tensor_parallel == 4
    assert server_config(config.rollout, places[0]) is config.rollout


def test_what_fits_on_one_node_stays_there_and_rank_0_starts_its_servers():
    roles = roles_of(needs_of(RECIPES["tiny"]()), slots_per_node=3)
    assert roles.nodes == 1 and not roles.servers
    assert roles_of(needs_of(RECIPES["tiny"]()), slots_per_node=2).nodes == 2
    assert roles_of(needs_of(RECIPES["tiny"]()), slots_per_node=1).nodes == 3


def test_servers_of_a_stage_without_ranks_begin_on_its_node():
    config = with_rollout(EvaluateConfig(model=Path("m"), run_dir=Path("r")), tensor_parallel=16)
    roles = roles_of(needs_of(config), slots_per_node=8)
    assert (roles.world_size, roles.trainer_nodes, roles.first_server_node, roles.nodes) == (1, 1, 0, 2)
    asked = dataclasses.replace(config, server=RunningServerConfig(url="http://other:8000", model="m"))
    alone = roles_of(needs_of(asked), slots_per_node=8)
    assert alone.nodes == 1 and not alone.servers


def test_gpus_by_number_are_refused_where_servers_have_nodes_of_their_own():
    config = with_rollout(RECIPES["tiny"](), devices=("4",))
    with pytest.raises(ConfigError, match=r"rollout\.devices: names GPUs of rank 0's node"):
        roles_of(needs_of(config), slots_per_node=1)
    assert not roles_of(needs_of(config), slots_per_node=3).servers


def test_shared_gpus_are_refused_over_several_nodes():
    config = with_rollout(RECIPES["grpo_671b"](), sync="ipc")
    with pytest.raises(ConfigError, match=r"ipc.*64 trainer nodes"):
        roles_of(needs_of(config), slots_per_node=8)


@pytest.mark.parametrize(
    ("slots", "words"),
    [(0, "a node has 0 slot"), (7, "must fill nodes of 7"), (32, None), (12, "must fill nodes of 12")],
)
def test_nodes_that_the_layout_does_not_fill_are_refused(slots, words):
    config = RECIPES["grpo_671b"]()
    if words is None:
        assert roles_of(needs_of(config), slots_per_node=slots).nodes == 16 + 8  # two servers of 16 on each
        return
    with pytest.raises(ConfigError, match=words):
        roles_of(needs_of(config), slots_per_node=slots)


def test_a_server_that_does_not_fill_its_nodes_is_refused():
    config = with_rollout(RECIPES["grpo_671b"](), tensor_parallel=12)
    preference = PreferenceConfig(name="p", model=Path("m"), domains=("d",), tensor_parallel=12)
    config = dataclasses.replace(config, rewards=dataclasses.replace(config.rewards, preferences=(preference,)))
    with pytest.raises(ConfigError) as caught:
        roles_of(needs_of(config), slots_per_node=8)
    assert "vllm-0: tensor_parallel 12" in str(caught.value) and "reward-p: tensor_parallel 12" in str(caught.value)
