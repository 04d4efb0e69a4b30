"""Times and memory of a plan by hand; the search; the fit that a run asks for before it starts."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from megatron_r1.algorithms import GRPO
from megatron_r1.algorithms.correction import Correction
from megatron_r1.config import ParallelConfig, load_shape
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.kinds import needs_of
from megatron_r1.planning import fit
from megatron_r1.planning.compute import all_to_all_seconds, flops_per_token
from megatron_r1.planning.decoding import (
    RooflineCost,
    cache_bytes_per_token,
    server_memory,
    server_numbers,
    server_weights,
)
from megatron_r1.planning.hardware import GIB, GPUS, Assumptions, find_gpu
from megatron_r1.planning.plan import ServerSetup, make_plan, planned_shape, setups_of
from megatron_r1.planning.search import layouts, search
from megatron_r1.planning.stages import even_layout, pipeline_chunks
from megatron_r1.planning.state import rank_state
from megatron_r1.planning.trainer import TrainerSetup, microbatches, trainer_memory, trainer_time
from megatron_r1.planning.workload import Workload
from megatron_r1.recipes import PACKAGED_SHAPES, RECIPES
from megatron_r1.stages.reward_model.config import RewardModelConfig

V3 = load_shape(Path(__file__).parent / "deepseek_v3.json")
TINY = load_shape(RECIPES["tiny"]().model.path)
H100, H200 = GPUS["h100"], GPUS["h200"]
EXACT = Assumptions(
    matmul_efficiency=1.0, network_efficiency=1.0, memory_efficiency=1.0, expert_imbalance=1.0, rows_filled=1.0
)


def test_the_packaged_model_is_the_one_the_tests_use():
    assert load_shape(PACKAGED_SHAPES["DeepSeek-V3-Base"]) == V3


@pytest.mark.parametrize(("context", "gigaflops"), [(4096, 250.5), (8192, 281), (16384, 343), (32768, 465)])
def test_training_flops_a_token_are_those_of_the_accounting(context, gigaflops):
    assert 3 * flops_per_token(V3, context) / 1e9 == pytest.approx(gigaflops, rel=0.004)


def test_all_to_all_by_hand():
    parallel = ParallelConfig(world_size=64, expert=64)
    # 8 copies of 7168 numbers of 2 bytes there and back; of 64 ranks 56 are on other nodes, 7 beside.
    sent = 1000 * 8 * 7168 * 4
    expected = sent * (56 / 64 / 50e9 + 7 / 64 / 450e9)
    assert all_to_all_seconds(V3, parallel, H100, EXACT, 1000, 2) == pytest.approx(expected)
    assert all_to_all_seconds(V3, ParallelConfig(), H100, EXACT, 1000, 2) == 0


def test_rows_and_microbatches():
    setup = TrainerSetup(parallel=ParallelConfig(world_size=8, pipeline_parallel=4), row_tokens=1000)
    assert microbatches(setup, 9_001, 1.0) == 5  # 10 rows on 2 ranks
    assert microbatches(setup, 1, 1.0) == 1
    interleaved = dataclasses.replace(setup, parallel=dataclasses.replace(setup.parallel, virtual_pipeline=2))
    assert microbatches(interleaved, 9_001, 1.0) == 8  # a multiple of the pipeline


def test_a_dense_step_on_one_gpu_takes_its_flops_over_the_peak():
    llama = load_shape(Path(__file__).parent / "deepseek_v3.json")
    alone = dataclasses.replace(
        llama, moe=None, mla=None, num_layers=2, num_kv_heads=128, head_dim=56, num_mtp_layers=0
    )
    work = Workload(samples=4, prompt_tokens=0, mean_response=1000, max_response=1000, variation=0.0, rollout=False)
    setup = TrainerSetup(parallel=ParallelConfig(), row_tokens=1000, recompute="none")
    time = trainer_time(alone, setup, work, H100, EXACT)
    head = 2 * 129_280 * 7168
    layers = flops_per_token(alone, 1000) - head - 2 * 7168  # the last norm is no matmul
    # Forward and twice that back; the head's chunks are computed once more.
    expected = 4000 * (3 * layers + 4 * head) / 989e12
    assert time.train - time.reduction == pytest.approx(expected, rel=1e-3)
    assert (time.microbatches, time.bubble, time.traffic) == (4, 0, 0)


def test_a_671b_server_by_hand():
    assert cache_bytes_per_token(V3, 32) == 70_272
    # One GPU has it all, but for MTP and the router biases.
    assert server_numbers(V3, 1) == 671_026_404_352
    # Down projections, their norms, the router and the layers' norms are whole on both.
    whole = 61 * (7168 * (1536 + 576) + 1536 + 512 + 2 * 7168) + 58 * 256 * 7168 + 7168
    assert server_numbers(V3, 2) == (671_026_404_352 - whole) // 2 + whole
    memory = server_memory(V3, H200, tensor=16, memory_fraction=0.85)
    assert memory.weights == 2 * server_numbers(V3, 16)
    assert memory.cache_tokens == int((0.85 * 140.4 * GIB - memory.weights - 3 * GIB) // 70_272)
    assert server_memory(V3, H100, tensor=16, memory_fraction=0.85).cache_tokens == 0


def test_decoding_reads_the_weights_that_it_meets():
    cost = RooflineCost(V3, H100, dataclasses.replace(EXACT, collective_seconds=0.0), 1)
    one = cost.met_weights(1)
    # One token leaves 248 of 256 experts alone in 58 layers.
    assert 2 * 671_026_404_352 - one == pytest.approx(58 * 248 * 3 * 7168 * 2048 * 2)
    assert cost.met_weights(10_000) == pytest.approx(2 * 671_026_404_352)
    assert cost.decode(1, 1000) == pytest.approx((one + 1000 * 70_272) / 3350e9)


def test_the_recipes_fullest_rank_is_its_state_and_what_it_keeps():
    config = RECIPES["grpo_671b"]()
    trainer, _ = setups_of(needs_of(config))
    memory = trainer_memory(V3, trainer, needs_of(config).work, Assumptions())
    rank = memory.pipeline_rank
    assert memory.state == rank_state(V3, config.parallel, pipeline_rank=rank)
    half = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, moments="bf16"))
    saved = trainer_memory(V3, setups_of(needs_of(half))[0], needs_of(half).work, Assumptions())
    assert saved.state.optimizer * 12 == memory.state.optimizer * 8 and saved.host == memory.host
    assert memory.total - saved.total == memory.state.optimizer - saved.state.optimizer
    layers = len(pipeline_chunks(V3, config.parallel)[rank][0].layers)
    # 5 rows a rank and optimizer step are fewer than the stages behind it: 8,192 / 16 x 8,448 / (33,792 x 0.95) / 32.
    split = config.parallel.tensor
    assert memory.kept == 5 * layers * 2 * 7168 * 33_792 / split
    assert memory.total == memory.state.total + memory.kept + memory.working + memory.logits + memory.reserved


def test_the_quick_count_agrees_with_the_exact_one():
    for name, shape in (("grpo_671b", V3), ("tiny", TINY)):
        config = RECIPES[name]()
        trainer, _ = setups_of(needs_of(config))
        both = [
            trainer_memory(shape, trainer, needs_of(config).work, Assumptions(), exact=exact) for exact in (True, False)
        ]
        assert both[0].state.parameters == both[1].state.parameters
        assert both[0].state.total == pytest.approx(both[1].state.total, rel=1e-2)


def test_the_recipe_fits_768_h100_as_it_is():
    config = RECIPES["grpo_671b"]()
    plan = make_plan(V3, *setups_of(needs_of(config)), needs_of(config).work, H100, Assumptions(), timed=False)
    assert (plan.faults, plan.gpus) == ([], 768)


@pytest.mark.parametrize("stages", [1, 2, 4, 7, 8, 16, 20])
def test_made_layouts_hold_every_layer_once(stages):
    layout = even_layout(V3, stages) if stages > 1 else ""
    chunks = pipeline_chunks(V3, ParallelConfig(world_size=stages, pipeline_parallel=stages, pipeline_layout=layout))
    assert [layer for (chunk,) in chunks for layer in chunk.layers] == list(range(61))
    sizes = [len(chunk.layers) + chunk.embedding + chunk.mtp + chunk.loss for (chunk,) in chunks]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("Et*61mL|", "E must be in its first stage, m and L in its last"),
        ("Et*60|mL", "60 decoder layers (t), the model has 61"),
        ("Et*61|L", "0 MTP layers (m), the model has 1"),
        ("Et*61mL", "1 stages; pipeline_parallel * virtual_pipeline is 2"),
        ("Ex|L", "not ['x']"),
    ],
)
def test_a_layout_that_does_not_hold_the_model_is_refused(layout, says):
    with pytest.raises(ConfigError) as raised:
        pipeline_chunks(V3, ParallelConfig(world_size=2, pipeline_parallel=2, pipeline_layout=layout))
    assert says in str(raised.value)


def test_search_gives_plans_that_fit_fastest_first():
    config = RECIPES["tiny"]()
    trainer, servers = setups_of(needs_of(config))
    found = search(TINY, 8, H100, needs_of(config).work, Assumptions(), trainer, servers)
    assert 1 < len(found) <= 5
    assert all(plan.gpus <= 8 and not plan.faults for plan in found)
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(found))
    seen = list(layouts(TINY, 4, trainer))
    assert len(seen) == len({repr(layout) for layout in seen}) > 5
    assert {layout.world_size for layout in seen} == {4}


def test_a_stage_that_cannot_fit_is_refused_and_told_what_would():
    config = RECIPES["grpo_671b"]()
    small = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, tensor_parallel=16),
        train=dataclasses.replace(config.train, gpu="h100"),
    )
    with pytest.raises(ConfigError) as raised:
        fit.check_fit(needs_of(small), V3)
    (fault,) = raised.value.faults
    assert "rollout.tensor_parallel is 16; a server of 16 h100 cannot hold the weights" in fault
    assert "what would fit on " in fault and "--rollout.tensor-parallel 32" in fault


def test_a_stage_that_fits_says_how_closely():
    config = RECIPES["grpo_671b"]()
    named = dataclasses.replace(config, train=dataclasses.replace(config.train, gpu="h100"))
    line = fit.check_fit(needs_of(named), V3)
    assert line.startswith("memory: trainer at most ") and line.endswith("a h100 has 79.6 GiB")
    assert fit.check_fit(needs_of(RECIPES["tiny"]()), TINY) == ""


def test_servers_in_fp8_with_whole_experts_by_hand():
    # 256 whole experts on 32 GPUs are as many numbers as 2,048 / 32 columns of every expert.
    assert server_numbers(V3, 32, expert_parallel=True) == server_numbers(V3, 32)
    assert cache_bytes_per_token(V3, 16, 1) == 61 * 576
    numbers = server_numbers(V3, 16)
    embedding, head, routers = 129_280 * 7168 // 16, 129_280 * 7168 // 16, 58 * 256 * 7168
    kept = embedding + head + routers
    assert server_weights(V3, 16, 1) == numbers + kept + 4 * (numbers - kept) // 128**2
    # The busiest GPU's experts: 1.25 times 8 experts of 3 x 7,168 x 2,048 in 58 layers, 2 FLOPs each, at 32 GPUs' peak.
    uneven = dataclasses.replace(EXACT, expert_imbalance=1.25)
    extra = 0.25 * 2 * 58 * 8 * 3 * 7168 * 2048 / (32 * H100.bf16_flops)
    whole, parts = (RooflineCost(V3, H100, uneven, 32, expert_parallel=experts) for experts in (True, False))
    assert whole.prefill(1000) - parts.prefill(1000) == pytest.approx(1000 * extra)


def test_the_recipes_servers_fit_in_bf16_on_32_gpus_and_in_fp8_on_16():
    config = RECIPES["grpo_671b"]()
    assert (config.rollout.tensor_parallel, config.rollout.expert_parallel) == (32, True)
    words = {"fp8_folder": Path("x"), "tensor_parallel": 16, "num_engines": 16}
    fp8 = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **words))
    plans = []
    for one, weight_bytes in ((config, 2), (fp8, 1)):
        trainer, servers = setups_of(needs_of(one))
        assert servers is not None and (servers.gpus, servers.weight_bytes) == (256, weight_bytes)
        plans.append(make_plan(V3, trainer, servers, needs_of(one).work, H100, Assumptions()))
        assert plans[-1].faults == []
        found = search(V3, 768, H100, needs_of(one).work, Assumptions(), trainer, servers)
        assert {plan.servers.tensor for plan in found if plan.servers} == {servers.tensor}
    assert plans[1].rollout.seconds < 0.6 * plans[0].rollout.seconds
    # A byte instead of two, to twice as many servers; scales, norms and what is whole on every GPU come on top.
    assert plans[1].sync.bytes_sent == pytest.approx(plans[0].sync.bytes_sent, rel=0.02)


def test_phases_that_are_planned_past_their_deadline_are_refused():
    config = RECIPES["grpo_671b"]()
    named = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, gpu="h100"),
        deadlines=dataclasses.replace(config.deadlines, rollout=1000.0, start=3000.0),
    )
    with pytest.raises(ConfigError) as raised:
        fit.check_fit(needs_of(named), V3)
    start, rollout = raised.value.faults
    # (671.03 + 11.61) billion bf16 numbers at 0.5 GB/s, and 900 s
    assert start.startswith("deadlines.start is 3000; a server may take 3631 s to start (900 s + 1,365 GB at rollout.")
    assert (
        rollout.startswith("deadlines.rollout is 1000; this layout is planned to take ")
        and "megatron-r1 plan" in rollout
    )


PIPELINE = RECIPES["r1_671b"]()
STAGES = [name for name in PIPELINE.__dataclass_fields__ if hasattr(getattr(PIPELINE, name), "model")]


@pytest.mark.parametrize("name", [name for name in STAGES if not name.startswith(("qwen", "llama"))])
def test_every_671b_stage_of_the_pipeline_fits_80_gb(name):
    stage = getattr(PIPELINE, name)
    shape = planned_shape(needs_of(stage), V3)
    plan = make_plan(shape, *setups_of(needs_of(stage)), needs_of(stage).work, H100, Assumptions(), timed=False)
    assert plan.faults == []
    if isinstance(stage, RewardModelConfig):
        named = dataclasses.replace(stage, train=dataclasses.replace(stage.train, gpu="h100"))
        assert "trainer at most" in fit.check_fit(needs_of(named), V3)


def test_the_gpu_is_asked_of_the_machine_unless_named(monkeypatch, tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = fit.installed_gpu()
    assert found is not None
    assert (found.name, found.memory_gib, found.bf16_flops) == ("NVIDIA H200", 143771 / 1024, 989e12)
    driver.write_text("#!/bin/sh\necho 'no driver'; exit 9\n")
    assert fit.installed_gpu() is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "not checked (no GPU here" in fit.check_fit(needs_of(RECIPES["grpo_671b"]()), V3)


def test_an_unknown_gpu_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"train\.gpu is 'v100'; known are a100, h100"):
        find_gpu("v100", "train.gpu")


def test_lengths_have_the_mean_and_the_tail_that_were_asked_for():
    work = Workload(samples=20_000, mean_response=1000, max_response=100_000, variation=0.8)
    lengths = work.lengths(seed=3)
    mean = sum(lengths) / len(lengths)
    assert mean == pytest.approx(1000, rel=0.02)
    spread = (sum((length - mean) ** 2 for length in lengths) / len(lengths)) ** 0.5
    assert spread / mean == pytest.approx(0.8, rel=0.05)
    assert max(dataclasses.replace(work, max_response=2000).lengths()) == 2000
    # What attention costs by: E[L^2] / E[L].
    whole = sum((length + 256) ** 2 for length in lengths) / sum(length + 256 for length in lengths)
    assert work.context_per_token == pytest.approx(whole, rel=0.2)


def test_a_sync_of_every_fourth_step_counts_a_quarter():
    trainer = TrainerSetup(parallel=ParallelConfig(world_size=8), row_tokens=8192)
    servers = ServerSetup(num_servers=2, tensor=1)
    each, fourth = (
        make_plan(TINY, trainer, servers, Workload(samples=64, sync_every=every), H100, Assumptions())
        for every in (1, 4)
    )
    assert each.sync and fourth.phases() == each.phases(), "a deadline is for a whole sync"
    assert fourth.parts()["weight sync"] == pytest.approx(each.sync.seconds / 4)
    assert each.seconds - fourth.seconds == pytest.approx(each.sync.seconds * 3 / 4)


@pytest.mark.parametrize(("against", "passes"), [("trainer", 2), ("rollout", 1)])
def test_a_stage_says_how_often_it_syncs_and_scores(against, passes):
    """Old logprobs of two minibatches, if the ratio is against them, and the reference's."""
    algorithm = GRPO(correction=Correction(ratio_against=against))
    work = needs_of(dataclasses.replace(RECIPES["tiny"](), minibatches=2, sync_every=4, algorithm=algorithm)).work
    assert work is not None and (work.sync_every, work.scoring_passes) == (4, passes)


def test_servers_alone_are_planned_too():
    servers = ServerSetup(num_servers=2, tensor=32)
    plan = make_plan(V3, None, servers, Workload(samples=64), H100, Assumptions())
    assert plan.phases().keys() == {"rollout"} and plan.gpus == 64
