"""Memory of GPUs that trainer and servers share, and of a sync beside a server's cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.config.trainer_faults import parallel_faults
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.kinds import needs_of
from megatron_r1.planning import fit
from megatron_r1.planning.fit import check_fit
from megatron_r1.planning.hardware import Assumptions, find_gpu
from megatron_r1.planning.plan import ServerSetup, _room_for, make_plan, setups_of
from megatron_r1.planning.search import EVERYTHING, search
from megatron_r1.planning.sharing import (
    ASLEEP_GIB,
    GIB,
    Moment,
    colocated_moments,
    layer_bytes_of_server,
    resident,
    sync_bytes_of_server,
)
from megatron_r1.planning.state import RankState
from megatron_r1.planning.trainer import TrainerSetup
from megatron_r1.recipes import PACKAGED_SHAPES, RECIPES

V3 = load_shape(PACKAGED_SHAPES["DeepSeek-V3-Base"])
H100 = find_gpu("h100")
STATE = RankState(parameters=10, weights=20, gradients=40, optimizer=120)
FEW = {"grpo_qwen_1_5b": 1, "grpo_qwen_7b": 8, "grpo_qwen_7b_colocated": 8, "grpo_moe_16b": 8, "distill_qwen_7b": 8}


def shape_of(config):
    return load_shape(PACKAGED_SHAPES[config.model.path.name])


def test_what_stays_on_the_gpu():
    assert resident(STATE, ()) == 180
    assert resident(STATE, ("gradients", "optimizer")) == 20
    assert resident(STATE, ("weights", "gradients", "optimizer")) == 0


def moments(sleep_level, offload):
    found = colocated_moments(
        STATE,
        training_bytes=1000.0,
        reserved_bytes=5.0,
        server_share=800.0,
        server_weights=300.0,
        layer_bytes=30.0,
        sleep_level=sleep_level,
        offload=offload,
    )
    return {moment.name: moment.needed for moment in found}


def test_the_three_moments_of_a_shared_gpu():
    asleep = ASLEEP_GIB * GIB
    assert moments(0, ()) == {"training": 1800.0, "sampling": 985.0, "sync": 1045.0}
    slept = moments(2, ("gradients", "optimizer"))
    assert slept == {"training": 1000 + asleep, "sampling": 800 + 5 + 20, "sync": 300 + asleep + 60 + 5 + 20}
    # The weights must be there to be sent, so a sync needs them although they are away while servers sample.
    away = moments(2, ("weights", "gradients", "optimizer"))
    assert away["sampling"] == 805 and away["sync"] == slept["sync"]


def test_a_layer_of_deepseek_v3_on_one_gpu_of_a_server():
    """One sparse layer: 256 experts and a shared one of 3 x 7168 x 2048, the router, norms, and attention."""
    expert = 3 * 7168 * 2048
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168 + 1536 + 512
    whole = 257 * expert + 256 * 7168 + attention + 2 * 7168
    found = layer_bytes_of_server(V3, tensor=1, expert_parallel=False, weight_bytes=2)
    assert found == pytest.approx(2 * whole, rel=1e-6) and found / 1e9 == pytest.approx(23.0, abs=0.1)
    shared = layer_bytes_of_server(V3, tensor=32, expert_parallel=True, weight_bytes=2)
    assert 2 * 8 * expert < shared < 2 * 11 * expert  # 8 of 256 experts, a 32nd of the shared one, attention's part


def test_a_sync_needs_room_beside_the_cache():
    """Unsharded, a layer of DeepSeek-V3 would be 22.5 GB on each GPU; the recipe's workers hold their part of it."""
    config = RECIPES["grpo_671b"]()
    trainer, servers = setups_of(needs_of(config))
    layer = layer_bytes_of_server(V3, tensor=32, expert_parallel=True, weight_bytes=2)
    # A buffer of 512 MiB may end with the embedding, 129,280 x 7,168 numbers of two bytes.
    assert sync_bytes_of_server(layer, 512 << 20) == 2 * layer + 2 * (512 << 20)
    assert sync_bytes_of_server(layer, 512 << 20, layers=3) == 4 * layer + 2 * (512 << 20)
    plan = make_plan(V3, trainer, servers, needs_of(config).work, H100, Assumptions(), timed=False)
    assert plan.faults == []
    greedy = dataclasses.replace(servers, memory_fraction=0.98)
    assert make_plan(V3, None, greedy, needs_of(config).work, H100, Assumptions(), timed=False).faults == []
    (fault,) = make_plan(V3, trainer, greedy, needs_of(config).work, H100, Assumptions(), timed=False).faults
    assert fault.startswith("rollout.memory_fraction is 0.98; a sync needs") and "1.6 of 79.6 GiB" in fault


def test_a_large_embedding_is_more_than_a_layer():
    """Qwen2.5-7B: 152,064 x 3,584 numbers, of which each of two GPUs has half."""
    qwen = load_shape(PACKAGED_SHAPES["Qwen2.5-7B"])
    assert layer_bytes_of_server(qwen, tensor=2, expert_parallel=False, weight_bytes=2) == 152_064 * 3_584


