"""Planned bytes of a rank against what real Megatron models, buffers and optimizers hold: equal to the byte."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from ranks import run_ranks

from megatron_r1.config import ParallelConfig
from megatron_r1.config.shape import shape_from_config
from megatron_r1.config.trainer_faults import parallel_faults
from megatron_r1.planning.parameters import count_parameters
from megatron_r1.planning.stages import even_layout, pipeline_chunks
from megatron_r1.planning.state import buffer_sizes, rank_state
from megatron_r1.planning.tensors import Parameter, chunk_parameters
from megatron_r1.recipes import RECIPES

pytestmark = pytest.mark.timeout(900)
DEEPSEEK_V3 = json.loads((Path(__file__).parent / "deepseek_v3.json").read_text())


def random_case(rng: random.Random) -> dict:
    """A tiny model and a layout of up to 64 ranks that validation accepts."""
    while True:
        moe = rng.random() < 0.6
        heads = rng.choice([4, 8])
        config = {
            "model_type": "deepseek_v3" if moe else rng.choice(["llama", "qwen2", "qwen3"]),
            "vocab_size": rng.choice([97, 104, 130]),
            "hidden_size": 8 * rng.randint(4, 8),
            "num_hidden_layers": rng.choice([4, 5, 6, 8]),
            "num_attention_heads": heads,
            "num_key_value_heads": heads if moe else rng.choice([2, 4]),
            "intermediate_size": 8 * rng.randint(5, 12),
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64,
            "rope_theta": 1e4,
            "tie_word_embeddings": rng.random() < 0.3 and not moe,
        }
        if moe:
            config |= {
                "q_lora_rank": rng.choice([None, 24]),
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 12,
                "qk_rope_head_dim": 8,
                "v_head_dim": 10,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": rng.choice([20, 28]),
                "n_shared_experts": rng.choice([0, 1, 2]),
                "first_k_dense_replace": rng.choice([0, 1, 3]),
                "n_group": 4,
                "topk_group": 2,
                "num_nextn_predict_layers": rng.choice([0, 1]),
            }
        shape = shape_from_config(config)
        tensor, pipeline, virtual = rng.choice([1, 2]), rng.choice([1, 2, 4]), rng.choice([1, 2])
        context, expert = rng.choice([1, 1, 2]), rng.choice([1, 2, 4]) if moe else 1
        layout = ""
        if shape.num_layers % (pipeline * virtual) or rng.random() < 0.3:
            try:
                layout = even_layout(shape, pipeline * virtual)
            except ValueError:
                continue
        parallel = {
            "world_size": tensor * pipeline * context * rng.choice([1, 2, 3, 4]),
            "tensor": tensor,
            "sequence": tensor > 1,
            "pipeline_parallel": pipeline,
            "virtual_pipeline": virtual,
            "context": context,
            "expert": expert,
            "expert_tensor": rng.choice([1, 2]) if moe and expert > 1 else tensor if moe else 1,
            "pipeline_layout": layout if pipeline > 1 else "",
        }
        if not parallel_faults(ParallelConfig(**parallel), shape):
            break
    world = parallel["world_size"]
    return {
        "config": config,
        "parallel": parallel,
        "dtype": rng.choice(["bf16", "bf16", "fp32"]),
        "distributed": rng.random() < 0.8,
        "train_mtp": rng.random() < 0.5,
        "places": sorted({0, world - 1, rng.randrange(world)}),
    }


def measured(cases: list[dict], folder: Path, *, backend: str, ranks: int = 1) -> list[dict]:
    file = folder / "cases.json"
    file.write_text(json.dumps({"backend": backend, "cases": cases}))
    run_ranks("plan_state.py", str(file), ranks=ranks, timeout_seconds=600)
    return [row for rank in range(ranks) for row in json.loads((folder / f"cases.{rank}.out").read_text())]


def planned(case: dict, row: dict) -> dict:
    state = rank_state(
        shape_from_config(case["config"]),
        ParallelConfig(**case["parallel"]),
        pipeline_rank=row["pipeline_rank"],
        data_rank=row["data_rank"],
        expert_data_rank=row["expert_data_rank"],
        fp32=case["dtype"] == "fp32",
        distributed=case["distributed"],
        train_mtp=case["train_mtp"],
    )
    names = ("parameters", "weights", "gradients", "optimizer")
    return {name: getattr(state, name) for name in names if name in row}


def check(cases: list[dict], rows: list[dict]) -> None:
    for row in rows:
        case = cases[row["case"]]
        expected = {name: row[name] for name in ("parameters", "weights", "gradients", "optimizer")}
        assert planned(case, row) == expected, (case, row)


@pytest.mark.slow
def test_twenty_random_layouts_hold_the_planned_bytes(tmp_path):
    rng = random.Random(20)
    cases = [random_case(rng) for _ in range(20)]
    used = [case["parallel"] for case in cases]
    for name in ("tensor", "pipeline_parallel", "virtual_pipeline", "context", "expert", "expert_tensor"):
        assert any(parallel[name] > 1 for parallel in used), f"no random layout uses {name}"
    assert {case["config"]["model_type"] == "deepseek_v3" for case in cases} == {True, False}
    rows = measured(cases, tmp_path, backend="fake")
    assert {row["case"] for row in rows} == set(range(20))
    check(cases, rows)


@pytest.mark.slow  # eight processes; the layouts above are examined in one
def test_ranks_that_do_communicate_hold_the_same(tmp_path):
    """The fake process group stands for the real one: two gloo ranks measure themselves."""
    config = {
        name: value for name, value in random_case(random.Random(3))["config"].items() if name != "num_hidden_layers"
    } | {"num_hidden_layers": 4}
    deepseek = json.loads((Path(RECIPES["tiny"]().model.path) / "config.json").read_text())
    layouts = [
        {"pipeline_parallel": 2, "virtual_pipeline": 2},
        {"tensor": 2, "sequence": True, "expert_tensor": 2 if config["model_type"] == "deepseek_v3" else 1},
        {},
    ]
    cases = [
        {
            "config": model,
            "parallel": {"world_size": 2, **layout},
            "dtype": "bf16",
            "distributed": True,
            "train_mtp": True,
        }
        for model, layout in [*((config, layout) for layout in layouts), (deepseek, {"expert": 2})]
    ]
    rows = measured(cases, tmp_path, backend="gloo", ranks=2)
    assert len(rows) == 8
    check(cases, rows)


@pytest.mark.slow  # half a minute
def test_671b_ranks_on_the_meta_device_hold_the_planned_parameters(tmp_path):
    recipe = RECIPES["grpo_671b"]().parallel
    fields = (
        "world_size",
        "tensor",
        "pipeline_parallel",
        "virtual_pipeline",
        "context",
        "expert",
        "expert_tensor",
        "sequence",
    )
    parallel = {name: getattr(recipe, name) for name in (*fields, "pipeline_layout")}
    step = recipe.world_size // recipe.pipeline_parallel
    # First stage (embedding, dense layers), a middle one, the last (MTP, its embedding, head).
    places = [0, 7 * step, recipe.world_size - 1]
    cases = [{"config": DEEPSEEK_V3, "parallel": parallel, "dtype": "bf16", "meta": True, "places": places}]
    rows = measured(cases, tmp_path, backend="fake")
    assert [row["pipeline_rank"] for row in rows] == [0, 7, recipe.pipeline_parallel - 1]
    for row in rows:
        assert planned(cases[0] | {"distributed": True, "train_mtp": False}, row)["parameters"] == row["parameters"]
    assert len({row["parameters"] for row in rows}) == 3


def test_all_stages_of_the_recipe_together_are_the_model():
    shape, parallel = shape_from_config(DEEPSEEK_V3), RECIPES["grpo_671b"]().parallel
    whole = ParallelConfig(
        pipeline_parallel=parallel.pipeline_parallel, pipeline_layout=parallel.pipeline_layout, world_size=16
    )
    if parallel.virtual_pipeline > 1:
        pytest.skip("interleaved")
    sizes = {"mtp": 0, "rest": 0}
    for chunks in pipeline_chunks(shape, whole):
        for item in chunk_parameters(shape, whole, chunks[0]):
            sizes["mtp" if item.name.startswith("mtp.") else "rest"] += item.size
    count = count_parameters(shape)
    biases = 256
    assert sizes["mtp"] == count.mtp - biases
    # The last stage has an embedding of its own for MTP; router biases are buffers.
    assert sizes["rest"] == count.total - 58 * biases + 129_280 * 7168


def test_a_buffer_is_padded_and_cut_as_megatron_does():
    # Laid from the last: c at 0..100, b at 128..138, a at 192..202; 202 up to a multiple of lcm(3, 128) = 384.
    items = [Parameter("a", 10), Parameter("b", 10), Parameter("c", 100)]
    assert buffer_sizes(items, 0, 3, distributed=True) == (384, 100)  # numbers 0..128
    assert buffer_sizes(items, 1, 3, distributed=True) == (384, 20)  # 128..256: b and a
    assert buffer_sizes(items, 2, 3, distributed=True) == (384, 0)
    assert buffer_sizes(items, 0, 3, distributed=False) == (120, 120)


def test_a_shared_embedding_has_a_bucket_of_its_own():
    items = [Parameter("embedding", 10, own_bucket=True), Parameter("a", 100)]
    # a: 0..100 in a bucket of 128; the embedding 128..138 in the next, up to 256. Two ranks take half of each.
    assert buffer_sizes(items, 0, 2, distributed=True) == (256, 64 + 10)
    assert buffer_sizes(items, 1, 2, distributed=True) == (256, 36)
