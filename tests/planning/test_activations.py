"""Estimated activation bytes against what autograd saves in real tiny models, within 15 %."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

from megatron_r1.config import ParallelConfig
from megatron_r1.config.shape import load_shape, shape_from_config
from megatron_r1.planning.activations import (
    Inventory,
    checkpoint_bytes,
    head_bytes,
    layer_bytes,
    logits_chunk_bytes,
    mtp_bytes,
)
from megatron_r1.recipes import RECIPES

TINY_V3 = json.loads((Path(RECIPES["tiny"]().model.path) / "config.json").read_text())
GQA = {"num_key_value_heads": 2, "num_hidden_layers": 2, "architectures": None}
CONFIGS = {
    "deepseek_v3": TINY_V3,
    "more experts": TINY_V3 | {"n_routed_experts": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 0},
    "no query rank": TINY_V3 | {"q_lora_rank": None, "hidden_size": 96},
    "qwen3": TINY_V3 | GQA | {"model_type": "qwen3", "head_dim": 32},
    "qwen2": TINY_V3 | GQA | {"model_type": "qwen2", "intermediate_size": 512},
    "llama": TINY_V3 | GQA | {"model_type": "llama", "hidden_size": 192},
}
CASES = {
    f"{name}, {dtype}, {recompute}": {
        "config": config,
        "dtype": dtype,
        "recompute": recompute,
        "tokens": tokens,
        "chunk_tokens": 64,
    }
    for name, config in CONFIGS.items()
    for dtype, recompute, tokens in (("fp32", "none", 256), ("bf16", "none", 160), ("bf16", "full", 256))
}


def estimate(case: dict, parallel: ParallelConfig = ParallelConfig()) -> float:  # noqa: B008 - frozen
    """Bytes that a rank of a model in one pipeline stage saves for one row that is one sequence."""
    shape, tokens = shape_from_config(case["config"]), case["tokens"]
    size = 4 if case["dtype"] == "fp32" else 2
    inventory = Inventory(dtype_bytes=size, fused=False, math_attention=shape.mla is not None)
    per_token = 8 + head_bytes(shape, parallel, inventory)
    for layer in range(shape.num_layers):
        per_token += (
            checkpoint_bytes(shape, parallel, size)
            if case["recompute"] == "full"
            else layer_bytes(shape, parallel, inventory, sparse=shape.is_moe_layer(layer), segment_tokens=tokens)
        )
    return per_token * tokens


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict]:
    file = tmp_path_factory.mktemp("activations") / "cases.json"
    return dict(zip(CASES, measure(file, {}, list(CASES.values())), strict=True))


def measure(file: Path, parallel: dict, cases: list[dict]) -> list[dict]:
    """Of each case what was saved, the mean of the ranks: which experts are chosen is the data's choice."""
    file.write_text(json.dumps({"parallel": parallel, "cases": cases}))
    ranks = parallel.get("world_size", 1)
    run_ranks("plan_activations.py", str(file), ranks=ranks)
    found = [json.loads(file.with_suffix(f".{rank}.out").read_text()) for rank in range(ranks)]
    return [rows[0] | {"saved": sum(row["saved"] for row in rows) / ranks} for rows in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("parallel", "names"),
    [
        ({"tensor": 2, "sequence": True, "expert": 2}, ["deepseek_v3", "more experts"]),
        ({"tensor": 2, "sequence": True}, ["qwen2", "qwen3", "llama"]),
        ({"expert": 2}, ["deepseek_v3"]),
    ],
    ids=["tp2ep2", "tp2", "ep2"],
)
@pytest.mark.slow  # ranks are started for each
def test_ranks_that_share_a_layer_save_their_part(tmp_path, parallel, names):
    layout = {"world_size": 2, **parallel}
    cases = [CASES[f"{name}, bf16, {recompute}"] for name in names for recompute in ("none", "full")]
    for case, row in zip(cases, measure(tmp_path / "cases.json", layout, cases), strict=True):
        ratio = estimate(case, ParallelConfig(**layout)) / row["saved"]
        print(f"{parallel}, {case['config']['model_type']}, {case['recompute']}: estimated {ratio:.3f} of the saved")
        assert ratio == pytest.approx(1, abs=0.15)