def test_servers_that_stay_awake_leave_no_room_to_train():
    config = RECIPES["grpo_qwen_7b_colocated"]()
    awake = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, sleep_level=0),
        train=dataclasses.replace(config.train, offload=(), gpu="h100"),
    )
    with pytest.raises(ConfigError, match=r"rollout.sync is ipc; training needs .* GiB of each GPU") as caught:
        check_fit(needs_of(awake), shape_of(config))
    (training,) = [line for line in str(caught.value).split("\n") if "training needs" in line]
    assert ": use rollout.sleep_level 2, rollout.memory_fraction 0." in training
    # Split further they may stay awake: the same GPUs, and no word of nccl.
    remedy = str(caught.value).partition("what would fit")[2]
    assert "--parallel.tensor 4" in remedy and "--rollout.sleep-level 0 --train.offload" in remedy
    assert "--rollout.sync" not in remedy


def test_where_no_layout_has_room_all_that_can_gives_way():
    config = RECIPES["grpo_qwen_7b_colocated"]()
    trainer, servers = setups_of(needs_of(config))
    awake = dataclasses.replace(servers, sleep_level=0, memory_fraction=0.9)
    given = dataclasses.replace(trainer, offload=())
    best = search(shape_of(config), 8, H100, needs_of(config).work, Assumptions(), given, awake)[0]
    assert (best.servers.sleep_level, best.trainer.offload) == (2, EVERYTHING)


def test_each_moment_says_what_makes_room_for_it():
    """By hand: of 100 GiB a server has 80 and the trainer keeps 30 while it samples; 10 GiB less are a share of 0.7."""
    server = ServerSetup(num_servers=1, tensor=1, memory_fraction=0.8, colocated=True, sleep_level=2)
    trainer = TrainerSetup(parallel=ParallelConfig(), offload=("optimizer",))
    sampling = Moment(name="sampling", needed=110 * GIB, what="")
    assert _room_for(sampling, trainer, server, 100.0) == (
        "use train.offload optimizer weights gradients or rollout.memory_fraction 0.7"
    )
    training = Moment(name="training", needed=110 * GIB, what="")
    assert _room_for(training, trainer, server, 100.0) == "use a smaller train.tokens_per_microbatch or more GPUs"
    sync = Moment(name="sync", needed=110 * GIB, what="")
    assert _room_for(sync, trainer, server, 100.0) == "use train.offload optimizer gradients"
    everything = dataclasses.replace(trainer, offload=("optimizer", "gradients", "weights"))
    assert _room_for(sync, everything, server, 100.0) == "use more GPUs"


@pytest.mark.parametrize("name", ["grpo_qwen_1_5b", "grpo_qwen_7b_colocated", "grpo_moe_16b"])
def test_layouts_in_turns_are_searched_and_fit_as_they_are_printed(name):
    config = RECIPES[name]()
    shape, work = shape_of(config), needs_of(config).work
    trainer, servers = setups_of(needs_of(config))
    gpus = FEW[name]
    found = search(shape, gpus, H100, work, Assumptions(), trainer, servers)
    best = found[0]
    assert best.servers.colocated and best.gpus == gpus == best.trainer.parallel.world_size
    assert best.seconds <= make_plan(shape, trainer, servers, work, H100, Assumptions()).seconds
    assert make_plan(shape, best.trainer, best.servers, work, H100, Assumptions(), timed=False).faults == []
    assert f"--rollout.sleep-level 2 --train.offload {' '.join(best.trainer.offload)}" in fit.options(best)


def test_turns_are_taken_on_one_node_only():
    config = RECIPES["grpo_qwen_7b_colocated"]()
    trainer, servers = setups_of(needs_of(config))
    found = search(shape_of(config), 16, H100, needs_of(config).work, Assumptions(), trainer, servers)
    assert found and not any(plan.servers.colocated for plan in found)
    assert all("--rollout.sync nccl --rollout.sleep-level 0" in fit.options(plan) for plan in found)


@pytest.mark.parametrize("name", FEW)
def test_the_recipes_for_few_gpus_fit_their_gpus(name):
    config = RECIPES[name]()
    shape = shape_of(config)
    trainer, servers = setups_of(needs_of(config))
    plan = make_plan(shape, trainer, servers, needs_of(config).work, H100, Assumptions(), timed=False)
    assert plan.faults == [] and plan.gpus == FEW[name]
    assert parallel_faults(config.parallel, shape) == []
    named = dataclasses.replace(config, train=dataclasses.replace(config.train, gpu="h100"))
    assert "a h100 has" in fit.check_fit(needs_of(named), shape)


def test_what_is_offloaded_is_on_the_host():
    config = RECIPES["grpo_qwen_1_5b"]()
    trainer, _ = setups_of(needs_of(config))
    alone = dataclasses.replace(trainer, offload=())
    work, shape = needs_of(config).work, shape_of(config)
    with_it = make_plan(shape, trainer, None, work, H100, Assumptions(), timed=False).memory
    without = make_plan(shape, alone, None, work, H100, Assumptions(), timed=False).memory
    assert with_it.host - without.host == without.state.optimizer


def test_every_packaged_shape_is_named_by_a_recipe():
    named = {Path(RECIPES[name]().model.path).name for name in (*FEW, "grpo_671b")}
    assert named == set(PACKAGED_SHAPES)