@pytest.mark.slow  # builds and runs each model
@pytest.mark.parametrize("name", CASES)
def test_saved_tensors_are_estimated_within_15_per_cent(measured, name):
    found, saved = estimate(CASES[name]), measured[name]["saved"]
    print(f"{name}: estimated {found / saved:.3f} of the saved")
    assert found == pytest.approx(saved, rel=0.15)


@pytest.mark.slow  # as those before
@pytest.mark.parametrize("name", ["deepseek_v3, fp32, none", "deepseek_v3, bf16, none"])
def test_the_peak_of_a_logits_chunk_is_estimated_within_15_per_cent(measured, name):
    case = CASES[name]
    wide = shape_from_config(case["config"] | {"vocab_size": case["config"]["vocab_size"] * 64})
    size = 4 if case["dtype"] == "fp32" else 2
    expected = logits_chunk_bytes(wide, ParallelConfig(), case["chunk_tokens"], size)
    print(f"{name}: estimated {expected / measured[name]['chunk_peak']:.3f} of the peak")
    assert expected == pytest.approx(measured[name]["chunk_peak"], rel=0.15)


V3 = load_shape(Path(__file__).parent / "deepseek_v3.json")
FUSED = Inventory()


def test_a_671b_layer_by_hand():
    alone = ParallelConfig()
    # bf16, h 7168, 128 heads: norms x and 1/rms; q_lora 1536, kv_lora 512 with theirs; q, k of 192, v, o of 128.
    norms = 2 * (2 * 7168 + 4)
    attention = 2 * 7168 + (2 * 1536 + 4) + (2 * 512 + 4) + 2 * (1536 + 512) + 2 * 128 * (2 * 192 + 2 * 128) + 4 * 128
    dense = 2 * 7168 + 6 * 18432
    found = layer_bytes(V3, alone, FUSED, sparse=False, segment_tokens=4096)
    assert found == norms + attention + dense
    # Router: 5 bytes twice for 256 experts, 20 for each of 8 choices, 4; 8 groups of 2 and 4 kept, 8 bytes each.
    router = 2 * 5 * 256 + 20 * 8 + 4 + 8 * 8 * 2 + 8 * 4
    routed = 8 * (2 * 7168 + 4 + 6 * 2048)
    sparse = 2 * 7168 + 6 * 2048 + router + routed
    assert layer_bytes(V3, alone, FUSED, sparse=True, segment_tokens=4096) == norms + attention + sparse


def test_sequence_parallelism_halves_a_layer_but_for_router_rounding():
    two = ParallelConfig(world_size=2, tensor=2, sequence=True)
    for sparse in (False, True):
        one = layer_bytes(V3, ParallelConfig(), FUSED, sparse=sparse, segment_tokens=4096)
        assert layer_bytes(V3, two, FUSED, sparse=sparse, segment_tokens=4096) == pytest.approx(one / 2, rel=1e-9)


def test_imbalance_multiplies_the_routed_tokens_only():
    one, more = (
        layer_bytes(V3, ParallelConfig(), FUSED, sparse=True, segment_tokens=1, imbalance=x) for x in (1.0, 1.5)
    )
    assert more - one == 0.5 * 8 * (2 * 7168 + 4 + 6 * 2048)


def test_a_checkpointed_layer_is_its_input_and_mtp_adds_a_head():
    assert checkpoint_bytes(V3, ParallelConfig(world_size=4, tensor=4, sequence=True), 2) == 2 * 7168 / 4
    own = 2 * (2 * 7168 + 4) + 4 * 7168
    assert mtp_bytes(V3, ParallelConfig(), FUSED) == own + head_bytes(V3, ParallelConfig(), FUSED)
